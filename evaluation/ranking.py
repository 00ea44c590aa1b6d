"""How well an uncertainty score ranks errors above correct pixels, from a fine histogram.

Scores are binned on the bits of their float32 value, which order non-negative floats as their values
do: exponent and some bits of the mantissa. The width of a histogram bin is thus a fraction of the score, however
small that is: 2**-12 of it above 2**-16, and 2**-6 below. (Variances are extremely skewed: of bins of equal
width they would fill only one.) All pixels of a bin count as tied, and ties are treated as an exact
evaluation treats them.

A histogram of F bins per image would be too large to keep; what is kept per image are counts in Q quantile bins,
each a range of neighbouring histogram bins.

Measures take `correct` and `wrong`, pixels by bin in ascending order of uncertainty, (..., K), with any
leading axes. Errors are the positive class, the uncertainty is their score.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.arrays import Array, divide

_ONE = 127 << 23  # the bits of 1.0, whose exponent of 0 is stored as 127
_SPLIT = (127 - 16) << 23  # the bits of 2**-16
_COARSE, _FINE = 17, 11  # of the 23 bits of the mantissa, those dropped below and above 2**-16
_BELOW = _SPLIT >> _COARSE  # bins below 2**-16
#: Histogram bins F of [0, 1].
HISTOGRAM_BINS = _BELOW + ((_ONE - _SPLIT) >> _FINE) + 1


# ---------------------------------------------------------------- histograms


def histogram_bin(score: Tensor) -> Tensor:
    """Histogram bin of scores, monotone in the score.

    Args:
        score: non-negative float32, any shape; scores above 1 share the bin of 1.

    Returns:
        int64 in [0, F), same shape.

    Example:
        >>> (histogram_bin(torch.tensor([0.0, 1.0, 7.0])) - HISTOGRAM_BINS).tolist()
        [-72641, -1, -1]
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: a negative zero becomes zero
    above = ((bits - _SPLIT) >> _FINE).add_(_BELOW)
    return torch.where(bits < _SPLIT, bits >> _COARSE, above).clamp_(max=HISTOGRAM_BINS - 1).to(torch.int64)


def bin_values() -> Array:
    """The middle of every histogram bin, (F,) float64; 0 and 1 exactly.

    It differs from a score in its bin by at most 2**-13 of it (2**-7 below 2**-16).

    Example:
        >>> round(float(bin_values()[histogram_bin(torch.tensor(0.25))]), 3)
        0.25
    """
    below = np.arange(_BELOW, dtype=np.int32) << _COARSE
    above = _SPLIT + (np.arange(HISTOGRAM_BINS - _BELOW + 1, dtype=np.int32) << _FINE)
    lower = np.concatenate([below, above]).astype(np.int32).view(np.float32).astype(np.float64)
    middle = 0.5 * (lower[:-1] + lower[1:])
    middle[0], middle[-1] = 0.0, 1.0
    return np.asarray(middle)


def add_histogram(histogram: Tensor, index: Tensor) -> None:
    """Add 1 to a histogram at every index, in place; exact, hence deterministic, on any device.

    Args:
        histogram: (K,) int64.
        index: int64 in [0, K), any shape, on the same device.

    Example:
        >>> histogram = torch.zeros(3, dtype=torch.int64)
        >>> add_histogram(histogram, torch.tensor([0, 2, 2]))
        >>> histogram.tolist()
        [1, 0, 2]
    """
    # sorting does not suffer from many pixels in one bin, as atomic additions on Metal do
    add = scattered if index.device.type in ("cpu", "cuda") else sorted_out
    add(histogram, index.reshape(-1))


def scattered(histogram: Tensor, index: Tensor) -> None:
    """:func:`add_histogram` by additions at every index (N,)."""
    one = torch.ones(1, dtype=histogram.dtype, device=histogram.device)
    histogram.scatter_add_(0, index, one.expand(len(index)))


def sorted_out(histogram: Tensor, index: Tensor) -> None:
    """:func:`add_histogram` by sorting the indices (N,) and searching where each bin begins."""
    edges = torch.arange(len(histogram) + 1, device=index.device)
    histogram += torch.searchsorted(index.sort().values, edges).diff()


