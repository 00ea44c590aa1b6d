"""Calibration of pixelwise confidence, streamed exactly: counts by bin, and the errors that follow from them.

Inside the ground-truth foreground every true label is 1. Comparing the *probability* with the *label*
there would measure nothing but ``1 - mean(p)``; what is compared is the *confidence* ``c = 1 - u`` of an
uncertainty score ``u`` in [0, 1] with the *correctness* of the predicted label.

One array of counts ``[image, score, outcome, bin]`` gives the calibration error of any region (a union of
outcomes, see :mod:`evaluation.image_maps`) and of any subset of images, and its bootstrap, by additions alone.

Shapes: S scores (or lambdas), G groups of pixels (outcomes, say), B bins, N pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.arrays import Array, divide
from evaluation.image_maps import CPU_PIECE, check_unit_interval
from evaluation.names import CORRECT, OUTCOMES, REGIONS

_BITS = 24
_ONE = 1 << _BITS  # a confidence is a whole multiple of 2**-24; see `count_confidence`
_LANES = 4  # private copies of the counters that neighbouring pixels take in turn
_PACK = 1 << 38  # one pixel, in a packed (count, sum) pair; a tile's sum stays below 2**14 * 2**24


# ---------------------------------------------------------------- counting


def count_confidence(
    uncertainty: Tensor, group: Tensor, groups: int, bins: int = 15, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Count pixels and add up their confidence ``c = 1 - u`` by score, group and bin, exactly.

    In float32 ``1 - u`` is a whole multiple of 2**-24 for every ``u`` in [0, 1]: above one half the
    difference is exact, below it the result lies in [0.5, 1], where float32 has that spacing. So a
    confidence is an integer of at most 25 bits, its bin follows from integer arithmetic, and sums are
    exact (in float64 up to 2**29 pixels), hence the same in any order, on any device, in any shards.

    Args:
        uncertainty: (S, N) float32 in [0, 1], on any device.
        group: (N,) integers in [0, groups), on the same device (the outcome of each pixel, say).
        groups: number of groups G.
        bins: number of equal-width bins B, ``(lo, hi]``, 0 in the first.
        check: whether to verify the range; leave out only where the values are in range by construction.

    Returns:
        Counts (S, G, B) int64 and confidence sums (S, G, B) in units of 2**-24, int64, both on the CPU.

    Raises:
        ValueError: a value is NaN or outside [0, 1].

    Example:
        >>> uncertainty = torch.tensor([[1.0, 0.5, 0.25, 0.0]])  # confidences 0, 0.5, 0.75, 1
        >>> count, total = count_confidence(uncertainty, torch.tensor([0, 1, 1, 1]), groups=2, bins=2)
        >>> count[0].tolist()
        [[1, 0], [1, 2]]
        >>> confidence_sum(total)[0].tolist()
        [[0.0, 0.0], [0.5, 1.75]]
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if check:
        check_unit_interval(uncertainty, "uncertainty")
    uncertainty = uncertainty.to(torch.float32)
    scores, pixels = uncertainty.shape
    width = bins + 1  # slot 0 takes a confidence of exactly 0, which the arithmetic puts below bin 0
    dtype = torch.int32 if groups * width <= 128 else torch.int64  # slot * 2**24 + 2**24 - 1 has to fit
    # (start << 24) - 1 + bins * m, shifted down by 24, is start + (bin of m): (lo, hi] with no rounding.
    start = ((group.to(dtype) * width + 1) << _BITS) - 1
    tally = _tally_by_bincount if uncertainty.device.type == "cpu" else _tally_by_mask
    tile = CPU_PIECE if uncertainty.device.type == "cpu" else max(pixels, 1)
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


def _tally_by_bincount(slot: Tensor, scaled: Tensor, slots: int) -> tuple[Tensor, Tensor]:
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
def _lanes(scores: int, slots: int, dtype: torch.dtype) -> Tensor:
    """First slot of the counters that each score and pixel of a tile uses, (S, tile)."""
    row = torch.arange(scores, dtype=dtype)[:, None]
    return (row * _LANES + torch.arange(CPU_PIECE, dtype=dtype) % _LANES) * slots


def _tally_by_mask(slot: Tensor, scaled: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Counts and sums (S, slots) by one masked integer reduction per slot, for GPUs, returned on the CPU.

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


def confidence_sum(scaled: Tensor) -> Tensor:
    """Sums counted in units of 2**-24 as float64 confidence sums; exact up to 2**29 pixels per entry.

    Example:
        >>> confidence_sum(torch.tensor([2**24, 2**22])).tolist()
        [1.0, 0.25]
    """
    return scaled.to(torch.float64) / _ONE


def bin_index(confidence: Array, bins: int = 15) -> Array:
    """Equal-width bin ``(k / bins, (k + 1) / bins]`` of float64 confidences, 0 in the first bin.

    The edges are the float64 numbers nearest to ``k / bins``. For a few values (recalibrated ones);
    pixels are counted by :func:`count_confidence`, whose edges are the rational numbers themselves.

    Example:
        >>> bin_index(np.array([0.0, 0.25, 0.3, 1.0]), bins=4).tolist()
        [0, 0, 1, 3]
    """
    return np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")


# ---------------------------------------------------------------- measures

# All take arrays whose last axis is the bins, whatever axes (images, scores, resamples) precede.


def region_codes(region: str, outcomes: int = len(OUTCOMES)) -> tuple[list[int], list[int]]:
    """Positions of a region's correct and wrong outcomes on an axis of the outcomes.

    Args:
        region: of `names.REGIONS`.
        outcomes: length of the axis: 8; or 4 where it is not said which pixels lie in the band; or 2, wrong and
            correct, where all pixels are those of the region.

    Example:
        >>> region_codes("union"), region_codes("union", 4)
        (([3, 7], [1, 2, 5, 6]), ([3], [1, 2]))
    """
    if outcomes == 2:
        return [1], [0]
    codes = sorted({code % outcomes for code in REGIONS[region]})
    return [code for code in codes if code in CORRECT], [code for code in codes if code not in CORRECT]


def region_bins(count: Array, confidence: Array, region: str) -> tuple[Array, Array, Array]:
    """Add the outcomes (axis -2, see :func:`region_codes`) of a region.

    Returns:
        Counts, correct counts and confidence sums, each (..., B).

    Example:
        >>> count = np.array([[8], [1], [2], [4], [0], [0], [0], [16]])  # by outcome, in one bin
        >>> [part.tolist() for part in region_bins(count, 0.5 * count, "foreground")]
        [[22], [20], [11.0]]
    """
    right, wrong = region_codes(region, count.shape[-2])
    inside = sorted(right + wrong)
    return count[..., inside, :].sum(-2), count[..., right, :].sum(-2), confidence[..., inside, :].sum(-2)


def expected_calibration_error(count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike) -> Array:
    """``sum_b n_b / N * |accuracy_b - mean confidence_b|``; NaN where N = 0, an empty bin adds nothing.

    The plug-in estimate is biased upwards: the absolute value of noise is positive, so that even a perfectly
    calibrated score shows up to about ``0.4 sqrt(B / N)`` for N independent pixels (and more for the correlated pixels
    of one image). Compare scores on the same pixels, and read a value of one image with care;
    :func:`debiased_calibration_error` takes out a part of the bias.
    Naeini et al., AAAI 2015; Guo et al., ICML 2017.

    Args:
        count: pixels by bin, (..., B).
        correct: those of them whose predicted label is right, (..., B).
        confidence: sums of their confidences, (..., B).

    Returns:
        The error in [0, 1], (...).

    Example:
        >>> float(expected_calibration_error([4, 4], [1, 4], [2.0, 3.0]))  # gaps of 1/4 and 1/4
        0.25
    """
    return divide(np.abs(np.asarray(correct) - confidence).sum(-1), np.asarray(count).sum(-1))


def debiased_calibration_error(count: Array, correct: Array, confidence: Array) -> Array:
    """ECE of all images with the jackknife's correction of its bias: ``n ECE - (n - 1) mean_i ECE_(-i)``, at least 0.

    ``ECE_(-i)`` leaves out image i, as the pixels of an image depend on each other; images without a pixel are not among
    the n. The correction removes bias that falls like 1 / n. Bias of the absolute value of a gap that is 0 falls like
    1 / sqrt(n), of which it removes half: simulated with 100 images whose accuracy varies from one to the next, means of
    400 repetitions (Kumar, Liang & Ma, NeurIPS 2019, correct the squared error, whose bias falls like 1 / n everywhere):

    ======  =======  ========
    truth   plug-in  debiased
    ======  =======  ========
    0.0002  0.0062   0.0037
    0.0029  0.0067   0.0042
    0.0098  0.0113   0.0096
    0.0300  0.0305   0.0304
    ======  =======  ========

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`, by image, (I, ..., B).

    Returns:
        The error in [0, 1], (...); NaN where fewer than two images have pixels.

    Example:
        >>> count = np.array([[4], [4]])  # two images of one bin, gaps of 1/4 and -1/4: together 0, each 1/4
        >>> float(debiased_calibration_error(count, np.array([[1], [3]]), np.array([[2.0], [2.0]])))
        0.0
    """
    gap = np.asarray(confidence - correct, dtype=float)
    pixels = count.sum(-1)
    used = pixels > 0
    images = used.sum(0)
    left_out = divide(np.abs(gap.sum(0) - gap).sum(-1), pixels.sum(0) - pixels)
    mean = divide(np.where(used, left_out, 0.0).sum(0), images)
    error = divide(np.abs(gap.sum(0)).sum(-1), pixels.sum(0))
    return np.where(images > 1, np.clip(images * error - (images - 1) * mean, 0.0, 1.0), np.nan)


def brier_parts(
    count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike
) -> tuple[Array, Array, Array]:
    """Reliability, resolution and uncertainty of the Brier score of the confidence, over the bins.

    With N pixels, n_b of them in bin b, of accuracy a_b and mean confidence c_b, and accuracy a of all::

        reliability  sum_b n_b / N (c_b - a_b)^2    the squared calibration error; lower is better
        resolution   sum_b n_b / N (a_b - a)^2      how far the bins tell pixels apart; higher is better
        uncertainty  a (1 - a)                      the same for every score

    The Brier score is reliability - resolution + uncertainty plus what the bins leave out: the mean over pixels of the
    variance of the confidence inside their bin, minus twice its covariance with correctness there. It is exactly 0 where
    all confidences in a bin are equal. Murphy, J. Appl. Meteorol. 1973; the remainder: Stephenson et al.,
    Weather Forecast. 2008.

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`.

    Returns:
        The three parts, (...) each; NaN without pixels.

    Example:
        >>> [float(part) for part in brier_parts([4, 4], [1, 4], [2.0, 3.0])]  # gaps of 1/4; 1/4 and 1 around 5/8
        [0.0625, 0.140625, 0.234375]
    """
    count, correct = np.asarray(count), np.asarray(correct)
    pixels = count.sum(-1)
    accuracy = divide(correct.sum(-1), pixels)
    size = np.maximum(count, 1)  # in an empty bin the numerators are 0
    reliability = divide(((confidence - correct) ** 2 / size).sum(-1), pixels)
    resolution = divide(((correct - count * accuracy[..., None]) ** 2 / size).sum(-1), pixels)
    return reliability, resolution, np.asarray(accuracy * (1.0 - accuracy))


def foreground_error(count: Array, confidence: Array) -> Array:
    """:func:`expected_calibration_error` (...) of wrong and correct pixels by bin (..., 2, B) and their confidence sums.

    Example:
        >>> float(foreground_error(np.array([[3, 0], [1, 4]]), np.array([[1.5, 0.0], [0.5, 3.0]])))
        0.25
    """
    return expected_calibration_error(count.sum(-2), count[..., 1, :], confidence.sum(-2))


def signed_gap(count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike) -> Array:
    """Mean confidence minus accuracy: positive is overconfident; NaN without pixels.

    Where the gap has one sign in every bin, ECE equals its absolute value under any binning.

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`.

    Returns:
        The gap in [-1, 1], (...).

    Example:
        >>> float(signed_gap([4, 4], [1, 4], [2.0, 3.0]))  # the gaps of both bins cancel
        0.0
    """
    return divide((np.asarray(confidence) - correct).sum(-1), np.asarray(count).sum(-1))


def maximum_calibration_error(count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike) -> Array:
    """Largest ``|accuracy_b - mean confidence_b|`` over non-empty bins; NaN without pixels. Naeini et al., 2015.

    A maximum over noisy bins: at most 64 % of its bootstrap intervals hold the truth in simulations, so that none is
    given.

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`.

    Returns:
        The error in [0, 1], (...).

    Example:
        >>> float(maximum_calibration_error([4, 2, 0], [1, 2, 0], [2.0, 1.0, 0.0]))  # gaps of 1/4 and 1/2
        0.5
    """
    gap = np.abs(divide(np.asarray(correct) - confidence, count))
    return np.where(np.asarray(count).sum(-1) > 0, np.nan_to_num(gap, nan=0.0).max(-1), np.nan)


def average_calibration_error(count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike) -> Array:
    """Unweighted mean of ``|accuracy_b - mean confidence_b|`` over non-empty bins; NaN without pixels.

    Neumann et al., "Relaxed softmax", 2018.

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`.

    Returns:
        The error in [0, 1], (...).

    Example:
        >>> float(average_calibration_error([4, 2, 0], [1, 2, 0], [2.0, 1.0, 0.0]))  # gaps of 1/4 and 1/2
        0.375
    """
    gap = np.abs(divide(np.asarray(correct) - confidence, count))
    return divide(np.nan_to_num(gap, nan=0.0).sum(-1), (np.asarray(count) > 0).sum(-1))


def reliability(count: npt.ArrayLike, correct: npt.ArrayLike, confidence: npt.ArrayLike) -> dict[str, Array]:
    """Reliability table of one score.

    Args:
        count, correct, confidence: as for :func:`expected_calibration_error`, (B,).

    Returns:
        Per bin, (B,) each: "lower" and "upper" edge, "count", mean "confidence" and "accuracy" (NaN in an empty bin).

    Example:
        >>> table = reliability([4, 0], [1, 0], [2.0, 0.0])
        >>> table["upper"].tolist(), table["confidence"].tolist(), table["accuracy"].tolist()
        ([0.5, 1.0], [0.5, nan], [0.25, nan])
    """
    count = np.asarray(count)
    edges = np.arange(len(count) + 1) / len(count)
    return {
        "lower": edges[:-1],
        "upper": edges[1:],
        "count": count,
        "confidence": divide(confidence, count),
        "accuracy": divide(correct, count),
    }
