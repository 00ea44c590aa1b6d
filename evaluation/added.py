"""What a variance adds to the detection of errors, by cross-fitted models.

A logistic model of second order predicts whether a pixel is wrong from what the network says anyway: how sure it is
(``max(p, 1 - p)``) and which label it predicts; then with the predictive variance; then with the saliency variance as
well. The question is how much the AUROC of errors rises from one to the next. Three safeguards:

- *Cross-fitting*: a pixel is scored by a model that was fitted on other images (or other groups of images).
- *No units*: features are standardised and there is no penalty, so that no scale of a variance matters.
- *A null*: the saliency variance permuted among the pixels of one image that are alike in everything else the model
  knows. It tells what the extra freedom alone would gain.

Pixels are counted in cells: by image, correct or wrong, predicted label, sureness, and both variances. Cells of sureness
and predictive variance are narrow, so that saliency variance cannot gain by telling what their width has lost.

Shapes: I images, R resamples, M cells that hold a pixel, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.arrays import Array, divide
from evaluation.fusion import Fusion
from evaluation.joint import variance_cell
from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.parallel import in_threads

#: Upper edges of the log-odds of ``max(p, 1 - p)``; beyond the last, one more cell.
SURENESS_EDGES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0)
SHAPE = (2, len(SURENESS_EDGES) + 1, 24, 12)  # label, sureness, predictive variance, saliency variance
FOLDS = 5
#: Which cells take part: those of predicted lesion, or all.
REGIONS = ("predicted_lesion", "whole_image")
#: What each model knows beside the predicted label.
MODELS = {"sureness": 1, "predictive_variance": 2, "saliency_variance": 3}


def error_cells_of_image(flat: Mapping[str, Tensor], fusion: Fusion) -> Array:
    """Correct and wrong pixels of one image by cell, (2, *SHAPE) int32; its maps (N,) as :func:`image_maps.checked_maps`."""
    probability, predicted = flat["mean_prediction"], flat["predicted"].to(torch.int64)
    wrong = (predicted != (flat["true_mask"] > 0)).to(torch.int64)
    sure = torch.maximum(probability, 1 - probability).clamp(max=1 - 2.0**-20)
    edges = torch.tensor(SURENESS_EDGES, dtype=sure.dtype, device=sure.device)
    index: Tensor = (wrong * 2 + predicted) * SHAPE[1] + torch.bucketize(torch.logit(sure), edges)
    index = index * SHAPE[2] + variance_cell(flat[PREDICTIVE], fusion.predictive, SHAPE[2])
    index = index * SHAPE[3] + variance_cell(flat[SALIENCY], fusion.saliency, SHAPE[3])
    count = torch.bincount(index, minlength=2 * int(np.prod(SHAPE)))
    return np.asarray(count.view(2, *SHAPE).to(torch.int32).cpu().numpy())


class Design(NamedTuple):
    """The features of the cells that hold a pixel.

    Attributes:
        cells: their numbers, (M,).
        features: by model, (M, D) float64 with a leading column of ones, standardised over all pixels.
    """

    cells: Array
    features: dict[str, Array]


def design(counts: Array, region: str) -> Design:
    """The features of a region's cells.

    Args:
        counts: pixels of all images by cell, SHAPE.
        region: of ``REGIONS``.
    """
    counts = counts.copy()
    if region == "predicted_lesion":
        counts[0] = 0
    cells = np.flatnonzero(counts)
    pixels = counts.ravel()[cells].astype(float)
    label, *places = np.unravel_index(cells, SHAPE)
    first_order = [_standardised(_mid_ranks(place, pixels), pixels) for place in places]
    signs = [] if region == "predicted_lesion" else [2.0 * label - 1.0]
    features = {}
    for model, known in MODELS.items():
        base = first_order[:known]
        columns = [*base, *(base[i] * base[j] for i in range(known) for j in range(i, known))]
        columns += [sign * column for sign in signs for column in (np.ones(len(cells)), *base)]
        standardised = [_standardised(column, pixels) for column in columns]
        features[model] = np.stack([np.ones(len(cells)), *standardised], 1)
    return Design(cells, features)


def _mid_ranks(place: Array, pixels: Array) -> Array:
    """The share of pixels in lower cells plus half of those in the same, (M,) in [0, 1]."""
    total = np.bincount(place, pixels)
    return ((np.cumsum(total) - 0.5 * total) / total.sum())[place]


def _standardised(values: Array, pixels: Array) -> Array:
    """Mean 0 and standard deviation 1 over all pixels; zeros where the values do not vary."""
    centred = values - np.average(values, weights=pixels)
    spread = np.sqrt(np.average(centred**2, weights=pixels))
    return centred / spread if spread > 1e-12 else np.zeros_like(centred)


def fit_logistic(features: Array, correct: Array, wrong: Array, steps: int = 25) -> Array:
    """Maximum-likelihood coefficients (D,) of the log-odds of an error, by Newton's method.

    Directions in which the features do not vary stay at 0 (least-squares steps); a step that would raise the loss is halved.

    Args:
        features: (M, D).
        correct, wrong: pixels of each row, (M,).
        steps: at most; fewer where they have become small.
    """
    def loss(candidate: Array) -> float:
        """Negative log-likelihood."""
        odds = features @ candidate
        return float((total * np.logaddexp(0.0, odds)).sum() - wrong @ odds)

    total = correct + wrong
    coefficients = np.zeros(features.shape[1])
    before = loss(coefficients)
    for _ in range(steps):
        probability = 1.0 / (1.0 + np.exp(-np.clip(features @ coefficients, -30.0, 30.0)))
        gradient = features.T @ (wrong - total * probability)
        hessian = (features * (total * probability * (1.0 - probability))[:, None]).T @ features
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-10)[0]
        after = loss(coefficients + step)
        while after > before and np.abs(step).max() > 1e-6:  # too far: the curvature changes on the way
            step /= 2.0
            after = loss(coefficients + step)
        if after > before:
            break
        coefficients, before = coefficients + step, after
        if np.abs(step).max() < 1e-6:
            break
    return coefficients


def folds_of(groups: Sequence[str], folds: int = FOLDS, seed: int = 42) -> Array:
    """The fold of each image, (I,); images of one group share theirs."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    place = {name: int(order[index] % folds) for index, name in enumerate(names)}
    return np.array([place[group] for group in groups])


