"""Measures of every score in every region from summed counters, and their paired bootstrap.

Summed counters are dictionaries of the arrays of :class:`counters.Counters` without the axis of the images
(or with one of the resamples instead); results have an axis of the scores last.
"""

from __future__ import annotations

import numpy as np

import ranking
from calibration import (
    CORRECT,
    REGIONS,
    average_calibration_error,
    bin_index,
    bootstrap,
    expected_calibration_error,
    interval,
    maximum_calibration_error,
    region_bins,
    signed_gap,
)
from counters import Counters
from ranking import cell_values, pool_cells
from recalibration import METHODS, mean_uncertainty

REFERENCE = "predictive_variance"  # what every other score is compared with
LOWER_IS_BETTER = ("ece", "brier", "log_loss")  # measures whose differences after recalibration are shown


def calibration_measures(summed: dict, region: str) -> dict:
    """ECE, signed gap, maximum and average calibration error, Brier score and log loss in a region, (..., S)."""
    bins = region_bins(summed["count"], summed["confidence"], region)
    pixels = bins[0].sum(-1)
    atoms = list(REGIONS[region])
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "ece": expected_calibration_error(*bins),
            "signed_gap": signed_gap(*bins),
            "mce": maximum_calibration_error(*bins),
            "ace": average_calibration_error(*bins),
            "brier": summed["squared_error"][..., atoms].sum(-1) / pixels,
            "log_loss": summed["log_loss"][..., atoms].sum(-1) / pixels,
        }


def split_region(histogram: np.ndarray, region: str) -> tuple:
    """Correct and wrong pixels (..., K) of a region from a histogram (..., A, K)."""
    right = [atom for atom in REGIONS[region] if atom in CORRECT]
    wrong = [atom for atom in REGIONS[region] if atom not in CORRECT]
    return histogram[..., right, :].sum(-2), histogram[..., wrong, :].sum(-2)


def ranking_measures(correct: np.ndarray, wrong: np.ndarray) -> dict:
    """AUROC and AUPRC of error detection, AURC and excess AURC, from histograms (..., S, K)."""
    return {
        "auroc": ranking.auroc(correct, wrong),
        "auprc": ranking.average_precision(correct, wrong),
        "aurc": ranking.aurc(correct, wrong),
        "excess_aurc": ranking.excess_aurc(correct, wrong),
    }


def fit_recalibration(validation: Counters, edges: np.ndarray) -> dict:
    """Recalibrated confidence of every quantile cell, {(method, region): (S, Q)}, fitted to the validation split."""
    values = cell_values()
    maps = {}
    for region in REGIONS:
        correct, wrong = split_region(validation.pooled["fine"], region)
        for method, fit in METHODS.items():
            maps[method, region] = np.stack(
                [
                    fit(
                        pool_cells(correct[score], edges[score]),
                        pool_cells(wrong[score], edges[score]),
                        mean_uncertainty(correct[score] + wrong[score], edges[score], values),
                    )
                    for score in range(len(edges))
                ]
            )
    return maps


def recalibrated_measures(correct: np.ndarray, wrong: np.ndarray, confidence: np.ndarray, bins: int) -> dict:
    """ECE, signed gap, Brier score and log loss after recalibration, (..., S).

    Args:
        correct, wrong: pixels by quantile cell, (..., S, Q).
        confidence: recalibrated confidence of every cell, (S, Q); NaN gives NaN.
        bins: equal-width bins of the recalibrated confidence.
    """
    size = correct + wrong
    pixels = size.sum(-1, dtype=float)
    gap = correct - size * confidence
    error = np.zeros(pixels.shape)
    for score in range(len(confidence)):
        index = bin_index(confidence[score], bins)
        for b in np.unique(index):
            error[..., score] += np.abs(gap[..., score, index == b].sum(-1))
    kept = np.clip(confidence, 2.0**-24, 1.0 - 2.0**-24)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "ece": error / pixels,
            "signed_gap": -gap.sum(-1) / pixels,
            "brier": (correct * (1.0 - confidence) ** 2 + wrong * confidence**2).sum(-1) / pixels,
            "log_loss": -(correct * np.log(kept) + wrong * np.log1p(-kept)).sum(-1) / pixels,
        }


def score_statistics(summed: dict, recalibration: dict, bins: int) -> dict:
    """All measures of all scores, keyed (region, kind, measure) with kind "raw" or a recalibration method."""
    result = {}
    for region in REGIONS:
        for name, value in calibration_measures(summed, region).items():
            result[region, "raw", name] = value
        if "cells" in summed:
            correct, wrong = split_region(summed["cells"], region)
            for name, value in ranking_measures(correct, wrong).items():
                result[region, "raw", name] = value
            for method in METHODS:
                confidence = recalibration[method, region]
                for name, value in recalibrated_measures(correct, wrong, confidence, bins).items():
                    result[region, method, name] = value
    return result


def score_table(validation: Counters, test: Counters, resamples: int, seed: int) -> tuple[dict, dict]:
    """Point values and bootstrap samples of :func:`score_statistics` on the test split.

    Values of the rank measures come from the fine cells, their resamples from the quantile cells,
    shifted by the (small) difference that this makes for the whole split.
    """
    recalibration = fit_recalibration(validation, test.edges)
    names = ("count", "confidence", "squared_error", "log_loss", "cells")
    per_image = {name: test.images[name] for name in names}
    per_image["cells"] = per_image["cells"].astype(np.float32)
    point = score_statistics({name: value.sum(0, dtype=float) for name, value in per_image.items()}, recalibration, test.bins)
    samples = bootstrap(per_image, lambda summed: score_statistics(summed, recalibration, test.bins), resamples, seed, chunk=64)
    for region in REGIONS:
        for name, exact in ranking_measures(*split_region(test.pooled["fine"], region)).items():
            key = (region, "raw", name)
            samples[key] = np.clip(samples[key] + (exact - point[key]), 0.0, 1.0)  # the range of all four
            point[key] = exact
    return point, samples


def estimate(value, samples) -> dict:
    """A number with its 95 % interval."""
    return {"value": value, "interval": interval(samples)}
