"""Flips at test time: how much a prediction changes under the eight symmetries of a square, without any dropout.

Reference: Wang et al., "Aleatoric uncertainty estimation with test-time
augmentation for medical image segmentation", Neurocomputing 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.logits import ToLogits, binary_logits
from inference.moments import Moments
from inference.precision import float32_convolutions

#: Quarter turns, and whether the columns are flipped first.
SYMMETRIES = tuple((turns, flipped) for flipped in (False, True) for turns in range(4))

#: Pixels of the views that are computed together.
PIXELS = 1 << 18


def turned(x: Tensor, turns: int, flipped: bool) -> Tensor:
    """x (..., H, W), its columns flipped where asked, then turned by quarter turns.

    Example:
        >>> turned(torch.tensor([[1, 2], [3, 4]]), 1, True).tolist()
        [[1, 3], [2, 4]]
    """
    return torch.rot90(x.flip(-1) if flipped else x, turns, (-2, -1))


def turned_back(x: Tensor, turns: int, flipped: bool) -> Tensor:
    """The inverse of :func:`turned`."""
    x = torch.rot90(x, -turns, (-2, -1))
    return x.flip(-1) if flipped else x


@torch.no_grad()
def flip_variance(model: nn.Module, images: Tensor, to_logits: ToLogits = binary_logits) -> Tensor:
    """Population variance of the probability over the eight flips and quarter turns of each image.

    The network is in evaluation mode: no dropout, nothing random. Images are computed one by one, in
    float32, so that the map of an image depends on no other.

    Args:
        model: maps (K, C, H, W) to logits as for :func:`uncertainty.uncertainty_maps`; its modes are left as they were.
        images: float (B, C, H, W) with H equal to W, normalised as the model expects.
        to_logits: makes logits (K, 1, H, W) of the model's output.

    Returns:
        float32 (B, H, W), in [0, 0.25]; zero for a network that commutes with flips and turns.

    Raises:
        ValueError: the images are not square, or the probabilities not finite.

    Example:
        >>> pointwise = nn.Conv2d(1, 1, 1)
        >>> flip_variance(pointwise, torch.rand(1, 1, 4, 4)).max()
        tensor(0.)
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"flips and quarter turns need square images, not {height} x {width}")
    modes = [(module, module.training) for module in model.modules()]
    together = max(1, min(len(SYMMETRIES), PIXELS // max(height * width, 1)))  # a rule of the image size alone
    rows = []
    model.eval()
    try:
        with float32_convolutions("ieee"):
            for image in images:
                moments = Moments()
                for first in range(0, len(SYMMETRIES), together):
                    some = SYMMETRIES[first : first + together]
                    logits = to_logits(model(torch.stack([turned(image, *symmetry) for symmetry in some])))
                    probability = torch.sigmoid(logits[:, 0].float())
                    moments.update(torch.stack([turned_back(p, *symmetry) for p, symmetry in zip(probability, some)]))
                rows.append(moments.variance())
    finally:
        for module, mode in modes:
            module.training = mode
    variance = torch.stack(rows) if rows else images.new_zeros(0, height, width)
    if not variance.isfinite().all():
        raise ValueError("the predictions of flipped images are not finite")
    return variance
