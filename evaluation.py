"""From counters to every number of the study; only :func:`evaluate` and :func:`tune` look at maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration import (
    REGIONS,
    bootstrap,
    bootstrap_weights,
    expected_calibration_error,
    interval,
    jsonable,
    region_bins,
    reliability,
    verdict,
)
from counters import Counters, count_curve, count_scores
from fusion import PREDICTIVE, SALIENCY, Fusion, best_lambda, distributions, lambda_grid, min_max
from measures import LOWER_IS_BETTER, REFERENCE, estimate, score_table, split_region
from ranking import auroc, equal_mass_error, quantile_edges, risk_coverage
from recalibration import METHODS

SCHEMA_VERSION = 1
HEADLINE = ("predictive_variance", "saliency_variance", "fused")
BAD_DICE = 0.8
ISIC_THRESHOLD = 0.65


@dataclass
class Evaluation:
    """What :func:`evaluate` found: the fitted fusion, the counters of both splits, and the numbers."""

    fusion: Fusion
    validation: Counters
    test: Counters
    metrics: dict
    rows: list


def evaluate(validation, test, *, bins=15, lambdas=11, study=False, resamples=10_000, seed=42) -> Evaluation:
    """Fit on validation, count both splits, compute everything.

    Args:
        validation, test: re-iterables of (id, maps) as :mod:`counters` describes; read three times and once
            (fourteen and five times with `study`).
        bins: equal-width bins.
        lambdas: size of the lambda grid from 0 to 1.
        study: also the other fusion rules and normalisations, and whether saliency adds anything.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: bad values in a map (named), an empty split, no foreground on validation.
    """
    fusion = tune(validation, bins=bins, lambdas=lambdas)
    grid = lambda_grid(lambdas)
    counted_validation = count_scores(validation, fusion, grid, bins)
    edges = cell_edges(counted_validation)
    counted_test = count_scores(test, fusion, grid, bins, edges)
    metrics = summary(counted_validation, counted_test, fusion, resamples=resamples, seed=seed)
    if study:
        from study import run_study

        metrics["study"] = run_study(validation, test, bins=bins, lambdas=lambdas, resamples=resamples, seed=seed)
    return Evaluation(fusion, counted_validation, counted_test, metrics, per_image(counted_test))


def tune(validation, *, bins=15, lambdas=11) -> Fusion:
    """Min-max constants and lambda from the validation split: the fusion of the study. Two passes."""
    found = distributions(validation)
    fusion = Fusion(min_max(found[PREDICTIVE]), min_max(found[SALIENCY]))
    grid = lambda_grid(lambdas)
    curve = count_curve(validation, fusion, grid, bins)
    lam = best_lambda(grid, lambda_errors(_total(curve.images)))
    return Fusion(fusion.predictive, fusion.saliency, "convex", lam)


def cell_edges(validation: Counters) -> np.ndarray:
    """The quantile cells with which the test split has to be counted."""
    return quantile_edges(validation.pooled["fine"], REGIONS.values())


def _total(images: dict) -> dict:
    return {name: value.sum(0) for name, value in images.items()}


def lambda_errors(summed: dict) -> np.ndarray:
    """Foreground ECE at every lambda, (..., L), from summed `lambda_count` and `lambda_confidence` (..., L, 2, B)."""
    count = summed["lambda_count"]
    return expected_calibration_error(count.sum(-2), count[..., 1, :], summed["lambda_confidence"].sum(-2))


def overlap(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and Jaccard index (I,) from pixels by atom (I, A); both 1 where truth and prediction are empty."""
    false_positive, false_negative, true_positive = (pixels[:, index].astype(float) for index in (1, 2, 3))
    wrong = false_positive + false_negative
    empty = wrong + true_positive == 0
    with np.errstate(invalid="ignore"):
        dice = 2.0 * true_positive / (2.0 * true_positive + wrong)
        jaccard = true_positive / (true_positive + wrong)
    return np.where(empty, 1.0, dice), np.where(empty, 1.0, jaccard)


def confusion(counters: Counters) -> np.ndarray:
    """Pixels by image and atom, (I, A) int64."""
    return counters.images["count"][:, 0].sum(-1)


