"""What a study of one or more trainings may conclude: endpoints, controls, one verdict.

Five endpoints with margins fixed beforehand, the fifth in two regions, corrected together by Holm's method; beside them
the controls that say whether an effect is one of saliency. Everything else a run measures is exploratory.

Shapes: S trainings, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple

import numpy as np

from evaluation.added import FOLDS, cross_fitted_auroc, folds_of, gains, permutation_null
from evaluation.arrays import Array, jsonable
from evaluation.calibration import expected_calibration_error, region_bins
from evaluation.counting import Counters
from evaluation.crossed import EQUIVALENCE_LEVEL, LEVEL, Estimate, crossed_estimate, holm, needed, outcome
from evaluation.effects import (
    MEASURES,
    PROCEDURES,
    RECALIBRATED,
    Training,
    image_aurc,
    resampled_measures,
    total_weights,
)
from evaluation.fusion import Fusion
from evaluation.image_ranking import mean_uncertainty_of_images
from evaluation.measures import fit_recalibration, layer_of, layers, recalibrated_measures, split_region
from evaluation.ranking import auroc

#: Of saliency variance within images, for the null of the error models.
PERMUTATIONS = 20


class Endpoint(NamedTuple):
    """A question asked beforehand: the fused score minus predictive variance, or a model with saliency minus one without.

    Attributes:
        label, region: in words.
        margin: the largest difference that does not matter.
        lower_is_better: whether a negative difference is an improvement.
    """

    label: str
    region: str
    margin: float
    lower_is_better: bool = True


ENDPOINTS = {
    "foreground_ece": Endpoint("foreground ECE, as the paper has it", "true lesions", 0.005),
    "brier": Endpoint("Brier score of the confidence", "whole image", 0.002),
    "error_auroc": Endpoint("AUROC of errors", "whole image", 0.01, lower_is_better=False),
    "image_aurc": Endpoint("area under the risk-coverage curve, risk 1 - Dice", "images", 0.005),
    "added_auroc_predicted_lesion": Endpoint("AUROC of errors that saliency adds", "predicted lesion", 0.005, False),
    "added_auroc_whole_image": Endpoint("AUROC of errors that saliency adds", "whole image", 0.005, False),
}
ENDPOINT_NAMES = tuple(ENDPOINTS)
DEFAULT_MARGINS = {name: endpoint.margin for name, endpoint in ENDPOINTS.items()}
_ADDED = {"added_auroc_predicted_lesion": "predicted_lesion", "added_auroc_whole_image": "whole_image"}

CONTROLS = {
    "placebo_other_image": "fused minus the same with another image's saliency",
    "placebo_shuffled": "fused minus the same with shuffled saliency",
    "placebo_constant": "fused minus the same with a constant for saliency",
    "tuned_scale": "fused minus predictive variance with a tuned scale",
}
#: The controls that are placebos, in words of the verdict.
PLACEBO_WORDS = {
    "fused_minus_placebo_other_image": "another image's map", "fused_minus_placebo_shuffled": "shuffled pixels",
    "fused_minus_placebo_constant": "a constant",
}
#: What is also measured after recalibration.
RECALIBRATED_PROCEDURES = ("predictive_variance", "fused")
ONE_TRAINING = (
    "One training: how much the answer varies between trainings is unknown, and no interval contains it; "
    "--trainings 10 would tell."
)
TWO_TRAININGS = (
    "Two trainings: their variance is known so badly that in simulated studies 88 to 93 % of the 95 % intervals held the truth; "
    "from three on it is 93 to 96 %."
)


class TrainingResult(NamedTuple):
    """One training, from its saved counts alone.

    Attributes:
        name: of its results folder, for tables.
        seed: of the training.
        fusion: as tuned on its validation images.
        validation, test: counters of both splits, with their joint histograms.
    """

    name: str
    seed: int
    fusion: Fusion
    validation: Counters
    test: Counters


class Drawn(NamedTuple):
    """Resampled differences and values of one training, the split itself taken out.

    Attributes:
        values: by procedure and measure, of the split.
        samples: the same of every resample, (R,), moved so that the split itself has its exact value.
        added: by region and variance, the gain in AUROC of the split.
        added_samples: the same of every resample of the test images.
        tuned: by procedure, its tuned number.
    """

    values: dict[str, dict[str, float]]
    samples: dict[str, dict[str, Array]]
    added: dict[str, dict[str, float]]
    added_samples: dict[str, dict[str, Array]]
    tuned: dict[str, float]


def exact_measures(test: Counters, score: str) -> dict[str, float]:
    """The four measures of a headline score from the counts of every pixel, without the width of a joint cell."""
    place = test.scores.index(score)
    summed = {name: test.images[name][:, place].sum(0) for name in ("count", "confidence")}
    correct, wrong = (part[place] for part in split_region(test.pooled["fine"], "whole_image"))
    dice = Training.dice_of(test)
    uncertainty = mean_uncertainty_of_images(test, score, "whole_image")
    return {
        "foreground_ece": float(expected_calibration_error(
            *region_bins(summed["count"], summed["confidence"], "foreground")
        )),
        "brier": float(test.images["squared_error"][:, place].sum() / summed["count"].sum()),
        "error_auroc": float(auroc(correct, wrong)),
        "image_aurc": float(image_aurc(uncertainty, 1.0 - dice, total_weights(len(dice)))[0]),
    }


def exact_recalibrated(validation: Counters, test: Counters) -> dict[str, dict[str, float]]:
    """The measures of ``RECALIBRATED`` of both scores, from the counts of every pixel: what the tables of a run hold."""
    fitted = fit_recalibration(validation, test.edges, ("foreground", "whole_image"), ("isotonic",))
    summed = layers({"cells": test.images["cells"].sum(0, keepdims=True)})
    found: dict[str, dict[str, float]] = {score: {} for score in RECALIBRATED_PROCEDURES}
    for region, names in (("foreground", {"ece": "foreground_ece_isotonic"}),
                          ("whole_image", {"brier": "brier_isotonic", "log_loss": "log_loss_isotonic"})):
        correct, wrong = split_region(layer_of({name: value[0] for name, value in summed.items()}, region)["cells"], region)
        measures = recalibrated_measures(
            correct, wrong, fitted["isotonic", region], test.bins, 0.5 / len(validation.ids)
        )
        for score, values in found.items():
            values.update({name: float(measures[key][test.scores.index(score)]) for key, name in names.items()})
    return found


def unit_weights(units: Sequence[str], resamples: int, seed: int) -> Array:
    """Random halves of the images, or of whole groups of them, (R + 1, I); the first row is the split itself.

    A half, drawn without replacement, has the variance of the whole split for anything smooth, like a bootstrap's resample
    (McCarthy, "Pseudo-replication: half samples", 1969). Unlike that it also varies what hangs on a single image,
    the largest variance, often enough: a half lacks that image in 50 % of the draws, a bootstrap in 37 %.

    Args:
        units: the group of each image; its own id where it stands for itself.
        resamples: R.
        seed: of the draws.

    Example:
        >>> drawn = unit_weights(["a", "b", "a"], resamples=3, seed=0)
        >>> drawn[0].tolist(), bool((drawn[:, 0] == drawn[:, 2]).all())
        ([1.0, 1.0, 1.0], True)
    """
    names, place = np.unique(np.array(units, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(names)), (resamples, 1)), axis=1)
    # of an odd number, the one in the middle belongs to either half
    drawn = np.where(order < len(names) // 2, 2.0, 0.0)
    if len(names) % 2:
        drawn[order == len(names) // 2] = 1.0
    return np.concatenate([total_weights(len(units)), drawn[:, place.ravel()]])


def draw(training: TrainingResult, resamples: int, seed: int, groups: Mapping[str, str] | None = None) -> Drawn:
    """Measure one training on the split itself and on resampled images, with scale and lambda fitted again.

    The same arguments draw the same images for every training.
    """
    units = [[(groups or {}).get(id, id) for id in split.ids] for split in (training.validation, training.test)]
    data = Training.of(training.validation, training.test, training.fusion)
    validation_weights, test_weights = (
        unit_weights(names, resamples, seed + offset) for offset, names in enumerate(units)
    )
    measured = resampled_measures(data, validation_weights, test_weights, recalibrated=RECALIBRATED_PROCEDURES)
    recalibrated = exact_recalibrated(training.validation, training.test)
    values: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, Array]] = {}
    for procedure in PROCEDURES:
        exact = exact_measures(training.test, procedure) if procedure in training.test.scores else {}
        exact.update(recalibrated.get(procedure, {}))
        values[procedure], samples[procedure] = {}, {}
        for measure in (name for name in measured[procedure] if name != "tuned"):
            approximate = measured[procedure][measure]
            value = exact.get(measure, float(approximate[0]))
            values[procedure][measure] = value
            samples[procedure][measure] = approximate[1:] + (value - approximate[0])
    folds = folds_of(units[1])
    added = {
        region: gains(cross_fitted_auroc(training.test.images["error_cells"], folds, test_weights, region))
        for region in _ADDED.values()
    }
    return Drawn(
        values, samples,
        {region: {name: float(gain[0]) for name, gain in found.items()} for region, found in added.items()},
        {region: {name: gain[1:] for name, gain in found.items()} for region, found in added.items()},
        {procedure: float(measured[procedure]["tuned"][0]) for procedure in PROCEDURES},
    )


def conclude(
    trainings: Sequence[TrainingResult], *, resamples: int = 500, seed: int = 42,
    margins: Mapping[str, float] | None = None, permutations: int = PERMUTATIONS, groups: Mapping[str, str] | None = None,
    report: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """The verdict on what fusing does, from one or more trainings on the same images.

    Args:
        trainings: at least one; of the same images and splits.
        resamples: of the images, shared by all trainings.
        seed: of the resamples.
        margins: of endpoints, in place of ``DEFAULT_MARGINS``.
        permutations: of the null of the error models; 0 leaves it out.
        groups: from the id of an image to its group (a patient, a lesion), which is then what is drawn and what shares a
            fold; an image without one stands for itself.
        report: called with 1 for every training that is resampled.

    Returns:
        Plain numbers for JSON: "sentence", "null_result", "notes", "endpoints", "controls", "measures", and how they
        were found.

    Raises:
        ValueError: no training, trainings of other images, or an unknown endpoint among the margins.
    """
    if not trainings:
        raise ValueError("no training to conclude from")
    for part in ("validation", "test"):
        if len({getattr(training, part).ids for training in trainings}) > 1:
            raise ValueError(f"the trainings have other {part} images")
    unknown = set(margins or ()) - set(ENDPOINT_NAMES)
    if unknown:
        raise ValueError(f"there is no endpoint {min(unknown)}; there are {', '.join(ENDPOINT_NAMES)}")
    drawn = []
    for training in trainings:
        drawn.append(draw(training, resamples, seed, groups))
        report(1)
    images = min(
        len({(groups or {}).get(id, id) for id in split.ids}) for split in (trainings[0].validation, trainings[0].test)
    )
    identical = all(training.fusion.parameter == 1.0 for training in trainings)
    endpoints = _endpoints(drawn, images, {**DEFAULT_MARGINS, **(margins or {})}, identical)
    controls = _controls(drawn, images)
    notes = [note for count, note in ((1, ONE_TRAINING), (2, TWO_TRAININGS)) if len(trainings) == count]
    return jsonable({
        "trainings": len(trainings), "seeds": [training.seed for training in trainings],
        "resamples": resamples, "folds": FOLDS,
        "level": LEVEL, "equivalence_level": EQUIVALENCE_LEVEL,
        "sentence": sentence(endpoints, len(trainings), controls),
        "null_result": endpoints[0]["outcome"] in ("equivalent", "worse"),
        "notes": notes,
        "endpoints": endpoints,
        "controls": controls,
        "recalibrated": [
            {"measure": measure, "lower_is_better": True,
             **_described(*_difference(drawn, measure, "predictive_variance", images))}
            for measure in RECALIBRATED
        ],
        "added": _added(trainings, drawn, images, permutations, groups),
        "lambda": [training.fusion.parameter for training in trainings],
        "measures": {
            procedure: {measure: _mean_and_parts([one.values[procedure][measure] for one in drawn]) for measure in MEASURES}
            for procedure in PROCEDURES
        },
    })


def _mean_and_parts(values: list[float]) -> dict[str, Any]:
    return {"value": float(np.mean(values)), "by_training": values}


def _described(estimate: Estimate, by_training: list[float]) -> dict[str, Any]:
    """What every row says of a difference."""
    return {
        "value": estimate.value, "interval": estimate.interval(), "interval_90": estimate.interval(EQUIVALENCE_LEVEL),
        "by_training": by_training, "seed_sd": float(np.sqrt(estimate.seed_variance)),
        "image_se": float(np.sqrt(estimate.image_variance)), "degrees_of_freedom": estimate.degrees_of_freedom(),
    }


def _difference(drawn: Sequence[Drawn], measure: str, other: str, images: int) -> tuple[Estimate, list[float]]:
    """The fused score's measure minus that of another procedure."""
    values = [one.values["fused"][measure] - one.values[other][measure] for one in drawn]
    samples = np.stack([one.samples["fused"][measure] - one.samples[other][measure] for one in drawn], 1)
    return crossed_estimate(values, samples, images), values


