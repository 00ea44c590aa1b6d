"""Measures of every score in every region from summed counters, and their paired bootstrap.

Summed counters are dictionaries of the arrays of :class:`counting.Counters` without the axis of the images
(or with one of the resamples instead); results have an axis of the scores last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation import ranking
from evaluation.arrays import Array, divide
from evaluation.calibration import (
    average_calibration_error,
    bin_index,
    brier_parts,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    region_bins,
    region_codes,
    signed_gap,
)
from evaluation.counting import Counters
from evaluation.names import CONFIDENCE_STEP, IN_BAND, REGIONS
from evaluation.ranking import bin_values, pool_bins
from evaluation.recalibration import METHODS, mean_uncertainty
from evaluation.resampling import LOWER_IS_BETTER, bootstrap, count_units, estimate, paired_difference, units_of

#: Region, kind ("raw" or a recalibration method), measure.
Key = tuple[str, str, str]
#: Recalibrated confidence of every quantile bin, (S, Q), by method and region.
Recalibration = Mapping[tuple[str, str], Array]

JUDGED = ("ece", "brier", "log_loss")  # measures whose differences get a verdict; the lower the better
#: Measures without an interval: at most 64 % of those of the largest gap of a bin hold the truth in simulations, and
#: resamples of an ECE have its bias twice, which the debiased one reduces.
WITHOUT_INTERVAL = ("mce", "ece_debiased")


def calibration_measures(summed: Mapping[str, Array], region: str) -> dict[str, Array]:
    """Proper scores of the confidence, Brier score and log loss, and then its calibration errors in a region.

    "brier" is "brier_reliability" - "brier_resolution" + accuracy (1 - accuracy) + "brier_remainder", the latter being
    what the bins leave out; see :func:`calibration.brier_parts`.

    Args:
        summed: `count`, `confidence` (..., S, A, B), `squared_error` and `log_loss` (..., S, A).
        region: of `names.REGIONS`.

    Returns:
        (..., S) each; NaN where the region is empty.
    """
    bins = region_bins(summed["count"], summed["confidence"], region)
    pixels = bins[0].sum(-1)
    members = sorted(sum(region_codes(region, summed["count"].shape[-2]), []))
    brier = divide(summed["squared_error"][..., members].sum(-1), pixels)
    reliability, resolution, uncertainty = brier_parts(*bins)
    return {
        "brier": brier,
        "brier_reliability": reliability,
        "brier_resolution": resolution,
        "brier_remainder": brier - (reliability - resolution + uncertainty),
        "log_loss": divide(summed["log_loss"][..., members].sum(-1), pixels),
        "ece": expected_calibration_error(*bins),
        "signed_gap": signed_gap(*bins),
        "mce": maximum_calibration_error(*bins),
        "ace": average_calibration_error(*bins),
    }


def split_region(histogram: Array, region: str) -> tuple[Array, Array]:
    """Correct and wrong pixels (..., K) of a region from a histogram (..., A, K), see :func:`calibration.region_codes`.

    Example:
        >>> correct, wrong = split_region(np.array([[8], [1], [2], [4], [0], [0], [0], [16]]), "union")
        >>> correct.tolist(), wrong.tolist()
        ([20], [3])
    """
    right, wrong = region_codes(region, histogram.shape[-2])
    return histogram[..., right, :].sum(-2), histogram[..., wrong, :].sum(-2)


def ranking_measures(correct: Array, wrong: Array) -> dict[str, Array]:
    """AUROC and AUPRC of error detection, AURC and excess AURC, (..., S) each, from histograms (..., S, K)."""
    right, errors = ranking.up_to(correct), ranking.up_to(wrong)
    area = ranking.aurc(correct, wrong, right, errors)
    return {
        "auroc": ranking.auroc(correct, wrong),
        "auprc": ranking.average_precision(correct, wrong, right, errors),
        "aurc": area,
        "excess_aurc": area - ranking.ideal_aurc(correct, wrong),
    }


def fit_recalibration(
    validation: Counters, edges: Array, regions: Iterable[str] = REGIONS, methods: Iterable[str] = METHODS
) -> dict[tuple[str, str], Array]:
    """Recalibrated confidence of every quantile bin, fitted to the validation split.

    Args:
        validation: with the histogram of every score.
        edges: quantile bins of every score, (S, Q - 1).
        regions, methods: those that are wanted.

    Returns:
        (S, Q) by method and region.
    """
    values = bin_values()
    fitted = {}
    for region in regions:
        correct, wrong = split_region(validation.pooled["fine"], region)
        for method in methods:
            fit = METHODS[method]
            fitted[method, region] = np.stack([
                fit(pool_bins(right, edge), pool_bins(errors, edge), mean_uncertainty(right + errors, edge, values))
                for right, errors, edge in zip(correct, wrong, edges)
            ])
    return fitted


def recalibrated_measures(
    correct: Array, wrong: Array, confidence: Array, bins: int, smallest: float = CONFIDENCE_STEP
) -> dict[str, Array]:
    """Brier score, log loss, ECE and signed gap after recalibration.

    For the log loss the recalibrated confidences are kept within [`smallest`, 1 - `smallest`]. Isotonic regression gives
    exactly 0 or 1 where all validation pixels of a bin are wrong or all are right, and the log loss of a single test pixel
    against it is then as large as rounding allows. Adding a pixel to each count would hardly change that: there are
    millions, but those of one image are much the same, so that it is the n validation images that count.
    ``smallest = 1 / (2 n)``, half an image among them, is the least that can be told from 0. It bounds the other
    end as well, where almost every pixel is right: below about ``1 / (2 n)`` nats per pixel this log loss cannot fall.

    Args:
        correct, wrong: pixels by quantile bin, (..., S, Q).
        confidence: recalibrated confidence of every quantile bin, (S, Q); NaN gives NaN.
        bins: equal-width bins of the recalibrated confidence.
        smallest: bound of the confidences that the log loss takes, in (0, 0.5]; the step of a confidence where nothing
            is to be smoothed.

    Returns:
        (..., S) each; NaN without pixels.

    Example:
        >>> correct, wrong = np.array([[3, 1]]), np.array([[1, 3]])
        >>> found = recalibrated_measures(correct, wrong, np.array([[0.75, 0.5]]), bins=15)
        >>> found["ece"].tolist(), found["signed_gap"].tolist()  # gaps of 0 and 1/4
        ([0.125], [0.125])
    """
    kept = np.clip(confidence, smallest, 1.0 - smallest)
    # Every measure is linear in the counts of a score: one matrix product for all resamples and bins, over (S, ..., Q).
    inside = bin_index(confidence, bins)[..., None] == np.arange(bins)  # S, Q, B
    right = np.concatenate([_columns((1.0 - confidence) ** 2, -np.log(kept)), inside * (1.0 - confidence)[..., None]], -1)
    errors = np.concatenate([_columns(confidence**2, -np.log1p(-kept)), inside * -confidence[..., None]], -1)
    first = [np.moveaxis(np.asarray(side, dtype=float), -2, 0) for side in (correct, wrong)]
    shape = first[0].shape[:-1]
    flat = [side.reshape(len(confidence), -1, side.shape[-1]) for side in first]
    sums = np.moveaxis((flat[0] @ right + flat[1] @ errors).reshape(*shape, -1), 0, -2)  # ..., S, 2 + B
    pixels = np.moveaxis((flat[0] + flat[1]).sum(-1).reshape(shape), 0, -1)
    gaps = sums[..., 2:]
    return {
        "brier": divide(sums[..., 0], pixels),
        "log_loss": divide(sums[..., 1], pixels),
        "ece": divide(np.abs(gaps).sum(-1), pixels),
        "signed_gap": divide(-gaps.sum(-1), pixels),
    }


def _columns(*values: Array) -> Array:
    return np.stack(values, -1)


def layers(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What is resampled: all pixels by four outcomes ("all/NAME"), those in the boundary band by two ("band/NAME").

    These take less time than eight outcomes, and the sums of all other regions are to the last bit what they would be
    without a band.

    Args:
        arrays: (I, S, A, ...) by name.

    Returns:
        (I, S, 4, ...) and (I, S, 2: wrong, correct, ...) each.
    """
    found = {f"all/{name}": value[:, :, :IN_BAND] + value[:, :, IN_BAND:] for name, value in arrays.items()}
    right, wrong = region_codes("boundary_band")
    for name, value in arrays.items():
        found[f"band/{name}"] = np.stack([value[:, :, wrong].sum(2), value[:, :, right].sum(2)], 2)
    return found


