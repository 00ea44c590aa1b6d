"""Dice and Jaccard index of predicted and true lesions."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.arrays import Array, accurate_dtype


def dice_and_jaccard(true_positive: Tensor, false_positive: Tensor, false_negative: Tensor) -> tuple[Tensor, Tensor]:
    """``2 TP / (2 TP + FP + FN)`` and ``TP / (TP + FP + FN)``; both 1 where all three are 0 (both masks empty).

    Args:
        true_positive, false_positive, false_negative: numbers of pixels, floating point, of one shape.

    Returns:
        Dice and Jaccard index in [0, 1], of the type and shape of the arguments.

    Example:
        >>> dice, jaccard = dice_and_jaccard(*torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
        >>> dice.tolist(), jaccard.tolist()  # 4 / 6 and 2 / 4 for the first, two empty masks for the second
        ([0.6666666865348816, 1.0], [0.5, 1.0])
    """
    total = 2 * true_positive + false_positive + false_negative  # pixels of both masks
    one = torch.ones_like(total)
    dice = torch.where(total > 0, 2 * true_positive / total, one)
    jaccard = torch.where(total > 0, true_positive / (total - true_positive), one)
    return dice, jaccard


def segmentation_overlap(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and Jaccard index of each image; 1 where both masks are empty.

    Args:
        prediction, truth: bool or 0/1 (B, H, W).

    Returns:
        float64 (B,) twice, in [0, 1]; float32 on devices without double precision.

    Example:
        >>> prediction, truth = torch.tensor([[[1, 1, 1, 0]]]), torch.tensor([[[0, 1, 1, 1]]])
        >>> dice, jaccard = segmentation_overlap(prediction, truth)
        >>> round(dice.item(), 4), jaccard.item()  # 2 * 2 / (3 + 3) and 2 / 4
        (0.6667, 0.5)
    """
    kind = accurate_dtype(prediction.device)
    prediction, truth = prediction.bool().flatten(1), truth.bool().flatten(1)
    both = (prediction & truth).sum(1)
    false_positive, false_negative = prediction.sum(1) - both, truth.sum(1) - both
    return dice_and_jaccard(both.to(kind), false_positive.to(kind), false_negative.to(kind))


def overlap_of_outcomes(pixels: Array) -> tuple[Array, Array]:
    """Dice and Jaccard index of each image, (I,) float64, from its pixels by outcome (I, 4).

    Example:
        >>> import numpy as np
        >>> dice, jaccard = overlap_of_outcomes(np.array([[90, 1, 1, 2], [94, 0, 0, 0]]))
        >>> dice.round(4).tolist(), jaccard.tolist()
        ([0.6667, 1.0], [0.5, 1.0])
    """
    _, false_positive, false_negative, true_positive = torch.from_numpy(pixels.astype(float)).unbind(1)
    dice, jaccard = dice_and_jaccard(true_positive, false_positive, false_negative)
    return dice.numpy(), jaccard.numpy()