def per_image(counters: Counters) -> list:
    """One dictionary of plain numbers an image, in the order of the ids; None where a number is undefined.

    Dice, Jaccard and the ISIC challenge's thresholded Jaccard (0 below 0.65), pixels by atom, foreground ECE
    of the three scores (biased upwards for a single image), and their mean over all pixels.
    """
    pixels = confusion(counters)
    dice, jaccard = overlap(pixels)
    columns = {
        "id": counters.ids,
        "dice": dice,
        "jaccard": jaccard,
        "thresholded_jaccard": np.where(jaccard < ISIC_THRESHOLD, 0.0, jaccard),
        "foreground_pixels": pixels[:, 2] + pixels[:, 3],
        "predicted_pixels": pixels[:, 1] + pixels[:, 3],
        "wrong_pixels": pixels[:, 1] + pixels[:, 2],
    }
    for name in HEADLINE:
        score = counters.scores.index(name)
        bins = region_bins(counters.images["count"][:, score], counters.images["confidence"][:, score], "foreground")
        columns[f"foreground_ece_{name}"] = expected_calibration_error(*bins)
    for name in counters.scores:
        columns[f"mean_{name}"] = mean_uncertainty_of_images(counters, name, "whole_image")
    if (counters.images["empty_cams"] >= 0).any():
        columns["empty_cams"] = counters.images["empty_cams"]
    return [jsonable(dict(zip(columns, row))) for row in zip(*columns.values())]


def mean_uncertainty_of_images(counters: Counters, name: str, region: str) -> np.ndarray:
    """Mean uncertainty of each image over a region, (I,); NaN where the region is empty."""
    score = counters.scores.index(name)
    count, _, confidence = region_bins(counters.images["count"][:, score], counters.images["confidence"][:, score], region)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 - confidence.sum(-1) / count.sum(-1)


def summary(validation: Counters, test: Counters, fusion: Fusion, *, resamples=10_000, seed=42) -> dict:
    """Everything that `metrics.json` holds about calibration, from counters alone; plain numbers, None for NaN.

    An estimate is ``{"value": x, "interval": [low, high]}``, the interval being the 95 % percentile interval
    of the image-level bootstrap. Differences are paired: both scores on the same resamples.
    """
    point, samples = score_table(validation, test, resamples, seed)
    position = {name: index for index, name in enumerate(test.scores)}
    headline = ("foreground", "raw", "ece")
    errors = {name: float(point[headline][position[name]]) for name in HEADLINE}
    bands = {name: interval(samples[headline][:, position[name]]) for name in HEADLINE}
    pairs = [("fused", REFERENCE), ("saliency_variance", REFERENCE), ("fused", "saliency_variance")]
    curves = {"validation": _curve(validation, resamples, seed), "test": _curve(test, resamples, seed)}
    sentence = {"raw": verdict_sentence(fusion.parameter, errors, point, samples, position, len(test.ids), "raw")}
    for method in METHODS:
        sentence[method] = verdict_sentence(fusion.parameter, errors, point, samples, position, len(test.ids), method)
    result = {
        "schema_version": SCHEMA_VERSION,
        "verdict": sentence["raw"],
        "verdict_recalibrated": {method: sentence[method] for method in METHODS},
        "lambda": fusion.parameter,
        "bins": test.bins,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "unit": "image", "method": "percentile"},
        "normalisation": {
            PREDICTIVE: [fusion.predictive.low, fusion.predictive.high],
            SALIENCY: [fusion.saliency.low, fusion.saliency.high],
        },
        "validation": {**_overlaps(validation, resamples, seed), **curves["validation"]},
        "test": {
            **_overlaps(test, resamples, seed),
            "foreground_ece": errors,
            "foreground_ece_interval": bands,
            "foreground_ece_difference": {
                f"{first}_minus_{second}": _difference(point, samples, headline, position[first], position[second])
                for first, second in pairs
            },
            **curves["test"],
            "regions": {region: _region(region, test, point, samples, position) for region in REGIONS},
            "ranking_of_images": ranking_of_images(test, resamples, seed),
        },
    }
    result["validation"]["lambda_selection"] = lambda_selection(validation, resamples, seed)
    largest = validation.images["largest"]
    result["validation"]["range_set_by"] = {
        name: widest(validation.ids, largest[:, index]) for index, name in enumerate((PREDICTIVE, SALIENCY))
    }
    return jsonable(result)


