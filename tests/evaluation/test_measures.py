from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import constructed_images, make_images
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from slow_errors import slow_error
from slow_regions import slow_outcome, slow_regions

from evaluation.calibration import brier_parts
from evaluation.measures import ScoreTable, calibration_measures, layer_of, layers, recalibrated_measures
from evaluation.names import REGIONS
from evaluation.protocol import evaluate
from evaluation.resampling import bootstrap_weights
from evaluation.scores import uncertainty_scores

MEASURES = (
    "brier", "brier_reliability", "brier_resolution", "brier_remainder", "log_loss", "ece", "ece_debiased", "signed_gap", "mce",
    "ace", "auroc", "auprc", "aurc", "excess_aurc",
)


def test_every_region_and_score_from_its_pixels():
    splits = make_images(8, seed=1), make_images(12, seed=2)
    found = evaluate(*splits, resamples=100)
    outcome = np.concatenate([slow_outcome(maps) for _, maps in splits[1]])
    regions = [slow_regions(maps)[0] for _, maps in splits[1]]
    scores = [uncertainty_scores(maps, found.fusion) for _, maps in splits[1]]
    wrong_everywhere = np.isin(outcome % 4, (1, 2))
    for region, members in REGIONS.items():
        inside = np.isin(outcome, members)
        assert np.array_equal(inside, np.concatenate([masks[region] for masks in regions])) and inside.any()
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


def test_an_empty_region_has_no_measure():
    summed = {name: np.zeros((1, 4, 15)) for name in ("count", "confidence")}
    summed.update({name: np.zeros((1, 4)) for name in ("squared_error", "log_loss")})
    assert all(np.isnan(value).all() for value in calibration_measures(summed, "foreground").values())
    found = recalibrated_measures(np.zeros((1, 2)), np.zeros((1, 2)), np.array([[0.5, 0.25]]), 15)
    assert all(np.isnan(value).all() for value in found.values())


def test_recalibrated_measures_by_hand():
    # Quantile bins of confidence 3/4 (three of four right) and 1/2 (one of four right).
    found = recalibrated_measures(np.array([[3, 1]]), np.array([[1, 3]]), np.array([[0.75, 0.5]]), 15)
    assert found["ece"] == (0 + 4 * abs(0.25 - 0.5)) / 8 == found["signed_gap"]
    assert found["brier"] == pytest.approx((3 * 0.25**2 + 0.75**2 + 4 * 0.5**2) / 8)
    assert found["log_loss"] == pytest.approx(-(3 * np.log(0.75) + np.log(0.25) + 4 * np.log(0.5)) / 8)


def test_the_log_loss_keeps_its_distance_from_certainty():
    # Isotonic regression says 1 and 0; one pixel of five is against the first.
    correct, wrong, confidence = np.array([[4, 0]]), np.array([[1, 5]]), np.array([[1.0, 0.0]])
    found = recalibrated_measures(correct, wrong, confidence, 15, smallest=1 / 50)
    assert found["log_loss"] == pytest.approx(-(9 * np.log(0.98) + np.log(0.02)) / 10)
    assert found["brier"] == pytest.approx(1 / 10) and found["ece"] == pytest.approx(1 / 10)  # these take 1 and 0 as they are
    plain = recalibrated_measures(correct, wrong, confidence, 15)
    assert plain["log_loss"] > found["log_loss"] + 1


def test_isotonic_log_loss_is_bounded_by_the_number_of_validation_images_and_platt_is_not_touched():
    validation, test = constructed_images(5, "noise", seed=1), constructed_images(6, "noise", seed=2)
    for _, maps in [*validation, *test]:
        maps["mean_prediction"] = torch.where(maps["true_mask"] > 0, 0.875, 0.125)  # no error at all
    wrong_once = test.items[0][1]["mean_prediction"]
    wrong_once[0, 31] = 0.125
    entry = evaluate(validation, test, resamples=50).metrics["test"]["regions"]["whole_image"]["scores"]["fused"]["recalibrated"]
    pixels = 6 * 32 * 32
    expected = (-(pixels - 1) * np.log(0.9) - np.log(0.1)) / pixels  # 1 / (2 * 5) and 1 minus that
    assert entry["isotonic"]["log_loss"]["value"] == pytest.approx(expected)
    assert entry["platt"]["log_loss"]["value"] == pytest.approx(24 * np.log(2) / pixels, rel=1e-2)
    assert entry["isotonic"]["brier"]["value"] == pytest.approx(1 / pixels)