def cross_fitted_auroc(
    counts: Array, folds: Array, weights: Array, region: str, models: Sequence[str] = tuple(MODELS)
) -> dict[str, Array]:
    """AUROC of errors of every model on images that it was not fitted on.

    The models are fitted once for each fold, to the split as it is; resamples weigh the images that are scored. Fitting
    again in each resample counts the noise of the fit twice: in simulated studies the standard error was then 1.8 times
    the true one, and 0.95 times without (:mod:`benchmarks.coverage`).

    Args:
        counts: correct and wrong pixels by image and cell, (I, 2, *SHAPE).
        folds: of each image, (I,).
        weights: how often each image was drawn, (R, I).
        region: of ``REGIONS``.
        models: some of ``MODELS``.

    Returns:
        By model, (R,); NaN where a resample holds no error or nothing else.
    """
    total = counts.sum((0, 1))
    if not (total[1] if region == "predicted_lesion" else total).any():  # no pixel is predicted lesion
        return {model: np.full(len(weights), np.nan) for model in models}
    known = design(total, region)
    flat = counts.reshape(len(counts), 2, -1)[:, :, known.cells].astype(float)
    present = [folds == fold for fold in np.unique(folds)]
    everywhere, (correct, wrong) = flat.sum(0), weights @ flat.sum(-1).T[:, :, None]
    result = {}
    for model in models:
        features = known.features[model]
        scores = np.stack([features @ fit_logistic(features, *(everywhere - flat[fold].sum(0))) for fold in present])
        pairs = _ranked_pairs(flat, present, scores)
        result[model] = divide(((weights @ pairs) * weights).sum(1), (correct * wrong)[:, 0])
    return result


