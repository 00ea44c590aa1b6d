"""The tables of a results folder: read, checked, and known again by a checksum in ``metrics.json``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.saved_schemas import WALL_CLOCK_COLUMNS
from runtime.errors import UserError, one_line
from runtime.files import file_checksum
from runtime.reading import check_regular
from runtime.records import fingerprint

LOG = "training_log.csv"


def read_table(path: Path, need: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a CSV file; every column but "id" as floats, an empty cell as NaN.

    Args:
        path: the file; its first line names the columns.
        need: columns that it must have, where it has any row.

    Raises:
        UserError: the file is missing, lacks a column, or holds a word where a number belongs or an id twice.
    """
    try:
        rows = [{key: text if key == "id" else _number(text) for key, text in row.items()} for row in _cells(path)]
        lacking = [name for name in need if rows and name not in rows[0]]
        if lacking:
            raise ValueError(f"it lacks the column {lacking[0]}")
        ids = [row["id"] for row in rows if "id" in row]
        if len(set(ids)) < len(ids):
            raise ValueError("it holds an id twice")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run main.py again") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a table of this program ({one_line(error)}); run main.py again") from error
    return rows


def _number(text: str) -> float:
    value = float(text or "nan")
    if math.isinf(value):
        raise ValueError(f"{text!r:.40} is no number")
    return value


def _cells(path: Path) -> list[dict[str, str]]:
    """The rows as texts, all with the same columns."""
    check_regular(path)
    # read whole, so that a checksum and the numbers are of the same bytes; a field is at most 131,072 characters long
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise ValueError("it holds a column twice")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells for {len(header)} columns")
    return [dict(zip(header, row)) for row in rows[1:]]


# ---------------------------------------------------------------- checksums


def mark(path: Path) -> str:
    """The checksum by which ``metrics.json`` knows a file again; of a training log, without the columns of wall-clock time.

    Raises:
        UserError: it cannot be read.
    """
    try:
        check_regular(path)
        if path.name != LOG:
            return file_checksum(path)
        rows = [{key: text for key, text in row.items() if key not in WALL_CLOCK_COLUMNS} for row in _cells(path)]
        return fingerprint(rows)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run main.py again") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a table of this program ({one_line(error)}); run main.py again") from error


def with_marks(metrics: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Metrics with the checksums of the files beside them, under "files"."""
    names = ["per_image.csv", "calibration.npz", LOG, *(f"per_image_{name}.csv" for name in metrics.get("targets", ()))]
    return {**metrics, "files": {name: mark(folder / name) for name in names if (folder / name).is_file()}}


def check_mark(path: Path, metrics: Mapping[str, Any]) -> None:
    """Refuse a file that is not the one that the metrics beside it were written with; those of earlier versions do not say.

    Raises:
        UserError: it is missing, or was changed.
    """
    if "files" in metrics and mark(path) != metrics["files"].get(path.name):
        raise UserError(f"{path} was changed after the run wrote it; run main.py again")
