"""Beyond the paper's fusion: every normalisation and rule, and whether saliency adds anything at all.

Two questions. Does any other way to fuse the two variances beat predictive variance alone, by its
foreground calibration error (`rules`)? And, given the mean prediction and the predictive variance,
does the saliency variance tell anything more about where the errors are (`added_value`)?
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

import ranking
from calibration import (
    REGIONS,
    atoms,
    bootstrap,
    confidence_sum,
    count_confidence,
    expected_calibration_error,
    interval,
    jsonable,
    verdict,
)
from counters import Counters, Rows, checked_maps, count_curve, drawn_pixels, pieces
from error_trees import count_error_trees
from evaluation import lambda_errors, tune, widest
from fusion import (
    NORMALISATIONS,
    PREDICTIVE,
    RULES,
    SALIENCY,
    Fusion,
    distributions,
    fit_logistic,
    foreground_sample,
    fuse,
    lambda_grid,
)
from measures import estimate
from ranking import FINE_CELLS, add_histogram, fine_cell, quantile_edges, quantile_table

BASELINE = "predictive"


# Fusion rules


def candidate_fusions(validation, found: dict, lambdas: tuple) -> list:
    """Every normalisation with every rule and every parameter that the rule proposes, as a list of `Fusion`.

    `found` is what :func:`fusion.distributions` returns for `validation`.
    """
    candidates = []
    for normalisation, normalise in NORMALISATIONS.items():
        plain = Fusion(normalise(found[PREDICTIVE]), normalise(found[SALIENCY]), BASELINE, None, normalisation)
        sample = foreground_sample(validation, plain)
        for name, function in RULES.items():
            parameters = function.candidates(sample, lambdas) if hasattr(function, "candidates") else (None,)
            candidates += [replace(plain, rule=name, parameter=parameter) for parameter in parameters]
    return candidates


def count_fusions(images, candidates: list, bins: int = 15) -> Counters:
    """Foreground counters of every candidate: `fusion_count`, `fusion_confidence` (I, C, 2, B), wrong and correct."""
    rows = Rows()
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        inside = flat["true_mask"].nonzero().view(-1)
        chosen = {name: flat[name].index_select(0, inside) for name in ("predicted", PREDICTIVE, SALIENCY)}
        correct = chosen["predicted"].to(torch.int32)
        count = torch.zeros(len(candidates), 2, bins, dtype=torch.int64)
        total = torch.zeros_like(count)
        for piece in pieces(len(inside), inside.device):
            scores = _fused_scores(chosen[PREDICTIVE][piece], chosen[SALIENCY][piece], candidates)
            here_count, here_total = count_confidence(scores, correct[piece], 2, bins)
            count += here_count
            total += here_total
        rows.add(identifier, {"fusion_count": count.numpy(), "fusion_confidence": confidence_sum(total).numpy()})
    return rows.counters([str(index) for index in range(len(candidates))], bins=bins)


def _fused_scores(pred_variance: torch.Tensor, saliency_variance: torch.Tensor, candidates: list) -> torch.Tensor:
    """Scores (C, n); each normalisation is applied once, not once a rule."""
    normalised, scores = {}, []
    for candidate in candidates:
        if candidate.normalisation not in normalised:
            normalised[candidate.normalisation] = candidate.normalise(pred_variance, saliency_variance)
        scores.append(fuse(*normalised[candidate.normalisation], candidate.rule, candidate.parameter))
    return torch.stack(scores)


def fusion_table(candidates: list, validation: Counters, test: Counters, resamples=10_000, seed=42) -> list:
    """One row a normalisation and rule, its parameter chosen on validation, its test ECE and paired differences.

    `minus_predictive_variance` compares with the paper's min-max normalised predictive variance,
    `minus_baseline` with the rule without saliency under the same normalisation (for a fitted rule: also fitted).
    """
    chosen = {}
    validation_errors = _fusion_errors({name: value.sum(0) for name, value in validation.images.items()})
    for index, candidate in enumerate(candidates):
        key = candidate.normalisation, candidate.rule
        # A tie goes to the later candidate, that is, to the larger lambda.
        if key not in chosen or not validation_errors[index] > validation_errors[chosen[key]]:
            chosen[key] = index
    point = _fusion_errors({name: value.sum(0) for name, value in test.images.items()})
    arrays = {name: value[:, list(chosen.values())] for name, value in test.images.items()}
    samples = bootstrap(arrays, lambda summed: {"ece": _fusion_errors(summed)}, resamples, seed)["ece"]
    column = {key: position for position, key in enumerate(chosen)}

    def difference(key, other):
        value = point[chosen[key]] - point[chosen[other]]
        bounds = interval(samples[:, column[key]] - samples[:, column[other]])
        return {"value": value, "interval": bounds, "verdict": verdict(value, *bounds)}

    rows = []
    for (normalisation, rule), index in chosen.items():
        key = normalisation, rule
        baseline = getattr(RULES[rule], "baseline", BASELINE)
        rows.append(
            {
                "normalisation": normalisation,
                "rule": rule,
                "parameter": candidates[index].parameter,
                "validation_foreground_ece": validation_errors[index],
                "foreground_ece": estimate(point[index], samples[:, column[key]]),
                "minus_predictive_variance": difference(key, ("min_max", BASELINE)),
                "baseline": baseline,
                "minus_baseline": difference(key, (normalisation, baseline)),
            }
        )
    return jsonable(rows)


def _fusion_errors(summed: dict) -> np.ndarray:
    count = summed["fusion_count"]
    return expected_calibration_error(count.sum(-2), count[..., 1, :], summed["fusion_confidence"].sum(-2))


# Added value of the saliency variance

MODELS = ("without", "with", "label_without", "label_with")
PAIRS = (("with", "without"), ("label_with", "label_without"))


def error_features(maps: dict, ranks: dict) -> dict:
    """Features (N, D) of the four logistic error models.

    "without": second-order polynomial of the log-odds of the mean prediction's confidence ``max(p, 1 - p)`` and
    the rank of the predictive variance. "with": also of the rank of the saliency variance.
    These do not know which label was predicted. "label_without" and "label_with" do: they have the predicted label
    and its products with the first-order features as well. The difference matters where a region gives the
    truth away: inside the ground truth an error *is* a predicted background pixel, so that there the label
    alone decides, and whatever tells the label (saliency is high where the network sees lesion) seems to find errors.

    Args:
        maps: flat maps (N,) as :func:`counters.checked_maps` gives them.
        ranks: normalisations of both variances, by name, to [0, 1].
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
    """Logistic models of a pixel's error, {(region, model): intercept and coefficients}, and their features' ranks."""

    ranks: dict
    coefficients: dict


