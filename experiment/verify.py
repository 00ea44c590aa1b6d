"""Checking everything that a finished run left against everything that it came from; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, TypeVar

import numpy as np

from experiment.case_images import ImageSet, image_sets
from experiment.given_files import facts_of
from experiment.map_files import MAP_ARRAYS, read_maps
from experiment.own_maps import maps_folder
from experiment.pooling import POOLED, read_training
from experiment.results import results_folder
from experiment.saved_run import (
    check_belongs,
    is_pooled,
    load_pooled,
    load_run,
    read_metrics,
    read_record,
    trained,
)
from experiment.tables import LOG, read_table
from isic.cache import kept_records, source_checksums
from isic.layout import Pair
from isic.source import Source, find_source, needs_synthetic
from runtime.checkpoints import load_checkpoint, load_training_state, state_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.progress import complain, progress_bar, say
from runtime.records import fingerprint

T = TypeVar("T")


def verify_results(config: Config) -> None:
    """Check the results folder that the flags name, and say in a line each what is wrong.

    Args:
        config: of the same command, or with ``--results`` alone.

    Raises:
        UserError: something is wrong; the lines before say what.
    """
    folder = folder_of(config)
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} holds no finished run (no metrics.json) that could be verified; run its command to the end")
    findings = Findings()
    findings.keep(lambda: _verify(folder, config, findings))
    for line in findings.lines:
        complain(f"wrong: {line}")
    if findings.lines:
        raise UserError(f"{folder}: {len(findings.lines)} things are wrong, see the lines above; run its command again")
    say(f"{folder}: {findings.files} files are as they were when the run was finished")


def folder_of(config: Config) -> Path:
    """The results folder of a command, whose images need not be there."""
    if config.results is not None:
        return Path(config.results)
    if config.pool is not None:
        return POOLED
    if config.maps is not None:
        return maps_folder(config)
    source = Source("synthetic", Path(), Path(), True) if needs_synthetic(config) else find_source(config)
    return results_folder(config, source)


class Findings:
    """What was found wrong, a line each, and how many files were looked at."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files = 0

    def keep(self, call: Callable[[], T]) -> T | None:
        """What a call returns; None where it raises a UserError, whose line is kept."""
        try:
            return call()
        except UserError as error:
            if str(error) not in self.lines:  # what one file lacks may be met on several ways
                self.lines.append(str(error))
            return None

    def through(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Items that stand for a file each, under a progress bar."""
        with progress_bar(f"verifying {what}", len(items), "file") as bar:
            for item in items:
                yield item
                self.files += 1
                bar.update(1)


def _verify(folder: Path, config: Config, findings: Findings) -> None:
    if is_pooled(folder):
        pooled = load_pooled(folder)
        for entry, training in zip(pooled.metrics["pooled"], pooled.trainings()):
            findings.keep(lambda training=training: _verify(training, config, findings))  # type: ignore[misc]
            found = findings.keep(lambda training=training: read_metrics(training))  # type: ignore[misc]
            if found is not None and found.get("identity") != entry["identity"]:
                findings.lines.append(f"{folder / 'metrics.json'} is about another run than lies in {training}")
        return
    record, metrics = read_record(folder), read_metrics(folder)
    check_belongs(folder, metrics, record)
    findings.keep(lambda: load_run(folder))
    findings.keep(lambda: read_training(folder))
    findings.files += 5
    sets = image_sets(folder, record)
    for other in sets[1:]:
        findings.keep(lambda other=other: other.rows(metrics))  # type: ignore[misc]
    masks: dict[str, np.ndarray] = {}
    if "maps" in record:
        findings.keep(lambda: _verify_given(record, findings))
    else:
        findings.keep(lambda: _verify_weights(folder, record, metrics, findings))
        size, cache = int(record["configuration"].get("image_size", 0)), config.cache or record["configuration"].get("cache")
        for one in sets:
            ids = one.test if one.name else [id for part in record["split"].values() for id in part]
            expected = one.content if one.name else record.get("data_fingerprint")
            masks.update(findings.keep(lambda: _verify_source(one, ids, expected, size, cache, findings)) or {})  # noqa: B023
    own = sets[0]
    parts = [] if "numbers_from" in metrics else [
        own._replace(maps=own.maps.parent / part, test=record["split"][part]) for part in ("validation", "test")
    ]
    for one in [*parts, *sets[1:]]:
        _verify_maps(one, record, metrics, masks, findings)


def _verify_maps(
    images: ImageSet, record: Mapping[str, Any], metrics: Mapping[str, Any], masks: Mapping[str, np.ndarray], findings: Findings
) -> None:
    """The map files of one part: whole, of this run, and with the masks that the images have."""
    need = [name for name in MAP_ARRAYS if name != "expected_entropy" or record.get("maps", {}).get("expected_entropy", True)]
    for id in findings.through(images.test, images.maps.name):
        path = images.maps / f"{id}.npz"
        maps = findings.keep(lambda: read_maps(path, need, images.identity(metrics), images.sealed))  # noqa: B023
        if maps is not None and id in masks and not np.array_equal(maps["true_mask"], masks[id]):
            findings.lines.append(f"{path}: true_mask is not the mask of the image")


def _verify_weights(folder: Path, record: Mapping[str, Any], metrics: Mapping[str, Any], findings: Findings) -> None:
    """The weights: those that the numbers are about, and those that the training says were its best."""
    best, state_path = folder / "weights" / "best_model.pth", folder / "weights" / "training_state.pth"
    weights = state_fingerprint(load_checkpoint(best, sealed=True)["model"])
    findings.files += 1
    if metrics.get("identity") != fingerprint([record.get("identity"), weights]):
        findings.lines.append(f"{best} does not hold the weights that {folder / 'metrics.json'} is about")
    if not trained(record) or not state_path.exists():
        return
    state = load_training_state(state_path)
    findings.files += 1
    if state["identity"] != record.get("identity") or state["progress"]["best_weights"] != weights:
        findings.lines.append(f"{state_path} is not of the training that {best} is from")
    elif read_table(folder / LOG) != [{name: float(value) for name, value in row.items()} for row in state["progress"]["log"]]:
        findings.lines.append(f"{folder / LOG} does not hold the epochs of {state_path}")


def _verify_source(
    images: ImageSet, ids: Sequence[str], expected: str | None, size: int, cache: str | None, findings: Findings
) -> dict[str, np.ndarray]:
    """The files of images and masks, read again, and what the cache holds of them; returns the masks that are there."""
    pairs = images.pairs()
    gone = [id for id in ids if id not in pairs]
    if gone:
        findings.lines.append(f"{len(gone)} images or masks of the run are no longer in {images.images}, the first of {gone[0]}")
    wanted: list[Pair] = [pairs[id] for id in sorted(ids) if id in pairs]
    records = kept_records(wanted, size, Path(cache or "data/cache"))
    checksums: dict[str, list[str]] = {}
    masks: dict[str, np.ndarray] = {}
    named = len(findings.lines)
    for pair in findings.through(wanted, f"images of {images.name or 'the run'}"):
        found = findings.keep(lambda: source_checksums(pair))  # noqa: B023
        if found is None:
            continue
        checksums[pair.id] = found
        kept = records.get(pair.id)
        if kept is None:
            continue
        if kept.checksums != found:
            file = pair.image if kept.checksums[0] != found[0] else pair.mask
            findings.lines.append(f"{file} is another file than the one that was decoded into {kept.path}")
        elif kept.mask is None:
            findings.lines.append(f"{kept.path}: the decoded image {pair.id} is damaged")
        else:
            masks[pair.id] = kept.mask
    whole = fingerprint([[id, *checksums[id]] for id in sorted(checksums)])
    if not gone and expected is not None and whole != expected and len(findings.lines) == named:
        findings.lines.append(f"the files in {images.images} and {images.masks} are others than those of the run")
    return masks


def _verify_given(record: Mapping[str, Any], findings: Findings) -> None:
    """The files of ``--maps``, read again."""
    given, scores = record["maps"], record["maps"].get("scores", ["pred_variance", "saliency_variance"])
    truth: dict[str, dict[str, str]] = {}
    content: dict[str, str] = {}
    for part in ("validation", "test"):
        folder, truth[part] = Path(given[part]), {}
        for id in findings.through(record["split"][part], f"given {part} maps"):
            facts = facts_of(folder / f"{id}.npz", scores)
            truth[part][id], content[id] = facts.truth, facts.content
    if fingerprint(truth) != record.get("data_fingerprint") or fingerprint(content) != given.get("fingerprint"):
        findings.lines.append(f"the files in {given['validation']} and {given['test']} are others than those of the run")
