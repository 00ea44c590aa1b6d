"""The joint histogram of the two variances: a split small enough to be refitted thousands of times.

A resample of the validation images changes the scale of both variances, lambda, and with them the score of every
pixel of every image. Counting pixels again for each would take hours. What a score ``u = lam N(a) + (1 - lam) N(b)``
depends on is the pair (a, b) of variances alone, so that the number of pixels of each image, outcome and small cell of
(a, b) is all that is needed: the score of a cell under any scale and lambda is one number, and a resample one matrix
product. Cells are narrow where variances are small (their edges are fourth powers), since variances are skewed; a pixel
counts with the mean variance of its cell.

The same is counted of **placebos**: maps that look like a saliency variance and cannot know anything about the errors
of this image. Only what the fused score does beyond a placebo is about saliency.

Shapes: I images, V variants (the true saliency variance and the placebos), A = 4 outcomes, K cells per variance.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.arrays import Array
from evaluation.fusion import Fusion
from evaluation.image_maps import ImageMaps, Split
from evaluation.names import IN_BAND, PREDICTIVE, SALIENCY
from evaluation.normalisation import Linear

#: The saliency variance of the image, of another image, and its own with the pixels shuffled.
VARIANTS = ("saliency", "other_image", "shuffled")
CELLS = 64
CELL_POWER = 4


def variance_cell(variance: Tensor, scale: Linear, cells: int = CELLS) -> Tensor:
    """The cell of each variance, int64 in [0, cells): edges at ``low + (high - low) (k / cells)^4``.

    Example:
        >>> variance_cell(torch.tensor([0.0, 0.02, 0.9, 7.0]), Linear(0.0, 1.0), cells=4).tolist()
        [0, 1, 3, 3]
    """
    return (scale(variance).pow_(1.0 / CELL_POWER) * cells).to(torch.int64).clamp_(max=cells - 1)


def with_other_saliency(images: Split) -> Iterator[tuple[str, ImageMaps, Tensor]]:
    """Yield each image with the saliency variance of the image before it, and the first with that of the last.

    A map of another shape is resized to the nearest pixel. An image alone is its own other. Where the maps hold
    "other_saliency_variance" (so that shares of a split pair up as the whole does) that is taken.
    """
    first: tuple[str, ImageMaps] | None = None
    before: Tensor | None = None
    for identifier, maps in images:
        given = maps.get("other_saliency_variance")
        if given is None and first is None:
            first, before = (identifier, maps), maps[SALIENCY]
            continue
        other = given if given is not None else before
        assert other is not None
        yield identifier, maps, _resized(other, maps[SALIENCY].shape)
        before = maps[SALIENCY]
    if first is not None and before is not None:
        identifier, maps = first
        yield identifier, maps, _resized(before, maps[SALIENCY].shape)


def with_partners(images: Split) -> list[tuple[str, ImageMaps]]:
    """The images with "other_saliency_variance" among their maps, in their order: to be done before a split is shared out.

    Example:
        >>> maps = {"saliency_variance": torch.tensor([[0.25]])}
        >>> other = {"saliency_variance": torch.tensor([[0.5]])}
        >>> [(name, found["other_saliency_variance"].item()) for name, found in with_partners([("a", maps), ("b", other)])]
        [('a', 0.5), ('b', 0.25)]
    """
    partners = {name: (maps, other) for name, maps, other in with_other_saliency(images)}
    return [
        (name, {**partners[name][0], "other_saliency_variance": partners[name][1]}) for name in (name for name, _ in images)
    ]


def _resized(values: Tensor, shape: torch.Size) -> Tensor:
    if values.shape == shape:
        return values
    return F.interpolate(values.reshape(1, 1, *values.shape[-2:]), size=tuple(shape[-2:]), mode="nearest")[0, 0]


def shuffled(values: Tensor, identifier: str, seed: int = 42) -> Tensor:
    """The values in another order, by chance that depends on seed and id alone; same shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{identifier}".encode()))
    order = torch.randperm(values.numel(), generator=generator).to(values.device)
    return values.reshape(-1)[order].view(values.shape)


def joint_of_image(
    identifier: str, flat: Mapping[str, Tensor], other: Tensor, fusion: Fusion, cells: int = CELLS
) -> dict[str, Array]:
    """The counts of one image.

    Args:
        identifier: of the image; seeds the shuffling.
        flat: maps (N,) as :func:`image_maps.checked_maps` gives them.
        other: saliency variance of another image, as many pixels.
        fusion: its scales place the cells.
        cells: K.

    Returns:
        "joint" (V, A, K, K) int32, predictive variance first; "cell_sums" (2, K) float64, the sums of the predictive
        and of the saliency variance over the pixels of each of their cells.
    """
    outcome = (flat["outcome"] % IN_BAND).to(torch.int64)
    pred_variance, saliency = flat[PREDICTIVE], flat[SALIENCY]
    predictive = variance_cell(pred_variance, fusion.predictive, cells)
    own = variance_cell(saliency, fusion.saliency, cells)
    variants = (own, variance_cell(other.reshape(-1), fusion.saliency, cells), shuffled(own, identifier))
    base = (outcome * cells + predictive) * cells
    size = 4 * cells * cells
    counts = [torch.bincount(base + cell, minlength=size).view(4, cells, cells) for cell in variants]
    sums = [
        torch.bincount(cell, weights=values.double(), minlength=cells)
        for cell, values in ((predictive, pred_variance), (own, saliency))
    ]
    return {
        "joint": torch.stack(counts).to(torch.int32).cpu().numpy(),
        "cell_sums": torch.stack(sums).cpu().numpy(),
    }
