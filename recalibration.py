"""Recalibrating a score on the validation split, from histograms over quantile cells alone.

Both maps are fitted to the counts of correct and wrong pixels of each cell and are constant within a
cell, so that the recalibrated score of any set of images follows from its counts, without a pixel.
"""

from __future__ import annotations

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression


def isotonic(correct: np.ndarray, wrong: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Accuracy of each cell under the constraint that it does not rise with the uncertainty, (Q,).

    Least squares weighted with the pixels; an empty cell takes the value between its neighbours.
    NaN without pixels. Zadrozny & Elkan, KDD 2002.
    """
    size = correct + wrong
    used = size > 0
    if not used.any():
        return np.full(len(size), np.nan)
    position = np.arange(len(size), dtype=float)  # the order is all that matters
    model = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=False, out_of_bounds="clip")
    model.fit(position[used], correct[used] / size[used], sample_weight=size[used])
    return model.predict(position)


def platt(correct: np.ndarray, wrong: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-(a x + b)))`` of each cell, x being the log-odds of its confidence, (Q,).

    Fitted by maximum likelihood, without the smoothed targets, which serve small samples; the sign of
    `a` is free. Where all pixels are correct, or all wrong, the constant accuracy. NaN without pixels. Platt, 1999.
    """
    total = correct.sum() + wrong.sum()
    if total == 0 or correct.sum() == 0 or wrong.sum() == 0:
        return np.full(len(correct), correct.sum() / total if total else np.nan)
    logit = log_odds(uncertainty)
    features = np.concatenate([logit, logit])[:, None]
    labels = np.concatenate([np.ones(len(logit)), np.zeros(len(logit))])
    weights = np.concatenate([correct, wrong])
    kept = weights > 0
    model = LogisticRegression(C=1e8, max_iter=1000, tol=1e-8)
    # Weights of mean 1 condition the optimiser; C is large enough for the penalty to vanish.
    model.fit(features[kept], labels[kept], sample_weight=weights[kept] / weights[kept].mean())
    return model.predict_proba(logit[:, None])[:, 1]


METHODS = {"isotonic": isotonic, "platt": platt}


def log_odds(uncertainty: np.ndarray) -> np.ndarray:
    """``ln((1 - u) / u)``, the log-odds of the confidence, with u kept within [1e-12, 1 - 2**-24]."""
    clipped = np.clip(uncertainty, 1e-12, 1.0 - 2.0**-24)
    return np.log1p(-clipped) - np.log(clipped)


def mean_uncertainty(fine: np.ndarray, edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean uncertainty of each quantile cell (Q,) from fine counts (F,) of one score; empty ones from their edge."""
    bounds = np.concatenate([[0], edges + 1, [len(fine)]])
    cumulated = np.concatenate([[0.0], np.cumsum(fine, dtype=float)])
    weighted = np.concatenate([[0.0], np.cumsum(fine * values)])
    size, total = np.diff(cumulated[bounds]), np.diff(weighted[bounds])
    return np.where(size > 0, total / np.maximum(size, 1.0), values[np.minimum(bounds[1:], len(values)) - 1])
