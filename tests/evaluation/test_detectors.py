"""Other detectors on the harness: the temperature against an optimiser on raw pixels, their numbers against their formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from constructed_maps import Images, make_images
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from evaluation.counting import count_scores
from evaluation.detectors import (
    COLDEST,
    FLIPS,
    HOTTEST,
    TEMPERED,
    UNTEMPERED,
    count_detectors,
    detector_numbers,
    fit_temperature,
    flip_scale,
    temperature_of,
    tempered,
)
from evaluation.names import CONFIDENCE_STEP, REFERENCE, REGIONS
from evaluation.ranking import HISTOGRAM_BINS, histogram_bin, quantile_edges
from evaluation.tuning import tune

RESAMPLES = 100


def with_flips(images: Images, seed: int = 0) -> Images:
    """The same images with a variance over flips that is the predictive variance with noise."""
    generator = torch.Generator().manual_seed(seed)
    for _, maps in images:
        maps[FLIPS] = maps["pred_variance"] * torch.rand(maps["pred_variance"].shape, generator=generator)
    return images


def overconfident(count: int, power: float, seed: int) -> Images:
    """Images whose pixels are lesion with probability q, of which the maps say the odds to a power."""
    rng = np.random.default_rng(seed)
    items = []
    for index in range(count):
        q = rng.uniform(0.02, 0.98, (32, 32))
        p = expit(power * logit(q)).astype(np.float32)
        maps = {
            "mean_prediction": torch.from_numpy(p), "pred_variance": torch.from_numpy((p * (1 - p)).astype(np.float32)),
            "saliency_variance": torch.from_numpy(rng.random((32, 32), dtype=np.float32)),
            "true_mask": torch.from_numpy((rng.random((32, 32)) < q).astype(np.uint8)),
        }
        items.append((f"image_{index}", maps))
    return Images(items)


def pixels(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and true labels of all pixels, float64."""
    p = np.concatenate([maps["mean_prediction"].double().numpy().ravel() for _, maps in images])
    return p, np.concatenate([maps["true_mask"].numpy().ravel() for _, maps in images])


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("power", [0.4, 1.0, 2.5])
def test_the_temperature_is_that_of_an_optimiser_on_raw_pixels(power):
    """The negative log-likelihood of the true label under ``sigmoid(logit(p) / t)``, minimised by SciPy in float64."""
    images = overconfident(4, power, seed=3)
    p, truth = pixels(images)
    sign = np.where(truth == 1, 1.0, -1.0)
    z = logit(np.clip(p, CONFIDENCE_STEP, 1 - CONFIDENCE_STEP))
    expected = minimize_scalar(
        lambda log: np.logaddexp(0, -sign * z / np.exp(log)).mean(), bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}
    )
    found = temperature_of(count_scores(images, tune(images).fusion))
    assert found == pytest.approx(np.exp(expected.x), rel=1e-3)
    assert found == pytest.approx(power, rel=0.15)  # what was done to the odds is undone


def test_the_slope_of_the_log_loss_is_zero_there():
    """At the optimum, by PyTorch's automatic derivative over raw pixels."""
    images = make_images(6, seed=5)
    p, truth = (torch.from_numpy(values) for values in pixels(images))
    found = temperature_of(count_scores(images, tune(images).fusion))
    inverse = torch.tensor(1 / found, dtype=torch.float64, requires_grad=True)
    z = torch.logit(p.clamp(CONFIDENCE_STEP, 1 - CONFIDENCE_STEP))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(inverse * z, truth.double())
    (slope,) = torch.autograd.grad(loss, inverse, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, inverse)
    assert abs(float((slope / curvature / inverse).detach())) < 1e-3  # Newton's next step


def test_known_temperatures_and_their_bounds():
    places = histogram_bin(torch.tensor([0.01, 0.2])).numpy()
    correct, wrong = np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)
    correct[places], wrong[places] = [99, 80], [1, 20]  # as often wrong as said
    assert fit_temperature(correct, wrong) == pytest.approx(1.0, abs=2e-3)
    assert fit_temperature(correct, np.zeros(HISTOGRAM_BINS)) == COLDEST
    assert fit_temperature(wrong, correct) == HOTTEST  # more wrong than right: no temperature helps
    assert np.isnan(fit_temperature(np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)))


