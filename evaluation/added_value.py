"""Whether saliency variance adds anything: models that predict which pixels are wrong, with and without it.

Given the mean prediction and the predictive variance, does the saliency variance tell anything more about where the
errors are? The logistic models are here, with the comparison that those of :mod:`evaluation.error_trees` share.

Shapes: I images, S models ("region/model"), N pixels, D features, Q quantile bins, F histogram bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation import ranking
from evaluation.arrays import Array, accurate_dtype, divide, jsonable
from evaluation.counting import Counters, Rows
from evaluation.fusion import fit_logistic
from evaluation.image_maps import Split, checked_maps, pieces, pixels_in_region, wrong_pixels
from evaluation.names import PREDICTIVE, REGIONS, SALIENCY
from evaluation.normalisation import Distribution, Rank, rank
from evaluation.ranking import HISTOGRAM_BINS, add_histogram, histogram_bin, quantile_edges, quantile_table
from evaluation.resampling import HIGHER_IS_BETTER, LOWER_IS_BETTER, bootstrap, estimate, paired_difference, units_of
from evaluation.sampling import drawn_pixels

MODELS = ("without", "with", "label_without", "label_with")
PAIRS = (("with", "without"), ("label_with", "label_without"))

# ---------------------------------------------------------------- logistic models


def error_features(maps: Mapping[str, Tensor], ranks: Mapping[str, Rank]) -> dict[str, Tensor]:
    """Features of the four logistic error models.

    "without": second-order polynomial of the log-odds of the mean prediction's confidence ``max(p, 1 - p)`` and
    the rank of the predictive variance. "with": also of the rank of the saliency variance.
    These do not know which label was predicted. "label_without" and "label_with" do: they have the predicted label
    and its products with the first-order features as well. The difference matters where a region gives the
    truth away: inside the ground truth an error *is* a predicted background pixel, so that there the label
    alone decides, and whatever tells the label (saliency is high where the network sees lesion) seems to find errors.

    Args:
        maps: flat maps (N,) as :func:`image_maps.checked_maps` gives them.
        ranks: normalisations of both variances, by name.

    Returns:
        (N, D) float32 by model.
    """
    probability = maps["mean_prediction"]
    confidence = torch.maximum(probability, 1.0 - probability).clamp(max=1.0 - 2.0**-20)
    sure = torch.log(confidence / (1.0 - confidence)) / 4.0
    predictive = 2.0 * ranks[PREDICTIVE](maps[PREDICTIVE]) - 1.0
    saliency = 2.0 * ranks[SALIENCY](maps[SALIENCY]) - 1.0
    label = torch.where(maps["predicted"] > 0, 1.0, -1.0)
    base = [sure, predictive, sure * sure, predictive * predictive, sure * predictive]
    extra = [saliency, saliency * saliency, sure * saliency, predictive * saliency]
    signed = [label, label * sure, label * predictive]
    return {
        "without": torch.stack(base, 1),
        "with": torch.stack(base + extra, 1),
        "label_without": torch.stack(base + signed, 1),
        "label_with": torch.stack(base + extra + signed + [label * saliency], 1),
    }


@dataclass
class ErrorModels:
    """Logistic models of a pixel's error, with the normalisations of their features."""

    ranks: dict[str, Rank]
    coefficients: dict[tuple[str, str], tuple[float, ...]]  # intercept and coefficients by region and model


def fit_error_models(validation: Split, found: Mapping[str, Distribution], limit: int = 512, seed: int = 42) -> ErrorModels:
    """Fit every model in every region on validation.

    Args:
        validation: read once.
        found: what :func:`normalisation.distributions` returns for `validation`.
        limit: pixels drawn at most from each region of each image, weighted for the rest.
        seed: of the draws.
    """
    ranks = {name: rank(found[name]) for name in (PREDICTIVE, SALIENCY)}
    coefficients = {}
    for region, drawn in drawn_pixels(validation, limit, seed).items():
        features = [error_features(pixels.maps, ranks) for pixels in drawn]
        wrong = np.concatenate([pixels.wrong for pixels in drawn])
        weight = np.concatenate([pixels.weight for pixels in drawn])
        for model in MODELS:
            columns = torch.cat([one[model] for one in features]).double().numpy()
            coefficients[region, model] = fit_logistic(columns, wrong, weight)
    return ErrorModels(ranks, coefficients)


