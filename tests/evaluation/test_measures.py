from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import constructed_images, make_images
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from slow_errors import slow_error

from evaluation.measures import ScoreTable, calibration_measures, recalibrated_measures
from evaluation.names import REGIONS
from evaluation.protocol import evaluate
from evaluation.scores import uncertainty_scores

MEASURES = ("ece", "signed_gap", "mce", "ace", "brier", "log_loss", "auroc", "auprc", "aurc", "excess_aurc")


def test_every_region_and_score_from_its_pixels():
    splits = make_images(8, seed=1), make_images(12, seed=2)
    found = evaluate(*splits, resamples=100)
    outcome = np.concatenate(
        [(2 * maps["true_mask"].numpy() + (maps["mean_prediction"].numpy() > 0.5)).ravel() for _, maps in splits[1]]
    )
    scores = [uncertainty_scores(maps, found.fusion) for _, maps in splits[1]]
    wrong_everywhere = (outcome == 1) | (outcome == 2)
    for region, members in REGIONS.items():
        inside = np.isin(outcome, members)
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


def test_only_errors_are_judged():
    point, samples = np.array([0.5, 0.25]), np.array([[0.5, 0.25], [0.75, 0.5]])
    keys = [("foreground", "raw", measure) for measure in ("ece", "brier", "log_loss", "auroc", "signed_gap")]
    table = ScoreTable(("a", "b"), dict.fromkeys(keys, point), dict.fromkeys(keys, samples))
    assert [table.difference(key, "b", "a").get("verdict") for key in keys] == ["improves"] * 3 + [None] * 2
    assert table.value(keys[0], "b") == 0.25 and table.estimate(keys[0], "b")["value"] == 0.25
