"""Boosted trees that predict which pixels are wrong, with and without the saliency variance.

The logistic models of :mod:`study` could miss what saliency adds because of their form. Trees have none:
whatever function of the inputs tells errors from correct pixels, given pixels enough, they come close to it.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from calibration import REGIONS
from counters import drawn_pixels
from fusion import PREDICTIVE, SALIENCY

#: The inputs of each model. ``1 - max(p, 1 - p)`` says how sure the network is; ``p`` says that and the label.
INPUTS = {
    "without": ("one_minus_max_probability", PREDICTIVE),
    "with": ("one_minus_max_probability", PREDICTIVE, SALIENCY),
    "label_without": ("mean_prediction", PREDICTIVE),
    "label_with": ("mean_prediction", PREDICTIVE, SALIENCY),
}
CELLS = 512
_SMALLEST = 2.0**-24  # probabilities are kept this far from 0 and 1 in the log loss


def count_error_trees(validation, test, fitted_on: int = 512, read_on: int = 2048, seed: int = 42) -> tuple:
    """Fit every model in every region on validation, and count its test pixels by predicted probability.

    Args:
        validation, test: re-iterables of (id, maps) as :mod:`counters` describes.
        fitted_on, read_on: pixels drawn at most from each image and region of the two splits. A drawn pixel
            counts for as many as it was drawn from, so that large regions keep their weight.
        seed: of the draws and the trees.

    Returns:
        Names "region/model" (S,); per image of `test` the arrays `model_log_loss` (I, S), `model_pixels`
        (I, S, 2: correct, wrong) and `model_cells` (I, S, 2, Q), all weighted; and the AUROC (S,) of all
        drawn test pixels by scikit-learn, NaN where a region has no error or nothing else.
    """
    fitting, reading = drawn_pixels(validation, fitted_on, seed), drawn_pixels(test, read_on, seed)
    images = len(reading["whole_image"])
    names, auroc = [], []
    arrays = {name: [] for name in ("model_log_loss", "model_pixels", "model_cells")}
    for region in REGIONS:
        features, wrong, weight, _ = _pooled(fitting[region])
        test_features, test_wrong, test_weight, image = _pooled(reading[region])
        for model, inputs in INPUTS.items():
            probability = _fitted(features, wrong, weight, inputs, seed)(test_features)
            names.append(f"{region}/{model}")
            both = 0 < test_wrong.sum() < len(test_wrong)
            auroc.append(roc_auc_score(test_wrong, probability, sample_weight=test_weight) if both else np.nan)
            kept = np.clip(probability, _SMALLEST, 1.0 - _SMALLEST)
            loss = -test_weight * np.log(np.where(test_wrong, kept, 1.0 - kept))
            arrays["model_log_loss"].append(np.bincount(image, loss, images))
            side = 2 * image + test_wrong
            arrays["model_pixels"].append(np.bincount(side, test_weight, 2 * images).reshape(images, 2))
            cell = _cells(probability)
            arrays["model_cells"].append(
                np.bincount(side * CELLS + cell, test_weight, 2 * images * CELLS).reshape(images, 2, CELLS)
            )
    return names, {name: np.stack(parts, 1) for name, parts in arrays.items()}, np.array(auroc)


def _pooled(drawn: list) -> tuple:
    """Features by name, wrong, weight and number of the image, each over all drawn pixels."""
    features = {name: torch.cat([values[name] for values, _, _ in drawn]).numpy() for name in drawn[0][0]}
    probability = features["mean_prediction"]
    features["one_minus_max_probability"] = 1.0 - np.maximum(probability, 1.0 - probability)
    wrong, weight = (np.concatenate([entry[position] for entry in drawn]) for position in (1, 2))
    image = np.repeat(np.arange(len(drawn)), [len(entry[1]) for entry in drawn])
    return features, wrong, weight, image


def _fitted(features: dict, wrong: np.ndarray, weight: np.ndarray, inputs: tuple, seed: int):
    """A function from features by name to the probability of an error; constant where only one class occurs."""
    if not 0 < wrong.sum() < len(wrong):
        constant = float(wrong.mean()) if len(wrong) else 0.5
        return lambda other: np.full(len(other[inputs[0]]), constant)
    model = HistGradientBoostingClassifier(
        max_iter=150, max_leaf_nodes=16, min_samples_leaf=200, early_stopping=False, random_state=seed
    )
    model.fit(np.stack([features[name] for name in inputs], 1), wrong, sample_weight=weight / weight.mean())
    return lambda other: model.predict_proba(np.stack([other[name] for name in inputs], 1))[:, 1]


def _cells(probability: np.ndarray) -> np.ndarray:
    """Quantile cell of each value, monotone; equal values share a cell."""
    if not len(probability):
        return np.zeros(0, dtype=int)
    edges = np.quantile(probability, np.arange(1, CELLS) / CELLS)
    return np.searchsorted(edges, probability, side="left")
