"""Whether the intervals of a study cover what they claim: simulated studies whose true effect is known.

    python -m benchmarks.coverage [--repetitions 500] [--processes 2] [--json FILE]

Each repetition draws a whole study: images whose errors cluster in some of them and are correlated in space, a predictive
variance that knows about the errors, a saliency variance, and S trainings on the same images that differ in how their
variances come out. Saliency variances have heavy tails, so that one image sets the scale of its split. The pipeline's own
functions then do what they do to real maps: scale, lambda, measures, resamples of both splits with everything refitted,
intervals over trainings and images, Holm's correction, outcomes.

What is to be covered is the mean effect of the procedure, which is taken from the mean over all repetitions and trainings
of that scenario; its own standard error is a twentieth of an interval's width. Two scenarios: a saliency variance that is
noise, and one that knows something about the errors that the predictive variance does not. Beside the new intervals stand
those of a bootstrap of the test images alone, with scale, lambda and training held fixed, as the old ones were.

Columns: share of intervals that hold the true effect; share of studies that call a difference better or worse when the
true effect is taken off (false), and of those whose interval leaves out 0 (found).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from evaluation.added import REGIONS, SHAPE, SURENESS_EDGES, cross_fitted_auroc, folds_of
from evaluation.conclusion import ENDPOINTS, unit_weights
from evaluation.crossed import LEVEL, Estimate, crossed_estimate, holm, outcome
from evaluation.effects import MEASURES, Joint, Training, resampled_measures

VALIDATION, TEST, SIDE = 60, 120, 16  # images, pixels per side
CELLS = 24
TRAININGS = (1, 3, 10)
LAMBDAS = tuple(k / 10 for k in range(11))
RESAMPLES = 200
SCENARIOS = {"noise": 0.0, "informative": 0.35, "small_gain": 0.23}  # what saliency variance knows about the errors
MEASURED = (*MEASURES, *(f"added_auroc_{region}" for region in REGIONS))
EDGES = (np.arange(CELLS + 1) / CELLS) ** 4


# ---------------------------------------------------------------- a made-up study


class Images:
    """The images of a study: what all trainings share."""

    def __init__(self, count: int, rng: np.random.Generator):
        y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
        radius = rng.uniform(0.28, 0.42, count)[:, None, None] * SIDE
        self.truth = np.hypot(y, x)[None] < radius
        self.distance = np.abs(np.hypot(y, x)[None] - radius)
        self.hard = rng.gamma(2.0, 0.5, count)[:, None, None]  # errors cluster: some images have many
        self.field = _smooth(rng, count)
        self.known_to_saliency = _smooth(rng, count)
        self.extreme = 1.0 + rng.pareto(3.0, count)  # heavy tails: one image sets the scale of its split
        self.spread = rng.lognormal(0.0, 0.5, (2, count))[:, :, None, None]


def _smooth(rng: np.random.Generator, count: int) -> np.ndarray:
    """Fields with errors correlated over two pixels, mean 0 and variance 1, (count, SIDE, SIDE)."""
    field = gaussian_filter(rng.standard_normal((count, SIDE, SIDE)), (0, 1.5, 1.5), mode="wrap")
    return np.asarray(field / field.std())


class Maps:
    """The maps that one training makes of the images: outcomes, sureness, and both variances in [0, 1]."""

    def __init__(self, images: Images, knows: float, training: np.random.Generator, style: np.ndarray):
        count = len(images.truth)
        doubt = 1.2 * images.field + 0.8 * images.known_to_saliency + 0.7 * _smooth(training, count)
        odds = style[0] + doubt * np.sqrt(images.hard) - 0.7 * images.distance  # of an error
        wrong = training.random(odds.shape) < 1.0 / (1.0 + np.exp(-odds))
        self.predicted = images.truth ^ wrong
        self.outcome = 2 * images.truth + self.predicted
        self.sure = np.abs(2.0 + 0.6 * images.distance - 0.5 * images.field + 0.3 * training.standard_normal(odds.shape))
        seen = 1.2 * images.field - 0.6 * images.distance + 0.8 * training.standard_normal(odds.shape)
        self.predictive = np.exp(seen - 1.5 + style[1]) * images.spread[0]
        told = knows * 2.0 * images.known_to_saliency + _smooth(training, count)
        self.saliency = np.exp(0.7 * told - 1.0 + style[2]) * images.spread[1] * images.extreme[:, None, None]


def joint_of(maps: Maps, scale: tuple[float, float]) -> tuple[Joint, np.ndarray]:
    """Joint histogram and error cells of a split; the scale is that of the validation maps."""
    count = len(maps.outcome)
    variances = [maps.predictive, maps.saliency]
    cell = [np.clip(np.searchsorted(EDGES, v / high, "right") - 1, 0, CELLS - 1) for v, high in zip(variances, scale)]
    image = np.arange(count)[:, None, None]
    index = ((image * 4 + maps.outcome) * CELLS + cell[0]) * CELLS + cell[1]
    counts = np.bincount(index.ravel(), minlength=count * 4 * CELLS * CELLS).reshape(count, 1, 4, CELLS, CELLS)
    values = np.stack([
        np.bincount(c.ravel(), v.ravel(), CELLS) / np.maximum(np.bincount(c.ravel(), minlength=CELLS), 1)
        for c, v in zip(cell, variances)
    ])
    largest = np.stack([v.max((1, 2)) for v in variances], 1)
    wrong = (maps.outcome == 1) | (maps.outcome == 2)
    place = ((image * 2 + wrong) * 2 + maps.predicted) * SHAPE[1] + np.searchsorted(SURENESS_EDGES, maps.sure)
    for v, high, cells in zip(variances, scale, SHAPE[2:]):
        place = place * cells + np.clip((np.clip(v / high, 0, 1) ** 0.25 * cells).astype(int), 0, cells - 1)
    errors = np.bincount(place.ravel(), minlength=count * 2 * int(np.prod(SHAPE))).reshape(count, 2, *SHAPE)
    return Joint(counts, values, (0.0, 0.0), largest), errors


def dice_of(maps: Maps) -> np.ndarray:
    """Dice of each image."""
    both = (maps.outcome == 3).sum((1, 2))
    return np.asarray(2 * both / np.maximum(2 * both + ((maps.outcome == 1) | (maps.outcome == 2)).sum((1, 2)), 1))


def repetition(task: tuple[str, int]) -> dict[str, Any]:
    """One study: the differences of each training, of its resamples, and of the old bootstrap of the first training."""
    scenario, number = task
    rng = np.random.default_rng([number, list(SCENARIOS).index(scenario)])
    validation, test = Images(VALIDATION, rng), Images(TEST, rng)
    weights = [unit_weights([str(i) for i in range(n)], RESAMPLES, 2 * number + n) for n in (VALIDATION, TEST)]
    folds = folds_of([str(i) for i in range(TEST)])
    values: dict[str, list[float]] = {name: [] for name in MEASURED}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in MEASURED}
    old: dict[str, list[float]] = {}
    for index in range(max(TRAININGS)):
        style = rng.normal(0.0, (0.25, 0.35, 0.35)) + (-1.6, 0.0, 0.0)
        maps = [Maps(images, SCENARIOS[scenario], rng, style) for images in (validation, test)]
        scale = float(maps[0].predictive.max()), float(maps[0].saliency.max())
        (fitted, _), (measured, errors) = (joint_of(one, scale) for one in maps)
        zero = np.zeros(len(LAMBDAS))
        training = Training(fitted, measured, dice_of(maps[1]), (zero, zero), LAMBDAS, 15)
        found = _differences(training, weights[0], weights[1])
        for region in REGIONS:
            gained = cross_fitted_auroc(errors, folds, weights[1], region)
            found[f"added_auroc_{region}"] = gained["saliency_variance"] - gained["predictive_variance"]
        for name in MEASURED:
            values[name].append(float(found[name][0]))
            samples[name].append(found[name][1:])
        if index == 0:  # scale, lambda and training held fixed: the test images alone are drawn again
            fixed = _differences(training, np.ones_like(weights[0]), weights[1])
            old = {name: np.quantile(fixed[name][1:], [0.025, 0.975]).tolist() for name in fixed}
    return {"values": values, "samples": samples, "old": old}


def _differences(training: Training, validation: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    found = resampled_measures(training, validation, test, ("predictive_variance", "fused"))
    return {name: found["fused"][name] - found["predictive_variance"][name] for name in MEASURES}


# ---------------------------------------------------------------- the table


def summarise(studies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coverage, false claims and power of every endpoint at each number of trainings."""
    truth = {name: float(np.mean([study["values"][name] for study in studies])) for name in MEASURED}
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for trainings in TRAININGS:
        tallies: dict[str, list[tuple[bool, bool, bool, float]]] = {name: [] for name in MEASURED}
        for study in studies:
            estimates = {
                name: crossed_estimate(
                    study["values"][name][:trainings], np.stack(study["samples"][name][:trainings], 1), VALIDATION
                )
                for name in MEASURED
            }
            centred = {name: _moved(estimate, truth[name]) for name, estimate in estimates.items()}
            corrected = dict(zip(MEASURED, holm([centred[name].p_value() for name in MEASURED])))
            for name, estimate in estimates.items():
                low, high = estimate.interval()
                claim = outcome(
                    centred[name], ENDPOINTS[name].margin, corrected[name], ENDPOINTS[name].lower_is_better
                )
                tallies[name].append((
                    low <= truth[name] <= high, claim in ("better", "worse"), low > 0 or high < 0, high - low
                ))
        for name, tally in tallies.items():
            covered, false, found, width = np.mean(tally, axis=0)
            rows[trainings, name] = {
                "trainings": trainings, "endpoint": name, "truth": truth[name], "coverage": covered, "false": false,
                "found": found, "mean_width": width,
            }
    for name in MEASURES:
        held = [study["old"][name][0] <= truth[name] <= study["old"][name][1] for study in studies]
        rows[1, name]["old_coverage"] = float(np.mean(held))
    return list(rows.values())


