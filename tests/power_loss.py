"""Kinds of runs whose power is lost, for the tests: what they do, and how their end is compared."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

import numpy as np
from conftest import TINY_FLAGS, command
from crash_model import Change, State, Tree, crash_states, read_tree, recorded, write_tree
from given_maps import write_given

import experiment.maps
import experiment.numbers
import reporting.run_pictures
import train
from isic.layout import find_pairs, isic_folders
from isic.synthetic import write_synthetic_dataset
from runtime.files import atomic_write
from runtime.records import WALL_CLOCK

#: A run of a second on twelve pairs.
FLAGS = (*TINY_FLAGS, "--epochs", 2, "--passes", 2, "--resamples", 100, "--quiet")

#: Numbers by a hash of what they follow from.
KNOWN: dict[bytes, bytes] = {}


class Scenario(NamedTuple):
    """A kind of run. Both functions take the folder of the data and the disk.

    Attributes:
        prepare: brings the disk to where the power may be lost from then on.
        act: the command; the same again after the loss.
        keeps: whether the same command again uses what is finished; with ``--fresh`` it starts over.
    """

    prepare: Callable[[Path, Path], object]
    act: Callable[[Path, Path], object]
    keeps: bool = True


class Recording(NamedTuple):
    """Of a run that was not disturbed: its changes, what it left, and what a power loss might leave on the way.

    Attributes:
        before, log: see :class:`crash_model.Recorder`.
        end: see :func:`ending`.
        states: of :func:`crash_model.crash_states`.
    """

    before: Tree
    log: list[Change]
    end: dict[str, Any]
    states: list[State]

    def __repr__(self) -> str:  # see crash_model.State
        return f"Recording of {len(self.log)} changes with {len(self.states)} states"


def _run(data: Path, disk: Path, *flags: object, results: str = "run") -> None:
    with _quick_ends():
        outcome = command("--data", data, "--results", disk / results, "--cache", disk / "cache", *FLAGS, *flags, cwd=disk)
    assert outcome.returncode == 0, outcome.stderr


@contextmanager
def _quick_ends() -> Iterator[None]:
    """No pictures but files of their names, and numbers that are computed once for the same counts.

    Both take most of the time of a tiny run, and neither touches the disk.
    """
    numbers_of = experiment.numbers._numbers_of

    def known(run: Any, tuned: Any, counted: Any, *others: Any) -> dict[str, Any]:
        key = hashlib.sha256(pickle.dumps((run.config.to_dict(), tuned, [part.to_arrays() for part in counted]))).digest()
        if key not in KNOWN:
            KNOWN[key] = pickle.dumps(numbers_of(run, tuned, counted, *others))
        return pickle.loads(KNOWN[key])

    def draw(run: Any, read: object) -> list[Path]:
        paths = [run.folder / name for name in ("figures/a.png", "figures/b.png", "report.html", "report.md")]
        for path in paths:
            with atomic_write(path) as stream:
                stream.write(f"{path.name} of {run.metrics['verdict']}".encode())
        return paths

    of_pool = mock.patch("reporting.pooled.draw_pooled", lambda run: None)
    numbers = mock.patch.object(experiment.numbers, "_numbers_of", known)
    stored = mock.patch.object(np, "savez_compressed", np.savez)
    with of_pool, stored, numbers, mock.patch.object(reporting.run_pictures, "draw_run", draw):
        yield


def _without_a_map_and_a_score(data: Path, disk: Path) -> None:
    _run(data, disk)
    maps = sorted((disk / "run" / "uncertainty_maps").glob("*/*.npz"))
    maps[0].unlink()
    maps[-1].write_bytes(b"damaged")


def _touched(data: Path, disk: Path) -> None:
    _run(data, disk)
    for pair in find_pairs(*isic_folders(data))[3:6]:
        os.utime(pair.image)


def _given(data: Path, disk: Path) -> None:
    folder = data.parent / "given"
    if not folder.exists():
        write_given(folder)
    with _quick_ends():
        outcome = command(
            "--maps", folder / "val", folder / "test", "--scores", "entropy", "variance", "--results", disk / "run",
            "--resamples", 100, "--quiet", "--device", "cpu", cwd=disk,
        )
    assert outcome.returncode == 0, outcome.stderr


def _nothing(data: Path, disk: Path) -> None:
    pass


SCENARIOS = {
    "first run": Scenario(_nothing, _run),
    "fresh over another": Scenario(
        lambda data, disk: _run(data, disk, "--seed", 7), lambda data, disk: _run(data, disk, "--fresh", "--seed", 8), keeps=False
    ),
    "maps made again": Scenario(_without_a_map_and_a_score, _run),
    "pictures decoded again": Scenario(_touched, _run),
    "several trainings": Scenario(_nothing, lambda data, disk: _run(data, disk, "--trainings", 2)),
    "weights of another": Scenario(
        _run, lambda data, disk: _run(data, disk, "--weights-from", disk / "run", "--passes", 3, results="other")
    ),
    "maps of the user's": Scenario(_nothing, _given),
    "synthetic lesions": Scenario(_nothing, lambda data, disk: write_synthetic_dataset(disk / "drawn", 2, processes=1)),
}


def ending(disk: Path) -> dict[str, Any]:
    """Every file of an end that must not depend on what happened before, without wall-clock fields."""
    found: dict[str, Any] = {}
    for name, content in read_tree(disk).items():
        path = Path(name)
        if content is None or path.name in (".lock", "config.json", "training_state.pth") or path.parts[0] == "cache":
            continue
        if path.name == "metrics.json":
            metrics = json.loads(content)
            found[name] = {key: value for key, value in metrics.items() if key not in WALL_CLOCK}
        elif path.name == "training_log.csv":
            found[name] = [line.rsplit(",", 2)[0] for line in content.decode().splitlines()]
        else:
            found[name] = content
    return found


def record(scenario: Scenario, data: Path, disk: Path, limit: int = 24) -> Recording:
    """Do a run once, undisturbed, on a new disk."""
    disk.mkdir()
    scenario.prepare(data, disk)
    with recorded(disk) as recorder:
        scenario.act(data, disk)
    return Recording(recorder.before, recorder.log, ending(disk), crash_states(recorder.before, recorder.log, limit))


def check_states(
    scenario: Scenario, data: Path, disk: Path, recording: Recording, states: list[State],
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Start the run again from each state: it ends as it did, and does nothing twice that was certain to be done."""
    faults = []
    for state in states:
        write_tree(disk, state.tree)
        try:
            with _counted() as counts:
                scenario.act(data, disk)
            problems = differences(ending(disk), recording.end)
            # in a cache that turns out to be complete nothing is written, and a leftover waits for the next decoding
            problems += [str(path) for path in disk.rglob(".*.partial") if disk / "cache" not in path.parents]
        except Exception as error:  # all states are tried, and all that fail are told
            problems = [f"{type(error).__name__}: {error}"]
        else:
            epochs, maps = (left_to_do(recording.log, state.point, name) for name in ("training_state.pth", ".npz"))
            # the first map is made twice, to see whether the network draws random numbers of its own
            if scenario.keeps and (counts["epochs"] > epochs or counts["maps"] > maps + 1):
                problems.append(f"{counts} though only {epochs} epochs and {maps} maps were left to do")
        if problems:
            faults.append(f"after {state.point} of {len(recording.log)} changes: {problems}")
            print(f"\n{faults[-1]}", flush=True)
        progress()
    shutil.rmtree(disk)
    assert not faults, f"{len(faults)} of {len(states)} states: " + "\n".join(faults)


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The files in which two ends differ."""
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def left_to_do(log: list[Change], point: int, ending: str) -> int:
    """Of the files that a run finished, those whose new name was not certain at a point of its log."""
    renames = [
        place for place, change in enumerate(log)
        if change[0] == "rename" and change[2].endswith(ending) and "calibration" not in change[2]
    ]
    return sum(not any(change[0] == "sync_folder" for change in log[place + 1: point]) for place in renames)


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts the epochs that are trained and the images whose maps are made."""
    counts = {"epochs": 0, "maps": 0}
    run_epoch, make = train.Training.run_epoch, experiment.maps.uncertainty_maps

    def counted_epoch(self: Any, *arguments: Any) -> Any:
        counts["epochs"] += 1
        return run_epoch(self, *arguments)

    def counted_maps(model: Any, images: Any, **options: Any) -> Any:
        counts["maps"] += len(images)
        return make(model, images, **options)

    with mock.patch.object(train.Training, "run_epoch", counted_epoch), mock.patch.object(
        experiment.maps, "uncertainty_maps", counted_maps
    ):
        yield counts