def _ranked_pairs(flat: Array, folds: Sequence[Array], scores: Array) -> Array:
    """How many pairs of a wrong pixel of one image and a correct one of another are ranked right, ties counted half.

    The number of such pairs in a resample is quadratic in how often each image was drawn: its AUROC follows from this
    matrix, whatever the number of resamples. All sums are whole or half numbers below 2**53, hence exact.

    Args:
        flat: correct and wrong pixels by image and cell, (I, 2, M).
        folds: the images of each fold, bool (I,); each image in one of them.
        scores: of the cells under the model of each fold, (F, M).

    Returns:
        (I, I): image of the wrong pixel, image of the correct one.
    """
    order = np.argsort(scores, axis=None, kind="stable")
    tied = np.empty(scores.size, dtype=np.int64)
    tied[order] = np.cumsum(np.diff(scores.ravel()[order], prepend=-np.inf) > 1e-12)  # but for rounding
    groups: Array = tied.reshape(scores.shape)
    pairs = np.empty((len(flat), len(flat)))
    for right, ranks in zip(folds, groups):
        ascending = np.argsort(ranks, kind="stable")
        below = np.zeros((int(right.sum()), len(ranks) + 1))
        np.cumsum(flat[right, 0][:, ascending], axis=1, out=below[:, 1:])
        for wrong, other in zip(folds, groups):
            first, last = (np.searchsorted(ranks[ascending], other, side) for side in ("left", "right"))
            pairs[np.ix_(wrong, right)] = flat[wrong, 1] @ (0.5 * (below[:, first] + below[:, last])).T
    return pairs


def permuted(counts: Array, rng: np.random.Generator) -> Array:
    """The counts with the saliency variance permuted among the pixels of an image that are alike in all else.

    Within each image, label, cell of sureness and of predictive variance, the wrong pixels are dealt new saliency cells
    from those that wrong and correct pixels have together (the multivariate hypergeometric distribution).

    Args:
        counts: (I, 2, *SHAPE).
        rng: of the permutation.
    """
    result = counts.copy()
    wrong = counts[:, 1].sum(-1)
    mixed = np.argwhere((wrong > 0) & (counts[:, 0].sum(-1) > 0))  # elsewhere nothing can change
    place = tuple(mixed.T)
    pool = (counts[:, 0] + counts[:, 1])[place].astype(np.int64)  # n, saliency
    left, remaining = wrong[place].astype(np.int64), pool.sum(1)
    for cell in range(pool.shape[1]):
        remaining -= pool[:, cell]
        dealt = rng.hypergeometric(pool[:, cell], remaining, left)
        result[:, 1, :, :, :, cell][place] = dealt
        left -= dealt
    result[:, 0] = counts.sum(1) - result[:, 1]
    return result


def permutation_null(counts: Array, folds: Array, region: str, permutations: int = 20, seed: int = 42) -> dict[str, Any]:
    """The gain of saliency variance when it cannot know more than the model already does.

    Returns:
        "mean" and "largest" of the permuted gains, and "p_value", the share of permutations (with the data themselves)
        that gain as much as the data; NaN where there is no gain to be had, as without a predicted lesion.
    """
    numbers = np.unique(folds)

    def gain(cells: Array) -> float:
        by_fold = np.stack([cells[folds == fold].sum(0) for fold in numbers])  # images of a fold need not be told apart
        once = np.ones((1, len(numbers)))
        found = cross_fitted_auroc(by_fold, numbers, once, region, ("predictive_variance", "saliency_variance"))
        return float(found["saliency_variance"][0] - found["predictive_variance"][0])

    def gain_of_permutation(number: int) -> float:
        return gain(permuted(counts, np.random.default_rng([seed, number])))

    actual = gain(counts)
    if np.isnan(actual):
        return {"mean": np.nan, "largest": np.nan, "p_value": np.nan, "permutations": 0}
    gains = np.array(in_threads(gain_of_permutation, range(permutations), permutations))
    p_value = (1 + int((gains >= actual).sum())) / (1 + permutations)
    return {"mean": float(gains.mean()), "largest": float(gains.max()), "p_value": p_value, "permutations": permutations}


def gains(measures: Mapping[str, Array]) -> dict[str, Array]:
    """What each variance adds: the AUROC of the model with it minus that of the model without."""
    return {
        "predictive_variance": measures["predictive_variance"] - measures["sureness"],
        "saliency_variance": measures["saliency_variance"] - measures["predictive_variance"],
    }
