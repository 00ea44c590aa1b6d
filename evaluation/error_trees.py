"""Boosted trees that predict which pixels are wrong, with and without the saliency variance.

The logistic models of :mod:`evaluation.added_value` could miss what saliency adds because of their form. Trees have none:
whatever function of the inputs tells errors from correct pixels, given pixels enough, they come close to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple

import numpy as np
import torch

from evaluation.added_value import compare_models
from evaluation.arrays import Array
from evaluation.image_maps import ImageMaps, Split
from evaluation.names import CONFIDENCE_STEP, PREDICTIVE, REGIONS, SALIENCY
from evaluation.parallel import in_threads
from evaluation.resampling import units_of
from evaluation.sampling import DrawnPixels, drawn_pixels

#: The inputs of each model. ``1 - max(p, 1 - p)`` says how sure the network is; ``p`` says that and the label.
INPUTS = {
    "without": ("one_minus_max_probability", PREDICTIVE),
    "with": ("one_minus_max_probability", PREDICTIVE, SALIENCY),
    "label_without": ("mean_prediction", PREDICTIVE),
    "label_with": ("mean_prediction", PREDICTIVE, SALIENCY),
}
QUANTILE_BINS = 512


def count_error_trees(
    validation: Split, test: Split, fitted_on: int = 512, read_on: int = 2048, seed: int = 42
) -> tuple[list[str], dict[str, Array], Array]:
    """Fit every model in every region on validation, and count its test pixels by predicted probability.

    Args:
        validation, test: pairs of id and maps; each is read once.
        fitted_on, read_on: pixels drawn at most from each region of each image of the two splits. A drawn pixel
            counts for as many as it was drawn from, so that large regions keep their weight.
        seed: of the draws and the trees.

    Returns:
        Names "region/model" (S,); per image of `test` the arrays `model_log_loss` (I, S), `model_pixels`
        (I, S, 2: correct, wrong) and `model_cells` (I, S, 2, Q), all weighted; and the AUROC (S,) of all
        drawn test pixels by scikit-learn, NaN where a region has no error or nothing else.
    """
    from sklearn.metrics import roc_auc_score  # here, as loading scikit-learn takes seconds

    fitting, reading = drawn_pixels(validation, fitted_on, seed), drawn_pixels(test, read_on, seed)
    images = len(reading["whole_image"])
    pooled = {region: (_pooled(fitting[region]), _pooled(reading[region])) for region in REGIONS}

    def measured(piece: tuple[str, str]) -> tuple[Array, Array, Array, float]:
        """Log loss, pixels and cells by image, and AUROC, of one model in one region."""
        region, model = piece
        fitted_pixels, pixels = pooled[region]
        side = 2 * pixels.image + pixels.wrong
        probability = _fitted(fitted_pixels, INPUTS[model], seed)(pixels.features)
        both = 0 < pixels.wrong.sum() < len(pixels.wrong)
        auroc = roc_auc_score(pixels.wrong, probability, sample_weight=pixels.weight) if both else np.nan
        kept = np.clip(probability, CONFIDENCE_STEP, 1.0 - CONFIDENCE_STEP)
        loss = -pixels.weight * np.log(np.where(pixels.wrong, kept, 1.0 - kept))
        place = side * QUANTILE_BINS + _quantile_bin(probability)
        histogram = np.bincount(place, pixels.weight, 2 * images * QUANTILE_BINS)
        return (
            np.bincount(pixels.image, loss, images), np.bincount(side, pixels.weight, 2 * images).reshape(images, 2),
            histogram.reshape(images, 2, QUANTILE_BINS), float(auroc),
        )

    pieces = [(region, model) for region in REGIONS for model in INPUTS]
    *parts, auroc = zip(*in_threads(measured, pieces, len(pieces)))
    arrays = {name: np.stack(part, 1) for name, part in zip(("model_log_loss", "model_pixels", "model_cells"), parts)}
    return [f"{region}/{model}" for region, model in pieces], arrays, np.array(auroc)


def added_value_of_trees(
    validation: Split, test: Split, resamples: int = 10_000, seed: int = 42, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As :func:`added_value.added_value`, of boosted trees instead of logistic models.

    Args:
        validation, test: pairs of id and maps; each is read once.
        resamples: of the bootstrap.
        seed: of the draws, the trees and the bootstrap.
        groups: by id, what the bootstrap draws; see :func:`resampling.units_of`.

    Returns:
        What :func:`added_value.compare_models` returns.
    """
    ids: list[str] = []

    def noted() -> Iterator[tuple[str, ImageMaps]]:
        for id, maps in test:
            ids.append(id)
            yield id, maps

    counted = count_error_trees(validation, noted(), seed=seed)
    return compare_models(*counted, resamples, seed, units_of(ids, groups))


class _Pixels(NamedTuple):
    """All drawn pixels of a region."""

    features: dict[str, Array]  # (N,) by name
    wrong: Array  # (N,) bool
    weight: Array  # (N,)
    image: Array  # (N,): the number of its image


def _pooled(drawn: Sequence[DrawnPixels]) -> _Pixels:
    features = {name: torch.cat([pixels.maps[name] for pixels in drawn]).numpy() for name in drawn[0].maps}
    probability = features["mean_prediction"]
    features["one_minus_max_probability"] = 1.0 - np.maximum(probability, 1.0 - probability)
    wrong = np.concatenate([pixels.wrong for pixels in drawn])
    weight = np.concatenate([pixels.weight for pixels in drawn])
    return _Pixels(features, wrong, weight, np.repeat(np.arange(len(drawn)), [len(pixels.wrong) for pixels in drawn]))


def _fitted(pixels: _Pixels, inputs: Sequence[str], seed: int) -> Callable[[dict[str, Array]], Array]:
    """A function from features by name to the probability of an error; constant where only one class occurs."""
    wrong = pixels.wrong
    if not 0 < wrong.sum() < len(wrong):
        constant = float(wrong.mean()) if len(wrong) else 0.5
        return lambda features: np.full(len(features[inputs[0]]), constant)
    from sklearn.ensemble import HistGradientBoostingClassifier  # here, as loading scikit-learn takes seconds

    def columns(features: dict[str, Array]) -> Array:
        return np.stack([features[name] for name in inputs], 1)

    model = HistGradientBoostingClassifier(
        max_iter=150, max_leaf_nodes=16, min_samples_leaf=200, early_stopping=False, random_state=seed
    )
    model.fit(columns(pixels.features), wrong, sample_weight=pixels.weight / pixels.weight.mean())
    return lambda features: np.asarray(model.predict_proba(columns(features))[:, 1])


def _quantile_bin(probability: Array) -> Array:
    """Quantile bin of each value, monotone; equal values share a bin."""
    if not len(probability):
        return np.zeros(0, dtype=int)
    edges = np.quantile(probability, np.arange(1, QUANTILE_BINS) / QUANTILE_BINS)
    return np.searchsorted(edges, probability, side="left")
