"""From counters to every number of a run: what ``metrics.json`` and ``per_image.csv`` hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.arrays import Array, jsonable
from evaluation.calibration import expected_calibration_error, region_bins, reliability
from evaluation.counting import Counters
from evaluation.fusion import Fusion, Parameter
from evaluation.image_ranking import confusion, mean_uncertainty_of_images, ranking_of_images
from evaluation.measures import Key, ScoreTable, score_table, split_region
from evaluation.names import (
    CONDITIONS_ON_TRUTH,
    HEADLINE,
    ISIC_THRESHOLD,
    PREDICTIVE,
    REFERENCE,
    REGIONS,
    SALIENCY,
    SCHEMA_VERSION,
)
from evaluation.overlap import overlap_of_outcomes
from evaluation.ranking import equal_mass_error, risk_coverage
from evaluation.recalibration import METHODS
from evaluation.resampling import bootstrap, bootstrap_weights, count_units, interval, units_of
from evaluation.tuning import lambda_errors

HEADLINE_KEY = ("foreground", "raw", "ece")

# ---------------------------------------------------------------- per image


def per_image(counters: Counters) -> list[dict[str, Any]]:
    """The numbers of every image.

    Dice, Jaccard and the ISIC challenge's thresholded Jaccard (0 below 0.65), numbers of pixels, foreground ECE
    of the three headline scores (biased upwards for a single image), the mean of every score over all pixels, and,
    where the maps said so, empty heatmaps.

    Args:
        counters: of a split, see :func:`counting.count_scores`.

    Returns:
        One dictionary of plain numbers per image, in the order of the ids; None where a number is undefined.

    Example:
        >>> import torch
        >>> from evaluation import Fusion, Linear
        >>> from evaluation.counting import count_scores
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 1.0]), "saliency_variance": torch.tensor([1.0, 1.0])}
        >>> (row,) = per_image(count_scores([("a", maps)], Fusion(Linear(0.0, 1.0), Linear(0.0, 1.0))))
        >>> row["wrong_pixels"], row["jaccard"], row["foreground_ece_saliency_variance"]  # confidence 0, one of two right
        (1, 0.5, 0.5)
    """
    pixels = confusion(counters)
    _, false_positive, false_negative, true_positive = pixels.T
    columns: dict[str, Any] = {
        "id": counters.ids,
        **_overlap_columns(pixels),
        "foreground_pixels": false_negative + true_positive,
        "predicted_pixels": false_positive + true_positive,
        "wrong_pixels": false_positive + false_negative,
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


def _overlap_columns(pixels: Array) -> dict[str, Array]:
    """The three overlaps (I,) from pixels by image and outcome (I, A)."""
    dice, jaccard = overlap_of_outcomes(pixels)
    return {"dice": dice, "jaccard": jaccard, "thresholded_jaccard": np.where(jaccard < ISIC_THRESHOLD, 0.0, jaccard)}


# ---------------------------------------------------------------- all numbers


def summarise(
    validation: Counters, test: Counters, fusion: Fusion, *, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that ``metrics.json`` holds about calibration, from counters alone.

    An estimate is ``{"value": x, "interval": [low, high]}``, the interval being the 95 % percentile interval
    of the image-level bootstrap (None for measures that have none, see `measures.WITHOUT_INTERVAL`). Differences are
    paired: both scores on the same resamples. What is "exploratory" decides nothing, whatever its intervals say.

    Args:
        validation, test: see :func:`protocol.count_splits`.
        fusion: with which they were counted.
        resamples, seed: of the bootstrap.
        groups: by id (a patient, a lesion), what the bootstrap draws; an image without one stands for itself.

    Returns:
        Plain numbers, texts, lists and dictionaries; None for NaN.

    Example:
        >>> import torch
        >>> from evaluation import count_splits, tune
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 0.25]), "saliency_variance": torch.tensor([0.5, 0.0])}
        >>> images = [("a", maps), ("b", maps)]  # the predictive variance is high at the error alone, the other elsewhere
        >>> tuned = tune(images)
        >>> found = summarise(*count_splits(tuned, images, images), tuned.fusion, resamples=100)
        >>> found["test"]["foreground_ece_difference"]["saliency_variance_minus_predictive_variance"]
        {'value': 1.0, 'interval': [1.0, 1.0], 'verdict': 'degrades'}
    """
    table = score_table(validation, test, resamples, seed, groups)
    grouped = any(units_of(part.ids, groups) is not None for part in (validation, test))
    sample = f"{len(test.ids)} test images" + (f" in {count_units(test.ids, groups)} groups" if grouped else "")
    sentences = {kind: verdict_sentence(fusion.parameter, table, sample, kind) for kind in ("raw", *METHODS)}
    curve, largest = lambda_samples(validation, resamples, seed, groups), validation.images["largest"]
    return jsonable({  # type: ignore[no-any-return]
        "schema_version": SCHEMA_VERSION,
        "verdict": sentences.pop("raw"),
        "verdict_recalibrated": sentences,
        "lambda": fusion.parameter,
        "bins": test.bins,
        "bootstrap": bootstrap_facts(grouped, resamples, seed),
        "normalisation": {
            PREDICTIVE: [fusion.predictive.low, fusion.predictive.high],
            SALIENCY: [fusion.saliency.low, fusion.saliency.high],
        },
        "validation": {
            **_overlaps(validation, resamples, seed, groups),
            **_curve(validation, curve),
            "lambda_selection": lambda_selection(validation.lambdas, curve),
            "range_set_by": {
                name: widest(validation.ids, largest[:, index]) for index, name in enumerate((PREDICTIVE, SALIENCY))
            },
        },
        "test": _test(test, table, resamples, seed, groups),
    })