def fit_error_models(validation, found: dict, limit: int = 512, seed: int = 42) -> ErrorModels:
    """Fit every model in every region to at most `limit` pixels an image and region, weighted for the rest."""
    ranks = {name: NORMALISATIONS["rank"](found[name]) for name in (PREDICTIVE, SALIENCY)}
    coefficients = {}
    for region, drawn in drawn_pixels(validation, limit, seed).items():
        features = [error_features(values, ranks) for values, _, _ in drawn]
        wrong, weight = (np.concatenate([entry[position] for entry in drawn]) for position in (1, 2))
        for model in MODELS:
            columns = torch.cat([one[model] for one in features]).double().numpy()
            coefficients[region, model] = fit_logistic(columns, wrong, weight)
    return ErrorModels(ranks, coefficients)


def count_error_models(images, models: ErrorModels, edges: np.ndarray | None = None) -> Counters:
    """Counters of the models on a split, the scores being "region/model".

    `model_log_loss` (I, S, 1), `model_pixels` (I, S, 2: correct, wrong), and, given `edges`,
    `model_cells` (I, S, 2, Q); pooled `model_fine` (S, 2, F).
    """
    names = [f"{region}/{model}" for region in REGIONS for model in MODELS]
    cells = 0 if edges is None else edges.shape[1] + 1
    rows, fine, lookup = Rows(), None, None
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        device = flat["mean_prediction"].device
        accurate = torch.float32 if device.type == "mps" else torch.float64
        if fine is None:
            fine = torch.zeros(len(names) * 2 * FINE_CELLS, dtype=torch.int64, device=device)
            lookup = quantile_table(edges).to(device) if cells else None
        row = {"model_log_loss": np.zeros(len(names)), "model_pixels": np.zeros((len(names), 2), dtype=np.int64)}
        histogram = np.zeros((len(names), 2, cells), dtype=np.int32)
        for piece in pieces(len(flat["mean_prediction"]), device):
            part = {name: value[piece] for name, value in flat.items()}
            atom = atoms(part["predicted"], part["true_mask"])
            features = error_features(part, models.ranks)
            for position, name in enumerate(names):
                region, model = name.split("/")
                inside = sum(atom == member for member in REGIONS[region]).nonzero().view(-1)
                wrong = ((atom == 1) | (atom == 2))[inside].to(torch.int64)
                weights = torch.tensor(models.coefficients[region, model], dtype=torch.float32, device=device)
                logit = weights[0] + (features[model][inside] * weights[1:]).sum(1)
                loss = torch.nn.functional.softplus(torch.where(wrong > 0, -logit, logit))
                row["model_log_loss"][position] += float(loss.sum(dtype=accurate))
                errors = int(wrong.sum())
                row["model_pixels"][position] += (len(wrong) - errors, errors)
                cell = fine_cell(torch.sigmoid(logit))
                add_histogram(fine, (position * 2 + wrong) * FINE_CELLS + cell)
                if cells:
                    counts = torch.zeros(2 * cells, dtype=torch.int64, device=device)
                    add_histogram(counts, wrong * cells + lookup[position][cell])
                    histogram[position] += counts.view(2, cells).cpu().numpy().astype(np.int32)
        if cells:
            row["model_cells"] = histogram
        rows.add(identifier, row)
    pooled = {} if fine is None else {"model_fine": fine.view(len(names), 2, FINE_CELLS).cpu().numpy()}
    return rows.counters(names, pooled=pooled, edges=edges)


