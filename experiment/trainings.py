"""Several trainings by one command: which seed goes where, which are finished, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

from dataset import Data
from experiment.pooling import check_pooled_folder, read_training
from experiment.results import clear_results, held, identity_inputs, remove_leftovers, unfinish
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.progress import complain, stage

#: Settings that decide neither weights nor maps, but what ``metrics.json`` of a training says.
SAID = ("resamples", "study", "margin", "data_note", "flips")


def configurations(config: Config, results: Path) -> list[Config]:
    """The configuration of each training: its seed, its own folder, and the weights of the same seed where some are taken."""
    return [
        replace(
            config, trainings=1, ensemble=False, seed=seed, results=str(results / f"seed-{seed}"),
            weights_from=config.weights_from and str(Path(config.weights_from) / f"seed-{seed}"),
        )
        for seed in range(config.seed, config.seed + config.trainings)
    ]


def kept_of_trainings(results: Path) -> str:
    """Which trainings are finished."""
    names = sorted((path.parent.name for path in results.glob("seed-*/metrics.json")), key=lambda name: (len(name), name))
    return f"{len(names)} finished trainings" + (f" ({', '.join(names)})" if names else "")


def is_finished(
    config: Config, folder: Path, data: Data | None, group: ProcessGroup, targets: Sequence[Mapping[str, Any]] = ()
) -> bool:
    """Whether a folder holds a training as configured, finished, and with the numbers that the settings ask for.

    Args:
        config: of the training.
        folder: its results folder.
        data: its images; None where the numbers are those of the run that the weights are taken from.
        group: of processes.
        targets: the records of the other test sets of which it must hold the numbers.

    Raises:
        UserError: see :func:`experiment.results.identity_inputs`.
    """
    if config.fresh or not (folder / "metrics.json").is_file():
        return False
    try:
        training = read_training(folder)
    except UserError:
        return False  # damaged or of another version: the run finds out what of it can be used again
    said = training.record.get("configuration", {})
    inputs = identity_inputs(folder, config, data, group.device)
    if training.record["decides"] != inputs or any(said.get(name) != getattr(config, name) for name in SAID):
        return False
    return all(target in training.record.get("targets", ()) and target["name"] in training.targets for target in targets)


def train_all(
    config: Config, results: Path, data: Data | None, group: ProcessGroup, train: Callable[[Config, Path], Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Run each training in its own folder, but for those that are finished; returns the folders.

    A training that fails does not keep the others from being run, where this process is alone. Several processes might
    not all have seen the failure, and would wait for each other.

    Args:
        config: of the whole.
        results: the folder of the whole, which this process holds.
        data: of all trainings; None where their numbers are those of the trainings that the weights are taken from.
        group: of processes.
        train: runs one training and returns its metrics; the folder is held for it.
        targets: the records of the other test sets.

    Raises:
        UserError: the folder holds a single run, or a training failed; names those that are finished.
    """
    failures: dict[str, str] = {}
    folders = []
    group.shared(lambda: _claim(config, results))
    for one in configurations(config, results):
        folder = Path(str(one.results))
        folders.append(folder)
        try:
            if group.shared(lambda one=one, folder=folder: is_finished(one, folder, data, group, targets)):  # type: ignore[misc]
                group.shared(lambda folder=folder: remove_leftovers(folder))  # type: ignore[misc]
                stage(folder.name, "finished before, used again")
                continue
            stage(folder.name, f"training {len(folders)} of {config.trainings}")
            group.shared(lambda: unfinish(results))
            with held(folder, group):
                metrics = train(one, folder)
            stage(folder.name, f"finished, lambda = {metrics['lambda']:g}; {folder / 'report.html'}")
        except UserError as error:
            failures[folder.name] = str(error)
            if group.world_size > 1:
                break
            if len(folders) < config.trainings:
                complain(f"{folder.name} failed, the next training follows: {error}")
    if failures:
        told = "; ".join(f"{name}: {text}" for name, text in failures.items())
        raise UserError(f"not pooled, as not every training is finished: {told}; kept in {results}: {kept_of_trainings(results)}")
    return folders


def _claim(config: Config, results: Path) -> None:
    """Make sure that the folder of the whole holds no single run; with ``--fresh``, delete what lies there."""
    if config.fresh:
        clear_results(results)
    check_pooled_folder(results)