def _gain(drawn: Sequence[Drawn], region: str, variance: str, images: int) -> tuple[Estimate, list[float]]:
    """What a variance adds to the AUROC of errors in a region."""
    values = [one.added[region][variance] for one in drawn]
    samples = np.stack([one.added_samples[region][variance] for one in drawn], 1)
    return crossed_estimate(values, samples, images), values


def _endpoints(
    drawn: Sequence[Drawn], images: int, margins: Mapping[str, float], identical: bool
) -> list[dict[str, Any]]:
    found = {
        name: _gain(drawn, _ADDED[name], "saliency_variance", images) if name in _ADDED
        else _difference(drawn, name, "predictive_variance", images)
        for name in ENDPOINTS
    }
    corrected = holm([estimate.p_value() for estimate, _ in found.values()])
    rows = []
    for (name, (estimate, values)), p_holm in zip(found.items(), corrected):
        endpoint, margin = ENDPOINTS[name], margins[name]
        same = identical and name not in _ADDED
        result = outcome(estimate, margin, p_holm, endpoint.lower_is_better, same)
        rows.append({
            "name": name, "label": endpoint.label, "region": endpoint.region, "lower_is_better": endpoint.lower_is_better,
            "margin": margin, **_described(estimate, values), "p_value": estimate.p_value(), "p_holm": p_holm,
            "outcome": result,
            "needed": needed(estimate, margin, _tests(estimate.p_value(), p_holm)) if result == "undecided" else None,
        })
    return rows


