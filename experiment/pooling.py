"""Finished trainings as one study: read back, checked to differ in the seed alone, and concluded from together.

Saved numbers are enough: no image and no weight is read, and maps only for the ensemble, where it is asked for.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np

from evaluation.conclusion import DEFAULT_MARGINS, ENDPOINT_NAMES, PERMUTATIONS, TrainingResult, conclude
from evaluation.counting import Counters
from evaluation.fusion import Fusion
from evaluation.names import SCHEMA_VERSION
from experiment.saved_counts import read_counts
from experiment.saved_fusion import fusion_of
from experiment.saved_run import PooledRun, check_belongs, read_any_record, read_metrics
from experiment.tables import check_mark
from experiment.terms import Terms
from runtime.config import Config
from runtime.errors import UserError
from runtime.files import remove, remove_partials
from runtime.lock import FolderLock
from runtime.progress import progress_bar
from runtime.reading import real_path
from runtime.records import fingerprint, read_json, seal, write_json

POOLED = Path("results/pooled")
#: Resamples that a conclusion takes at most: each of them refits scales, lambda and recalibration.
RESAMPLES = 500
#: Of the counts of each image, what a conclusion needs and older versions did not save.
NEEDED = ("joint", "cell_sums", "largest", "error_cells")
#: Before the name of another test set, in the names of saved counts.
TARGET = "target:"
#: Recorded inputs in which trainings of one study may differ; fingerprints of taken weights and of given maps differ with
#: the training.
MAY_DIFFER = ("seed", "weights", "maps")


# ---------------------------------------------------------------- concluding


def check_margins(margins: Mapping[str, float] | None) -> None:
    """Refuse a margin of something else than an endpoint.

    Raises:
        UserError: lists the endpoints.
    """
    for name in margins or ():
        if name not in ENDPOINT_NAMES:
            raise UserError(f"--margin names no endpoint {name}; there are {', '.join(ENDPOINT_NAMES)}")


def conclude_trainings(
    trainings: Sequence[TrainingResult], resamples: int, margins: Mapping[str, float] | None, permutations: int = PERMUTATIONS,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What one training or several of the same experiment show, with the same resamples however they were run.

    Args:
        trainings: in any order.
        resamples: at most ``RESAMPLES`` of them are taken.
        margins: by endpoint, where it is not the default.
        permutations: of the null of the error models; 0 leaves it out.
        groups: by id, what is drawn and what shares a fold; an image without one stands for itself.

    Returns:
        See :func:`evaluation.conclusion.conclude`.
    """
    in_order = sorted(trainings, key=lambda training: training.seed)
    with progress_bar("concluding", len(in_order), "training", delay=1.0, leave=False) as bar:
        return conclude(
            in_order, resamples=min(resamples, RESAMPLES), seed=in_order[0].seed, report=bar.update,
            margins={**DEFAULT_MARGINS, **(margins or {})}, permutations=permutations, groups=groups,
        )


def conclude_run(
    config: Config, fusion: Fusion, validation: Counters, test: Counters, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """:func:`conclude_trainings` of one training, as it is configured; the permutation null with ``--study`` alone."""
    result = TrainingResult(f"seed-{config.seed}", config.seed, fusion, validation, test)
    return conclude_trainings([result], config.resamples, config.margin, PERMUTATIONS if config.study else 0, groups)


# ---------------------------------------------------------------- reading a finished training


class FinishedTraining(NamedTuple):
    """A finished training, as far as a pool needs it.

    Attributes:
        folder: its results folder.
        metrics: ``metrics.json``.
        record: ``config.json``.
        result: its counts.
        targets: the counts of other test sets, by name.
    """

    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]
    result: TrainingResult
    targets: Mapping[str, Counters]


def read_training(folder: Path) -> FinishedTraining:
    """Read a finished training, after checking that its files belong together.

    Raises:
        UserError: it is not finished, is itself a pool, was changed, or was made by another version.
    """
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} holds no finished run (no metrics.json); finish it, or name another folder")
    metrics, record = read_metrics(folder), read_any_record(folder)
    if "pooled" in metrics or "pooled" in record:
        raise UserError(f"{folder} is a pool itself; name the folders of its trainings")
    if "config_identity" not in metrics or "identity" not in metrics:
        raise _of_another_version(folder)
    inputs = record.get("decides")
    identity = fingerprint(inputs)
    if not isinstance(inputs, dict) or not identity == record.get("identity") == metrics["config_identity"]:
        raise UserError(f"{folder / 'metrics.json'} does not belong to the config.json beside it; run main.py again")
    check_belongs(folder, metrics, record)
    seed = _seed_of(inputs, folder)
    check_mark(folder / "calibration.npz", metrics)
    ids = {TARGET + entry["name"]: entry["ids"] for entry in record.get("targets", ())}
    parts = read_counts(folder / "calibration.npz", str(metrics["identity"]), {**record["split"], **ids})
    if any(name not in counts.images for counts in parts.values() for name in NEEDED):
        raise _of_another_version(folder)
    fusion = fusion_of(metrics, folder / "metrics.json")
    result = TrainingResult(f"seed-{seed}", seed, fusion, parts.pop("validation"), parts.pop("test"))
    targets = {name[len(TARGET):]: counts for name, counts in parts.items() if name[len(TARGET):] in metrics.get("targets", ())}
    return FinishedTraining(folder, metrics, record, result, targets)