def test_proper_scores_come_first_and_two_measures_have_no_interval():
    regions = evaluate(make_images(4, seed=1), make_images(5, seed=2), resamples=50).metrics["test"]["regions"]
    for region, entry in regions.items():
        assert entry["exploratory"] is True and entry["conditions_on_truth"] == (region in ("foreground", "union"))
        for name, score in entry["scores"].items():
            assert list(score)[:6] == ["brier", "brier_reliability", "brier_resolution", "brier_remainder", "log_loss", "ece"]
            assert all(list(found)[:3] == ["brier", "log_loss", "ece"] for found in score["recalibrated"].values())
            entries = [score] + ([score["minus_predictive_variance"]] if name != "predictive_variance" else [])
            for measured in entries:
                without = [key for key in MEASURES if measured[key]["interval"] is None]
                assert without == ["ece_debiased", "mce"] and measured["mce"]["value"] is not None
            whole = score["brier"]["value"]
            parts = [score[f"brier_{part}"]["value"] for part in ("reliability", "resolution", "remainder")]
            accuracy = entry["accuracy"]
            assert whole == pytest.approx(parts[0] - parts[1] + accuracy * (1 - accuracy) + parts[2], abs=1e-12)


def test_brier_reliability_and_resolution_have_paired_intervals():
    found = evaluate(make_images(4, seed=1), make_images(9, seed=2), resamples=200)
    images = found.test.images
    place = found.test.scores.index("fused")
    samples = []
    for weights in bootstrap_weights(9, 200, 42):
        for weight in weights:
            count, confidence = ((images[key][:, place] * weight[:, None, None]).sum(0) for key in ("count", "confidence"))
            bins = [part[[4, 5, 6, 7]].sum(0) for part in (count, confidence)]
            samples.append(brier_parts(bins[0], count[[4, 7]].sum(0), bins[1])[:2])
    entry = found.metrics["test"]["regions"]["boundary_band"]["scores"]["fused"]
    for index, name in enumerate(("brier_reliability", "brier_resolution")):
        assert entry[name]["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975], axis=0)[:, index])


def test_layers_hold_every_pixel_and_those_of_the_band():
    counters = evaluate(make_images(3, seed=1), make_images(4, seed=2), resamples=20).test
    found = layers({"count": counters.images["count"]})
    whole, band = layer_of(found, "whole_image")["count"], layer_of(found, "boundary_band")["count"]
    assert np.array_equal(whole, counters.images["count"].reshape(4, len(counters.scores), 2, 4, 15).sum(2))
    inside = counters.images["count"][:, :, 4:]
    assert np.array_equal(band, np.stack([inside[:, :, 1:3].sum(2), inside[:, :, [0, 3]].sum(2)], 2))
    assert 0 < band.sum() < whole.sum()


def test_only_errors_are_judged():
    point, samples = np.array([0.5, 0.25]), np.array([[0.5, 0.25], [0.75, 0.5]])
    keys = [("foreground", "raw", measure) for measure in ("ece", "brier", "log_loss", "auroc", "signed_gap")]
    table = ScoreTable(("a", "b"), dict.fromkeys(keys, point), dict.fromkeys(keys, samples))
    assert [table.difference(key, "b", "a").get("verdict") for key in keys] == ["improves"] * 3 + [None] * 2
    assert table.value(keys[0], "b") == 0.25 and table.estimate(keys[0], "b")["value"] == 0.25