def layer_of(summed: Mapping[str, Array], region: str) -> dict[str, Array]:
    """The summed :func:`layers` that a region consists of, by the names of the arrays."""
    prefix = "band/" if region == "boundary_band" else "all/"
    return {name[len(prefix) :]: value for name, value in summed.items() if name.startswith(prefix)}


def score_statistics(
    summed: Mapping[str, Array], recalibration: Recalibration, bins: int, smallest: float = CONFIDENCE_STEP
) -> dict[Key, Array]:
    """All measures of all scores from summed :func:`layers`, (..., S) each.

    Args:
        summed: arrays (..., S, 4, ...) and (..., S, 2, ...).
        recalibration: fitted to validation.
        bins: equal-width bins of the recalibrated confidence.
        smallest: bound of the isotonic confidences, see :func:`recalibrated_measures`. Platt's have no steps to smooth.
    """
    result: dict[Key, Array] = {}
    for region in REGIONS:
        layer = layer_of(summed, region)
        for name, value in calibration_measures(layer, region).items():
            result[region, "raw", name] = value
        correct, wrong = split_region(layer["cells"], region)
        for name, value in ranking_measures(correct, wrong).items():
            result[region, "raw", name] = value
        for method in METHODS:
            confidence = recalibration[method, region]
            bound = smallest if method == "isotonic" else CONFIDENCE_STEP
            for name, value in recalibrated_measures(correct, wrong, confidence, bins, bound).items():
                result[region, method, name] = value
    return result