def summarise_test(
    validation: Counters, test: Counters, *, resamples: int = 10_000, seed: int = 42, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What :func:`summarise` says under "test", of any images that were counted with the fusion and the quantile bins of
    the validation split; its arguments are the same."""
    table = score_table(validation, test, resamples, seed, groups)
    return jsonable(_test(test, table, resamples, seed, groups))  # type: ignore[no-any-return]


def bootstrap_facts(grouped: bool, resamples: int, seed: int) -> dict[str, Any]:
    """What the metrics say of their intervals."""
    return {
        "resamples": resamples, "seed": seed, "level": 0.95, "unit": "group" if grouped else "image", "method": "percentile"
    }


def _test(
    test: Counters, table: ScoreTable, resamples: int, seed: int, groups: Mapping[str, str] | None
) -> dict[str, Any]:
    pairs = [("fused", REFERENCE), ("saliency_variance", REFERENCE), ("fused", "saliency_variance")]
    return {
        **_overlaps(test, resamples, seed, groups),
        "foreground_ece": {name: table.value(HEADLINE_KEY, name) for name in HEADLINE},
        "foreground_ece_interval": {name: table.estimate(HEADLINE_KEY, name)["interval"] for name in HEADLINE},
        "foreground_ece_difference": {
            f"{first}_minus_{second}": table.difference(HEADLINE_KEY, first, second) for first, second in pairs
        },
        **_curve(test, lambda_samples(test, resamples, seed, groups)),
        "regions": {region: _region(region, test, table) for region in REGIONS},
        "ranking_of_images": ranking_of_images(test, resamples, seed, groups),
    }


def widest(ids: Sequence[str], largest: Array) -> dict[str, Any]:
    """The image that sets the upper end of a range.

    Args:
        ids: of the images.
        largest: the largest value of each, (I,).

    Returns:
        "image" with the largest value, that value as "largest", and "largest_elsewhere", of the other images (NaN
        without others).

    Example:
        >>> found = widest(["a", "b", "c"], np.array([0.25, 2.0, 0.5]))
        >>> found["image"], float(found["largest"]), float(found["largest_elsewhere"])
        ('b', 2.0, 0.5)
    """
    first = int(np.argmax(largest))
    others = np.delete(largest, first)
    return {"image": ids[first], "largest": largest[first], "largest_elsewhere": others.max() if len(others) else np.nan}


def _overlaps(
    counters: Counters, resamples: int, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Numbers of images and pixels, mean overlaps with their intervals, clipped pixels, empty heatmaps."""
    pixels = confusion(counters)
    columns = _overlap_columns(pixels)
    means = np.stack(list(columns.values()), 1)
    drawn = bootstrap_weights(len(means), resamples, seed, units=units_of(counters.ids, groups))
    samples = np.concatenate([weights @ means / weights.sum(1, keepdims=True) for weights in drawn])
    empty = counters.images["empty_cams"]
    result: dict[str, Any] = {"images": len(counters.ids), "pixels": int(pixels.sum())}
    for index, name in enumerate(columns):
        result[name] = means[:, index].mean()
        result[f"{name}_interval"] = interval(samples[:, index])
    result["images_without_foreground"] = int((pixels[:, 2:].sum(1) == 0).sum())
    result["clipped_pixels"] = dict(zip((PREDICTIVE, SALIENCY), counters.images["clipped"].sum(0)))
    result["empty_cams"] = int(empty.sum()) if (empty >= 0).all() else None
    return result


def _region(region: str, test: Counters, table: ScoreTable) -> dict[str, Any]:
    """All numbers of one region, and what its figures show; none of them is an endpoint, all are exploratory."""
    totals = test.total("count", "confidence")
    count, correct, confidence = region_bins(totals["count"], totals["confidence"], region)
    correct_histogram, wrong_histogram = split_region(test.pooled["fine"], region)
    pixels, right = int(count[0].sum()), int(correct[0].sum())
    curves = [risk_coverage(*rows, points=51) for rows in zip(correct_histogram, wrong_histogram)]
    scores = {}
    for index, name in enumerate(table.scores):
        scores[name] = {
            **_measures(region, name, table),
            "equal_mass_ece": equal_mass_error(correct_histogram[index], wrong_histogram[index], test.bins),
            "reliability": reliability(count[index], correct[index], confidence[index]),
            "risk": curves[index]["risk"],
        }
    return {
        "exploratory": True,
        "conditions_on_truth": CONDITIONS_ON_TRUTH[region],
        "pixels": pixels,
        "wrong_pixels": pixels - right,
        "accuracy": right / pixels if pixels else float("nan"),
        "scores": scores,
        # the same for every score
        "risk_coverage": {"coverage": curves[0]["coverage"], "ideal_risk": curves[0]["ideal"]},
    }


def _measures(region: str, name: str, table: ScoreTable) -> dict[str, Any]:
    """Every measure of a score in a region, then its differences from the reference; the same after recalibration."""
    entry: dict[str, Any] = {}
    for kind in ("raw", *METHODS):
        keys = [key for key in table.point if key[:2] == (region, kind)]
        place = entry if kind == "raw" else entry.setdefault("recalibrated", {}).setdefault(kind, {})
        place.update({key[2]: table.estimate(key, name) for key in keys})
        if name != REFERENCE:
            place[f"minus_{REFERENCE}"] = {key[2]: table.difference(key, name, REFERENCE) for key in keys}
    return entry


# ---------------------------------------------------------------- the lambda curve


def lambda_samples(counters: Counters, resamples: int, seed: int, groups: Mapping[str, str] | None = None) -> Array:
    """Foreground ECE at every lambda in resamples of the images, or of groups of them, (R, L)."""
    arrays = {name: counters.images[name] for name in ("lambda_count", "lambda_confidence")}
    units = units_of(counters.ids, groups)
    return bootstrap(arrays, lambda summed: {"ece": lambda_errors(summed)}, resamples, seed, units=units)["ece"]


def _curve(counters: Counters, samples: Array) -> dict[str, Any]:
    """The lambda curve with its band, and the paired difference from lambda = 1 with its band."""
    point = lambda_errors(counters.total("lambda_count", "lambda_confidence"))
    return {
        "lambdas": counters.lambdas,
        "foreground_ece_by_lambda": point,
        "foreground_ece_by_lambda_interval": interval(samples).T,
        "foreground_ece_by_lambda_minus_predictive": point - point[-1],
        "foreground_ece_by_lambda_minus_predictive_interval": interval(samples - samples[:, -1:]).T,
    }


def lambda_selection(lambdas: Sequence[float], samples: Array) -> dict[str, Any]:
    """In which share of the validation resamples each lambda would have been chosen, the scale of both variances kept.

    Args:
        lambdas: (L,), ascending.
        samples: foreground ECE at every lambda, (R, L); resamples without foreground (NaN) are left out.

    Returns:
        "lambdas" and "share" (L,).

    Example:
        >>> found = lambda_selection((0.0, 1.0), np.array([[0.25, 0.5], [0.5, 0.25], [0.5, 0.5], [0.5, 0.125]]))
        >>> found["share"].tolist()  # the tie goes to the larger lambda
        [0.25, 0.75]
    """
    errors = samples[~np.isnan(samples).any(1)]
    last_minimum = errors.shape[1] - 1 - np.argmin(errors[:, ::-1], axis=1)
    share = np.bincount(last_minimum, minlength=errors.shape[1]) / max(len(errors), 1)
    return {"lambdas": lambdas, "share": share}


# ---------------------------------------------------------------- the verdict


def verdict_sentence(lam: Parameter, table: ScoreTable, sample: str, kind: str = "raw") -> str:
    """The answer in one sentence, from the paired interval of fused minus predictive foreground ECE.

    Args:
        lam: the tuned lambda.
        table: of the test split.
        sample: how many test images there are, in words.
        kind: "raw", or the recalibration method after which the errors are compared.
    """
    key: Key = ("foreground", kind, "ece")
    before, after = table.value(key, REFERENCE), table.value(key, "fused")
    words = {"platt": "Platt"}.get(kind, kind)
    error = "foreground calibration error" + ("" if kind == "raw" else f" after {words} recalibration")
    if not np.isfinite([before, after]).all():
        return f"No difference shown: the test masks hold no foreground pixel, so that there is no {error}."
    if lam == 1.0:
        low, high = table.estimate(key, REFERENCE)["interval"]
        return (
            f"No difference shown: the tuned lambda is 1, so that the fused score is predictive variance alone; "
            f"its {error} is {before:.4f} (95 % interval {low:.4f} to {high:.4f}, {sample})."
        )
    found = table.difference(key, "fused", REFERENCE)
    low, high = found["interval"]
    numbers = (
        f"from {before:.4f} to {after:.4f}, a difference of {found['value']:+.4f} "
        f"(95 % interval {low:+.4f} to {high:+.4f}, paired over {sample})"
    )
    if found["verdict"] == "no difference shown":
        return f"No difference shown: fusing at lambda = {lam:g} changes the {error} {numbers}."
    return f"Fusing at lambda = {lam:g} {found['verdict']} the {error} {numbers}."
