"""Measures of every score in every region from summed counters, and their paired bootstrap.

Summed counters are dictionaries of the arrays of :class:`counting.Counters` without the axis of the images
(or with one of the resamples instead); results have an axis of the scores last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation import ranking
from evaluation.arrays import Array, divide
from evaluation.calibration import (
    average_calibration_error,
    bin_index,
    expected_calibration_error,
    maximum_calibration_error,
    region_bins,
    signed_gap,
)
from evaluation.counting import Counters
from evaluation.names import CONFIDENCE_STEP, CORRECT, REGIONS
from evaluation.ranking import bin_values, pool_bins
from evaluation.recalibration import METHODS, mean_uncertainty
from evaluation.resampling import LOWER_IS_BETTER, bootstrap, estimate, paired_difference

#: Region, kind ("raw" or a recalibration method), measure.
Key = tuple[str, str, str]
#: Recalibrated confidence of every quantile bin, (S, Q), by method and region.
Recalibration = Mapping[tuple[str, str], Array]

JUDGED = ("ece", "brier", "log_loss")  # measures whose differences get a verdict; the lower the better


def calibration_measures(summed: Mapping[str, Array], region: str) -> dict[str, Array]:
    """ECE, signed gap, maximum and average calibration error, Brier score and log loss in a region.

    Args:
        summed: `count`, `confidence` (..., S, A, B), `squared_error` and `log_loss` (..., S, A).
        region: of `names.REGIONS`.

    Returns:
        (..., S) each; NaN where the region is empty.
    """
    bins = region_bins(summed["count"], summed["confidence"], region)
    pixels = bins[0].sum(-1)
    members = list(REGIONS[region])
    return {
        "ece": expected_calibration_error(*bins),
        "signed_gap": signed_gap(*bins),
        "mce": maximum_calibration_error(*bins),
        "ace": average_calibration_error(*bins),
        "brier": divide(summed["squared_error"][..., members].sum(-1), pixels),
        "log_loss": divide(summed["log_loss"][..., members].sum(-1), pixels),
    }


def split_region(histogram: Array, region: str) -> tuple[Array, Array]:
    """Correct and wrong pixels (..., K) of a region from a histogram (..., A, K).

    Example:
        >>> correct, wrong = split_region(np.array([[8], [1], [2], [4]]), "union")
        >>> correct.tolist(), wrong.tolist()
        ([4], [3])
    """
    right = [outcome for outcome in REGIONS[region] if outcome in CORRECT]
    wrong = [outcome for outcome in REGIONS[region] if outcome not in CORRECT]
    return histogram[..., right, :].sum(-2), histogram[..., wrong, :].sum(-2)


def ranking_measures(correct: Array, wrong: Array) -> dict[str, Array]:
    """AUROC and AUPRC of error detection, AURC and excess AURC, (..., S) each, from histograms (..., S, K)."""
    return {
        "auroc": ranking.auroc(correct, wrong),
        "auprc": ranking.average_precision(correct, wrong),
        "aurc": ranking.aurc(correct, wrong),
        "excess_aurc": ranking.excess_aurc(correct, wrong),
    }


def fit_recalibration(validation: Counters, edges: Array) -> dict[tuple[str, str], Array]:
    """Recalibrated confidence of every quantile bin, fitted to the validation split.

    Args:
        validation: with the histogram of every score.
        edges: quantile bins of every score, (S, Q - 1).

    Returns:
        (S, Q) by method and region.
    """
    values = bin_values()
    fitted = {}
    for region in REGIONS:
        correct, wrong = split_region(validation.pooled["fine"], region)
        for method, fit in METHODS.items():
            fitted[method, region] = np.stack([
                fit(pool_bins(right, edge), pool_bins(errors, edge), mean_uncertainty(right + errors, edge, values))
                for right, errors, edge in zip(correct, wrong, edges)
            ])
    return fitted


def recalibrated_measures(correct: Array, wrong: Array, confidence: Array, bins: int) -> dict[str, Array]:
    """ECE, signed gap, Brier score and log loss after recalibration.

    Args:
        correct, wrong: pixels by quantile bin, (..., S, Q).
        confidence: recalibrated confidence of every quantile bin, (S, Q); NaN gives NaN.
        bins: equal-width bins of the recalibrated confidence.

    Returns:
        (..., S) each; NaN without pixels.

    Example:
        >>> correct, wrong = np.array([[3, 1]]), np.array([[1, 3]])
        >>> found = recalibrated_measures(correct, wrong, np.array([[0.75, 0.5]]), bins=15)
        >>> found["ece"].tolist(), found["signed_gap"].tolist()  # gaps of 0 and 1/4
        ([0.125], [0.125])
    """
    size = correct + wrong
    pixels = size.sum(-1, dtype=float)
    gap = correct - size * confidence
    error = np.zeros(pixels.shape)
    for score in range(len(confidence)):
        index = bin_index(confidence[score], bins)
        for here in np.unique(index):
            error[..., score] += np.abs(gap[..., score, index == here].sum(-1))
    kept = np.clip(confidence, CONFIDENCE_STEP, 1.0 - CONFIDENCE_STEP)
    return {
        "ece": divide(error, pixels),
        "signed_gap": divide(-gap.sum(-1), pixels),
        "brier": divide((correct * (1.0 - confidence) ** 2 + wrong * confidence**2).sum(-1), pixels),
        "log_loss": divide(-(correct * np.log(kept) + wrong * np.log1p(-kept)).sum(-1), pixels),
    }


def score_statistics(summed: Mapping[str, Array], recalibration: Recalibration, bins: int) -> dict[Key, Array]:
    """All measures of all scores from summed counters, (..., S) each."""
    result: dict[Key, Array] = {}
    for region in REGIONS:
        for name, value in calibration_measures(summed, region).items():
            result[region, "raw", name] = value
        correct, wrong = split_region(summed["cells"], region)
        for name, value in ranking_measures(correct, wrong).items():
            result[region, "raw", name] = value
        for method in METHODS:
            confidence = recalibration[method, region]
            for name, value in recalibrated_measures(correct, wrong, confidence, bins).items():
                result[region, method, name] = value
    return result


@dataclass(frozen=True)
class ScoreTable:
    """Every measure of every score on the test split, with its resamples."""

    scores: tuple[str, ...]
    point: dict[Key, Array]  # (S,) each
    samples: dict[Key, Array]  # (R, S) each

    def value(self, key: Key, score: str) -> float:
        """The measure of one score."""
        return float(self.point[key][self.scores.index(score)])

    def estimate(self, key: Key, score: str) -> dict[str, Any]:
        """The measure of one score with its interval."""
        position = self.scores.index(score)
        return estimate(self.point[key][position], self.samples[key][:, position])

    def difference(self, key: Key, first: str, second: str) -> dict[str, Any]:
        """The paired difference of two scores; with a verdict for measures that have one."""
        better = LOWER_IS_BETTER if key[2] in JUDGED else None
        places = self.scores.index(first), self.scores.index(second)
        return paired_difference(self.point[key], self.samples[key], *places, better)


def score_table(validation: Counters, test: Counters, resamples: int, seed: int) -> ScoreTable:
    """All measures of the test split and their bootstrap; recalibration is fitted to validation.

    Values of the rank measures come from the histogram bins, their resamples from the quantile bins,
    shifted by the (small) difference that this makes for the whole split.
    """
    recalibration = fit_recalibration(validation, test.edges)
    arrays = {name: test.images[name] for name in ("count", "confidence", "squared_error", "log_loss", "cells")}
    arrays["cells"] = arrays["cells"].astype(np.float32)

    def statistics(summed: Mapping[str, Array]) -> dict[Key, Array]:
        return score_statistics(summed, recalibration, test.bins)

    point = statistics({name: value.sum(0, dtype=float) for name, value in arrays.items()})
    samples = bootstrap(arrays, statistics, resamples, seed, chunk=64)
    for region in REGIONS:
        for name, exact in ranking_measures(*split_region(test.pooled["fine"], region)).items():
            key = (region, "raw", name)
            samples[key] = np.clip(samples[key] + (exact - point[key]), 0.0, 1.0)  # the range of all four
            point[key] = exact
    return ScoreTable(test.scores, point, samples)