# ---------------------------------------------------------------- quantile bins


def quantile_edges(histogram: Array, groups: Iterable[Iterable[int]], bins: int = 256) -> Array:
    """The quantile bins of every score.

    Args:
        histogram: pixels by score, outcome and histogram bin, (S, A, F).
        groups: groups of outcomes; the quantiles are those of an even mixture of their distributions, so
            that a small lesion has its share of the bins.
        bins: number of quantile bins Q.

    Returns:
        The last histogram bin of every quantile bin but the last, (S, Q - 1) int64.

    Example:
        >>> quantile_edges(np.array([[[1, 1, 1, 1, 0, 0]]]), [(0,)], bins=2).tolist()  # half of the pixels lie in 0 and 1
        [[1]]
    """
    mixture = sum(_share(histogram[:, list(members)].sum(1)) for members in groups)
    cumulated = np.cumsum(_share(np.asarray(mixture)), -1)
    # Less a little, for a boundary that lies at a level exactly but for rounding: where a score tells errors from correct
    # pixels completely, that is the one between them.
    levels = np.arange(1, bins) / bins - 1e-9
    edges = np.stack([np.searchsorted(row, levels) for row in cumulated])
    return np.asarray(np.minimum(edges, histogram.shape[-1] - 1), dtype=np.int64)


def _share(histogram: Array) -> Array:
    return np.asarray(histogram / np.maximum(histogram.sum(-1, keepdims=True), 1e-300))


def quantile_table(edges: Array) -> Tensor:
    """The quantile bin of every histogram bin, (S, F) int64, from :func:`quantile_edges` (S, Q - 1)."""
    return torch.from_numpy(np.stack([np.searchsorted(row, np.arange(HISTOGRAM_BINS)) for row in edges]))


def pool_bins(histogram: Array, edges: Array) -> Array:
    """Histograms (..., F) added up to quantile bins (..., Q), from the edges (Q - 1,) of that score.

    Example:
        >>> pool_bins(np.array([1, 2, 3, 4]), np.array([1])).tolist()
        [3.0, 7.0]
    """
    cumulated = np.concatenate([np.zeros(histogram.shape[:-1] + (1,)), np.cumsum(histogram, -1)], -1)
    bounds = np.concatenate([[0], edges + 1, [histogram.shape[-1]]])
    return np.asarray(np.diff(cumulated[..., bounds], axis=-1))


# ---------------------------------------------------------------- measures


def auroc(correct: npt.ArrayLike, wrong: npt.ArrayLike) -> Array:
    """Probability that a wrong pixel scores above a correct one, ties counted half.

    Args:
        correct, wrong: pixels by bin of the score, ascending, (..., K).

    Returns:
        The area in [0, 1], (...); NaN where there is no wrong or no correct pixel.

    Example:
        >>> float(auroc([2, 1, 0], [0, 1, 1]))  # of six pairs five rank the error higher and one is tied
        0.9166666666666666
    """
    correct, wrong = np.asarray(correct), np.asarray(wrong)
    below = np.cumsum(correct, -1) - 0.5 * correct
    return divide((wrong * below).sum(-1), np.sum(wrong, -1, dtype=float) * np.sum(correct, -1, dtype=float))


def up_to(values: npt.ArrayLike) -> Array:
    """Sums over each bin and those before it, (..., K) float64; measures take those of their arguments to share them.

    Example:
        >>> up_to([2, 1, 0]).tolist()
        [2.0, 3.0, 3.0]
    """
    return np.cumsum(np.asarray(values, dtype=float), -1)


def average_precision(
    correct: npt.ArrayLike, wrong: npt.ArrayLike, right: Array | None = None, errors: Array | None = None
) -> Array:
    """Area under the precision-recall curve of the errors as average precision.

    ``sum_k (recall_k - recall_(k-1)) * precision_k`` over descending thresholds, as in scikit-learn.

    Args:
        correct, wrong: as for :func:`auroc`; whole numbers.
        right, errors: of both :func:`up_to`, if they are known already.

    Returns:
        The area in [0, 1], (...); NaN without errors.

    Example:
        >>> float(average_precision([2, 1, 0], [0, 1, 1]))  # precision 1 for one half of the errors, 2/3 for the other
        0.8333333333333333
    """
    correct, wrong = np.asarray(correct, dtype=float), np.asarray(wrong, dtype=float)
    right, errors = up_to(correct) if right is None else right, up_to(wrong) if errors is None else errors
    found = errors[..., -1:] - errors + wrong  # in this bin and those after it
    flagged = right[..., -1:] - right + correct + found
    descending = np.ascontiguousarray((wrong * found / np.maximum(flagged, 1e-300))[..., ::-1])
    return divide(descending.sum(-1), wrong.sum(-1))


