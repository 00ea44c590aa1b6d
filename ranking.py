"""How well an uncertainty score ranks errors above correct pixels, from a fine histogram.

Scores are binned on the bits of their float32 value, which order non-negative floats as their values
do: exponent and some bits of the mantissa, that is, cells whose width is a fraction of the score however
small it is, 2**-12 of it above 2**-16 and 2**-6 below. (Variances are extremely skewed; bins of equal
width would see one bin only.) All pixels of a cell count as tied, and ties are treated as an exact evaluation
treats them.

Measures take `correct` and `wrong`, pixels by cell in ascending order of uncertainty, (..., K); any
leading axes. Errors are the positive class, the uncertainty is their score.
"""

from __future__ import annotations

import numpy as np
import torch

_ONE = 127 << 23  # the bits of 1.0, whose exponent of 0 is stored as 127
_SPLIT = (127 - 16) << 23  # the bits of 2**-16
_COARSE, _FINE = 17, 11  # of the 23 bits of the mantissa, those dropped below and above 2**-16
_BELOW = _SPLIT >> _COARSE  # cells below 2**-16
FINE_CELLS = _BELOW + ((_ONE - _SPLIT) >> _FINE) + 1  # cells of [0, 1]


def fine_cell(score: torch.Tensor) -> torch.Tensor:
    """Fine cell of non-negative float32 scores, int64, monotone; scores above 1 share the cell of 1."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0: a negative zero becomes zero
    above = ((bits - _SPLIT) >> _FINE).add_(_BELOW)
    return torch.where(bits < _SPLIT, bits >> _COARSE, above).clamp_(max=FINE_CELLS - 1).to(torch.int64)


def cell_values() -> np.ndarray:
    """(F,) middle of every fine cell, float64; 0 and 1 exactly. Within 2**-13 of a value (2**-7 below 2**-16), relative."""
    below = np.arange(_BELOW, dtype=np.int32) << _COARSE
    above = _SPLIT + (np.arange(FINE_CELLS - _BELOW + 1, dtype=np.int32) << _FINE)
    lower = np.concatenate([below, above]).astype(np.int32).view(np.float32).astype(np.float64)
    middle = 0.5 * (lower[:-1] + lower[1:])
    middle[0], middle[-1] = 0.0, 1.0
    return middle


def add_histogram(histogram: torch.Tensor, index: torch.Tensor) -> None:
    """Add 1 to `histogram` (K,), int64, at every index, in place; exact, hence deterministic, on any device."""
    # sorting does not suffer from many pixels in one cell, as atomic additions on Metal do
    add = scattered if index.device.type in ("cpu", "cuda") else sorted_out
    add(histogram, index.reshape(-1))


def scattered(histogram: torch.Tensor, index: torch.Tensor) -> None:
    """:func:`add_histogram` by additions at every index (N,)."""
    one = torch.ones(1, dtype=histogram.dtype, device=histogram.device)
    histogram.scatter_add_(0, index, one.expand(len(index)))


def sorted_out(histogram: torch.Tensor, index: torch.Tensor) -> None:
    """:func:`add_histogram` by sorting the indices (N,) and searching where each cell begins."""
    edges = torch.arange(len(histogram) + 1, device=index.device)
    histogram += torch.searchsorted(index.sort().values, edges).diff()


def quantile_edges(fine: np.ndarray, regions, cells: int = 256) -> np.ndarray:
    """Quantile cells of every score: the last fine cell of each but the last, (S, cells - 1) int64.

    Args:
        fine: pixels by score, atom and fine cell, (S, A, F).
        regions: groups of atoms; the quantiles are those of an even mixture of their distributions, so
            that a small lesion has its share of the cells.
        cells: their number.
    """
    mixture = sum(_share(fine[:, list(members)].sum(1)) for members in regions)
    cumulated = np.cumsum(_share(mixture), -1)
    # Less a little, for a boundary that lies at a level exactly but for rounding: where a score tells errors from correct
    # pixels completely, that is the one between them.
    levels = np.arange(1, cells) / cells - 1e-9
    edges = np.stack([np.searchsorted(row, levels) for row in cumulated])
    return np.minimum(edges, fine.shape[-1] - 1).astype(np.int64)


def _share(histogram: np.ndarray) -> np.ndarray:
    return histogram / np.maximum(histogram.sum(-1, keepdims=True), 1e-300)


def quantile_table(edges: np.ndarray) -> torch.Tensor:
    """The quantile cell of every fine cell, (S, F) int64, from edges (S, Q - 1)."""
    return torch.from_numpy(np.stack([np.searchsorted(row, np.arange(FINE_CELLS)) for row in edges]))


def pool_cells(fine: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Fine histograms (..., F) added up to quantile cells (..., Q); `edges` (Q - 1,) of that score."""
    cumulated = np.concatenate([np.zeros(fine.shape[:-1] + (1,)), np.cumsum(fine, -1)], -1)
    bounds = np.concatenate([[0], edges + 1, [fine.shape[-1]]])
    return np.diff(cumulated[..., bounds], axis=-1)