def _seed_of(inputs: Mapping[str, Any], folder: Path) -> int:
    seed = inputs.get("seed")
    if type(seed) is not int or seed < 0:
        raise UserError(f"{folder / 'config.json'} does not say which seed the run had; run main.py again")
    return seed


def _of_another_version(folder: Path) -> UserError:
    return UserError(
        f"{folder} was finished by another version of this program, which saved too little to pool; "
        "run its command again: weights and maps are used again"
    )


# ---------------------------------------------------------------- belonging together


def check_together(trainings: Sequence[FinishedTraining]) -> None:
    """Refuse trainings that differ in more than the seed, two of one seed, and two that judged the same given maps.

    Runs of ``--maps`` are trainings of one experiment when their files have the same ids and masks; what tells them apart is
    the ``--seed`` that each was given.

    Raises:
        UserError: names both folders, and the settings in which they differ.
    """
    first = trainings[0]
    seeds: dict[int, Path] = {}
    for training in trainings:
        seed = training.result.seed
        if seed in seeds:
            raise UserError(f"{seeds[seed]} and {training.folder} are both of seed {seed}; leave one out")
        seeds[seed] = training.folder
    maps: dict[str, Path] = {}
    for training in trainings:
        content = training.record["decides"].get("maps")
        if content in maps:
            raise UserError(f"{maps[content]} and {training.folder} judged the same maps, which are those of one training")
        if content is not None:
            maps[content] = training.folder
    for training in trainings[1:]:
        one, two = first.record["decides"], training.record["decides"]
        changed = [
            f"{key} is {one.get(key)!r} there and {two.get(key)!r} here"
            for key in sorted({*one, *two} - {*MAY_DIFFER}) if one.get(key) != two.get(key)
        ]
        if not changed and first.record.get("split") != training.record.get("split"):
            changed = ["the split of the images"]
        for part in ("validation", "test"):
            if not changed and getattr(first.result, part).ids != getattr(training.result, part).ids:
                changed = [f"the {part} images"]
        if changed:
            raise UserError(f"{training.folder} differs from {first.folder} in more than the seed: {'; '.join(changed)}")


def check_pooled_folder(results: Path) -> None:
    """Refuse a results folder that holds a run of its own, whose numbers a pool would replace.

    Raises:
        UserError: names the folder.
    """
    path = results / "config.json"
    if path.exists() and "pooled" not in read_json(path):
        raise UserError(f"{results} holds a single run; choose another --results folder for what is pooled")


# ---------------------------------------------------------------- pooling


class Pool(NamedTuple):
    """What the files ``metrics.json`` and ``config.json`` of a pool hold."""

    metrics: dict[str, Any]
    record: dict[str, Any]


@contextmanager
def pool_folder(config: Config) -> Iterator[Path]:
    """Hold the results folder of ``--pool``, which must hold no single run.

    Raises:
        UserError: it does, or another command holds it; or a margin is of no endpoint.
    """
    results = Path(config.results or POOLED)
    check_margins(config.margin)
    check_pooled_folder(results)
    with FolderLock(results):
        remove_partials(results, results / "figures")
        yield results


def write_pool(config: Config, folders: Sequence[Path], results: Path, draw: Callable[[PooledRun], object]) -> dict[str, Any]:
    """Pool finished trainings and write ``config.json``, what ``draw`` writes, and ``metrics.json``, whose content it returns.

    Raises:
        UserError: see :func:`pool_trainings`; what was written before stays.
    """
    metrics, record = pool_trainings(folders, results, config)
    remove(results / "metrics.json")
    write_json(results / "config.json", record)
    draw(PooledRun(results, metrics, record))
    write_json(results / "metrics.json", metrics)  # last: its presence says that the pool is finished
    return metrics


