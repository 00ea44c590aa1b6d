"""What is accumulated over the passes while they stream by: moments, and how far the passes agree.

Shapes: K passes of one chunk, T passes in all, B images, H W pixels.

Reference: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm
for computing sample variances", 1979.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Streaming mean and population variance over passes (Welford's update).

    ``mean += (x - mean) / n`` and ``M2 += (x - mean_before)^2 (n - 1) / n``:
    the second form never decreases, so the variance is never negative, and
    a constant sequence has variance exactly zero. The passes are taken one by
    one in their order, so chunks of any length give the same bits.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))  # two passes of two pixels
        >>> moments.mean, moments.variance()
        (tensor([2., 5.]), tensor([1., 0.]))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.empty(0)

    def update(self, values: Tensor) -> None:
        """Add the passes along the first axis of ``values`` (K, ...)."""
        for x in values:
            self.count += 1
            if self.count == 1:
                self.mean, self.squares = x.clone(), torch.zeros_like(x)
                continue
            delta = x - self.mean
            self.mean.add_(delta, alpha=1.0 / self.count)
            self.squares.addcmul_(delta, delta, value=(self.count - 1) / self.count)

    def variance(self) -> Tensor:
        """Sum of squared deviations over the number of passes; zero for one pass."""
        return self.squares / self.count


class PassDice:
    """Streaming mean pairwise Dice between the lesions that the passes predict, as a ratio of sums.

    With ``b_t`` the lesion of pass t, ``sum_{t < t'} 2 |b_t and b_t'| / sum_{t < t'} (|b_t| + |b_t'|)``. A pixel
    that n of T passes predict lies in n (n - 1) / 2 of the intersections, and every pass is in T - 1 pairs, so this is
    ``sum n (n - 1) / ((T - 1) sum n)`` over the pixels: whole numbers, the same in any order and in any chunks.

    Example:
        >>> agreement = PassDice()
        >>> agreement.update(torch.tensor([[[[True, True, False]]], [[[True, False, False]]]]))  # two passes of an image
        >>> agreement.value()  # 2 * 1 / (2 + 1)
        tensor([0.6667], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.passes = 0
        self.count = torch.empty(0)

    def update(self, predicted: Tensor) -> None:
        """Add the passes along the first axis of ``predicted``, bool (K, B, H, W)."""
        count = predicted.sum(0, dtype=torch.int32)
        self.count = self.count + count if self.passes else count
        self.passes += len(predicted)

    def value(self) -> Tensor:
        """float64 (B,), in [0, 1]; 1 where no pass predicts any lesion, and for one pass. On Metal float32."""
        count = self.count.to(torch.int64).flatten(1)
        shared, size = (count * (count - 1)).sum(1), (self.passes - 1) * count.sum(1)
        kind = torch.float32 if count.device.type == "mps" else torch.float64
        ratio = shared.to(kind) / size.clamp_min(1).to(kind)
        return torch.where(size > 0, ratio, torch.ones_like(ratio))
