"""How well the uncertainty of an image, as one number, tells that its segmentation is bad.

An image is ranked by an aggregate of its uncertainty map, see :func:`uncertainty_of_images`, and judged by its Dice.

Shapes: I images, S scores, r resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.arrays import Array, divide
from evaluation.calibration import region_bins
from evaluation.counting import Counters
from evaluation.names import AGGREGATES, BAD_DICE, IN_BAND, REFERENCE, REGIONS
from evaluation.overlap import overlap_of_outcomes
from evaluation.parallel import in_threads
from evaluation.resampling import bootstrap_weights, estimate, units_of

#: What is measured of a ranking, in the order of :func:`rank_statistics`.
RANK_MEASURES = ("spearman_with_dice", "auroc_bad_dice", "aurc", "augrc")


def confusion(counters: Counters) -> Array:
    """Pixels by image and outcome, (I, 4) int64, wherever they lie."""
    pixels = counters.images["count"][:, 0].sum(-1)
    return np.asarray(pixels.reshape(len(pixels), -1, IN_BAND).sum(1))


# ---------------------------------------------------------------- one number for an image


def mean_uncertainty_of_images(counters: Counters, score: str, region: str) -> Array:
    """Mean uncertainty of each image over a region, (I,) in [0, 1]; NaN where the region is empty."""
    position = counters.scores.index(score)
    count, confidence = (counters.images[name][:, position] for name in ("count", "confidence"))
    count, _, confidence = region_bins(count, confidence, region)
    return np.asarray(1.0 - divide(confidence.sum(-1), count.sum(-1)))


def uncertainty_of_images(counters: Counters, score: str, aggregate: str) -> Array:
    """The uncertainty of each image as one number.

    Args:
        counters: of a split.
        score: of `counters.scores`.
        aggregate: of `names.AGGREGATES`: a region, over which the mean is taken, or "quantile95" or "largest_patch", see
            :func:`scores.largest_uncertainties`.

    Returns:
        (I,) float64 in [0, 1]; NaN where the region is empty.
    """
    if aggregate in REGIONS:
        return mean_uncertainty_of_images(counters, score, aggregate)
    return counters.images[aggregate][:, counters.scores.index(score)].astype(float)


def disagreement_of_passes(counters: Counters) -> Array:
    """One minus the mean pairwise Dice of the passes, (I,); NaN where the maps did not say it."""
    agreement = counters.images["pass_dice"]
    return np.where(agreement >= 0.0, 1.0 - agreement, np.nan)


# ---------------------------------------------------------------- all rankings


def ranking_of_images(
    test: Counters, resamples: int, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """How every score and aggregate ranks the images: see :func:`rank_statistics`.

    Images of which an aggregate is not defined (no lesion predicted) are left out of its ranking. A useful score has
    a negative correlation with Dice, an AUROC above one half, and small areas.

    Args:
        test: counters of all test images.
        resamples, seed: of the bootstrap.
        groups: by id, what it draws; see :func:`resampling.units_of`.

    Returns:
        "bad_dice_below" and "bad_images"; "whole_image" and "predicted_foreground" with, per score, the number of "images",
        correlation and AUROC; and "aggregates" with, per aggregate and score, all four measures, and but for the reference
        the paired difference of each from predictive variance under the same aggregate, "minus_predictive_variance".
        Where the maps hold `pass_dice`, also "baselines" with the entry "pass_dice": one minus that as the
        uncertainty, compared with the mean predictive variance of the image.
    """
    dice, _ = overlap_of_outcomes(confusion(test))
    names = [(aggregate, score) for aggregate in AGGREGATES for score in test.scores]
    rankings = [uncertainty_of_images(test, score, aggregate) for aggregate, score in names]
    passes = disagreement_of_passes(test)
    *measured, by_passes = measure_rankings([*rankings, passes], dice, resamples, seed, units_of(test.ids, groups))
    found = dict(zip(names, measured))
    table: dict[str, dict[str, Any]] = {aggregate: {} for aggregate in AGGREGATES}
    for (aggregate, score), ranking in found.items():
        reference = None if score == REFERENCE else found[aggregate, REFERENCE]
        table[aggregate][score] = _entry(ranking, reference)
    plain = ("images", *RANK_MEASURES[:2])
    result: dict[str, Any] = {"bad_dice_below": BAD_DICE, "bad_images": int((dice < BAD_DICE).sum())}
    for region in ("whole_image", "predicted_foreground"):
        result[region] = {score: {name: entry[name] for name in plain} for score, entry in table[region].items()}
    result["aggregates"] = table
    if not np.isnan(passes).any():
        result["baselines"] = {"pass_dice": _entry(by_passes, found["whole_image", REFERENCE])}
    return result


class Measured(NamedTuple):
    """One ranking of the images."""

    images: int  # that have a place in it
    values: Array  # (4,), see `RANK_MEASURES`
    samples: Array  # (R, 4)


def measure_rankings(
    rankings: Sequence[Array], dice: Array, resamples: int, seed: int, units: Array | None = None
) -> list[Measured]:
    """Measure rankings of the same images on the same resamples.

    Args:
        rankings: the uncertainty of each image, (I,) each; images with NaN are left out of that ranking.
        dice: of each image, (I,).
        resamples, seed, units: of the bootstrap, see :func:`resampling.bootstrap_weights`.
    """
    known = [~np.isnan(uncertainty) for uncertainty in rankings]
    groups: dict[bytes, list[int]] = {}  # rankings of the same images: their weights and ranks of Dice are the same
    for place, mask in enumerate(known):
        groups.setdefault(mask.tobytes(), []).append(place)

    def measure(weights: Array) -> list[Array]:
        found: list[Array] = [np.empty(0)] * len(rankings)
        for places in groups.values():
            mask = known[places[0]]
            judged = _Judged.of(dice[mask], weights[:, mask])
            for place in places:
                found[place] = judged.statistics(rankings[place][mask])
        return found

    points = measure(np.ones((1, len(dice))))
    drawn = list(bootstrap_weights(len(dice), resamples, seed, units=units))
    parts = in_threads(measure, drawn, len(drawn))
    return [
        Measured(int(mask.sum()), point[0], np.concatenate(samples))
        for mask, point, samples in zip(known, points, zip(*parts))
    ]


def _entry(found: Measured, reference: Measured | None) -> dict[str, Any]:
    """A ranking as ``metrics.json`` holds it, with its paired differences from the reference."""
    entry: dict[str, Any] = {"images": found.images}
    for index, name in enumerate(RANK_MEASURES):
        entry[name] = estimate(found.values[index], found.samples[:, index])
    if reference is not None:
        values, samples = found.values - reference.values, found.samples - reference.samples
        entry[f"minus_{REFERENCE}"] = {
            name: estimate(values[index], samples[:, index]) for index, name in enumerate(RANK_MEASURES)
        }
    return entry


# ---------------------------------------------------------------- measures


def rank_statistics(uncertainty: Array, dice: Array, weights: Array) -> Array:
    """How well the uncertainty of images ranks them by their Dice, in resamples of images.

    The risk of an image is 1 - Dice. Ties are in no order: half of each order for the AUROC, and for the areas the risk
    spread evenly over the tie.

    Args:
        uncertainty, dice: of each image, (I,).
        weights: how often each resample holds each image, (r, I).

    Returns:
        (r, 4), NaN where undefined (no image, no or only bad ones, a constant):

        - Spearman correlation of the uncertainty with Dice;
        - AUROC for a Dice below 0.8;
        - AURC: mean over k of the mean risk of the k least uncertain images (Geifman & El-Yaniv, NeurIPS 2017);
        - AUGRC: mean over k of the sum of their risks, over the number of images (Traub et al., NeurIPS 2024).

    Example:
        >>> uncertainty, dice = np.array([0.1, 0.2, 0.4, 0.3]), np.array([1.0, 0.75, 0.0, 0.75])
        >>> found = rank_statistics(uncertainty, dice, np.ones((1, 4)))[0]
        >>> [round(float(value), 4) for value in found]  # risks in order 0, 1/4, 1/4, 1: (0 + 1/8 + 1/6 + 3/8) / 4
        [-0.9487, 1.0, 0.1667, 0.1406]
    """
    return _Judged.of(dice, weights).statistics(uncertainty)


class _Judged(NamedTuple):
    """Resamples of images whose Dice is known, and what all rankings of them share."""

    dice: Array  # (I,)
    weights: Array  # (r, I)
    total: Array  # images of each resample, (r,)
    ranks: Array  # of Dice, (r, I), minus their mean
    spread: Array  # sum of their squares, (r,)

    @classmethod
    def of(cls, dice: Array, weights: Array) -> _Judged:
        total = weights.sum(1)
        if len(dice) == 0:
            return cls(dice, weights, total, weights, total)
        ranks = _ranks(dice, weights) - 0.5 * (total[:, None] + 1.0)
        return cls(dice, weights, total, ranks, np.einsum("ri,ri,ri->r", weights, ranks, ranks))

    def statistics(self, uncertainty: Array) -> Array:
        """The four measures (r, 4) of :func:`rank_statistics`, from the images in ascending order of uncertainty."""
        if len(self.dice) == 0:
            return np.full((len(self.weights), len(RANK_MEASURES)), np.nan)
        order, starts, group = _ties(uncertainty)
        risk, bad = 1.0 - self.dice[order], (self.dice < BAD_DICE)[order].astype(float)
        weights = self.weights[:, order]
        size = weights if len(starts) == len(order) else np.add.reduceat(weights, starts, axis=1)
        kept = np.cumsum(size, axis=1)  # images up to the end of each tie
        ranks = kept - 0.5 * (size - 1.0)  # copies of an image are tied as well
        if size is not weights:
            ranks = ranks[:, group[order]]
        # All but the two areas are sums of multiples of one quarter, hence exact in any order.
        weighted = weights * ranks
        total = self.total
        bad_images, all_risk = weights @ bad, weights @ risk
        area = weighted @ bad - 0.5 * bad_images * (bad_images + 1.0)
        middle = 0.5 * (total + 1.0)
        covariance = np.einsum("ri,ri->r", weighted, self.ranks[:, order])
        variance = np.einsum("ri,ri->r", weighted, ranks) - total * middle**2
        return np.stack([
            divide(covariance, np.sqrt(variance * self.spread)),
            divide(area, bad_images * (total - bad_images)),
            self._aurc(weights, size, kept, starts, risk, all_risk),
            # an image of rank q is among the k least uncertain for n + 1 - q of the n numbers k
            divide((total + 1.0) * all_risk - weighted @ risk, total**2),
        ], 1)

    def _aurc(self, weights: Array, size: Array, kept: Array, starts: Array, risk: Array, all_risk: Array) -> Array:
        """Mean over k of the mean risk of the first k images.

        With H(k) the harmonic numbers, the image in place j adds its risk over k for every k from j to n:
        ``risk_j (H(n) - H(j - 1)) / n``. Sums of H(j - 1) over the places of an image or a tie are looked up.
        """
        most = int(self.total.max())
        harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, most + 1))])
        summed = np.concatenate([[0.0], np.cumsum(harmonic[:-1])])  # of H(0) ... H(k - 1)
        places = np.take(summed, kept.astype(np.int64))
        if size is weights:  # summation by parts: differences of the places times risk
            spent = places @ (risk - np.append(risk[1:], 0.0))
        else:
            mean_risk = np.add.reduceat(weights * risk, starts, axis=1) / np.maximum(size, 1.0)
            spent = (np.diff(places, axis=1, prepend=0.0) * mean_risk).sum(1)
        total = self.total.astype(np.int64)
        return divide(harmonic[total] * all_risk - spent, total)


def _ties(values: Array) -> tuple[Array, Array, Array]:
    """Ascending order of the values, where in it each distinct value starts, and the distinct value of each."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.argsort(values, kind="stable"), np.cumsum(count) - count, group


def _ranks(values: Array, weights: Array) -> Array:
    """Ranks (r, I) of the values in resamples with multiplicities `weights`, ties (and copies) at their mean rank."""
    order, starts, group = _ties(values)
    size = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(size, 1) - 0.5 * (size - 1.0))[:, group])
