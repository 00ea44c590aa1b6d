"""Every uncertainty score of an image, from its maps, and how uncertain its most uncertain part is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.arrays import Array
from evaluation.fusion import Fusion, fuse
from evaluation.image_maps import ImageMaps
from evaluation.names import PREDICTIVE, SALIENCY


def uncertainty_scores(maps: ImageMaps, fusion: Fusion) -> dict[str, Tensor]:
    """Every score of an image; its confidence is ``1 - score``.

    The variances are normalised as `fusion` says. The baselines keep their natural scale, in which they
    reach their bound only at their largest possible value: entropies in nats over ln 2, and
    ``1 - max(p, 1 - p)``, whose confidence is the probability of the predicted label, in [0.5, 1].
    They are read as they come, with no constant from the data, neither favoured nor handicapped by
    a rescaling; after recalibration only the ranking of the pixels matters, for all scores alike.

    Args:
        maps: as :mod:`evaluation.image_maps` describes, of any shape.
        fusion: fitted on validation.

    Returns:
        float32 maps in [0, 1] by the names of `names.SCORES`, in that order. Mutual information is the predictive
        entropy minus `expected_entropy`, at least 0 (rounding), and is left out where `expected_entropy` is missing.

    Example:
        >>> from evaluation.normalisation import Linear
        >>> maps = {"mean_prediction": torch.tensor([0.5, 0.5]), "pred_variance": torch.tensor([0.25, 0.0]),
        ...         "saliency_variance": torch.tensor([0.0, 0.0])}
        >>> for name, score in uncertainty_scores(maps, Fusion(Linear(0.0, 0.25), Linear(0.0, 1.0), "convex", 0.5)).items():
        ...     print(name, score.tolist())
        predictive_variance [1.0, 0.0]
        saliency_variance [0.0, 0.0]
        fused [0.5, 0.0]
        predictive_entropy [1.0, 1.0]
        one_minus_max_probability [0.5, 0.5]
    """
    probability = maps["mean_prediction"]
    predictive, saliency = fusion.normalise(maps[PREDICTIVE], maps[SALIENCY])
    entropy = binary_entropy(probability)
    scores = {
        "predictive_variance": predictive,
        "saliency_variance": saliency,
        "fused": fuse(predictive, saliency, fusion.rule, fusion.parameter),
        "predictive_entropy": (entropy / np.log(2.0)).clamp_(0.0, 1.0),
    }
    if "expected_entropy" in maps:
        scores["mutual_information"] = ((entropy - maps["expected_entropy"]) / np.log(2.0)).clamp_(0.0, 1.0)
    scores["one_minus_max_probability"] = 1.0 - torch.maximum(probability, 1.0 - probability)
    return scores


def binary_entropy(probability: Tensor) -> Tensor:
    """``-p ln p - (1 - p) ln(1 - p)`` in nats, 0 at p = 0 and p = 1.

    Example:
        >>> [round(value, 4) for value in binary_entropy(torch.tensor([0.0, 0.5, 1.0])).abs().tolist()]
        [0.0, 0.6931, 0.0]
    """
    other = 1.0 - probability
    negative: Tensor = torch.special.xlogy(probability, probability) + torch.special.xlogy(other, other)
    return -negative


# ---------------------------------------------------------------- one number for an image

PATCHES = 8  # the side of the largest patch is this part of the shorter side of the image


def largest_uncertainties(scores: Tensor, shape: Sequence[int]) -> dict[str, Array]:
    """How uncertain the most uncertain part of an image is, by each score.

    Args:
        scores: (S, N), on any device.
        shape: of the image, (H, W); of maps with another number of dimensions all pixels form one row.

    Returns:
        "quantile95" (S,) float32: the smallest value that at least 95 % of the pixels do not exceed, one of their values;
        "largest_patch" (S,) float32: the largest mean over a square of k x k pixels inside the image, at any place, with
        ``k = max(1, min(H, W) // 8)``.

    Example:
        >>> scores = torch.zeros(1, 20 * 20)
        >>> scores[0, :21] = 1.0  # the first row and a pixel of the second; k = 2
        >>> {name: values.tolist() for name, values in largest_uncertainties(scores, (20, 20)).items()}
        {'quantile95': [1.0], 'largest_patch': [0.75]}
    """
    pixels = scores.shape[1]
    rank = pixels - pixels // 20  # 95 % of the pixels, rounded up
    quantile = [_kth_smallest(row, rank) for row in scores.cpu().numpy()]
    height, width = shape if len(shape) == 2 else (1, pixels)
    side = max(1, min(height, width) // PATCHES)
    patch = scores.view(-1, height, width)
    for axis in (2, 1):
        patch = window_sums(patch, side, axis)
    return {"quantile95": np.array(quantile, np.float32), "largest_patch": (patch.amax((1, 2)) / side**2).cpu().numpy()}


def _kth_smallest(values: Array, rank: int) -> float:
    """The value of a rank, from 1, near the upper end: only values above one that a sample puts below it are partitioned."""
    sample = values[::16]
    guess = np.partition(sample, int(0.93 * len(sample)))[int(0.93 * len(sample))]
    above = values[values > guess]
    place = rank - (len(values) - len(above))  # among those
    return float(np.partition(above, place - 1)[place - 1] if place > 0 else np.partition(values, rank - 1)[rank - 1])


def window_sums(values: Tensor, length: int, axis: int) -> Tensor:
    """Sums over all windows along an axis, by adding windows of half the length: log2(length) additions of whole maps.

    Args:
        values: floating point, any shape.
        length: of a window, from 1 to the size of the axis.
        axis: along which.

    Returns:
        The sums, ``length - 1`` fewer along the axis.

    Example:
        >>> window_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3, 0).tolist()
        [6.0, 9.0]
    """
    if length == 1:
        return values
    half, places = window_sums(values, length // 2, axis), values.shape[axis] - length + 1
    total = half.narrow(axis, 0, places) + half.narrow(axis, length // 2, places)
    return total + values.narrow(axis, length - 1, places) if length % 2 else total
