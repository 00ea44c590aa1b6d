"""How well the mean uncertainty of an image tells that its segmentation is bad."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.arrays import Array, divide
from evaluation.calibration import region_bins
from evaluation.counting import Counters
from evaluation.names import BAD_DICE
from evaluation.overlap import overlap_of_outcomes
from evaluation.ranking import auroc
from evaluation.resampling import bootstrap_weights, estimate


def confusion(counters: Counters) -> Array:
    """Pixels by image and outcome, (I, A) int64."""
    return np.asarray(counters.images["count"][:, 0].sum(-1))


def mean_uncertainty_of_images(counters: Counters, score: str, region: str) -> Array:
    """Mean uncertainty of each image over a region, (I,) in [0, 1]; NaN where the region is empty."""
    position = counters.scores.index(score)
    count, confidence = (counters.images[name][:, position] for name in ("count", "confidence"))
    count, _, confidence = region_bins(count, confidence, region)
    return np.asarray(1.0 - divide(confidence.sum(-1), count.sum(-1)))


def ranking_of_images(test: Counters, resamples: int, seed: int) -> dict[str, Any]:
    """Spearman correlation of an image's mean uncertainty with its Dice, and AUROC for a Dice below 0.8.

    For every score, over the whole image and over the predicted foreground (images without any are left out).
    A useful score has a negative correlation and an AUROC above one half.

    Args:
        test: counters of all test images.
        resamples, seed: of the bootstrap.

    Returns:
        "bad_dice_below", "bad_images", and per region and score the number of "images" and both estimates.
    """
    dice, _ = overlap_of_outcomes(confusion(test))
    result: dict[str, Any] = {"bad_dice_below": BAD_DICE, "bad_images": int((dice < BAD_DICE).sum())}
    for region in ("whole_image", "predicted_foreground"):
        result[region] = {}
        for name in test.scores:
            uncertainty = mean_uncertainty_of_images(test, name, region)
            known = ~np.isnan(uncertainty)
            samples = np.concatenate([
                rank_statistics(uncertainty[known], dice[known], weights[:, known])
                for weights in bootstrap_weights(len(dice), resamples, seed)
            ])
            (value,) = rank_statistics(uncertainty[known], dice[known], np.ones((1, int(known.sum()))))
            result[region][name] = {
                "images": int(known.sum()),
                "spearman_with_dice": estimate(value[0], samples[:, 0]),
                "auroc_bad_dice": estimate(value[1], samples[:, 1]),
            }
    return result


def rank_statistics(uncertainty: Array, dice: Array, weights: Array) -> Array:
    """Spearman correlation with Dice, and AUROC for a Dice below 0.8, in resamples of images.

    Args:
        uncertainty, dice: of each image, (I,).
        weights: how often each resample holds each image, (r, I).

    Returns:
        Both numbers, (r, 2); NaN where undefined (no image, no or only bad ones, a constant).

    Example:
        >>> uncertainty, dice = np.array([0.1, 0.2, 0.4, 0.3]), np.array([0.9, 0.8, 0.5, 0.7])
        >>> rank_statistics(uncertainty, dice, np.ones((1, 4))).round(9).tolist()  # in exactly the opposite order
        [[-1.0, 1.0]]
    """
    if len(dice) == 0:
        return np.full((len(weights), 2), np.nan)
    first, second = _ranks(uncertainty, weights), _ranks(dice, weights)
    total = weights.sum(1, keepdims=True)
    first = first - divide((weights * first).sum(1, keepdims=True), total)
    second = second - divide((weights * second).sum(1, keepdims=True), total)
    scale = np.sqrt((weights * first**2).sum(1) * (weights * second**2).sum(1))
    spearman = divide((weights * first * second).sum(1), scale)
    bad = dice < BAD_DICE
    order, starts, _ = _ties(uncertainty)
    histograms = [np.add.reduceat((weights * chosen)[:, order], starts, axis=1) for chosen in (~bad, bad)]
    return np.stack([spearman, auroc(*histograms)], 1)


def _ties(values: Array) -> tuple[Array, Array, Array]:
    """Ascending order of the values, where in it each distinct value starts, and the distinct value of each."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.argsort(values, kind="stable"), np.cumsum(count) - count, group


def _ranks(values: Array, weights: Array) -> Array:
    """Ranks (r, I) of the values in resamples with multiplicities `weights`, ties (and copies) at their mean rank."""
    order, starts, group = _ties(values)
    size = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(size, 1) - 0.5 * (size - 1.0))[:, group])
