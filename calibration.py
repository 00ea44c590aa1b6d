"""Calibration of pixelwise confidence, streamed exactly: counts per image, and what follows from them.

Every pixel belongs to one of four atoms, ``2 * truth + predicted`` (true negative, false positive,
false negative, true positive). Whether a pixel is correct, and every region a figure is wanted for,
are unions of atoms, so that one array of counts ``[image, score, atom, bin]`` gives the calibration
error of any region and any subset of images, and its bootstrap, by additions alone.

Inside the ground-truth foreground every true label is 1. Comparing the *probability* with the *label*
there would measure nothing but ``1 - mean(p)``; what is compared is the *confidence* ``c = 1 - u`` of an
uncertainty score ``u`` in [0, 1] with the *correctness* of the predicted label.

Shapes: I images, S scores (or lambdas), G groups of pixels (atoms), B bins, N pixels, R resamples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

ATOMS = ("true_negative", "false_positive", "false_negative", "true_positive")
CORRECT = (0, 3)  # atoms whose predicted label equals the truth
REGIONS = {
    "foreground": (2, 3),  # ground-truth lesion: the headline region
    "predicted_foreground": (1, 3),
    "union": (1, 2, 3),
    "whole_image": (0, 1, 2, 3),
}

_BITS = 24
_ONE = 1 << _BITS  # a confidence is a whole multiple of 2**-24; see `count_confidence`
_TILE = 15 * 1024  # pixels at a time on a CPU: fewer than 2**14, see `_tally_by_bincount`; small enough for the cache
_LANES = 4  # private copies of the counters that neighbouring pixels take in turn
_PACK = 1 << 38  # one pixel, in a packed (count, sum) pair; a tile's sum stays below 2**14 * 2**24


def atoms(mean_prediction: torch.Tensor, true_mask: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Atom code ``2 * truth + predicted`` of every pixel, int32, same shape; predicted is ``p > threshold``."""
    return 2 * (true_mask > 0).to(torch.int32) + (mean_prediction > threshold).to(torch.int32)


def check_unit_interval(values: torch.Tensor, name: str) -> None:
    """Raise ValueError, naming the map, unless every value is a number in [0, 1] (NaN fails too)."""
    if values.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(values))
    if not (low >= 0.0 and high <= 1.0):
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{name} holds NaN or infinite values")
        raise ValueError(f"{name} must lie in [0, 1], found values from {low:.6g} to {high:.6g}")


def bin_index(confidence: np.ndarray, bins: int = 15) -> np.ndarray:
    """Equal-width bin ``(k / bins, (k + 1) / bins]`` of float64 confidences, 0 in the first bin.

    The edges are the float64 numbers nearest to ``k / bins``. For a few values (recalibrated ones);
    pixels are counted by :func:`count_confidence`, whose edges are the rational numbers themselves.
    """
    return np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")