def _tests(p_value: float, p_holm: float) -> float:
    """What the correction multiplied a p-value by; all endpoints where the product is cut off at 1."""
    return p_holm / p_value if p_holm < 1 else float(len(ENDPOINTS))


def _controls(drawn: Sequence[Drawn], images: int) -> list[dict[str, Any]]:
    rows = []
    for other, label in CONTROLS.items():
        for measure in MEASURES:
            estimate, values = _difference(drawn, measure, other, images)
            rows.append({
                "name": f"fused_minus_{other}", "label": label, "measure": measure,
                "lower_is_better": ENDPOINTS[measure].lower_is_better, **_described(estimate, values),
                "tuned": [one.tuned[other] for one in drawn],
            })
    return rows


def _added(
    trainings: Sequence[TrainingResult], drawn: Sequence[Drawn], images: int, permutations: int,
    groups: Mapping[str, str] | None,
) -> dict[str, Any]:
    """What each variance adds in each region, with the permutation null of the first training."""
    first = trainings[0].test
    folds = folds_of([(groups or {}).get(id, id) for id in first.ids])
    return {
        region: {
            **{name: _described(*_gain(drawn, region, name, images)) for name in ("predictive_variance", "saliency_variance")},
            "permutation_null":
                permutation_null(first.images["error_cells"], folds, region, permutations) if permutations else None,
        }
        for region in _ADDED.values()
    }