def aurc(
    correct: npt.ArrayLike, wrong: npt.ArrayLike, right: Array | None = None, errors: Array | None = None
) -> Array:
    """Area under the risk-coverage curve: mean over k of the error rate of the k least uncertain pixels.

    Errors among tied pixels are taken to be spread evenly over the tie; sums of 1 / k are replaced by logarithms,
    which matters for a handful of pixels only. Geifman, Uziel & El-Yaniv, "Bias-reduced uncertainty estimation",
    ICLR 2019.

    Args:
        correct, wrong, right, errors: as for :func:`average_precision`.

    Returns:
        The area in [0, 1], (...); NaN without pixels.

    Example:
        >>> round(float(aurc([1, 0, 1, 0], [0, 1, 0, 1])), 2)  # (0/1 + 1/2 + 1/3 + 2/4) / 4 = 1/3
        0.33
    """
    wrong = np.asarray(wrong, dtype=float)
    size = wrong + np.asarray(correct)
    right, errors = up_to(correct) if right is None else right, up_to(wrong) if errors is None else errors
    pixels = right + errors
    before = pixels - size
    # With e errors in a tie of n, the sum over j = 1 ... n of (E + j e / n) / (N + j) is
    # e + (E - N e / n) (H(N + n) - H(N)); harmonic numbers H(k) = ln(k + 1/2) + const + O(k**-2).
    harmonic = np.log(pixels + 0.5)
    harmonic = np.diff(harmonic, axis=-1, prepend=np.log(0.5))
    rest = errors - wrong - before * np.where(size > 0, wrong / np.maximum(size, 1e-300), 0.0)
    return divide((wrong + rest * harmonic).sum(-1), pixels[..., -1])


def excess_aurc(correct: npt.ArrayLike, wrong: npt.ArrayLike) -> Array:
    """AURC minus that of a score which ranks every error last. Geifman et al., ICLR 2019.

    Args:
        correct, wrong: as for :func:`auroc`.

    Returns:
        At least 0 but for rounding, (...): 0 for a perfect ranking. NaN without pixels.

    Example:
        >>> abs(round(float(excess_aurc([70, 0], [0, 30])), 9))
        0.0
    """
    return np.asarray(aurc(correct, wrong) - ideal_aurc(correct, wrong))


def ideal_aurc(correct: npt.ArrayLike, wrong: npt.ArrayLike) -> Array:
    """The AURC (...) of a score that ranks every error last; NaN without pixels.

    Args:
        correct, wrong: as for :func:`auroc`.

    Example:
        >>> round(float(ideal_aurc([2, 0], [0, 2])), 2)  # (0/1 + 0/2 + 1/3 + 2/4) / 4 = 5/24
        0.21
    """
    errors, right = np.sum(wrong, -1, dtype=float), np.sum(correct, -1, dtype=float)
    pixels = errors + right
    return divide(errors - right * (np.log(pixels + 0.5) - np.log(right + 0.5)), pixels)