def count_error_models(images: Split, models: ErrorModels, edges: Array | None = None) -> Counters:
    """Counters of the models on a split, the scores being "region/model".

    Args:
        images: pairs of id and maps; read once.
        models: fitted on validation.
        edges: quantile bins from :func:`model_edges`, if wanted.

    Returns:
        Counters of `model_log_loss` (I, S), `model_pixels` (I, S, 2: correct, wrong), and, given `edges`,
        `model_cells` (I, S, 2, Q); pooled `model_fine` (S, 2, F), by the predicted probability of an error.
    """
    names = [f"{region}/{model}" for region in REGIONS for model in MODELS]
    quantiles = 0 if edges is None else edges.shape[1] + 1
    rows, histogram, lookup = Rows(), None, None
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        device = flat["mean_prediction"].device
        if histogram is None:
            histogram = torch.zeros(len(names) * 2 * HISTOGRAM_BINS, dtype=torch.int64, device=device)
            lookup = None if edges is None else quantile_table(edges).to(device)
        row = {
            "model_log_loss": np.zeros(len(names)),
            "model_pixels": np.zeros((len(names), 2), dtype=np.int64),
            "model_cells": np.zeros((len(names), 2, quantiles), dtype=np.int32),
        }
        for piece in pieces(len(flat["mean_prediction"]), device):
            part = {name: value[piece] for name, value in flat.items()}
            outcome = part["outcome"]
            features = error_features(part, models.ranks)
            for position, name in enumerate(names):
                region, model = name.split("/")
                inside = pixels_in_region(outcome, region)
                wrong = wrong_pixels(outcome)[inside].to(torch.int64)
                weights = torch.tensor(models.coefficients[region, model], dtype=torch.float32, device=device)
                logit = weights[0] + (features[model][inside] * weights[1:]).sum(1)
                loss = torch.nn.functional.softplus(torch.where(wrong > 0, -logit, logit))
                row["model_log_loss"][position] += float(loss.sum(dtype=accurate_dtype(device)))
                errors = int(wrong.sum())
                row["model_pixels"][position] += (len(wrong) - errors, errors)
                place = histogram_bin(torch.sigmoid(logit))
                add_histogram(histogram, (position * 2 + wrong) * HISTOGRAM_BINS + place)
                if lookup is not None:
                    counts = torch.zeros(2 * quantiles, dtype=torch.int64, device=device)
                    add_histogram(counts, wrong * quantiles + lookup[position][place])
                    row["model_cells"][position] += counts.view(2, quantiles).cpu().numpy().astype(np.int32)
        if not quantiles:
            del row["model_cells"]
        rows.add(identifier, row)
    pooled = {} if histogram is None else {"model_fine": histogram.view(len(names), 2, HISTOGRAM_BINS).cpu().numpy()}
    return rows.counters(names, pooled=pooled, edges=edges)


def model_edges(validation: Counters, bins: int = 256) -> Array:
    """Quantile bins of every model from its validation counters; correct and wrong pixels have half of them each."""
    return quantile_edges(validation.pooled["model_fine"], [(0,), (1,)], bins)


def added_value(
    models: ErrorModels, test: Counters, resamples: int = 10_000, seed: int = 42, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Log loss and AUROC of the logistic models on test, with and without saliency, and their paired differences.

    Saliency adds something where the log loss falls or the AUROC rises.

    Args:
        models: fitted on validation.
        test: their counters with quantile bins, see :func:`count_error_models`.
        resamples, seed: of the bootstrap.
        groups: by id, what it draws; see :func:`resampling.units_of`.

    Returns:
        What :func:`compare_models` returns, and the "coefficients" of every model.
    """
    arrays = {name: test.images[name] for name in ("model_log_loss", "model_pixels", "model_cells")}
    histogram = test.pooled["model_fine"]
    exact, units = ranking.auroc(histogram[:, 0], histogram[:, 1]), units_of(test.ids, groups)
    result = compare_models(test.scores, arrays, exact, resamples, seed, units)
    for (region, model), coefficients in models.coefficients.items():
        result[region]["models"][model]["coefficients"] = list(coefficients)
    return result


# ---------------------------------------------------------------- comparing models


def compare_models(
    names: Sequence[str], arrays: Mapping[str, Array], exact_auroc: Array, resamples: int, seed: int, units: Array | None = None
) -> dict[str, Any]:
    """Log loss and AUROC of every model in every region, and the paired differences of `PAIRS`.

    Args:
        names: "region/model" of each of S models, with every region and every model of `MODELS`.
        arrays: per image `model_log_loss` (I, S) in nats, `model_pixels` (I, S, 2: correct, wrong) and
            `model_cells` (I, S, 2, Q), pixels in ascending quantile bins of the predicted probability.
        exact_auroc: (S,); the resamples from the quantile bins are shifted by what it differs from theirs.
        resamples, seed, units: of the bootstrap, see :func:`resampling.bootstrap_weights`.

    Returns:
        Per region "models", both measures of each as estimates, and "difference", both of each pair, with a verdict.
    """
    arrays = {**arrays, "model_cells": arrays["model_cells"].astype(np.float32)}
    point = _model_statistics({name: value.sum(0, dtype=float) for name, value in arrays.items()})
    samples = bootstrap(arrays, _model_statistics, resamples, seed, chunk=64, units=units)
    samples["auroc"] = np.clip(samples["auroc"] + (exact_auroc - point["auroc"]), 0.0, 1.0)
    point["auroc"] = exact_auroc
    position = {name: index for index, name in enumerate(names)}
    better = {"log_loss": LOWER_IS_BETTER, "auroc": HIGHER_IS_BETTER}
    result: dict[str, Any] = {}
    for region in REGIONS:
        place = {model: position[f"{region}/{model}"] for model in MODELS}
        result[region] = {
            "models": {
                model: {measure: estimate(point[measure][index], samples[measure][:, index]) for measure in better}
                for model, index in place.items()
            },
            "difference": {
                f"{first}_minus_{second}": {
                    measure: paired_difference(point[measure], samples[measure], place[first], place[second], sign)
                    for measure, sign in better.items()
                }
                for first, second in PAIRS
            },
        }
    return jsonable(result)  # type: ignore[no-any-return]


def _model_statistics(summed: Mapping[str, Array]) -> dict[str, Array]:
    """Log loss and AUROC of every model, (..., S)."""
    histogram = summed["model_cells"]
    return {
        "log_loss": divide(summed["model_log_loss"], summed["model_pixels"].sum(-1)),
        "auroc": ranking.auroc(histogram[..., 0, :], histogram[..., 1, :]),
    }
