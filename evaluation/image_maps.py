"""The maps of an image: what they are, their checks, and the outcome of every pixel.

The maps of an image are (H, W) tensors on one device: `mean_prediction`, `pred_variance`,
`saliency_variance`, optionally `expected_entropy` (all float32), and `true_mask` (uint8, 0 or 1); beside them
optionally the numbers `empty_cams` and `threshold` (0.5: a pixel with a larger `mean_prediction` is predicted
lesion). Images may differ in size.

Every pixel has one of four outcomes, coded ``2 * truth + predicted`` (true negative, false positive, false
negative, true positive). Every region that numbers are wanted for is a union of outcomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.names import CORRECT, PREDICTIVE, REGIONS, SALIENCY

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
        Every map as a tensor (N,), float32 but for `true_mask`, and "predicted" (N,) uint8: 1 where
        ``mean_prediction > threshold``, else 0.

    Raises:
        ValueError: maps of different shapes, NaN, an infinite value or one out of range; names image and map.

    Example:
        >>> maps = {"mean_prediction": torch.tensor([[0.5, 0.75]]), "pred_variance": torch.zeros(1, 2),
        ...         "saliency_variance": torch.zeros(1, 2), "true_mask": torch.tensor([[0, 1]])}
        >>> checked_maps("a", maps)["predicted"].tolist()
        [0, 1]
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


def outcomes(mean_prediction: Tensor, true_mask: Tensor, threshold: float = 0.5) -> Tensor:
    """The outcome ``2 * truth + predicted`` of every pixel.

    Args:
        mean_prediction: probabilities, any shape.
        true_mask: same shape; lesion where positive.
        threshold: a pixel is predicted lesion where its probability is larger.

    Returns:
        int32 codes, positions in `names.OUTCOMES`, same shape.

    Example:
        >>> outcomes(torch.tensor([0.25, 0.75, 0.5, 0.75]), torch.tensor([0, 0, 1, 1])).tolist()
        [0, 1, 2, 3]
    """
    return 2 * (true_mask > 0).to(torch.int32) + (mean_prediction > threshold).to(torch.int32)


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