def test_a_certain_error_has_the_finite_cost_of_the_smallest_uncertainty():
    """One of 1,000 pixels with p = 1 is wrong: 2**-24 tempered is 1/1000, so that t = ln(2**24 - 1) / ln(999)."""
    correct, wrong = np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)
    correct[0], wrong[0] = 999, 1
    found = fit_temperature(correct, wrong)
    assert found == pytest.approx(np.log(2**24 - 1) / np.log(999), rel=1e-6)
    assert tempered(torch.zeros(1), found).item() == pytest.approx(1 / 1000, rel=1e-4)


def test_tempering_keeps_the_order_and_one_is_the_identity():
    u = torch.linspace(0, 0.5, 101)
    torch.testing.assert_close(tempered(u, 1.0), u, rtol=1e-5, atol=1e-7)
    for temperature in (0.3, 3.0):
        found = tempered(u, temperature)
        assert (found.diff() > 0).all() and found[0] > 0 and found[-1] == 0.5
        np.testing.assert_allclose(found[1:], expit(logit(u[1:].double().numpy()) / temperature), rtol=1e-4)


# ---------------------------------------------------------------- counting


def test_counters_of_the_study_s_scores_are_those_of_the_study():
    """The same pixels, counted by :func:`counting.count_scores`: counts in every bit, losses up to the order of summation."""
    images = make_images(3, seed=2)
    fusion = tune(images).fusion
    expected = count_scores(images, fusion, ())
    edges = quantile_edges(expected.pooled["fine"], REGIONS.values())
    expected = count_scores(images, fusion, (), edges=edges)
    chosen = [expected.scores.index(name) for name in (REFERENCE, UNTEMPERED)]

    def scores_of(flat):
        p = flat["mean_prediction"]
        return {REFERENCE: fusion.predictive(flat["pred_variance"]), UNTEMPERED: 1 - torch.maximum(p, 1 - p)}

    found = count_detectors(images, scores_of, edges=edges[chosen])
    assert found.scores == (REFERENCE, UNTEMPERED) and found.ids == expected.ids
    for name in ("count", "confidence", "cells"):
        np.testing.assert_array_equal(found.images[name], expected.images[name][:, chosen])
    for name in ("squared_error", "log_loss"):
        np.testing.assert_allclose(found.images[name], expected.images[name][:, chosen], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found.pooled["fine"], expected.pooled["fine"][chosen])


def test_bad_scores_and_maps_are_named():
    images = with_flips(make_images(2))
    with pytest.raises(ValueError, match="uncertainty must lie in"):
        count_detectors(images, lambda flat: {"x": 2 + flat["mean_prediction"]})
    images.items[1][1][FLIPS][0, 0] = float("nan")
    with pytest.raises(ValueError, match="image_0001: flip_variance holds NaN"):
        count_detectors(images, lambda flat: {"x": flat["mean_prediction"]})
    with pytest.raises(ValueError, match="no image"):
        count_detectors(Images([]), lambda flat: {})


# ---------------------------------------------------------------- all numbers


@pytest.fixture(scope="module")
def splits():
    return with_flips(make_images(4, seed=1)), with_flips(make_images(6, seed=2), seed=1)


@pytest.fixture(scope="module")
def numbers(splits):
    return detector_numbers(*splits, tune(splits[0]).fusion, resamples=RESAMPLES)


def region_of(maps, region):
    truth, predicted = maps["true_mask"].numpy() == 1, maps["mean_prediction"].numpy() > 0.5
    return {"foreground": truth, "predicted_foreground": predicted, "union": truth | predicted,
            "whole_image": np.ones_like(truth)}[region]