def model_edges(validation: Counters, cells: int = 256) -> np.ndarray:
    """Quantile cells of every model from its validation counters; correct and wrong pixels have half of them each."""
    return quantile_edges(validation.pooled["model_fine"], [(0,), (1,)], cells)


def added_value(models: ErrorModels, test: Counters, resamples=10_000, seed=42) -> dict:
    """Log loss and AUROC of the error models on test, with and without saliency, and their paired differences.

    Saliency adds something where the log loss falls or the AUROC rises.
    """
    arrays = {name: test.images[name] for name in ("model_log_loss", "model_pixels", "model_cells")}
    fine = test.pooled["model_fine"]
    result = compare_models(test.scores, arrays, ranking.auroc(fine[:, 0], fine[:, 1]), resamples, seed)
    for (region, model), coefficients in models.coefficients.items():
        result[region]["models"][model]["coefficients"] = list(coefficients)
    return result


def added_value_of_trees(validation, test, resamples=10_000, seed=42) -> dict:
    """As :func:`added_value`, of boosted trees instead of logistic models; see :mod:`error_trees`."""
    return compare_models(*count_error_trees(validation, test, seed=seed), resamples, seed)


def compare_models(names: tuple, arrays: dict, exact_auroc: np.ndarray, resamples: int, seed: int) -> dict:
    """Log loss and AUROC of every model in every region, and the paired differences of `PAIRS`.

    Args:
        names: "region/model" of each of S models, with every region and every model of `MODELS`.
        arrays: per image `model_log_loss` (I, S) in nats, `model_pixels` (I, S, 2: correct, wrong) and
            `model_cells` (I, S, 2, Q), pixels in ascending cells of the predicted probability.
        exact_auroc: (S,); the resamples from the cells are shifted by what it differs from theirs.
    """
    arrays = {**arrays, "model_cells": arrays["model_cells"].astype(np.float32)}
    point = _model_statistics({name: value.sum(0, dtype=float) for name, value in arrays.items()})
    samples = bootstrap(arrays, _model_statistics, resamples, seed, chunk=64)
    samples["auroc"] = np.clip(samples["auroc"] + (exact_auroc - point["auroc"]), 0.0, 1.0)
    point["auroc"] = exact_auroc
    position = {name: index for index, name in enumerate(names)}
    result = {}
    for region in REGIONS:
        result[region] = {"models": {}, "difference": {}}
        for model in MODELS:
            index = position[f"{region}/{model}"]
            result[region]["models"][model] = {
                measure: estimate(point[measure][index], samples[measure][:, index]) for measure in point
            }
        for first, second in PAIRS:
            entry = {}
            for measure, sign in (("log_loss", 1.0), ("auroc", -1.0)):
                one, two = position[f"{region}/{first}"], position[f"{region}/{second}"]
                value = point[measure][one] - point[measure][two]
                bounds = interval(samples[measure][:, one] - samples[measure][:, two])
                found = verdict(sign * value, *sorted(sign * bounds))
                entry[measure] = {"value": value, "interval": bounds, "verdict": found}
            result[region]["difference"][f"{first}_minus_{second}"] = entry
    return jsonable(result)