@dataclass(frozen=True)
class ScoreTable:
    """Every measure of every score on the test split, with its resamples."""

    scores: tuple[str, ...]
    point: dict[Key, Array]  # (S,) each, in the order of the tables
    samples: dict[Key, Array]  # (R, S) each; none of measures without an interval

    def value(self, key: Key, score: str) -> float:
        """The measure of one score."""
        return float(self.point[key][self.scores.index(score)])

    def estimate(self, key: Key, score: str) -> dict[str, Any]:
        """The measure of one score with its interval, if it has one."""
        position = self.scores.index(score)
        return estimate(self.point[key][position], self.samples[key][:, position] if key in self.samples else None)

    def difference(self, key: Key, first: str, second: str) -> dict[str, Any]:
        """The paired difference of two scores; with a verdict for measures that have one."""
        better = LOWER_IS_BETTER if key[2] in JUDGED else None
        places = self.scores.index(first), self.scores.index(second)
        if key not in self.samples:
            return estimate(self.point[key][places[0]] - self.point[key][places[1]], None)
        return paired_difference(self.point[key], self.samples[key], *places, better)


def score_table(
    validation: Counters, test: Counters, resamples: int, seed: int, groups: Mapping[str, str] | None = None
) -> ScoreTable:
    """All measures of the test split and their bootstrap, of whole groups where some are given; recalibration is fitted to
    validation.

    Values of the rank measures come from the histogram bins, their resamples from the quantile bins,
    shifted by the (small) difference that this makes for the whole split.
    """
    recalibration = fit_recalibration(validation, test.edges)
    arrays = layers({name: test.images[name] for name in ("count", "confidence", "squared_error", "log_loss", "cells")})
    arrays.update({name: value.astype(np.float32) for name, value in arrays.items() if name.endswith("/cells")})
    smallest = 0.5 / count_units(validation.ids, groups)

    def statistics(summed: Mapping[str, Array]) -> dict[Key, Array]:
        found = score_statistics(summed, recalibration, test.bins, smallest)
        return {key: value for key, value in found.items() if key[2] not in WITHOUT_INTERVAL}

    totals = {name: value.sum(0, dtype=float) for name, value in arrays.items()}
    samples = bootstrap(arrays, statistics, resamples, seed, chunk=64, units=units_of(test.ids, groups))
    point: dict[Key, Array] = {}
    for key, value in score_statistics(totals, recalibration, test.bins, smallest).items():
        point[key] = value
        if key[1:] == ("raw", "ece"):
            bins = region_bins(test.images["count"], test.images["confidence"], key[0])
            point[key[0], "raw", "ece_debiased"] = debiased_calibration_error(*bins)
    for region in REGIONS:
        for name, exact in ranking_measures(*split_region(test.pooled["fine"], region)).items():
            key = (region, "raw", name)
            samples[key] = np.clip(samples[key] + (exact - point[key]), 0.0, 1.0)  # the range of all four
            point[key] = exact
    return ScoreTable(test.scores, point, samples)