def widest(ids, largest) -> dict:
    """The image with the largest of the values (I,), that value, and the largest of the other images (NaN without others)."""
    first = int(np.argmax(largest))
    others = np.delete(largest, first)
    return {"image": ids[first], "largest": largest[first], "largest_elsewhere": others.max() if len(others) else np.nan}


def _overlaps(counters: Counters, resamples: int, seed: int) -> dict:
    dice, jaccard = overlap(confusion(counters))
    thresholded = np.where(jaccard < ISIC_THRESHOLD, 0.0, jaccard)
    means = np.stack([dice, jaccard, thresholded], 1)
    samples = np.concatenate([weights @ means / len(means) for weights in bootstrap_weights(len(means), resamples, seed)])
    empty = counters.images["empty_cams"]
    result = {"images": len(counters.ids), "pixels": int(confusion(counters).sum())}
    for index, name in enumerate(("dice", "jaccard", "thresholded_jaccard")):
        result[name] = means[:, index].mean()
        result[f"{name}_interval"] = interval(samples[:, index])
    result["images_without_foreground"] = int((confusion(counters)[:, 2:].sum(1) == 0).sum())
    result["clipped_pixels"] = dict(zip((PREDICTIVE, SALIENCY), counters.images["clipped"].sum(0)))
    result["empty_cams"] = int(empty.sum()) if (empty >= 0).all() else None
    return result


def _curve(counters: Counters, resamples: int, seed: int) -> dict:
    """The lambda curve with its band, and the paired difference from lambda = 1 with its band."""
    arrays = {name: counters.images[name] for name in ("lambda_count", "lambda_confidence")}
    point = lambda_errors(_total(arrays))
    samples = bootstrap(arrays, lambda summed: {"ece": lambda_errors(summed)}, resamples, seed)["ece"]
    return {
        "lambdas": counters.lambdas,
        "foreground_ece_by_lambda": point,
        "foreground_ece_by_lambda_interval": interval(samples).T,
        "foreground_ece_by_lambda_minus_predictive": point - point[-1],
        "foreground_ece_by_lambda_minus_predictive_interval": interval(samples - samples[:, -1:]).T,
    }


def lambda_selection(validation: Counters, resamples: int, seed: int) -> dict:
    """Share of the validation resamples in which each lambda would have been chosen, the scale of both variances being kept."""
    arrays = {name: validation.images[name] for name in ("lambda_count", "lambda_confidence")}
    errors = bootstrap(arrays, lambda summed: {"ece": lambda_errors(summed)}, resamples, seed)["ece"]
    errors = errors[~np.isnan(errors).any(1)]
    last_minimum = errors.shape[1] - 1 - np.argmin(errors[:, ::-1], axis=1)  # a tie goes to the larger lambda
    share = np.bincount(last_minimum, minlength=errors.shape[1]) / max(len(errors), 1)
    return {"lambdas": validation.lambdas, "share": share}


def _difference(point: dict, samples: dict, key: tuple, first: int, second: int) -> dict:
    value = point[key][first] - point[key][second]
    result = estimate(value, samples[key][:, first] - samples[key][:, second])
    if key[2] in LOWER_IS_BETTER:
        result["verdict"] = verdict(value, *result["interval"])
    return result


def _region(region: str, test: Counters, point: dict, samples: dict, position: dict) -> dict:
    """All numbers of one region, and what its figures show."""
    totals = _total({name: test.images[name] for name in ("count", "confidence")})
    count, correct, confidence = region_bins(totals["count"], totals["confidence"], region)
    fine_correct, fine_wrong = split_region(test.pooled["fine"], region)
    pixels, right = int(count[0].sum()), int(correct[0].sum())
    scores = {}
    for name, index in position.items():
        entry = {}
        for (where, kind, measure), value in point.items():
            if where != region:
                continue
            place = entry if kind == "raw" else entry.setdefault("recalibrated", {}).setdefault(kind, {})
            place[measure] = estimate(value[index], samples[where, kind, measure][:, index])
            if name != REFERENCE:
                difference = _difference(point, samples, (where, kind, measure), index, position[REFERENCE])
                place.setdefault(f"minus_{REFERENCE}", {})[measure] = difference
        entry["equal_mass_ece"] = equal_mass_error(fine_correct[index], fine_wrong[index], test.bins)
        entry["reliability"] = reliability(count[index], correct[index], confidence[index])
        curve = risk_coverage(fine_correct[index], fine_wrong[index], 51)
        entry["risk"] = curve["risk"]
        scores[name] = entry
    return {
        "pixels": pixels,
        "wrong_pixels": pixels - right,
        "accuracy": right / pixels if pixels else float("nan"),
        "scores": scores,
        "risk_coverage": {"coverage": curve["coverage"], "ideal_risk": curve["ideal"]},
    }