def _model_statistics(summed: dict) -> dict:
    pixels = summed["model_pixels"].sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_loss = summed["model_log_loss"] / pixels
    cells = summed["model_cells"]
    return {"log_loss": log_loss, "auroc": ranking.auroc(cells[..., 0, :], cells[..., 1, :])}


# The scale


class _Without:
    """A split without one of its images."""

    def __init__(self, images, left_out: str):
        self.images, self.left_out = images, left_out

    def __iter__(self):
        return ((identifier, maps) for identifier, maps in self.images if identifier != self.left_out)


def without_widest_image(validation, test, *, bins=15, lambdas=11, resamples=10_000, seed=42) -> dict | None:
    """What would have been chosen and found without the validation image that has the largest saliency variance.

    Min-max constants are the extremes of all validation pixels. One image can set them, and with them the mean
    confidence of every pixel of every image, the foreground ECE, and lambda. A bootstrap that keeps the constants does
    not show that; leaving the image out does.

    Returns:
        "image", "largest" and "largest_elsewhere" as :func:`evaluation.widest`; "lambda"; on test, "foreground_ece" by score and
        "foreground_ece_difference" from predictive variance, paired. None where there is only one validation image.
    """
    ids, largest = zip(*((identifier, float(maps[SALIENCY].max())) for identifier, maps in validation))
    if len(ids) == 1:
        return None
    found = widest(ids, np.array(largest))
    fusion = tune(_Without(validation, found["image"]), bins=bins, lambdas=lambdas)
    grid = lambda_grid(lambdas)
    arrays = count_curve(test, fusion, grid, bins).images
    errors = lambda_errors({name: value.sum(0) for name, value in arrays.items()})
    samples = bootstrap(arrays, lambda summed: {"ece": lambda_errors(summed)}, resamples, seed)["ece"]
    place = {"predictive_variance": -1, "saliency_variance": 0, "fused": grid.index(fusion.parameter)}
    differences = {}
    for name in ("fused", "saliency_variance"):
        entry = estimate(errors[place[name]] - errors[-1], samples[:, place[name]] - samples[:, -1])
        differences[f"{name}_minus_predictive_variance"] = {**entry, "verdict": verdict(entry["value"], *entry["interval"])}
    return jsonable({
        **found, "lambda": fusion.parameter, "foreground_ece": {name: errors[index] for name, index in place.items()},
        "foreground_ece_difference": differences,
    })


def run_study(validation, test, *, bins=15, lambdas=11, resamples=10_000, seed=42) -> dict:
    """Three tables, "rules" (a list), "added_value" and "added_value_of_trees", and "without_widest_image".

    Eleven passes over validation, four over test.
    """
    found = distributions(validation)
    candidates = candidate_fusions(validation, found, lambda_grid(lambdas))
    counted = [count_fusions(split, candidates, bins) for split in (validation, test)]
    models = fit_error_models(validation, found)
    edges = model_edges(count_error_models(validation, models))
    return {
        "rules": fusion_table(candidates, *counted, resamples=resamples, seed=seed),
        "added_value": added_value(models, count_error_models(test, models, edges), resamples, seed),
        "added_value_of_trees": added_value_of_trees(validation, test, resamples, seed),
        "without_widest_image": without_widest_image(
            validation, test, bins=bins, lambdas=lambdas, resamples=resamples, seed=seed
        ),
    }