def _moved(estimate: Estimate, truth: float) -> Estimate:
    return Estimate(
        estimate.value - truth, estimate.seed_variance, estimate.image_variance, estimate.trainings, estimate.image_degrees
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| endpoint | S | true effect | coverage | old coverage | false | found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (MEASURED.index(row["endpoint"]), row["trainings"])):
        old = f"{100 * row['old_coverage']:.1f} %" if "old_coverage" in row else ""
        lines.append(
            f"| {row['endpoint']} | {row['trainings']} | {row['truth']:+.4f} | {100 * row['coverage']:.1f} % | {old} | "
            f"{100 * row['false']:.1f} % | {100 * row['found']:.1f} % |"
        )
    return "\n".join(lines)


def run(scenario: str, repetitions: int, processes: int) -> list[dict[str, Any]]:
    """Simulate a scenario; prints how far it is on standard error."""
    from runtime.progress import progress_bar

    tasks = [(scenario, number) for number in range(repetitions)]
    with progress_bar(scenario, repetitions, "study") as bar:
        studies = []
        if processes == 1:
            for task in tasks:
                studies.append(repetition(task))
                bar.update(1)
        else:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for study in pool.imap(repetition, tasks):
                    studies.append(study)
                    bar.update(1)
    return summarise(studies)


def main() -> None:
    """Simulate both scenarios and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500, help="simulated studies per scenario [500]")
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), help="only this one")
    parser.add_argument("--processes", type=int, default=2, help="[2]")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    options = parser.parse_args()
    started, found = time.perf_counter(), {}
    for scenario in [options.scenario] if options.scenario else SCENARIOS:
        found[scenario] = run(scenario, options.repetitions, options.processes)
        print(f"\n{scenario}: {options.repetitions} studies of {VALIDATION} validation and {TEST} test images; "
              f"intervals of {LEVEL:.0%}\n\n{table(found[scenario])}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{platform.machine()}, NumPy {np.__version__}, {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