@pytest.mark.parametrize("region", ["foreground", "predicted_foreground", "union", "whole_image"])
@pytest.mark.parametrize("detector", [TEMPERED, FLIPS, UNTEMPERED, REFERENCE])
def test_every_number_by_its_formula_from_raw_pixels(splits, numbers, region, detector):
    validation, test = splits
    columns = []
    for _, maps in test:
        inside = region_of(maps, region)
        p = maps["mean_prediction"].double().numpy()[inside]
        wrong = (p > 0.5) != (maps["true_mask"].numpy()[inside] == 1)
        if detector in (TEMPERED, UNTEMPERED):
            u = 1 - np.maximum(p, 1 - p)
            u = expit(logit(np.clip(u, CONFIDENCE_STEP, 0.5)) / numbers["temperature"]) if detector == TEMPERED else u
        else:
            name = FLIPS if detector == FLIPS else "pred_variance"
            values = np.concatenate([one[name].double().numpy().ravel() for _, one in validation])
            u = np.clip((maps[name].double().numpy()[inside] - values.min()) / (values.max() - values.min()), 0, 1)
        columns.append((u, wrong))
    u, wrong = (np.concatenate(column) for column in zip(*columns))
    given = np.where(wrong, u, 1 - u)  # probability given to what is the case
    bins = np.clip(np.ceil((1 - u) * 15) - 1, 0, 14).astype(int)
    ece = sum(abs((~wrong)[bins == b].sum() - (1 - u)[bins == b].sum()) for b in range(15)) / len(u)
    found = numbers["regions"][region][detector]["raw"]
    assert found["brier"]["value"] == pytest.approx(np.mean((1 - given) ** 2), rel=1e-5)
    assert found["log_loss"]["value"] == pytest.approx(-np.log(np.maximum(given, CONFIDENCE_STEP)).mean(), rel=1e-4)
    assert found["ece"]["value"] == pytest.approx(ece, abs=2e-4)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(wrong, u), abs=1e-3)


def test_intervals_and_differences_belong_to_their_numbers(numbers):
    for scores in numbers["regions"].values():
        for name, entry in scores.items():
            for kind, found in entry.items():
                for measure in ("brier", "log_loss", "ece", *(["auroc"] if kind == "raw" else [])):
                    low, high = found[measure]["interval"]
                    assert low - 0.01 <= found[measure]["value"] <= high + 0.01
                    for baseline in (REFERENCE, UNTEMPERED):
                        if f"minus_{baseline}" in found:
                            difference = found[f"minus_{baseline}"][measure]
                            assert set(difference) == {"value", "interval"}  # exploratory: no verdict
                            expected = found[measure]["value"] - scores[baseline][kind][measure]["value"]
                            assert difference["value"] == pytest.approx(expected, abs=1e-12)
                assert (f"minus_{REFERENCE}" in found) == (name != REFERENCE)
                assert (f"minus_{UNTEMPERED}" in found) == (name == TEMPERED)
    assert set(numbers["regions"]) == set(REGIONS)


def test_tempering_lowers_the_log_loss_of_overconfident_probabilities_and_not_their_ranking():
    validation, test = overconfident(4, 2.5, seed=1), overconfident(4, 2.5, seed=2)
    found = detector_numbers(validation, test, tune(validation).fusion, resamples=RESAMPLES)
    assert found["flip_scale"] is None and FLIPS not in found["regions"]["whole_image"]
    gain = found["regions"]["whole_image"][TEMPERED]["raw"][f"minus_{UNTEMPERED}"]
    assert gain["log_loss"]["interval"][1] < 0 and gain["brier"]["interval"][1] < 0 and gain["ece"]["interval"][1] < 0
    assert gain["auroc"]["value"] == pytest.approx(0, abs=1e-3)


def test_numbers_are_strict_json_and_the_same_again(splits, numbers):
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers == detector_numbers(*splits, tune(splits[0]).fusion, resamples=RESAMPLES)
    scale = flip_scale(splits[0])
    assert numbers["flip_scale"] == [scale.low, scale.high]


def test_nothing_to_fit_to_is_an_error(splits):
    with pytest.raises(ValueError, match="no image to fit a temperature to"):
        detector_numbers(Images([]), splits[1], tune(splits[0]).fusion)