def verdict_sentence(lam, errors: dict, point: dict, samples: dict, position: dict, images: int, kind: str) -> str:
    """The answer in one sentence, from the paired interval of fused minus predictive foreground ECE."""
    key = ("foreground", kind, "ece")
    before, after = (float(point[key][position[name]]) for name in (REFERENCE, "fused"))
    found = _difference(point, samples, key, position["fused"], position[REFERENCE])
    low, high = found["interval"]
    error = "foreground calibration error" if kind == "raw" else f"foreground calibration error after {kind} recalibration"
    if not np.isfinite([before, after]).all():
        return f"No difference shown: the test masks hold no foreground pixel, so that there is no {error}."
    if lam == 1.0:
        own = interval(samples[key][:, position[REFERENCE]])
        return (
            f"No difference shown: the tuned lambda is 1, so that the fused score is predictive variance alone; "
            f"its {error} is {before:.4f} (95 % interval {own[0]:.4f} to {own[1]:.4f}, {images} test images)."
        )
    numbers = (
        f"from {before:.4f} to {after:.4f}, a difference of {found['value']:+.4f} "
        f"(95 % interval {low:+.4f} to {high:+.4f}, paired over {images} test images)"
    )
    if found["verdict"] == "no difference shown":
        return f"No difference shown: fusing at lambda = {lam:g} changes the {error} {numbers}."
    return f"Fusing at lambda = {lam:g} {found['verdict']} the {error} {numbers}."


def ranking_of_images(test: Counters, resamples: int, seed: int) -> dict:
    """How well an image's mean uncertainty tells a bad segmentation: Spearman with Dice, AUROC for Dice below 0.8.

    For every score, over the whole image and over the predicted foreground (images without any are left out).
    A useful score has a negative correlation and an AUROC above one half.
    """
    dice, _ = overlap(confusion(test))
    result = {"bad_dice_below": BAD_DICE, "bad_images": int((dice < BAD_DICE).sum())}
    for region in ("whole_image", "predicted_foreground"):
        result[region] = {}
        for name in test.scores:
            uncertainty = mean_uncertainty_of_images(test, name, region)
            known = ~np.isnan(uncertainty)
            samples = [
                _rank_statistics(uncertainty[known], dice[known], weights[:, known])
                for weights in bootstrap_weights(len(dice), resamples, seed)
            ]
            value = _rank_statistics(uncertainty[known], dice[known], np.ones((1, int(known.sum()))))
            result[region][name] = {
                "images": int(known.sum()),
                "spearman_with_dice": estimate(value[0, 0], np.concatenate(samples)[:, 0]),
                "auroc_bad_dice": estimate(value[0, 1], np.concatenate(samples)[:, 1]),
            }
    return result


def _rank_statistics(uncertainty: np.ndarray, dice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman correlation with Dice and AUROC for bad Dice (r, 2) of resamples given by weights (r, I)."""
    if len(dice) == 0:
        return np.full((len(weights), 2), np.nan)
    first, second = _ranks(uncertainty, weights), _ranks(dice, weights)
    total = weights.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = first - (weights * first).sum(1, keepdims=True) / total
        second = second - (weights * second).sum(1, keepdims=True) / total
        scale = np.sqrt((weights * first**2).sum(1) * (weights * second**2).sum(1))
        spearman = (weights * first * second).sum(1) / scale
    bad = dice < BAD_DICE
    order, starts, _ = _ties(uncertainty)
    histograms = [np.add.reduceat((weights * chosen)[:, order], starts, axis=1) for chosen in (~bad, bad)]
    return np.stack([spearman, auroc(*histograms)], 1)


def _ties(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending order of the values, where in it each distinct value starts, and the distinct value of each."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.argsort(values, kind="stable"), np.cumsum(count) - count, group


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks (r, I) of the values in resamples with multiplicities `weights`, ties (and copies) at their mean rank."""
    order, starts, group = _ties(values)
    size = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(size, 1) - 0.5 * (size - 1.0))[:, group]
