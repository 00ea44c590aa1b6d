"""Normalisations: a variance to [0, 1], with constants from the maps of the validation split.

A normalisation is fitted to the distribution of all validation pixels. Called with a float32 map, it returns a
float32 map in [0, 1] of the same shape on the same device, and leaves its argument alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evaluation.arrays import Array
from evaluation.image_maps import Split, check_variance
from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.ranking import HISTOGRAM_BINS, add_histogram, bin_values, histogram_bin


@dataclass(frozen=True)
class Linear:
    """``(v - low) / (high - low)`` in float32, clipped to [0, 1]; all zeros where high equals low.

    `low` maps to 0 and `high` to 1 exactly.

    Example:
        >>> Linear(2.0, 6.0)(torch.tensor([1.0, 2.0, 3.0, 7.0])).tolist()
        [0.0, 0.0, 0.25, 1.0]
    """

    low: float
    high: float

    def __call__(self, variance: Tensor) -> Tensor:
        """The normalised variance."""
        if not self.high > self.low:
            return torch.zeros_like(variance)
        # A divisor in a tensor: by a plain number, some devices multiply with its rounded reciprocal,
        # and the last bit (the bin, for a value at an edge) would depend on the device.
        span = float(np.float32(self.high) - np.float32(self.low))
        divisor = torch.full((1,), span, dtype=variance.dtype, device=variance.device)
        return (variance - self.low).div_(divisor).clamp_(0.0, 1.0)

    def outside(self, variance: Tensor) -> int:
        """How many pixels lie outside [low, high], that is, are clipped."""
        return int(((variance < self.low) | (variance > self.high)).sum())


@dataclass(frozen=True)
class Rank(Linear):
    """Share of the validation pixels below a value, ties counted half, to the width of a histogram bin."""

    table: Array = field(repr=False, compare=False)  # (F,) float32
    unit: float = 1.0  # see `Distribution`

    def __call__(self, variance: Tensor) -> Tensor:
        """The normalised variance."""
        return torch.from_numpy(self.table).to(variance.device)[histogram_bin(variance / self.unit)]


@dataclass(frozen=True)
class Distribution:
    """Of all pixels of one variance over a split: minimum, maximum, and pixels by histogram bin (F,).

    The histogram is that of the variance divided by `unit`, the power of two that no value exceeds; 1 for smaller values.
    """

    low: float
    high: float
    histogram: Array = field(repr=False)
    unit: float = field(default=1.0, repr=False)

    @property
    def flat(self) -> bool:
        """Whether all pixels have one value, so that no scale can be taken from them."""
        return self.low == self.high


def distributions(images: Split) -> dict[str, Distribution]:
    """The distributions of the predictive and of the saliency variance over a split.

    Args:
        images: pairs of id and maps, of which only the two variances are read: once, and again where one exceeds 1, as a
            score of another kind may.

    Returns:
        The distributions by name of the variance.

    Raises:
        ValueError: a variance is NaN, infinite or negative (image and map are named), or there is no image.

    Example:
        >>> maps = {"pred_variance": torch.tensor([0.25, 0.5]), "saliency_variance": torch.tensor([0.0, 0.125])}
        >>> found = distributions([("a", maps)])
        >>> found["pred_variance"]
        Distribution(low=0.25, high=0.5)
        >>> int(found["pred_variance"].histogram.sum())
        2
    """
    found = _distributions(images, {})
    units = {name: 2.0 ** np.ceil(np.log2(one.high)) for name, one in found.items() if one.high > 1.0}
    return _distributions(images, units) if units else found


def _distributions(images: Split, units: Mapping[str, float]) -> dict[str, Distribution]:
    """The same with these units, by name of the variance."""
    names = (PREDICTIVE, SALIENCY)
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    histogram: dict[str, Tensor] = {}
    for identifier, maps in images:
        for name in names:
            check_variance(maps[name], f"{identifier}: {name}")
            if name not in histogram:
                histogram[name] = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=maps[name].device)
            smallest, largest = (float(value) for value in torch.aminmax(maps[name]))
            low[name], high[name] = min(low.get(name, np.inf), smallest), max(high.get(name, -np.inf), largest)
            add_histogram(histogram[name], histogram_bin(maps[name] / units.get(name, 1.0)))
    if not histogram:
        raise ValueError("the validation split holds no image to take normalisation constants from")
    return {
        name: Distribution(low[name], high[name], histogram[name].cpu().numpy(), float(units.get(name, 1.0))) for name in names
    }


def min_max(distribution: Distribution) -> Linear:
    """From the smallest validation value to the largest: the study's normalisation.

    Example:
        >>> min_max(Distribution(0.25, 0.5, np.zeros(HISTOGRAM_BINS)))
        Linear(low=0.25, high=0.5)
    """
    return Linear(distribution.low, distribution.high)


def robust_quantile(distribution: Distribution, tail: float = 0.01) -> Linear:
    """From the `tail` quantile of the validation pixels to that of ``1 - tail``, so that one extreme pixel sets no scale."""
    cumulated = np.cumsum(distribution.histogram) / distribution.histogram.sum()
    low, high = (distribution.unit * bin_values()[np.searchsorted(cumulated, level)] for level in (tail, 1.0 - tail))
    return Linear(float(low), float(high))


def rank(distribution: Distribution) -> Rank:
    """Empirical distribution function of the validation pixels: uniform on validation, only their order matters."""
    middle = np.cumsum(distribution.histogram) - 0.5 * distribution.histogram
    table = (middle / distribution.histogram.sum()).astype(np.float32)
    return Rank(distribution.low, distribution.high, table, distribution.unit)


NORMALISATIONS = {"min_max": min_max, "robust_quantile": robust_quantile, "rank": rank}
