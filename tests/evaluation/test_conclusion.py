"""The verdict of several trainings: its numbers again by a slow, separate loop, and whether it says what is true."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from constructed_maps import Images, make_images
from sklearn.metrics import roc_auc_score

from evaluation.conclusion import DEFAULT_MARGINS, ENDPOINT_NAMES, TrainingResult, conclude, draw, sentence, unit_weights
from evaluation.measures import score_table
from evaluation.protocol import count_splits
from evaluation.tuning import tune


def training(seed: int, knows: float = 0.0, images: int = 12, noise_maps: bool = True) -> tuple[TrainingResult, Images, Images]:
    """A training on images that all trainings share; its saliency variance knows ``knows`` about the errors."""
    generator = torch.Generator().manual_seed(seed)
    splits = make_images(images, seed=3, prefix="v"), make_images(2 * images, seed=4, prefix="t")
    for split in splits:
        for _, maps in split:
            shape = maps["mean_prediction"].shape
            odds = torch.logit(maps["mean_prediction"], eps=1e-6) + 0.5 * torch.randn(shape, generator=generator)
            maps["mean_prediction"] = torch.sigmoid(odds)
            wrong = ((maps["mean_prediction"] > 0.5) != (maps["true_mask"] > 0)).float()
            noise = torch.rand(shape, generator=generator)
            if noise_maps:
                maps["saliency_variance"] = 0.05 * noise**4
            maps["saliency_variance"] = (
                (1 - knows) * maps["saliency_variance"] + knows * wrong * 0.2 * torch.rand(shape, generator=generator)
            )
    tuned = tune(splits[0])
    counted = count_splits(tuned, *splits)
    return TrainingResult(f"seed-{seed}", seed, tuned.fusion, *counted), *splits


@pytest.fixture(scope="module")
def three():
    return [training(seed) for seed in (42, 43, 44)]


@pytest.fixture(scope="module")
def concluded(three):
    return conclude([found for found, _, _ in three], resamples=100)


# ---------------------------------------------------------------- the numbers again


def slow_measures(found: TrainingResult, test: Images, kind: str) -> dict[str, float]:
    """Pixel by pixel in float64, without any of the code that counts."""
    scores, wrongs, means, risks, gap, inside = [], [], [], [], np.zeros(15), 0
    for _, maps in test.items:
        first, second = (
            np.clip(
                (maps[key].double().numpy().ravel() - scale.low) / (scale.high - scale.low), 0, 1
            )
            for key, scale in (("pred_variance", found.fusion.predictive), ("saliency_variance", found.fusion.saliency))
        )
        lam = 1.0 if kind == "predictive_variance" else found.fusion.parameter
        score = lam * first + (1 - lam) * second
        predicted, truth = (maps["mean_prediction"] > 0.5).numpy().ravel(), (maps["true_mask"] > 0).numpy().ravel()
        confidence = 1 - score[truth]
        place = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
        gap += np.bincount(place, predicted[truth] - confidence, 15)
        inside += truth.sum()
        scores.append(score)
        wrongs.append(predicted != truth)
        means.append(score.mean())
        risks.append(1 - 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    score, wrong = np.concatenate(scores), np.concatenate(wrongs)
    order = np.argsort(means)
    return {
        "foreground_ece": np.abs(gap).sum() / inside, "brier": np.mean((1 - score - ~wrong) ** 2),
        "error_auroc": roc_auc_score(wrong, score),
        "image_aurc": np.mean(np.cumsum(np.array(risks)[order]) / np.arange(1, len(risks) + 1)),
    }


def test_every_value_of_the_pooled_report_by_a_slow_loop(three, concluded):
    slow = {
        kind: [slow_measures(found, test, kind) for found, _, test in three] for kind in ("fused", "predictive_variance")
    }
    for row in concluded["endpoints"][:4]:
        name = row["name"]
        expected = [one[name] - other[name] for one, other in zip(slow["fused"], slow["predictive_variance"])]
        assert row["by_training"] == pytest.approx(expected, abs=2e-4 if name == "error_auroc" else 2e-6)
        assert row["value"] == pytest.approx(np.mean(expected), abs=2e-4)
        assert row["seed_sd"] == pytest.approx(np.std(expected, ddof=1), abs=2e-4)
    for kind, values in slow.items():
        for measure, entry in concluded["measures"][kind].items():
            assert entry["by_training"] == pytest.approx([one[measure] for one in values], abs=2e-4)


def test_intervals_come_from_the_trainings_and_the_shared_images(three, concluded):
    drawn = [draw(found, 100, 42) for found, _, _ in three]
    row = concluded["endpoints"][1]
    samples = np.stack([one.samples["fused"]["brier"] - one.samples["predictive_variance"]["brier"] for one in drawn], 1)
    apart = (samples - samples.mean(1, keepdims=True)).var(0, ddof=1).sum() / 2
    assert row["image_se"] ** 2 == pytest.approx(max(samples.mean(1).var(ddof=1) - apart / 3, 0))
    error = np.sqrt(row["seed_sd"] ** 2 / 3 + row["image_se"] ** 2)
    assert row["interval"][1] - row["value"] > 1.96 * error  # Student's, with few trainings
    assert row["interval_90"][0] > row["interval"][0] and row["interval_90"][1] < row["interval"][1]


# ---------------------------------------------------------------- what it says


def test_it_can_be_written_as_json(concluded):
    assert json.loads(json.dumps(concluded, allow_nan=False)) == concluded
    assert [row["name"] for row in concluded["endpoints"]] == list(ENDPOINT_NAMES)
    assert concluded["seeds"] == [42, 43, 44] and concluded["notes"] == []
    assert len(concluded["controls"]) == 16 and len(concluded["lambda"]) == 3
    assert concluded["sentence"] == sentence(concluded["endpoints"], 3, concluded["controls"])


def test_noise_is_never_called_better():
    found = conclude([training(seed)[0] for seed in (1, 2, 3)], resamples=100)
    for row in found["endpoints"]:
        if row["name"].startswith("added"):
            assert row["outcome"] in ("equivalent", "different but negligible", "undecided") and abs(row["value"]) < 0.005
        elif row["name"] == "error_auroc":
            assert row["outcome"] != "better"
    assert not any(
        row["name"] == "fused_minus_placebo_shuffled" and row["measure"] == "error_auroc" and row["interval"][0] > 0
        for row in found["controls"]
    )


def test_saliency_that_informs_is_called_better():
    found = conclude([training(seed, knows=0.9, images=20)[0] for seed in (1, 2, 3)], resamples=100)
    outcomes = {row["name"]: row["outcome"] for row in found["endpoints"]}
    assert outcomes["error_auroc"] == outcomes["added_auroc_whole_image"] == "better"
    assert outcomes["added_auroc_predicted_lesion"] == "better"
    (row,) = [
        row for row in found["controls"]
        if row["name"] == "fused_minus_placebo_shuffled" and row["measure"] == "error_auroc"
    ]
    assert row["interval"][0] > 0  # more than a shuffled map gives
    assert found["added"]["whole_image"]["permutation_null"]["p_value"] < 0.06


def test_lambda_1_in_every_training_is_identical():
    results = []
    for seed in (1, 2):
        found, validation, test = training(seed)
        for split in (validation, test):
            for _, maps in split:
                maps["saliency_variance"] = maps["pred_variance"].clone()
        tuned = tune(validation)
        assert tuned.fusion.parameter == 1.0  # every lambda is as good: the largest
        counted = count_splits(tuned, validation, test)
        results.append(TrainingResult(found.name, seed, tuned.fusion, *counted))
    found = conclude(results, resamples=100)
    assert [row["outcome"] for row in found["endpoints"][:4]] == ["identical"] * 4
    assert "identical" in found["sentence"] and found["endpoints"][0]["value"] == 0


def test_one_training_says_what_it_cannot_know(three):
    found = conclude([three[0][0]], resamples=100)
    assert found["endpoints"][0]["seed_sd"] is None and "between trainings is unknown" in found["notes"][0]
    assert "one training" in found["sentence"]


def test_margins_are_recorded_and_decide(three):
    wide = conclude([found for found, _, _ in three], resamples=100, margins={"error_auroc": 1.0})
    row = wide["endpoints"][ENDPOINT_NAMES.index("error_auroc")]
    assert row["margin"] == 1.0 and row["outcome"] in ("equivalent", "different but negligible")
    assert wide["endpoints"][0]["margin"] == DEFAULT_MARGINS["foreground_ece"]
    with pytest.raises(ValueError, match="no endpoint auroc; there are foreground_ece"):
        conclude([three[0][0]], margins={"auroc": 1.0})


@pytest.mark.parametrize("images", (24, 25))
def test_halves_have_the_variance_of_a_mean(images):
    """Of a mean over n images it is s^2 / n, exactly, where n is even; (n - 1) / n of that where it is odd."""
    values = np.random.default_rng(3).gamma(2.0, 1.0, images)
    weights = unit_weights([f"{i:03d}" for i in range(images)], 40_000, seed=5)[1:]
    np.testing.assert_array_equal(weights.sum(1), images)
    expected = values.var(ddof=1) / images * (1 if images % 2 == 0 else (images - 1) / images)
    assert (weights @ values / images).var() == pytest.approx(expected, rel=0.03)
    without_the_largest = (weights[:, np.argmax(values)] == 0).mean()
    assert without_the_largest == pytest.approx((images // 2) / images, abs=0.01)


def test_recalibrated_values_are_those_of_the_tables(three):
    found = [one for one, _, _ in three]
    rows = conclude(found, resamples=60, permutations=0)["recalibrated"]
    tables = [score_table(one.validation, one.test, 100, 42) for one in found]
    for row, (region, measure) in zip(rows, (("foreground", "ece"), ("whole_image", "brier"), ("whole_image", "log_loss"))):
        key = (region, "isotonic", measure)
        expected = [table.value(key, "fused") - table.value(key, "predictive_variance") for table in tables]
        np.testing.assert_allclose(row["by_training"], expected, atol=1e-12)
        assert row["interval"][0] < row["value"] < row["interval"][1]


def test_groups_are_drawn_whole(three):
    found = three[0][0]
    pairs = {id: f"patient {int(id[-4:]) // 2}" for id in (*found.validation.ids, *found.test.ids)}
    weights = unit_weights([pairs[id] for id in found.test.ids], 50, 7)
    np.testing.assert_array_equal(weights[:, 0::2], weights[:, 1::2])
    assert (weights[1:].sum(1) == len(found.test.ids)).all() and set(np.unique(weights[1:])) == {0.0, 2.0}
    alone, grouped = (conclude([found], resamples=60, permutations=0, groups=groups) for groups in (None, pairs))
    for one, other in zip(alone["endpoints"], grouped["endpoints"]):
        if not one["name"].startswith("added"):  # whose folds are other ones
            assert one["value"] == other["value"]
        assert one["image_se"] != other["image_se"]


def test_trainings_have_to_share_their_images(three):
    other, _, _ = training(45, images=11)
    with pytest.raises(ValueError, match="the trainings have other validation images"):
        conclude([three[0][0], other])
    with pytest.raises(ValueError, match="no training"):
        conclude([])


def test_an_improvement_that_a_placebo_has_as_well_is_said_to_be_none_of_saliency(three):
    rows = conclude([found for found, _, _ in three], resamples=60, permutations=0)
    first = {**rows["endpoints"][0], "outcome": "better", "value": -0.25, "interval": [-0.5, -0.125]}
    endpoints = [first, *rows["endpoints"][1:]]

    def said(*placebos):
        return sentence(endpoints, 3, [
            {"name": f"fused_minus_{name}", "measure": measure, "interval": [-1.0, high]}
            for name, high in placebos for measure in ("foreground_ece", "brier")
        ])

    words = said(("placebo_shuffled", 0.25), ("placebo_constant", -0.125), ("placebo_other_image", 0.0), ("tuned_scale", 1.0))
    assert "A placebo does as well (shuffled pixels, another image's map in place of saliency), so that" in words
    assert "placebo" not in said(("placebo_shuffled", -0.25), ("tuned_scale", 1.0))
    assert "placebo" not in sentence([{**first, "outcome": "worse"}, *rows["endpoints"][1:]], 3, [
        {"name": "fused_minus_placebo_shuffled", "measure": "foreground_ece", "interval": [-1.0, 1.0]}])