def pool_trainings(folders: Sequence[Path], results: Path, config: Config) -> Pool:
    """Conclude from finished trainings together.

    Args:
        folders: of the trainings, in any order; at least two.
        results: the folder of the pool; nothing is written.
        config: its margins and resamples are used.

    Returns:
        The sealed metrics, and the record of how they were made.

    Raises:
        UserError: a training is unfinished, damaged or of another version, or they do not belong together.
    """
    trainings = sorted(map(read_training, folders), key=lambda training: training.result.seed)
    check_together(trainings)
    groups = trainings[0].record.get("groups")
    conclusion = conclude_trainings(
        [training.result for training in trainings], config.resamples, config.margin, groups=groups
    )
    names = trainings[0].metrics.get("score_names")
    if names is not None:
        conclusion = Terms(names["first"], names["second"]).in_metrics(conclusion)
    notes = dict.fromkeys(training.metrics.get("data_note") for training in trainings)  # each once, in order
    dices = [training.metrics["test"]["dice"] for training in trainings]
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "synthetic": any(training.metrics["synthetic"] for training in trainings),
        "data_note": "; ".join(note for note in notes if note) or None,
        "verdict": conclusion["sentence"],
        "pooled": [
            {"name": training.result.name, "seed": training.result.seed, "identity": training.metrics["identity"],
             "dice": dice, "lambda": training.metrics["lambda"]}
            for training, dice in zip(trainings, dices)
        ],
        "conclusion": conclusion,
        **({"score_names": names} if names is not None else {}),
        "test": _mean_test([training.metrics["test"] for training in trainings], len(trainings[0].result.test.ids)),
    }
    metrics["warnings"] = [
        {**warning, "text": f"{training.result.name}: {warning['text']}"}
        for training in trainings for warning in training.metrics.get("warnings", ())
    ]
    targets, others = _shared_targets(trainings)
    if targets:
        metrics["targets"] = {
            entry["name"]: _pooled_target(trainings, entry, groups or {}, config) for entry in targets
        }
    metrics["warnings"] += [
        {"code": "target_left_out", "text": f"Test set {name} is left out: not every training was measured on it."}
        for name in others
    ]
    if config.ensemble:
        from experiment.ensemble import ensemble_numbers  # loads all that makes maps; here alone are maps read

        metrics["ensemble"] = ensemble_numbers(
            [training.folder for training in trainings], bins=int(trainings[0].record["configuration"]["bins"]),
            resamples=config.resamples, seed=trainings[0].result.seed,
        )
    return Pool(seal(metrics), seal(_record(trainings, results, config)))


def _mean_test(tests: Sequence[Mapping[str, Any]], images: int) -> dict[str, Any]:
    """The headline numbers of a test set, means over trainings; None where a training has no such number."""
    found: dict[str, Any] = {"images": images, "dice": float(np.mean([test["dice"] for test in tests]))}
    if all("foreground_ece" in test for test in tests):
        found["foreground_ece"] = {
            score: _mean([test["foreground_ece"][score] for test in tests]) for score in tests[0]["foreground_ece"]
        }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _shared_targets(trainings: Sequence[FinishedTraining]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The records of the other test sets that every training was measured on, and the names of all others."""

    def of(training: FinishedTraining) -> dict[str, Mapping[str, Any]]:
        return {entry["name"]: entry for entry in training.record.get("targets", ()) if entry["name"] in training.targets}

    found = [of(training) for training in trainings]
    shared = [
        entry for name, entry in found[0].items()
        if all(name in one and one[name]["fingerprint"] == entry["fingerprint"] for one in found)
    ]
    names = {entry["name"] for entry in shared}
    return shared, sorted({name for one in found for name in one} - names)


def _pooled_target(
    trainings: Sequence[FinishedTraining], entry: Mapping[str, Any], groups: Mapping[str, str], config: Config
) -> dict[str, Any]:
    """The numbers of another test set from all trainings: means over them, and one conclusion."""
    name = entry["name"]
    results = [training.result._replace(test=training.targets[name]) for training in trainings]
    numbers = [training.metrics["targets"][name] for training in trainings]
    return {
        "test": _mean_test([one["test"] for one in numbers], len(results[0].test.ids)),
        # the null of the error models is that of the source's test images
        "conclusion": conclude_trainings(
            results, config.resamples, config.margin, permutations=0, groups={**groups, **entry.get("groups", {})}
        ),
        "shift": {
            quantity: {side: _mean([one["shift"][quantity][side] for one in numbers]) for side in sides}
            for quantity, sides in numbers[0]["shift"].items()
        },
        "by_training": [{"dice": one["test"]["dice"], "foreground_ece": one["test"]["foreground_ece"]} for one in numbers],
    }


def _record(trainings: Sequence[FinishedTraining], results: Path, config: Config) -> dict[str, Any]:
    """What ``config.json`` of the pool holds: what the trainings share, where each lies, and with what all was made."""
    first = trainings[0].record
    keys = ("device", "device_name", "versions")
    environments = [{key: training.record.get(key) for key in keys} for training in trainings]
    asked = {name: getattr(config, name) for name in ("results", "pool", "margin", "resamples", "ensemble")}
    packages = ("numpy", "scipy", "matplotlib")
    return {
        "configuration": {**first["configuration"], **asked, "seed": trainings[0].result.seed, "trainings": len(trainings)},
        "pooled": [{"name": training.result.name, "folder": _seen_from(results, training.folder)} for training in trainings],
        **{key: first.get(key) for key in ("synthetic", "images", "masks", "data_fingerprint", "split", "skipped")},
        **({"groups": first["groups"]} if "groups" in first else {}),
        **({"maps": {"from_elsewhere": True}} if "maps" in first else {}),
        **({"targets": targets} if (targets := _shared_targets(trainings)[0]) else {}),
        "environments": [entry for place, entry in enumerate(environments) if entry not in environments[:place]],
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _seen_from(results: Path, folder: Path) -> str:
    """The path of a folder from the results folder where it lies inside, else from the root."""
    inside, outside = real_path(folder), real_path(results)
    return inside.relative_to(outside).as_posix() if outside in inside.parents else os.fspath(inside)
