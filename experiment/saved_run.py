"""The numbers that a finished run left, without its maps and weights."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config import IDENTITY_FIELDS, NETWORK_FIELDS, UNET_FIELDS, Config
from runtime.errors import UserError
from runtime.records import read_json, read_sealed


class SavedRun(NamedTuple):
    """What a finished run saved, except maps and weights.

    Attributes:
        folder: the results folder.
        metrics: ``metrics.json``.
        record: ``config.json``.
        rows: ``per_image.csv``, one row per test image; numbers are floats, NaN where the cell is empty.
        log: ``training_log.csv``, one row per epoch, likewise; none where nothing was trained.
    """

    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]


class PooledRun(NamedTuple):
    """What several pooled trainings left together.

    Attributes:
        folder: the results folder of the whole; each training has its own.
        metrics: its ``metrics.json``.
        record: its ``config.json``.
    """

    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]

    def trainings(self) -> list[Path]:
        """The results folder of each training, in the order of the metrics."""
        return [self.folder / entry["folder"] for entry in self.record["pooled"]]


class Setting(NamedTuple):
    """A setting of a run beside the default."""

    name: str
    value: Any
    default: Any


def load_run(folder: Path) -> SavedRun:
    """Read the numbers of a finished run.

    Args:
        folder: its results folder.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    return with_tables(Path(folder), read_sealed(Path(folder) / "metrics.json"))


def with_tables(folder: Path, metrics: Mapping[str, Any]) -> SavedRun:
    """The numbers of a run whose ``metrics.json`` may not be written yet.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    record = read_record(folder)
    log = folder / "training_log.csv"
    epochs = read_table(log) if trained(record) or log.is_file() else []
    return SavedRun(folder, metrics, record, read_table(folder / "per_image.csv"), epochs)


def trained(record: Mapping[str, Any]) -> bool:
    """Whether a run, by its ``config.json``, trained a network itself, so that it has a training log."""
    asked = record.get("configuration", {})
    return "maps" not in record and asked.get("model_weights") is None and asked.get("weights_from") is None


def read_record(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a run.

    Raises:
        UserError: it is missing or broken, or the folder holds several pooled trainings; the line names them.
    """
    record = read_json(folder / "config.json")
    if "pooled" in record:
        names = ", ".join(map(str, PooledRun(folder, {}, record).trainings()))
        raise UserError(f"{folder} pools several trainings; choose one of them: {names}")
    return record


def is_pooled(folder: Path) -> bool:
    """Whether a results folder is that of several pooled trainings.

    Raises:
        UserError: its ``config.json`` is damaged.
    """
    path = Path(folder) / "config.json"
    return path.is_file() and "pooled" in read_json(path)


def load_pooled(folder: Path) -> PooledRun:
    """Read what several pooled trainings left together.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    folder = Path(folder)
    return PooledRun(folder, read_sealed(folder / "metrics.json"), read_json(folder / "config.json"))


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; every column but "id" as floats, an empty cell as NaN.

    Args:
        path: the file; its first line names the columns.

    Raises:
        UserError: the file is missing or holds a word where a number belongs.
    """
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            return [
                {key: value if key == "id" else float(value or "nan") for key, value in row.items()}
                for row in csv.DictReader(stream)
            ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run main.py again") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a table of this program ({error}); run main.py again") from error


def settings(run: SavedRun | PooledRun) -> list[Setting]:
    """Every recorded setting that decides the numbers of a run, in the order of the configuration.

    The number of synthetic images is left out: it says nothing about a run on other images. So are the settings of the
    network that the run did not use; where dropout was inserted into another one is added.
    """
    used = run.record.get("configuration", {})
    idle = UNET_FIELDS if used.get("model") else NETWORK_FIELDS
    found = [
        Setting(name, used[name], getattr(Config, name)) for name in IDENTITY_FIELDS
        if name in used and name != "synthetic_images" and name not in idle
    ]
    sites = run.record.get("decides", {}).get("inserted_dropout")
    return found + ([Setting("dropout_inserted_after", ", ".join(sites), None)] if sites else [])
