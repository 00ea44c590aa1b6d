"""From the saved maps of a run to its numbers: counting both splits, every measure, the verdict, the warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from evaluation.counting import Counters
from evaluation.detectors import DETECTOR_READS, detector_numbers
from evaluation.fusion import Fusion, lambda_grid
from evaluation.parallel import watched
from evaluation.protocol import count_splits
from evaluation.study import STUDY_READS, run_study
from evaluation.summary import per_image, summarise
from evaluation.tuning import Tuned, tune
from experiment.checks import warnings_of
from experiment.maps import SavedMaps
from experiment.pooling import conclude_run, read_training
from experiment.results import write_counts
from experiment.run import Run
from experiment.targets import CountedTarget, TargetSet, count_targets, target_numbers
from runtime.files import remove
from runtime.progress import Reported, progress_bar, resampling_bar, stage
from runtime.resources import naming_shortage
from runtime.stages import timed


class Numbers(NamedTuple):
    """What a run's files hold.

    Attributes:
        metrics: for ``metrics.json``.
        rows: for ``per_image.csv``, one row per test image.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]


@timed("tuning")
def tuned_on(run: Run, validation: SavedMaps) -> Tuned:
    """What the validation maps of a run decide; called by all processes together, computed by one."""
    config = run.config
    return run.group.shared(lambda: tune(validation, bins=config.bins, lambdas=lambda_grid(config.lambda_steps)))


@naming_shortage("evaluation", "lower --resamples, --bins or --image-size")
def measure(
    run: Run, tuned: Tuned, validation: SavedMaps, test: SavedMaps, groups: Mapping[str, str] | None = None,
    targets: Sequence[tuple[TargetSet, SavedMaps]] = (),
) -> Numbers:
    """Count the pixels of both splits and compute every number; all processes call it together and get the same.

    The maps get their fused scores, and ``calibration.npz`` is written on the way, with ``per_image_<name>.csv`` of every
    other test set.

    Args:
        run: that the maps are of.
        tuned: on validation.
        validation, test: maps of both splits.
        groups: by id, what every bootstrap draws and what shares a fold; an image without one stands for itself.
        targets: other test sets with their maps, which have their fused scores.
    """
    config, group = run.config, run.group
    with timed("counting"):
        for part in (validation, test):
            part.add_fused_scores(tuned.fusion, group)
        counted = count_splits(tuned, validation.counted_by(group), test.counted_by(group), gather=group.gathered)
        others = count_targets(run, tuned.fusion, counted[1], targets)
    fallbacks = {part.folder.name: part.fallbacks(group) for part in (validation, test)}
    ranges = {part.folder.name: part.ranges(group) for part in (validation, test)}

    def compute() -> Numbers:
        write_counts(run, *counted, {one.target.name: one.counters for one in others})
        with watched(resampling_bar):
            metrics, rows = _numbers_of(run, tuned, counted, validation, test, groups), per_image(counted[1])
        for part, count in fallbacks.items():
            metrics[part]["precision_fallbacks"] = count
        metrics["warnings"] = warnings_of(metrics, rows, config.passes, ranges)
        _add_targets(run, metrics, [target_numbers(run, tuned.fusion, counted, groups, one) for one in others], others)
        stage("evaluation", f"lambda = {metrics['lambda']:g}, {config.resamples} resamples{', study' if config.study else ''}")
        return Numbers(metrics, rows)

    return group.shared(compute)


def measure_targets(run: Run, make: Callable[[Fusion], Sequence[tuple[TargetSet, SavedMaps]]]) -> Numbers:
    """The numbers of a finished run as they are, and those of other test sets beside them; called by all processes together.

    ``calibration.npz`` is written with the counts of the finished run, ``per_image_<name>.csv`` for every other set.

    Args:
        run: takes weights, fusion and counts of a finished one.
        make: from that fusion to other test sets with their maps, which have their fused scores.
    """
    finished = read_training(Path(str(run.config.weights_from)))
    result, groups = finished.result, finished.record.get("groups")
    counted = result.validation, result.test
    others = count_targets(run, result.fusion, result.test, make(result.fusion))

    def compute() -> Numbers:
        write_counts(run, *counted, {one.target.name: one.counters for one in others})
        own = {name: value for name, value in finished.metrics.items() if name not in ("checksum", "files", "targets")}
        metrics = {**own, "numbers_from": str(finished.folder), "warnings": [
            warning for warning in own.get("warnings", ()) if warning.get("target") is None
        ]}
        _add_targets(run, metrics, [target_numbers(run, result.fusion, counted, groups, one) for one in others], others)
        stage("evaluation", f"{len(others)} other test sets; the numbers of the source are those of {finished.folder}")
        return Numbers(metrics, per_image(result.test))

    return run.group.shared(compute)


def _add_targets(
    run: Run, metrics: dict[str, Any], numbers: Sequence[Mapping[str, Any]], others: Sequence[CountedTarget]
) -> None:
    """Put the numbers of other test sets beside those of the source, and their warnings among its own.

    Tables of sets that an earlier command measured are deleted.
    """
    found = dict(zip((one.target.name for one in others), numbers))
    for path in run.results.glob("per_image_*.csv"):
        if path.stem[len("per_image_"):] not in found:
            remove(path)
    if found:
        metrics["targets"] = found
        metrics["warnings"] += [{**warning, "target": name} for name, one in found.items() for warning in one["warnings"]]


def _numbers_of(
    run: Run, tuned: Tuned, counted: tuple[Counters, Counters], validation: SavedMaps, test: SavedMaps,
    groups: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Every number that follows from the counts, and from the maps where the configuration asks for more."""
    config = run.config
    with timed("numbers"):
        metrics = summarise(*counted, tuned.fusion, resamples=config.resamples, seed=config.seed, groups=groups)
    with timed("verdict"):
        metrics["conclusion"] = conclude_run(config, tuned.fusion, *counted, groups)
    metrics["verdict"] = metrics["conclusion"]["sentence"]
    options: dict[str, Any] = {"bins": config.bins, "resamples": config.resamples, "seed": config.seed, "groups": groups}
    if config.study or config.flips:
        reads = len(validation.ids) * (DETECTOR_READS[0] + config.flips + STUDY_READS[0] * config.study)
        reads += len(test.ids) * (DETECTOR_READS[1] + STUDY_READS[1] * config.study)
        with timed("study"), progress_bar("study", reads, "map", leave=False) as bar:
            parts = Reported(validation, bar), Reported(test, bar)
            metrics["detectors"] = detector_numbers(*parts, tuned.fusion, **options)
            if config.study:
                metrics["study"] = run_study(*parts, lambdas=tuned.lambdas, **options)
    return metrics