def sentence(endpoints: Sequence[Mapping[str, Any]], trainings: int, controls: Sequence[Mapping[str, Any]] = ()) -> str:
    """The verdict in words: the outcome of the paper's own endpoint with its numbers, then those of the others.

    Where that is an improvement which the fused score does not have over a placebo, the words say so.
    """
    first, *others = endpoints
    numbers = "" if first["outcome"] in ("identical", "not defined") else (
        f" (difference {first['value']:+.4f}, 95 % interval {first['interval'][0]:+.4f} to {first['interval'][1]:+.4f}, "
        f"margin {first['margin']:g})"
    )
    by_outcome: dict[str, list[str]] = {}
    for row in others:
        by_outcome.setdefault(row["outcome"], []).append(f"{row['label']} ({row['region']})")
    rest = "; ".join(f"{found}: {', '.join(labels)}" for found, labels in by_outcome.items())
    count = "one training" if trainings == 1 else f"{trainings} trainings"
    as_good = [
        PLACEBO_WORDS[row["name"]] for row in controls
        if row["measure"] == first["name"] and row["name"] in PLACEBO_WORDS and row["interval"][1] >= 0
    ]
    placebo = "" if first["outcome"] != "better" or not as_good else (
        f" A placebo does as well ({', '.join(as_good)} in place of saliency), so that this is no effect of saliency."
    )
    return (
        f"Fused against predictive variance, {count}: the {first['label']}, is {first['outcome']}{numbers}.{placebo} "
        f"Of the other endpoints, {rest}."
    )
