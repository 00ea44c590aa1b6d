import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from constructed_maps import Images, constructed_images, make_images
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from calibration import REGIONS
from counters import Counters, count_scores, merge, uncertainty_scores
from evaluation import _rank_statistics, cell_edges, evaluate, overlap, per_image, summary, tune
from fusion import lambda_grid

MEASURES = ("ece", "signed_gap", "mce", "ace", "brier", "log_loss", "auroc", "auprc", "aurc", "excess_aurc")


def slow_error(confidence, correct, bins=15):
    """ECE by a loop over bins, in float64."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > (b / bins if b else -1)) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def slow_foreground_error(images, weights, constants):
    """Foreground ECE of a convex fusion straight from the maps, by the formulas, in NumPy."""
    confidence, correct = [], []
    for _, maps in images:
        inside = maps["true_mask"].numpy() == 1
        score = 0.0
        for name, weight in weights.items():
            low, high = constants[name]
            normalised = (maps[name].numpy()[inside] - np.float32(low)) / (np.float32(high) - np.float32(low))
            score = score + weight * np.clip(normalised, 0, 1)
        confidence.append(1.0 - score)
        correct.append(maps["mean_prediction"].numpy()[inside] > 0.5)
    return slow_error(np.concatenate(confidence), np.concatenate(correct))


@pytest.fixture(scope="module")
def splits():
    return make_images(8, seed=1, prefix="validation"), make_images(12, seed=2, prefix="test")


@pytest.fixture(scope="module")
def found(splits):
    return evaluate(*splits, resamples=300)


def test_protocol_from_the_formulas(splits, found):
    validation, test = splits
    metrics = found.metrics
    constants = {}
    for name in ("pred_variance", "saliency_variance"):
        everything = np.concatenate([maps[name].numpy().ravel() for _, maps in validation])
        constants[name] = [float(everything.min()), float(everything.max())]
    assert metrics["normalisation"] == constants
    curve = [
        slow_foreground_error(validation, {"pred_variance": k / 10, "saliency_variance": 1 - k / 10}, constants)
        for k in range(11)
    ]
    assert metrics["validation"]["foreground_ece_by_lambda"] == pytest.approx(curve, abs=1e-6)
    lam = int(np.argmin(curve)) / 10
    assert metrics["lambda"] == lam == found.fusion.parameter
    errors = metrics["test"]["foreground_ece"]
    assert errors["predictive_variance"] == pytest.approx(slow_foreground_error(test, {"pred_variance": 1}, constants), abs=1e-6)
    assert errors["saliency_variance"] == pytest.approx(
        slow_foreground_error(test, {"saliency_variance": 1}, constants), abs=1e-6
    )
    weights = {"pred_variance": lam, "saliency_variance": 1 - lam}
    assert errors["fused"] == pytest.approx(slow_foreground_error(test, weights, constants), abs=1e-6)
    assert metrics["schema_version"] == 1
    assert metrics["validation"]["images"] == 8 and metrics["test"]["images"] == 12
    assert metrics["test"]["foreground_ece_by_lambda"][10] == errors["predictive_variance"]
    assert metrics["test"]["foreground_ece_by_lambda"][0] == errors["saliency_variance"]


def test_every_region_and_score_from_its_pixels(splits, found):
    atom = np.concatenate(
        [(2 * maps["true_mask"].numpy() + (maps["mean_prediction"].numpy() > 0.5)).ravel() for _, maps in splits[1]]
    )
    scores = [uncertainty_scores(maps, found.fusion) for _, maps in splits[1]]
    wrong_everywhere = (atom == 1) | (atom == 2)
    for region, members in REGIONS.items():
        inside = np.isin(atom, members)
        wrong = wrong_everywhere[inside]
        entry = found.metrics["test"]["regions"][region]
        assert entry["pixels"] == inside.sum() and entry["wrong_pixels"] == wrong.sum()
        for name in found.test.scores:
            score = np.concatenate([image[name].numpy().ravel() for image in scores])[inside]
            confidence = (np.float32(1) - score).astype(float)
            measured = {key: value["value"] for key, value in entry["scores"][name].items() if key in MEASURES}
            assert measured["ece"] == pytest.approx(slow_error(confidence, ~wrong), abs=1e-12)
            assert measured["signed_gap"] == pytest.approx(confidence.mean() - (~wrong).mean(), abs=1e-12)
            assert measured["brier"] == pytest.approx(np.mean((confidence - ~wrong) ** 2), abs=1e-7)
            assert measured["auroc"] == pytest.approx(roc_auc_score(wrong, score), abs=1e-4)
            assert measured["auprc"] == pytest.approx(average_precision_score(wrong, score), abs=5e-3)  # few pixels
            difference = entry["scores"][name].get("minus_predictive_variance")
            if difference:
                reference = entry["scores"]["predictive_variance"]["ece"]["value"]
                assert difference["ece"]["value"] == pytest.approx(measured["ece"] - reference, abs=1e-12)


def test_the_predicted_label_of_one_half_is_background():
    validation, test = make_images(4, seed=1), make_images(4, seed=2)
    for _, maps in test:
        maps["mean_prediction"][:] = 0.5  # exactly the threshold, above which a pixel is lesion
    found = evaluate(validation, test, resamples=100)
    lesion = sum(int(maps["true_mask"].sum()) for _, maps in test)
    regions = found.metrics["test"]["regions"]
    assert regions["foreground"]["wrong_pixels"] == regions["foreground"]["pixels"] == lesion
    assert regions["predicted_foreground"]["pixels"] == 0 and found.metrics["test"]["dice"] == 0


def test_recalibration_is_that_of_scikit_learn_fitted_on_validation():
    # errors follow both variances on validation and one of them on test: what is fitted on one is wrong for the other
    parts = constructed_images(20, "informative", seed=1), constructed_images(20, "noise", seed=2)
    found = evaluate(*parts, resamples=100)
    values, right = [], []
    for part in parts:
        inside = [maps["true_mask"].numpy() == 1 for _, maps in part]
        values.append(np.concatenate([maps["pred_variance"].numpy()[here] for (_, maps), here in zip(part, inside)]))
        right.append(np.concatenate([maps["mean_prediction"].numpy()[here] > 0.5 for (_, maps), here in zip(part, inside)]))
    entry = found.metrics["test"]["regions"]["foreground"]["scores"]["predictive_variance"]["recalibrated"]
    errors = []
    for fitted_on in (0, 1):
        isotonic = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(values[fitted_on], right[fitted_on])
        errors.append(slow_error(isotonic.predict(values[1]), right[1]))
    assert entry["isotonic"]["ece"]["value"] == pytest.approx(errors[0], abs=0.01) and errors[0] > errors[1] + 0.1
    assert entry["platt"]["ece"]["value"] == pytest.approx(errors[0], abs=0.03)


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
        count = images["count"][drawn][:, index, 2:].sum(0)
        confidence = images["confidence"][drawn][:, index, 2:].sum((0, 1))
        errors.append(np.abs(count[1] - confidence).sum() / count.sum())
    expected = np.quantile(errors, [0.025, 0.975])
    assert found.metrics["test"]["foreground_ece_interval"]["fused"] == pytest.approx(expected, abs=1e-12)


def test_everything_follows_from_saved_and_merged_counters(splits, found, tmp_path):
    validation, test = splits
    fused = tune(validation)
    assert fused == found.fusion
    grid = lambda_grid()
    counted = count_scores(validation, fused, grid)
    edges = cell_edges(counted)
    shards = [count_scores(Images(test.items[start::2]), fused, grid, edges=edges) for start in (1, 0)]
    for name, counters in (("validation", counted), ("test", merge(shards))):
        np.savez_compressed(tmp_path / f"{name}.npz", **counters.to_arrays())
    loaded = []
    for name in ("validation", "test"):
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as arrays:
            loaded.append(Counters.from_arrays(arrays))
    assert summary(*loaded, fused, resamples=300) == found.metrics
    assert per_image(loaded[1]) == found.rows


def test_the_order_of_the_images_does_not_matter(splits, found):
    validation, test = (Images(reversed(split.items)) for split in splits)
    assert evaluate(validation, test, resamples=300).metrics == found.metrics


def test_metrics_are_strict_json(found):
    text = json.dumps(found.metrics, allow_nan=False)
    assert json.loads(text) == found.metrics


# The verdict


def test_verdict_when_saliency_is_informative():
    found = evaluate(constructed_images(15, "informative", seed=1), constructed_images(30, "informative", seed=2), resamples=1000)
    assert found.metrics["lambda"] == 0.5
    assert found.metrics["test"]["foreground_ece"]["predictive_variance"] == pytest.approx(1 / 8, abs=0.01)
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference["verdict"] == "improves" and difference["interval"][1] < 0
    assert found.metrics["verdict"].startswith("Fusing at lambda = 0.5 improves")
    assert f"{difference['value']:+.4f}" in found.metrics["verdict"]
    # Recalibration does not help predictive variance to what it does not know: the log loss tells.
    recalibrated = found.metrics["test"]["regions"]["foreground"]["scores"]["fused"]["recalibrated"]["isotonic"]
    assert recalibrated["minus_predictive_variance"]["log_loss"]["verdict"] == "improves"


def test_verdict_when_saliency_is_noise():
    found = evaluate(constructed_images(15, "noise", seed=1), constructed_images(30, "noise", seed=2), resamples=1000)
    assert found.metrics["lambda"] >= 0.9
    assert found.metrics["verdict"].startswith(("No difference shown", "Fusing at lambda = 0.9 degrades"))


def test_verdict_when_validation_misleads():
    found = evaluate(constructed_images(15, "informative", seed=1), constructed_images(30, "noise", seed=2), resamples=1000)
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference["verdict"] == "degrades" and difference["interval"][0] > 0
    assert found.metrics["verdict"].startswith("Fusing at lambda = 0.5 degrades")


def test_verdict_when_both_variances_are_equal():
    found = evaluate(constructed_images(8, "equal", seed=1), constructed_images(8, "equal", seed=2), resamples=200)
    assert found.metrics["lambda"] == 1.0  # every lambda ties, exactly
    assert len(set(found.metrics["validation"]["foreground_ece_by_lambda"])) == 1
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference == {"value": 0.0, "interval": [0.0, 0.0], "verdict": "no difference shown"}
    assert found.metrics["verdict"].startswith("No difference shown: the tuned lambda is 1")
    assert found.metrics["validation"]["lambda_selection"]["share"][10] == 1


# Edges of the data


def emptied(images):
    for _, maps in images:
        maps["true_mask"].zero_()
    return images


def test_no_foreground_on_test_is_said_and_is_null(splits):
    found = evaluate(splits[0], emptied(make_images(3, seed=5)), resamples=50)
    assert found.metrics["test"]["foreground_ece"] == dict.fromkeys(("predictive_variance", "saliency_variance", "fused"))
    assert "no foreground pixel" in found.metrics["verdict"]
    assert found.metrics["test"]["images_without_foreground"] == 3
    assert found.metrics["test"]["regions"]["whole_image"]["scores"]["fused"]["ece"]["value"] is not None


def test_no_foreground_on_validation_is_an_error(splits):
    with pytest.raises(ValueError, match="validation masks hold no foreground pixel"):
        evaluate(emptied(make_images(3)), splits[1], resamples=50)


def test_one_image_and_no_error(splits):
    images = make_images(1)
    images.items[0][1]["true_mask"] = (images.items[0][1]["mean_prediction"] > 0.5).to(torch.uint8)
    found = evaluate(images, images, resamples=50)
    assert found.metrics["test"]["dice"] == 1
    score = found.metrics["test"]["regions"]["foreground"]["scores"]["predictive_variance"]
    assert score["auroc"]["value"] is None and score["aurc"]["value"] == 0
    low, high = score["ece"]["interval"]
    assert low == high == score["ece"]["value"]


def test_constant_saliency_is_no_uncertainty(splits):
    images = make_images(3)
    for _, maps in images:
        maps["saliency_variance"].fill_(0.01)
    found = evaluate(images, images, resamples=50)
    gap = found.metrics["test"]["regions"]["foreground"]["scores"]["saliency_variance"]["signed_gap"]["value"]
    assert gap == pytest.approx(1 - found.metrics["test"]["regions"]["foreground"]["accuracy"])


# Rows and the ranking of images


def test_overlap():
    pixels = np.array([[5, 1, 2, 3], [9, 0, 0, 0], [8, 1, 0, 0], [0, 0, 0, 9]])
    dice, jaccard = overlap(pixels)
    assert dice.tolist() == [2 * 3 / (2 * 3 + 1 + 2), 1, 0, 1]
    assert jaccard.tolist() == [3 / 6, 1, 0, 1]


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
    fused = tune(make_images(2, seed=9))
    counters = count_scores(images, fused, lambda_grid())
    rows = per_image(counters)
    assert rows[0]["dice"] == rows[0]["jaccard"] == rows[0]["thresholded_jaccard"] == 1
    assert rows[1]["dice"] == rows[1]["jaccard"] == 0
    assert rows[0]["foreground_ece_fused"] is None
    assert [row["empty_cams"] for row in rows] == [0, 3]


def test_rank_statistics_of_weighted_images_are_those_of_repeated_ones():
    rng = np.random.default_rng(0)
    uncertainty, dice = np.round(rng.random(40), 1), np.round(rng.random(40), 2)  # with ties
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    for weight, (correlation, area) in zip(weights, _rank_statistics(uncertainty, dice, weights)):
        images = np.repeat(np.arange(40), weight.astype(int))
        assert correlation == pytest.approx(spearmanr(uncertainty[images], dice[images])[0])
        assert area == pytest.approx(roc_auc_score(dice[images] < 0.8, uncertainty[images]))


def test_ranking_of_images_uses_the_rows(found):
    ranking = found.metrics["test"]["ranking_of_images"]
    dice = [row["dice"] for row in found.rows]
    mean = [row["mean_fused"] for row in found.rows]
    expected = spearmanr(mean, dice)[0]
    assert ranking["whole_image"]["fused"]["spearman_with_dice"]["value"] == pytest.approx(expected)
    assert ranking["bad_images"] == sum(value < 0.8 for value in dice)


class _Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer4 = torch.nn.Conv2d(3, 4, 3, padding=1)


class _OtherModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = _Backbone()
        self.drop, self.last = torch.nn.Dropout2d(0.4), torch.nn.Conv2d(4, 1, 1)

    def forward(self, images):
        return self.last(self.drop(self.backbone.layer4(images).relu()))


def test_the_readme_says_how_another_model_gets_a_verdict():
    from uncertainty import uncertainty_maps

    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "from evaluation import" in block]
    torch.manual_seed(0)

    def loader(prefix, count):
        return [([f"{prefix}{index}a", f"{prefix}{index}b"], torch.randn(2, 3, 16, 16),
                 (torch.rand(2, 16, 16) > 0.4).to(torch.uint8)) for index in range(count)]

    names = {"model": _OtherModel(), "uncertainty_maps": uncertainty_maps, "validation": loader("v", 3), "test": loader("t", 4)}
    exec(code, names)
    metrics = names["result"].metrics
    assert metrics["test"]["images"] == 8 and "foreground calibration error" in metrics["verdict"]
    assert metrics["test"]["empty_cams"] is not None