def measures_by_bin(bins: Iterable[tuple[Array, Array]], all_correct: Array, all_wrong: Array) -> dict[str, Array]:
    """AUROC, average precision and AURC of many histograms at once, one bin after the other.

    The same as :func:`auroc`, :func:`average_precision` and :func:`aurc`, for thousands of resamples: everything that a bin
    needs stays in the cache of the CPU, and running sums take the place of cumulated histograms.

    Args:
        bins: correct and wrong pixels of every histogram, in bins of ascending uncertainty, (...) float64 each; not changed.
        all_correct, all_wrong: their sums over the bins, (...).

    Returns:
        "auroc", "auprc" and "aurc", (...) each; NaN as there.

    Example:
        >>> bins = [(np.array([2.0]), np.array([0.0])), (np.array([1.0]), np.array([1.0])), (np.array([0.0]), np.array([1.0]))]
        >>> found = measures_by_bin(bins, np.array([3.0]), np.array([2.0]))
        >>> round(float(found["auroc"][0]), 4), round(float(found["auprc"][0]), 4)  # as in the examples of the two
        (0.9167, 0.8333)
    """
    right, errors, pairs, precision, risk, part = (np.zeros(np.shape(all_correct)) for _ in range(6))
    harmonic = np.full_like(right, np.log(0.5))
    for correct, wrong in bins:
        found = all_wrong - errors  # in this bin and those after it
        flagged = all_correct - right
        flagged += found
        found *= wrong
        found /= np.maximum(flagged, 1e-300, out=flagged)
        precision += found
        np.multiply(correct, 0.5, out=part)
        part += right
        part *= wrong
        pairs += part
        before, size = right + errors, correct + wrong
        np.divide(wrong, np.maximum(size, 1e-300, out=part), out=part)
        part *= before
        rest = np.subtract(errors, part, out=part)
        before += size
        before += 0.5
        next_harmonic = np.log(before, out=before)
        rest *= np.subtract(next_harmonic, harmonic, out=harmonic)
        harmonic = next_harmonic
        risk += wrong
        risk += rest
        right += correct
        errors += wrong
    return {
        "auroc": divide(pairs, all_wrong * all_correct),
        "auprc": divide(precision, all_wrong),
        "aurc": divide(risk, all_correct + all_wrong),
    }


def risk_coverage(correct: npt.ArrayLike, wrong: npt.ArrayLike, points: int = 101) -> dict[str, Array]:
    """Error rate of the least uncertain share of the pixels, for one score, with that of the ideal ranking.

    Args:
        correct, wrong: pixels by bin of the score, ascending, (K,).
        points: coverages from 0 to 1, of which 0 itself is left out.

    Returns:
        "coverage" in (0, 1], "risk" and "ideal" risk, (points - 1,) each, linear within ties; NaN without pixels.

    Example:
        >>> curve = risk_coverage([2, 1], [0, 1], points=3)
        >>> curve["coverage"].tolist(), curve["risk"].tolist(), curve["ideal"].tolist()
        ([0.5, 1.0], [0.0, 0.25], [0.0, 0.25])
    """
    pixels = np.concatenate([[0.0], np.cumsum(np.add(correct, wrong, dtype=float))])
    errors = np.concatenate([[0.0], np.cumsum(wrong, dtype=float)])
    coverage = np.arange(1, points) / (points - 1)
    kept = coverage * pixels[-1]
    ideal = np.maximum(kept - (pixels[-1] - errors[-1]), 0.0)
    return {
        "coverage": coverage,
        "risk": divide(np.interp(kept, pixels, errors), kept),
        "ideal": divide(ideal, kept),
    }


def equal_mass_error(correct: npt.ArrayLike, wrong: npt.ArrayLike, bins: int = 15) -> float:
    """ECE with bins of (nearly) equal numbers of pixels, for one score.

    A histogram bin is never split: pixels of equal score share an equal-mass bin, the one that holds the middle of
    their ranks, so that the value does not depend on the order of the pixels and there may be fewer bins. The
    confidence of a pixel is one minus the middle of its histogram bin. Nixon et al., "Measuring calibration in
    deep learning", 2019.

    Args:
        correct, wrong: pixels by histogram bin, (F,).
        bins: equal-mass bins at most.

    Returns:
        The error in [0, 1]; NaN without pixels.

    Example:
        >>> correct, wrong = np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)
        >>> correct[0], wrong[0] = 3, 1  # four pixels of confidence 1
        >>> equal_mass_error(correct, wrong)
        0.25
    """
    correct, wrong = np.asarray(correct, dtype=float), np.asarray(wrong, dtype=float)
    size = correct + wrong
    total = size.sum()
    if total == 0:
        return float("nan")
    middle = np.cumsum(size) - 0.5 * size
    index = np.minimum((middle * bins / total).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=correct - size * (1.0 - bin_values()), minlength=bins)
    return float(np.abs(gap).sum() / total)
