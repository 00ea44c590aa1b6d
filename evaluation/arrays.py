"""What the arithmetic of all modules shares: the type of an array, division, precision, plain numbers for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def divide(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Array:
    """Quotient in float64 without a warning: NaN for 0 / 0, an infinity for any other number over 0.

    Example:
        >>> divide([1, 0, 1], [2, 0, 0]).tolist()
        [0.5, nan, inf]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float))


def accurate_dtype(device: torch.device) -> torch.dtype:
    """The most accurate floating-point type of a device: float64, but float32 on Metal, which has no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def jsonable(value: Any) -> Any:
    """Plain Python containers and numbers, floats at full precision, NaN and infinities as None.

    Example:
        >>> jsonable({"ece": np.float64(0.25), "interval": np.array([0.125, np.nan]), "images": (np.int64(3),)})
        {'ece': 0.25, 'interval': [0.125, None], 'images': [3]}
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
