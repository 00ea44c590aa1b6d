"""From the saved maps of a run to its numbers: counting both splits, every measure, the verdict, the warnings."""

from __future__ import annotations

from typing import Any, NamedTuple

from evaluation.counting import Counters
from evaluation.detectors import detector_numbers
from evaluation.protocol import count_splits
from evaluation.study import run_study
from evaluation.summary import per_image, summarise
from evaluation.tuning import Tuned
from experiment.checks import warnings_of
from experiment.maps import SavedMaps
from experiment.pooling import conclude_run
from experiment.results import write_counts
from experiment.run import Run
from runtime.progress import stage


class Numbers(NamedTuple):
    """What a run's files hold.

    Attributes:
        metrics: for ``metrics.json``.
        rows: for ``per_image.csv``, one row per test image.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]


def measure(run: Run, tuned: Tuned, validation: SavedMaps, test: SavedMaps) -> Numbers:
    """Count the pixels of both splits and compute every number; all processes call it together and get the same.

    The maps get their fused scores, and ``calibration.npz`` is written on the way.
    """
    config, group = run.config, run.group
    for part in (validation, test):
        part.add_fused_scores(tuned.fusion, group)
    counted = count_splits(tuned, validation.counted_by(group), test.counted_by(group), gather=group.gathered)
    fallbacks = {part.folder.name: part.fallbacks(group) for part in (validation, test)}
    ranges = {part.folder.name: part.ranges(group) for part in (validation, test)}

    def compute() -> Numbers:
        write_counts(run, *counted)
        metrics, rows = _numbers_of(run, tuned, counted, validation, test), per_image(counted[1])
        for part, count in fallbacks.items():
            metrics[part]["precision_fallbacks"] = count
        metrics["warnings"] = warnings_of(metrics, rows, config.passes, ranges)
        stage("evaluation", f"lambda = {metrics['lambda']:g}, {config.resamples} resamples{', study' if config.study else ''}")
        return Numbers(metrics, rows)

    return group.shared(compute)


def _numbers_of(
    run: Run, tuned: Tuned, counted: tuple[Counters, Counters], validation: SavedMaps, test: SavedMaps
) -> dict[str, Any]:
    """Every number that follows from the counts, and from the maps where the configuration asks for more."""
    config = run.config
    metrics = summarise(*counted, tuned.fusion, resamples=config.resamples, seed=config.seed)
    metrics["conclusion"] = conclude_run(config, tuned.fusion, *counted)
    metrics["verdict"] = metrics["conclusion"]["sentence"]
    if config.study or config.flips:
        metrics["detectors"] = detector_numbers(
            validation, test, tuned.fusion, bins=config.bins, resamples=config.resamples, seed=config.seed
        )
    if config.study:
        metrics["study"] = run_study(
            validation, test, bins=config.bins, lambdas=tuned.lambdas, resamples=config.resamples, seed=config.seed
        )
    return metrics
