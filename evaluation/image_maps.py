"""The maps of an image: what they are, their checks, and the outcome of every pixel.

The maps of an image are (H, W) tensors on one device: `mean_prediction`, `pred_variance`,
`saliency_variance`, optionally `expected_entropy` (all float32), and `true_mask` (uint8, 0 or 1); beside them
optionally the numbers `empty_cams`, `threshold` (0.5: a pixel with a larger `mean_prediction` is predicted lesion) and
`pass_dice` (mean Dice of two passes). Images may differ in size.

Every pixel has one of four outcomes, coded ``2 * truth + predicted`` (true negative, false positive, false negative,
true positive), and lies inside or outside the band along the predicted boundary: 4 is added to the code of a pixel
inside. Every region that numbers are wanted for is a union of these eight codes, see `names.REGIONS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.names import BAND_REACH, BAND_SIDE, CORRECT, IN_BAND, PREDICTIVE, REGIONS, SALIENCY

#: The maps of one image by name.
ImageMaps = Mapping[str, Any]
#: A split, or a share of one: pairs of id and maps. It is read several times where a docstring says so.
Split = Iterable[tuple[str, ImageMaps]]

#: Pixels handled at a time on a CPU: temporaries stay in its cache, and see :mod:`evaluation.calibration`.
CPU_PIECE = 15 * 1024
_PIECE = 1 << 19  # on other devices
_MAPS = ("mean_prediction", PREDICTIVE, SALIENCY, "expected_entropy", "true_mask")


# ---------------------------------------------------------------- checks


def check_unit_interval(values: Tensor, name: str) -> None:
    """Raise unless every value is a number in [0, 1].

    Args:
        values: any shape; may be empty.
        name: of the map, for the message.

    Raises:
        ValueError: a value is NaN, infinite or out of range.
    """
    if values.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(values))
    if not (low >= 0.0 and high <= 1.0):
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{name} holds NaN or infinite values")
        raise ValueError(f"{name} must lie in [0, 1], found values from {low:.6g} to {high:.6g}")


def check_variance(values: Tensor, name: str) -> None:
    """Raise unless all values are finite and not negative.

    Args:
        values: any shape; may be empty.
        name: of the map, for the message.

    Raises:
        ValueError: a value is NaN, infinite or negative.
    """
    if values.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(values))
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"{name} holds NaN or infinite values")
    if low < 0:
        raise ValueError(f"{name} must not be negative, found {low:.6g}")


def checked_maps(identifier: str, maps: ImageMaps) -> dict[str, Tensor]:
    """The maps of an image, checked and flattened.

    Args:
        identifier: of the image, for messages.
        maps: as the module describes; not changed.

    Returns:
        Every map as a tensor (N,), float32 but for `true_mask`; "predicted" (N,) uint8, 1 where
        ``mean_prediction > threshold``, else 0; and "outcome" (N,) int32, see :func:`outcomes`. Maps that are not
        (H, W) have no boundary band.

    Raises:
        ValueError: maps of different shapes, NaN, an infinite value or one out of range; names image and map.

    Example:
        >>> maps = {"mean_prediction": torch.tensor([[0.5, 0.75]]), "pred_variance": torch.zeros(1, 2),
        ...         "saliency_variance": torch.zeros(1, 2), "true_mask": torch.tensor([[0, 1]])}
        >>> flat = checked_maps("a", maps)
        >>> flat["predicted"].tolist(), flat["outcome"].tolist()  # both pixels lie in the band
        ([0, 1], [4, 7])
    """
    shape = maps["mean_prediction"].shape
    flat: dict[str, Tensor] = {}
    for name in _MAPS:
        if name not in maps and name == "expected_entropy":
            continue
        if maps[name].shape != shape:
            raise ValueError(f"{identifier}: {name} is {tuple(maps[name].shape)}, mean_prediction {tuple(shape)}")
        flat[name] = maps[name].reshape(-1) if name == "true_mask" else maps[name].reshape(-1).to(torch.float32)
    check_unit_interval(flat["mean_prediction"], f"{identifier}: mean_prediction")
    for name in (PREDICTIVE, SALIENCY, "expected_entropy"):
        if name in flat:
            check_variance(flat[name], f"{identifier}: {name}")
    mask = flat["true_mask"]
    if mask.numel() and int(mask.max()) > 1:
        raise ValueError(f"{identifier}: true_mask holds values other than 0 and 1")
    flat["predicted"] = (flat["mean_prediction"] > maps.get("threshold", 0.5)).to(torch.uint8)
    band = boundary_band(flat["predicted"].view(shape)).view(-1) if len(shape) == 2 else None
    flat["outcome"] = outcomes(flat["predicted"], mask, band=band)
    return flat


def pieces(pixels: int, device: torch.device) -> list[slice]:
    """Slices of `pixels` pixels, so that temporaries stay small for images of any size.

    Example:
        >>> pieces(20_000, torch.device("cpu"))
        [slice(0, 15360, None), slice(15360, 20000, None)]
    """
    step = CPU_PIECE if device.type == "cpu" else _PIECE
    return [slice(first, min(first + step, pixels)) for first in range(0, pixels, step)]


# ---------------------------------------------------------------- outcomes


def outcomes(mean_prediction: Tensor, true_mask: Tensor, threshold: float = 0.5, band: Tensor | None = None) -> Tensor:
    """The outcome ``2 * truth + predicted + 4 * band`` of every pixel.

    Args:
        mean_prediction: probabilities, any shape.
        true_mask: same shape; lesion where positive.
        threshold: a pixel is predicted lesion where its probability is larger.
        band: same shape, 1 inside the boundary band and 0 outside; None leaves all pixels outside.

    Returns:
        int32 codes, positions in `names.OUTCOMES`, same shape.

    Example:
        >>> outcomes(torch.tensor([0.25, 0.75, 0.5, 0.75]), torch.tensor([0, 0, 1, 1])).tolist()
        [0, 1, 2, 3]
        >>> outcomes(torch.tensor([0.25, 0.75]), torch.tensor([0, 0]), band=torch.tensor([0, 1])).tolist()
        [0, 5]
    """
    code = 2 * (true_mask > 0).to(torch.int32) + (mean_prediction > threshold).to(torch.int32)
    return code if band is None else code.add_(band.to(torch.int32), alpha=IN_BAND)


def band_reach(height: int, width: int) -> int:
    """How far the boundary band reaches, in pixels: ``max(1, round(side * 3 / 128))`` of the shorter side.

    Example:
        >>> band_reach(128, 128), band_reach(256, 300), band_reach(24, 24)
        (3, 6, 1)
    """
    return max(1, round(min(height, width) * BAND_REACH / BAND_SIDE))


def boundary_band(predicted: Tensor) -> Tensor:
    """The band along the predicted boundary: pixels with one of the other label within :func:`band_reach` of them.

    The distance is Chebyshev's, the larger of those along rows and columns: a pixel lies in the band where the square
    window around it, as far as the image goes, holds both labels. Where one label is predicted everywhere, there is none.

    Args:
        predicted: labels 0 and 1, (H, W) uint8.

    Returns:
        1 inside the band and 0 outside, (H, W) uint8.

    Example:
        >>> predicted = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 2, dtype=torch.uint8)  # the reach is 1
        >>> boundary_band(predicted).tolist()
        [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0]]
    """
    height, width = predicted.shape
    reach = band_reach(height, width)
    window = 2 * reach + 1
    seen = torch.stack([predicted, 1 - predicted])  # which labels the window around each pixel holds
    for axis, size in ((1, height), (2, width)):
        # The maximum over a window of 2 w is that over two of w side by side; the last two overlap.
        padding = (0, 0, reach, reach) if axis == 1 else (reach, reach)
        seen, length = torch.nn.functional.pad(seen, padding), 1
        while 2 * length <= window:
            rest = seen.shape[axis] - length
            seen, length = seen.narrow(axis, 0, rest) | seen.narrow(axis, length, rest), 2 * length
        seen = seen.narrow(axis, 0, size) | seen.narrow(axis, window - length, size)
    return seen[0] & seen[1]


def pixels_in_region(outcome: Tensor, region: str) -> Tensor:
    """Numbers of the pixels of a region, ascending int64, from the outcomes (N,) of all pixels.

    Example:
        >>> pixels_in_region(torch.tensor([0, 3, 2, 1]), "foreground").tolist()
        [1, 2]
    """
    inside = torch.zeros_like(outcome, dtype=torch.bool)
    for code in REGIONS[region]:
        inside |= outcome == code
    return inside.nonzero().view(-1)


def wrong_pixels(outcome: Tensor) -> Tensor:
    """Whether the predicted label of each pixel is wrong, bool, same shape as `outcome`.

    Example:
        >>> wrong_pixels(torch.tensor([0, 1, 2, 3])).tolist()
        [False, True, True, False]
    """
    right = torch.zeros_like(outcome, dtype=torch.bool)
    for code in CORRECT:
        right |= outcome == code
    return ~right
