"""Recalibrating a score on the validation split, from histograms over quantile bins alone.

Both maps are fitted to the counts of correct and wrong pixels of each bin and are constant within a
bin, so that the recalibrated score of any set of images follows from its counts, without a pixel.
"""

from __future__ import annotations

import numpy as np

from evaluation.arrays import Array
from evaluation.names import CONFIDENCE_STEP


def isotonic(correct: Array, wrong: Array, uncertainty: Array) -> Array:
    """Accuracy of each quantile bin under the constraint that it does not rise with the uncertainty.

    Least squares weighted with the pixels; an empty bin takes the value between its neighbours. Where all pixels are
    right or all wrong the confidence is exactly 1 or 0; :func:`measures.recalibrated_measures` keeps the log loss
    finite. Zadrozny & Elkan, KDD 2002.

    Args:
        correct, wrong: pixels by bin, ascending uncertainty, (Q,).
        uncertainty: mean of each bin (Q,); only its order matters, which is that of the bins.

    Returns:
        Confidence in [0, 1], (Q,); NaN without pixels.

    Example:
        >>> isotonic(np.array([3.0, 1.0]), np.array([1.0, 3.0]), np.array([0.25, 0.5])).tolist()
        [0.75, 0.25]
        >>> isotonic(np.array([1.0, 3.0]), np.array([3.0, 1.0]), np.array([0.25, 0.5])).tolist()  # it would rise: pooled
        [0.5, 0.5]
    """
    size = correct + wrong
    used = size > 0
    if not used.any():
        return np.full(len(size), np.nan)
    from sklearn.isotonic import isotonic_regression  # here, as loading scikit-learn takes seconds

    fitted = isotonic_regression(correct[used] / size[used], sample_weight=size[used], increasing=False)
    return np.interp(np.arange(len(size)), np.flatnonzero(used), fitted)


def platt(correct: Array, wrong: Array, uncertainty: Array) -> Array:
    """``1 / (1 + exp(-(a x + b)))`` of each quantile bin, x being the log-odds of its confidence.

    Fitted by maximum likelihood, without the smoothed targets, which serve small samples; the sign of
    `a` is free. Where all pixels are correct, or all wrong, the constant accuracy. Platt, 1999.

    Args:
        correct, wrong: pixels by bin, (Q,).
        uncertainty: mean of each bin, (Q,) in [0, 1].

    Returns:
        Confidence in [0, 1], (Q,); NaN without pixels.

    Example:
        >>> platt(np.array([3.0, 1.0]), np.array([1.0, 3.0]), np.array([0.1, 0.9])).round(3).tolist()
        [0.75, 0.25]
    """
    total = correct.sum() + wrong.sum()
    if total == 0 or correct.sum() == 0 or wrong.sum() == 0:
        return np.full(len(correct), correct.sum() / total if total else np.nan)
    from sklearn.linear_model import LogisticRegression  # here, as loading scikit-learn takes seconds

    logit = log_odds(uncertainty)
    features = np.concatenate([logit, logit])[:, None]
    labels = np.concatenate([np.ones(len(logit)), np.zeros(len(logit))])
    weights = np.concatenate([correct, wrong])
    kept = weights > 0
    model = LogisticRegression(C=1e8, max_iter=1000, tol=1e-8)
    # Weights of mean 1 condition the optimiser; C is large enough for the penalty to vanish.
    model.fit(features[kept], labels[kept], sample_weight=weights[kept] / weights[kept].mean())
    return np.asarray(model.predict_proba(logit[:, None])[:, 1])


METHODS = {"isotonic": isotonic, "platt": platt}


def log_odds(uncertainty: Array) -> Array:
    """``ln((1 - u) / u)``, the log-odds of the confidence, with u kept within [1e-12, 1 - 2**-24].

    Example:
        >>> log_odds(np.array([0.2, 0.5])).round(4).tolist()  # ln 4 and ln 1
        [1.3863, 0.0]
    """
    clipped = np.clip(uncertainty, 1e-12, 1.0 - CONFIDENCE_STEP)
    return np.asarray(np.log1p(-clipped) - np.log(clipped))


def mean_uncertainty(histogram: Array, edges: Array, values: Array) -> Array:
    """Mean uncertainty of each quantile bin; of an empty one the value at its edge.

    Args:
        histogram: pixels by histogram bin of one score, (F,).
        edges: its quantile bins, (Q - 1,).
        values: the middle of each histogram bin, (F,).

    Returns:
        (Q,) in [0, 1].

    Example:
        >>> mean_uncertainty(np.array([1, 3, 2]), np.array([1]), np.array([0.0, 0.5, 1.0])).tolist()  # 3 * 0.5 / 4 and 1
        [0.375, 1.0]
    """
    bounds = np.concatenate([[0], edges + 1, [len(histogram)]])
    cumulated = np.concatenate([[0.0], np.cumsum(histogram, dtype=float)])
    weighted = np.concatenate([[0.0], np.cumsum(histogram * values)])
    size, total = np.diff(cumulated[bounds]), np.diff(weighted[bounds])
    at_edge = values[np.minimum(bounds[1:], len(values)) - 1]
    return np.asarray(np.where(size > 0, total / np.maximum(size, 1.0), at_edge))