def count_confidence(
    uncertainty: torch.Tensor, group: torch.Tensor, groups: int, bins: int = 15, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count pixels and add up their confidence ``c = 1 - u`` by score, group and bin, exactly.

    In float32 ``1 - u`` is a whole multiple of 2**-24 for every ``u`` in [0, 1]: above one half the
    difference is exact, below it the result lies in [0.5, 1], where float32 has that spacing. So a
    confidence is an integer of at most 25 bits, its bin follows from integer arithmetic, and sums are
    exact (in float64 up to 2**29 pixels), hence the same in any order, on any device, in any shards.

    Args:
        uncertainty: (S, N) float32 in [0, 1], on any device.
        group: (N,) integers in [0, groups), on the same device (the atom of each pixel, say).
        groups: number of groups G.
        bins: number of equal-width bins B, ``(lo, hi]``, 0 in the first.
        check: whether to verify the range; leave out only where the values are in range by construction.

    Returns:
        Counts (S, G, B) int64 and confidence sums (S, G, B) in units of 2**-24, int64, both on the CPU.

    Raises:
        ValueError: a value is NaN or outside [0, 1].
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if check:
        check_unit_interval(uncertainty, "uncertainty")
    uncertainty = uncertainty.to(torch.float32)
    scores, pixels = uncertainty.shape
    width = bins + 1  # slot 0 takes a confidence of exactly 0, which the arithmetic puts below bin 0
    dtype = torch.int32 if groups * width < 128 else torch.int64  # slot * 2**24 has to fit
    # (start << 24) - 1 + bins * m, shifted down by 24, is start + (bin of m): (lo, hi] with no rounding.
    start = ((group.to(dtype) * width + 1) << _BITS) - 1
    tally = _tally_by_bincount if uncertainty.device.type == "cpu" else _tally_by_mask
    tile = _TILE if uncertainty.device.type == "cpu" else max(pixels, 1)
    one = torch.full((1,), float(_ONE), dtype=torch.float32, device=uncertainty.device)
    count = torch.zeros(scores, groups * width, dtype=torch.int64)
    total = torch.zeros_like(count)
    for first in range(0, pixels, tile):
        # (1 - u) * 2**24 in one step and rounded once, as scaling by a power of two rounds nothing.
        confidence = torch.sub(one, uncertainty[:, first : first + tile], alpha=_ONE)
        slot = torch.add(start[first : first + tile], confidence.to(dtype), alpha=bins)
        slot >>= _BITS
        tile_count, tile_total = tally(slot, confidence, groups * width)
        count += tile_count
        total += tile_total
    count, total = (part.view(scores, groups, width) for part in (count, total))
    count[..., 1] += count[..., 0]  # the confidence sum of slot 0 is 0
    return count[..., 1:].contiguous(), total[..., 1:].contiguous()


def _tally_by_bincount(slot: torch.Tensor, scaled: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and sums (S, slots) from one weighted bincount, on a CPU; fewer than 2**14 pixels.

    Two tricks. A weight of ``2**38 + m`` carries the count above the sum, m being at most 2**24: for fewer
    than 2**14 pixels the two cannot run into each other, and their total stays below 2**52, exact in
    float64. And when most pixels share one bin, each addition waits for the one before it to reach
    memory; neighbouring pixels therefore use different copies ("lanes") of the counters.
    """
    scores, pixels = slot.shape
    slot += _lanes(scores, slots, slot.dtype)[:, :pixels]
    weight = scaled.to(torch.float64).add_(float(_PACK))
    packed = torch.bincount(slot.view(-1), weight.view(-1), minlength=scores * _LANES * slots).to(torch.int64)
    packed = packed.view(scores, _LANES, slots).sum(1)
    return packed // _PACK, packed % _PACK


@lru_cache(maxsize=4)
def _lanes(scores: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """First slot of the counters that each score and pixel of a tile uses, (S, tile)."""
    row = torch.arange(scores, dtype=dtype)[:, None]
    return (row * _LANES + torch.arange(_TILE, dtype=dtype) % _LANES) * slots


def _tally_by_mask(slot: torch.Tensor, scaled: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and sums (S, slots) by one masked integer reduction a slot, for GPUs, returned on the CPU.

    No atomic additions: deterministic, no contention where one bin holds nearly all pixels, and no
    float64 (which Metal lacks).
    """
    whole = scaled.to(torch.int64)
    count, total = [], []
    for index in range(slots):
        inside = slot == index
        count.append(inside.sum(1))
        total.append((whole * inside).sum(1))
    return torch.stack(count, 1).cpu(), torch.stack(total, 1).cpu()


def confidence_sum(scaled: torch.Tensor) -> torch.Tensor:
    """Sums counted in units of 2**-24 as float64 confidence sums; exact up to 2**29 pixels an entry."""
    return scaled.to(torch.float64) / _ONE


# Measures. All take arrays whose last axis is the bins, whatever axes (images, scores, resamples) precede.


def region_bins(count: np.ndarray, confidence: np.ndarray, region: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the atoms (axis -2) of a region: counts, correct counts and confidence sums, each (..., B)."""
    inside = list(REGIONS[region])
    right = [atom for atom in inside if atom in CORRECT]
    return count[..., inside, :].sum(-2), count[..., right, :].sum(-2), confidence[..., inside, :].sum(-2)


def _divide(numerator, denominator):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)


def expected_calibration_error(count, correct, confidence) -> np.ndarray:
    """``sum_b n_b / N * |accuracy_b - mean confidence_b|``; NaN where N = 0, an empty bin adds nothing.

    The plug-in estimate is biased upwards: the absolute value of noise is positive, so that even a
    perfectly calibrated score shows up to about ``0.4 sqrt(B / N)`` for N independent pixels (and more for
    the correlated pixels of one image). Compare scores on the same pixels, and read a value of one image with care.
    Naeini et al., AAAI 2015; Guo et al., ICML 2017.
    """
    return _divide(np.abs(np.asarray(correct) - confidence).sum(-1), np.asarray(count).sum(-1))


def signed_gap(count, correct, confidence) -> np.ndarray:
    """Mean confidence minus accuracy: positive is overconfident; NaN without pixels.

    Where the gap has one sign in every bin, ECE equals its absolute value under any binning.
    """
    return _divide((np.asarray(confidence) - correct).sum(-1), np.asarray(count).sum(-1))


def maximum_calibration_error(count, correct, confidence) -> np.ndarray:
    """Largest ``|accuracy_b - mean confidence_b|`` over non-empty bins; NaN without pixels. Naeini et al., 2015."""
    gap = np.abs(_divide(np.asarray(correct) - confidence, count))
    return np.where(np.asarray(count).sum(-1) > 0, np.nan_to_num(gap, nan=0.0).max(-1), np.nan)


def average_calibration_error(count, correct, confidence) -> np.ndarray:
    """Unweighted mean of ``|accuracy_b - mean confidence_b|`` over non-empty bins; NaN without pixels.

    Neumann et al., "Relaxed softmax", 2018.
    """
    gap = np.abs(_divide(np.asarray(correct) - confidence, count))
    return _divide(np.nan_to_num(gap, nan=0.0).sum(-1), (np.asarray(count) > 0).sum(-1))


def reliability(count, correct, confidence) -> dict:
    """Reliability table of one score: per bin its edges, count, mean confidence and accuracy (NaN when empty)."""
    edges = np.arange(len(count) + 1) / len(count)
    return {
        "lower": edges[:-1],
        "upper": edges[1:],
        "count": np.asarray(count),
        "confidence": _divide(confidence, count),
        "accuracy": _divide(correct, count),
    }


# The bootstrap


def bootstrap_weights(images: int, resamples: int = 10_000, seed: int = 42, chunk: int = 256):
    """Yield image-level resamples as weights (r, I) float64, at most `chunk` rows at a time, `resamples` in all.

    Pixels of one image depend on each other, images do not: the image is the unit. A row says how often each
    image was drawn, with replacement, as many as there are. The same arguments give the same rows, so that
    statistics from several calls are paired.
    """
    if images < 1:
        raise ValueError("no images to resample")
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(0, images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def bootstrap(counters: dict, statistics, resamples: int = 10_000, seed: int = 42, chunk: int = 256) -> dict:
    """Statistics of resampled counters; the resampling is one matrix product, whose memory `chunk` bounds.

    Args:
        counters: arrays (I, ...) that add up over images; float32 ones are multiplied in float32.
        statistics: maps a dictionary of such arrays, summed, (r, ...), to a dictionary of arrays (r, ...).
        resamples, seed, chunk: see :func:`bootstrap_weights`.

    Returns:
        What `statistics` returns, (R, ...) each, in the order of the resamples. Efron & Tibshirani, 1993.
    """
    shapes = {name: np.shape(value)[1:] for name, value in counters.items()}
    flat = {}
    for name, value in counters.items():
        value = np.asarray(value)
        dtype = np.float32 if value.dtype == np.float32 else np.float64
        flat[name] = np.ascontiguousarray(value, dtype=dtype).reshape(len(value), -1)
    results = {}
    for weights in bootstrap_weights(len(next(iter(flat.values()))), resamples, seed, chunk):
        summed = {
            name: (weights.astype(value.dtype, copy=False) @ value).reshape((len(weights),) + shapes[name])
            for name, value in flat.items()
        }
        for name, value in statistics(summed).items():
            results.setdefault(name, []).append(np.asarray(value, dtype=np.float64))
    return {name: np.concatenate(parts) for name, parts in results.items()}


def interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Percentile interval over axis 0, shape (2, ...); NaN samples (an empty region) are left out.

    It covers in about 95 % of repetitions for differences and for errors well above their noise. The ECE of a nearly
    calibrated score is biased upwards (see :func:`expected_calibration_error`), its resamples are so once
    more, and the interval then lies above the truth: read the paired difference instead, in which the bias of
    two such scores largely cancels.
    """
    samples = np.asarray(samples, dtype=float)
    tail = (1.0 - level) / 2.0
    empty = np.isnan(samples).all(0)
    filled = np.where(empty, 0.0, samples)
    bounds = np.nanquantile(filled, [tail, 1.0 - tail], axis=0)
    return np.where(empty, np.nan, bounds)


def verdict(difference: float, low: float, high: float) -> str:
    """'improves', 'degrades' or 'no difference shown', from a paired difference of errors and its interval.

    An interval that keeps away from 0 by less than 2**-24, the step of a confidence, shows rounding.
    """
    if np.isfinite([difference, low, high]).all():
        if high < -1.0 / _ONE:
            return "improves"
        if low > 1.0 / _ONE:
            return "degrades"
    return "no difference shown"


def jsonable(value):
    """Plain Python containers and numbers, floats at full precision, NaN and infinities as None."""
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
