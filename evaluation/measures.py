"""Measures of every score in every region from summed counters, and their paired bootstrap.

Summed counters are dictionaries of the arrays of :class:`counting.Counters` without the axis of the images
(or with one of the resamples instead); results have an axis of the scores last.
"""

from __future__ import annotations

import math
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
from evaluation.parallel import in_threads
from evaluation.ranking import bin_values, pool_bins
from evaluation.recalibration import METHODS, mean_uncertainty
from evaluation.resampling import (
    CHUNK,
    LOWER_IS_BETTER,
    bootstrap,
    bootstrap_weights,
    count_units,
    estimate,
    paired_difference,
    units_of,
)

#: Region, kind ("raw" or a recalibration method), measure.
Key = tuple[str, str, str]

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
    correct, wrong = np.asarray(correct, dtype=float), np.asarray(wrong, dtype=float)
    return measures_of_sums(recalibrated_sums(correct, wrong, confidence, bins, smallest), (correct + wrong).sum(-1))


def recalibrated_sums(
    correct: Array, wrong: Array, confidence: Array, bins: int, smallest: float = CONFIDENCE_STEP
) -> Array:
    """What :func:`recalibrated_measures` are made of: sums over pixels, which add up over images and their resamples.

    Args:
        correct, wrong, confidence, bins, smallest: as there.

    Returns:
        (..., S, 2 + B): squared errors, log losses, and correct pixels less confidences by bin.
    """
    kept = np.clip(confidence, smallest, 1.0 - smallest)
    inside = bin_index(confidence, bins)[..., None] == np.arange(bins)  # S, Q, B
    right = np.concatenate([_columns((1.0 - confidence) ** 2, -np.log(kept)), inside * (1.0 - confidence)[..., None]], -1)
    errors = np.concatenate([_columns(confidence**2, -np.log1p(-kept)), inside * -confidence[..., None]], -1)
    # one matrix product per score for all images or resamples, over (S, ..., Q)
    first = [np.moveaxis(np.asarray(side, dtype=float), -2, 0) for side in (correct, wrong)]
    shape = first[0].shape[:-1]
    flat = [side.reshape(len(confidence), -1, side.shape[-1]) for side in first]
    return np.moveaxis((flat[0] @ right + flat[1] @ errors).reshape(*shape, -1), 0, -2)


def measures_of_sums(sums: Array, pixels: Array) -> dict[str, Array]:
    """:func:`recalibrated_measures` (..., S) from :func:`recalibrated_sums` (..., S, 2 + B) and numbers of pixels (..., S)."""
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


def linear_statistics(summed: Mapping[str, Array]) -> dict[Key, Array]:
    """The measures of all scores that follow from sums over pixels, raw and recalibrated, (..., S) each.

    Args:
        summed: :func:`layers` of the counters by bin, and under "METHOD/REGION" the :func:`recalibrated_sums` of every region.
    """
    result: dict[Key, Array] = {}
    for region in REGIONS:
        layer = layer_of(summed, region)
        for name, value in calibration_measures(layer, region).items():
            result[region, "raw", name] = value
        pixels = region_bins(layer["count"], layer["confidence"], region)[0].sum(-1)
        for method in METHODS:
            for name, value in measures_of_sums(summed[f"{method}/{region}"], pixels).items():
                result[region, method, name] = value
    return result


#: Which of the six outcomes of :func:`layers` are the correct pixels of each region, and which the wrong ones, (2, 6, 6).
_SPLIT_REGIONS = np.zeros((2, len(REGIONS), IN_BAND + 2))
for _place, _region in enumerate(REGIONS):
    _first, _outcomes = (IN_BAND, 2) if _region == "boundary_band" else (0, IN_BAND)
    for _side, _codes in enumerate(region_codes(_region, _outcomes)):
        _SPLIT_REGIONS[_side, _place, [_first + code for code in _codes]] = 1.0


def ranking_samples(cells: Array, resamples: int, seed: int, units: Array | None = None) -> dict[Key, Array]:
    """The :func:`ranking_measures` of all scores in all regions, in resamples of the images.

    Args:
        cells: pixels by quantile bin, (I, S, A, Q).
        resamples, seed, units: see :func:`resampling.bootstrap_weights`.

    Returns:
        (R, S) each.
    """
    whole, band = layers({"cells": cells}).values()
    counts = np.concatenate([whole, band], 2).transpose(3, 2, 1, 0)  # Q, 6, S, I
    shape = counts.shape[:3]
    flat = np.ascontiguousarray(counts, dtype=np.float32).reshape(-1, len(cells))
    split = _SPLIT_REGIONS.reshape(-1, shape[1])

    def by_region(outcomes: Array) -> Array:
        """Correct and wrong pixels (2, regions, S * r) of those of six outcomes (6, S * r)."""
        return (split @ outcomes.astype(float)).reshape(2, len(REGIONS), -1)

    def measured(weights: Array) -> dict[str, Array]:
        summed = (flat @ weights.T.astype(np.float32)).reshape(*shape[:2], -1)
        totals = by_region(summed.sum(0, dtype=float))
        found = ranking.measures_by_bin(map(by_region, summed), *totals)  # type: ignore[arg-type]
        found["excess_aurc"] = found["aurc"] - ranking.ideal_aurc(*totals[..., None])
        return {name: value.reshape(len(REGIONS), shape[2], -1) for name, value in found.items()}

    drawn = bootstrap_weights(len(cells), resamples, seed, units=units)
    parts = in_threads(measured, drawn, math.ceil(resamples / CHUNK))
    return {
        (region, "raw", name): np.concatenate([part[name][place].T for part in parts])
        for place, region in enumerate(REGIONS) for name in parts[0]
    }


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
    smallest, units = 0.5 / count_units(validation.ids, groups), units_of(test.ids, groups)
    arrays = layers({name: test.images[name] for name in ("count", "confidence", "squared_error", "log_loss")})
    cells = {region: split_region(test.images["cells"], region) for region in REGIONS}
    for (method, region), confidence in fit_recalibration(validation, test.edges).items():
        # Platt's map has no steps to smooth
        bound = smallest if method == "isotonic" else CONFIDENCE_STEP
        arrays[f"{method}/{region}"] = recalibrated_sums(*cells[region], confidence, test.bins, bound)

    def statistics(summed: Mapping[str, Array]) -> dict[Key, Array]:
        return {key: value for key, value in linear_statistics(summed).items() if key[2] not in WITHOUT_INTERVAL}

    samples = bootstrap(arrays, statistics, resamples, seed, units=units)
    samples.update(ranking_samples(test.images["cells"], resamples, seed, units))
    point = linear_statistics({name: value.sum(0, dtype=float) for name, value in arrays.items()})
    for region in REGIONS:
        bins = region_bins(test.images["count"], test.images["confidence"], region)
        point[region, "raw", "ece_debiased"] = debiased_calibration_error(*bins)
    for region in REGIONS:
        approximate = ranking_measures(*(side.sum(0, dtype=float) for side in cells[region]))
        for name, exact in ranking_measures(*split_region(test.pooled["fine"], region)).items():
            key = (region, "raw", name)
            samples[key] = np.clip(samples[key] + (exact - approximate[name]), 0.0, 1.0)  # the range of all four
            point[key] = exact
    return ScoreTable(test.scores, point, samples)
