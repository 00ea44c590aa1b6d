"""The numbers of the study: what the document needs of each finished run, in files below docs/study.

    pooled.json         the ten trainings together, and on the external test set
    trainings.json      each of them, values without intervals, and their mean
    first.json          the first of them with its curves, for the figures
    ABLATION.json       three of them with another setting, together
    larger-SEED.json    the three larger networks of an earlier version of this program

All numbers have six significant digits. A larger network or an ablation whose run is not at hand keeps the file that is there,
if one is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.saved_run import load_run
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.records import WALL_CLOCK, read_json

SEEDS = tuple(f"seed-{seed}" for seed in range(42, 52))
ABLATIONS = {
    "predicted-score": "Grad-CAM of the predicted lesion", "bottleneck": "heatmaps of the bottleneck",
    "unscaled": "heatmaps not divided by their maximum", "passes-10": "T = 10",
}
LARGER = ("larger-42", "larger-43", "larger-44")
POOLED, TRAININGS, FIRST, EXTERNAL = "pooled", "trainings", "first", "HAM10000"
#: Every file, by the name under which the document refers to it.
FILES = (POOLED, TRAININGS, FIRST, *ABLATIONS, *LARGER)
SPLIT = ("data", "split_seed", "test_fraction", "validation_fraction", "skipped")
#: What is the same in no two runs, and of no use to a reader.
PRIVATE = ("checksum", "identity", "config_identity", "files", *WALL_CLOCK)
#: The regions that all runs were measured in, and what ``trainings.json`` holds of a score there.
REGIONS = ("foreground", "predicted_foreground", "union", "whole_image")
OF_SCORES = ("ece", "signed_gap", "mean_confidence", "brier", "log_loss", "auroc")
#: What of each of the ten trainings is left to ``first.json`` and ``pooled.json``.
HEAVY = ("conclusion", "ranking_of_images")


def collect_all(runs: Path, docs: Path) -> None:
    """Write all files of the numbers.

    Args:
        runs: holds the folder pooled (of ten trainings), and perhaps those of ``ABLATIONS`` (of three each) and ``LARGER``.
        docs: the folder of the documentation.

    Raises:
        UserError: a run is missing or unfinished, or they are of different images or splits.
    """
    trainings = {seed: training_of(runs / POOLED / seed) for seed in SEEDS}
    found: dict[str, Any] = {
        POOLED: pool_of(runs / POOLED),
        TRAININGS: {seed: values_of(training) for seed, training in trainings.items()},
        FIRST: without(trainings[SEEDS[0]], ("targets",)),
        **{name: pool_of(runs / name) for name in ABLATIONS if (runs / name).is_dir()},
        **{name: training_of(runs / name) for name in LARGER if (runs / name / "metrics.json").is_file()},
    }
    found[TRAININGS]["mean"] = mean(list(found[TRAININGS].values()))
    kinds = {json.dumps([entry["settings"].get(key) for key in SPLIT]): name
             for name, entry in found.items() if name != TRAININGS}
    if len(kinds) > 1:
        raise UserError(f"{', '.join(kinds.values())} in {runs} are of different images or splits; make them again in one folder")
    for name, content in found.items():
        with atomic_write(docs / "study" / f"{name}.json") as stream:
            stream.write((json.dumps(rounded(content), separators=(",", ":")) + "\n").encode())


def read_all(docs: Path) -> dict[str, dict[str, Any]]:
    """The committed numbers, by the name of their file; the trainings also by their own."""
    found = {name: read_json(docs / "study" / f"{name}.json") for name in FILES if (docs / "study" / f"{name}.json").is_file()}
    return {**found, **found[TRAININGS]}


def training_of(folder: Path) -> dict[str, Any]:
    """The numbers of a finished training, its settings, and how its training went."""
    run = load_run(folder)
    metrics = without(run.metrics, PRIVATE)
    for place in (metrics["test"], *(target["test"] for target in metrics.get("targets", {}).values())):
        for region in place.get("regions", {}).values():
            for entry in region["scores"].values():
                entry["mean_confidence"] = region["accuracy"] + entry["signed_gap"]["value"]
    best = max(run.log, key=lambda row: row["validation_dice"])
    return {
        **metrics, "settings": run.record["decides"], "versions": run.record["versions"],
        "training": {
            "images": len(run.record["split"]["train"]), "epochs": len(run.log), "best_epoch": int(best["epoch"]),
        },
    }


def pool_of(folder: Path) -> dict[str, Any]:
    """The numbers of pooled trainings, with the settings that they share.

    Raises:
        UserError: it is no finished pool.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"there is no finished pool in {folder}; docs/study/run.sh makes it")
    metrics = read_json(path)
    if "pooled" not in metrics:
        raise UserError(f"{folder} holds a single run instead of a pool; docs/study/run.sh makes it")
    settings = training_of(folder / metrics["pooled"][0]["name"])["settings"]
    return {**without(metrics, PRIVATE), "settings": settings}


def values_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """What ``trainings.json`` holds of a training: values without intervals, of some regions and measures."""
    content: dict[str, Any] = values_only(without(training, HEAVY))
    for place in (content["test"], *(target["test"] for target in content.get("targets", {}).values())):
        place["regions"] = {name: place["regions"][name] for name in REGIONS}
        for region in place["regions"].values():
            region.pop("risk_coverage", None)
            region["scores"] = {
                score: {name: entry[name] for name in OF_SCORES if name in entry} for score, entry in region["scores"].items()
            }
    if "detectors" in content:
        content["detectors"]["regions"] = {"whole_image": content["detectors"]["regions"]["whole_image"]}
    return content


# ---------------------------------------------------------------- nested numbers


def without(value: Any, names: tuple[str, ...]) -> Any:
    """Nested dictionaries and lists without the entries of these names."""
    if isinstance(value, Mapping):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [without(item, names) for item in value]
    return value


def values_only(value: Any) -> Any:
    """Nested dictionaries without intervals: neither those of estimates nor entries that are called so."""
    if isinstance(value, Mapping):
        return {key: values_only(item) for key, item in value.items() if not re.search(r"(^|_)interval(_|$)", key)}
    if isinstance(value, list):
        return [values_only(item) for item in value]
    return value


def mean(values: list[Any]) -> Any:
    """The mean of nested dictionaries and lists, number by number; None where one of them has no such number.

    Example:
        >>> mean([{"a": [1.0, 2.0], "b": "x"}, {"a": [3.0, 4.0], "b": "y"}])
        {'a': [2.0, 3.0], 'b': None}
    """
    first = values[0]
    if isinstance(first, Mapping):
        shared = [key for key in first if all(isinstance(value, Mapping) and key in value for value in values)]
        return {key: mean([value[key] for value in values]) for key in shared}
    if isinstance(first, list):
        alike = all(isinstance(value, list) and len(value) == len(first) for value in values)
        return [mean(list(row)) for row in zip(*values)] if alike else None
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return math.fsum(numbers) / len(values) if len(numbers) == len(values) else None


def rounded(value: Any) -> Any:
    """Floats to six significant digits, in nested lists and dictionaries."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
