from __future__ import annotations

import json

import numpy as np
import pytest
from constructed_maps import make_images
from slow_errors import slow_error

from evaluation.counting import count_scores
from evaluation.measures import ScoreTable
from evaluation.protocol import evaluate
from evaluation.scores import uncertainty_scores
from evaluation.summary import per_image, verdict_sentence
from evaluation.tuning import tune


@pytest.fixture(scope="module")
def splits():
    return make_images(8, seed=1, prefix="validation"), make_images(12, seed=2, prefix="test")


@pytest.fixture(scope="module")
def found(splits):
    return evaluate(*splits, resamples=300)


def emptied(images):
    for _, maps in images:
        maps["true_mask"].zero_()
    return images


# ---------------------------------------------------------------- per image


def test_rows(splits, found):
    assert [row["id"] for row in found.rows] == [identifier for identifier, _ in splits[1]]
    for row, (_, maps) in zip(found.rows, splits[1]):
        truth, label = maps["true_mask"].numpy() == 1, maps["mean_prediction"].numpy() > 0.5
        both, either = (truth & label).sum(), (truth | label).sum()
        assert row["dice"] == pytest.approx(2 * both / (truth.sum() + label.sum()))
        assert row["jaccard"] == pytest.approx(both / either)
        assert row["thresholded_jaccard"] == (row["jaccard"] if row["jaccard"] >= 0.65 else 0)
        scores = uncertainty_scores(maps, found.fusion)
        for name in ("predictive_variance", "saliency_variance", "fused"):
            confidence = (1 - scores[name].numpy()[truth]).astype(float)
            assert row[f"foreground_ece_{name}"] == pytest.approx(slow_error(confidence, label[truth]), abs=1e-12)
            assert row[f"mean_{name}"] == pytest.approx(float(scores[name].mean()), abs=1e-6)
    assert "empty_cams" not in found.rows[0]
    assert found.metrics["test"]["dice"] == pytest.approx(np.mean([row["dice"] for row in found.rows]))


def test_rows_of_an_empty_image_and_empty_cams():
    images = emptied(make_images(2))
    images.items[0][1]["mean_prediction"].zero_()
    for index, (_, maps) in enumerate(images):
        maps["empty_cams"] = 3 * index
    fused = tune(make_images(2, seed=9)).fusion
    counters = count_scores(images, fused)
    rows = per_image(counters)
    assert rows[0]["dice"] == rows[0]["jaccard"] == rows[0]["thresholded_jaccard"] == 1
    assert rows[1]["dice"] == rows[1]["jaccard"] == 0
    assert rows[0]["foreground_ece_fused"] is None
    assert [row["empty_cams"] for row in rows] == [0, 3]


# ---------------------------------------------------------------- all numbers


def test_the_image_that_sets_the_range_is_named(splits, found):
    for key in ("pred_variance", "saliency_variance"):
        largest = sorted(((float(maps[key].max()), identifier) for identifier, maps in splits[0]), reverse=True)
        entry = found.metrics["validation"]["range_set_by"][key]
        assert (entry["largest"], entry["image"], entry["largest_elsewhere"]) == (*largest[0], largest[1][0])
        assert entry["largest"] == found.metrics["normalisation"][key][1]


def test_intervals_hold_their_estimates(found):
    table = found.metrics["test"]["regions"]["whole_image"]["scores"]
    for name in found.test.scores:
        for measure in ("signed_gap", "brier", "log_loss", "auroc", "aurc"):
            low, high = table[name][measure]["interval"]
            assert low < table[name][measure]["value"] < high


def test_the_interval_of_the_headline_is_that_of_a_loop_over_resamples(splits, found):
    images = found.test.images
    index = found.test.scores.index("fused")
    rng = np.random.default_rng(42)
    errors = []
    for _ in range(300):
        drawn = rng.integers(0, 12, 12)
        count = images["count"][drawn][:, index].sum(0)
        count = count[2:4] + count[6:8]
        confidence = images["confidence"][drawn][:, index][:, [2, 3, 6, 7]].sum((0, 1))
        errors.append(np.abs(count[1] - confidence).sum() / count.sum())
    expected = np.quantile(errors, [0.025, 0.975])
    assert found.metrics["test"]["foreground_ece_interval"]["fused"] == pytest.approx(expected, abs=1e-12)


def test_metrics_are_strict_json(found):
    text = json.dumps(found.metrics, allow_nan=False)
    assert json.loads(text) == found.metrics


# ---------------------------------------------------------------- the verdict


def sentence(values, samples, lam=0.5):
    key = ("foreground", "raw", "ece")
    table = ScoreTable(("predictive_variance", "fused"), {key: np.array(values)}, {key: np.array(samples)})
    return verdict_sentence(lam, table, sample="7 test images")


def test_the_verdict_says_the_numbers_it_rests_on():
    assert sentence([0.25, 0.125], [[0.25, 0.125]]) == (
        "Fusing at lambda = 0.5 improves the foreground calibration error from 0.2500 to 0.1250, a difference of -0.1250 "
        "(95 % interval -0.1250 to -0.1250, paired over 7 test images)."
    )
    assert sentence([0.25, 0.375], [[0.25, 0.375]]).startswith("Fusing at lambda = 0.5 degrades the")
    undecided = sentence([0.25, 0.125], [[0.25, 0.125], [0.25, 0.5]])
    assert undecided.startswith("No difference shown: fusing at lambda = 0.5 changes the")
    assert sentence([0.25, 0.25], [[0.25, 0.25]], 1.0) == (
        "No difference shown: the tuned lambda is 1, so that the fused score is predictive variance alone; its foreground "
        "calibration error is 0.2500 (95 % interval 0.2500 to 0.2500, 7 test images)."
    )
    assert "no foreground pixel" in sentence([np.nan, np.nan], [[np.nan, np.nan]])