def _divide(numerator, denominator):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)


def auroc(correct, wrong) -> np.ndarray:
    """Probability that a wrong pixel scores above a correct one, ties counted half; NaN if either is missing."""
    below = np.cumsum(correct, -1) - 0.5 * np.asarray(correct)
    return _divide((wrong * below).sum(-1), np.sum(wrong, -1, dtype=float) * np.sum(correct, -1, dtype=float))


def average_precision(correct, wrong) -> np.ndarray:
    """Area under the precision-recall curve of the errors as average precision; NaN without errors.

    ``sum_k (recall_k - recall_(k-1)) * precision_k`` over descending thresholds, as in scikit-learn.
    """
    wrong = np.asarray(wrong, dtype=float)
    found = np.cumsum(wrong[..., ::-1], -1)
    flagged = found + np.cumsum(np.asarray(correct, dtype=float)[..., ::-1], -1)
    return _divide((wrong[..., ::-1] * found / np.maximum(flagged, 1e-300)).sum(-1), wrong.sum(-1))


def aurc(correct, wrong) -> np.ndarray:
    """Area under the risk-coverage curve: mean over k of the error rate of the k least uncertain pixels.

    Errors among tied pixels are taken to be spread evenly over the tie. NaN without pixels.
    Geifman, Uziel & El-Yaniv, "Bias-reduced uncertainty estimation", ICLR 2019.
    """
    wrong = np.asarray(wrong, dtype=float)
    size = wrong + correct
    pixels, errors = np.cumsum(size, -1), np.cumsum(wrong, -1)
    before = pixels - size
    # With e errors in a tie of n, the sum over j = 1 ... n of (E + j e / n) / (N + j) is
    # e + (E - N e / n) (H(N + n) - H(N)); harmonic numbers H(k) = ln(k + 1/2) + const + O(k**-2).
    harmonic = np.log(pixels + 0.5) - np.log(before + 0.5)
    rest = errors - wrong - before * np.where(size > 0, wrong / np.maximum(size, 1e-300), 0.0)
    return _divide((wrong + rest * harmonic).sum(-1), pixels[..., -1])


def excess_aurc(correct, wrong) -> np.ndarray:
    """AURC minus that of a score which ranks every error last: 0 for a perfect ranking. Geifman et al., ICLR 2019."""
    errors, right = np.sum(wrong, -1, dtype=float), np.sum(correct, -1, dtype=float)
    pixels = errors + right
    best = _divide(errors - right * (np.log(pixels + 0.5) - np.log(right + 0.5)), pixels)
    return aurc(correct, wrong) - best


def risk_coverage(correct, wrong, points: int = 101) -> dict:
    """Error rate of the least uncertain share of the pixels, for one score, with that of the ideal ranking.

    Returns coverage (0, 1], risk and ideal risk, each (points - 1,), linear within ties; NaN without pixels.
    """
    pixels = np.concatenate([[0.0], np.cumsum(np.add(correct, wrong, dtype=float))])
    errors = np.concatenate([[0.0], np.cumsum(wrong, dtype=float)])
    coverage = np.arange(1, points) / (points - 1)
    kept = coverage * pixels[-1]
    ideal = np.maximum(kept - (pixels[-1] - errors[-1]), 0.0)
    return {
        "coverage": coverage,
        "risk": _divide(np.interp(kept, pixels, errors), kept),
        "ideal": _divide(ideal, kept),
    }


def equal_mass_error(correct, wrong, bins: int = 15) -> float:
    """ECE with bins of (nearly) equal numbers of pixels, for one score on fine cells (F,); NaN without pixels.

    A cell is never split: pixels of equal score share a bin, the one that holds the middle of their ranks, so
    that the value does not depend on the order of the pixels and there may be fewer bins. The confidence
    of a pixel is one minus the middle of its cell. Nixon et al., "Measuring calibration in deep learning", 2019.
    """
    correct, wrong = np.asarray(correct, dtype=float), np.asarray(wrong, dtype=float)
    size = correct + wrong
    total = size.sum()
    if total == 0:
        return float("nan")
    middle = np.cumsum(size) - 0.5 * size
    index = np.minimum((middle * bins / total).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=correct - size * (1.0 - cell_values()), minlength=bins)
    return float(np.abs(gap).sum() / total)
