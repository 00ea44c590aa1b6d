"""The counts of a finished run: what ``calibration.npz`` may hold, checked before any memory is taken for it."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from evaluation.added import SHAPE as ERROR_SHAPE
from evaluation.counting import Counters
from evaluation.joint import CELLS, VARIANTS
from evaluation.names import OUTCOMES
from evaluation.ranking import HISTOGRAM_BINS
from runtime.errors import UserError, one_line
from runtime.npz import Header, read_npz

#: A side of an array: its length, or a letter for one that the file itself tells: S scores, L lambdas, B bins, Q quantile bins.
Side = Union[int, str]
A = len(OUTCOMES)
#: The counts of each image, of which the first axis is that of the images: type and the other sides.
IMAGE_ARRAYS: dict[str, tuple[str, tuple[Side, ...]]] = {
    "lambda_count": ("i", ("L", 2, "B")), "lambda_confidence": ("f", ("L", 2, "B")),
    "count": ("i", ("S", A, "B")), "confidence": ("f", ("S", A, "B")),
    "squared_error": ("f", ("S", A)), "log_loss": ("f", ("S", A)), "clipped": ("i", (2,)), "largest": ("f", (2,)),
    "cells": ("i", ("S", A, "Q")), "joint": ("i", (len(VARIANTS), 4, CELLS, CELLS)), "cell_sums": ("f", (2, CELLS)),
    "error_cells": ("i", (2, *ERROR_SHAPE)), "quantile95": ("f", ("S",)), "largest_patch": ("f", ("S",)),
    "empty_cams": ("i", ()), "pass_dice": ("f", ()),
}
#: More of anything than this has no run.
MOST = {"S": 64, "L": 1001, "B": 10_000, "Q": 1 << 16}


def read_counts(path: Path, identity: str, ids: Mapping[str, Sequence[str]]) -> dict[str, Counters]:
    """The counts that :func:`experiment.results.write_counts` saved, by part: "validation", "test", "target:<name>".

    Args:
        path: the file.
        identity: of the run that they must be of.
        ids: of the images of each part that may be there; "validation" and "test" must be.

    Raises:
        UserError: the file is missing, damaged, of another run or of another version.
    """
    try:
        content = read_npz(path, lambda headers: _check_headers(headers, ids), stored=False)
        arrays: dict[str, dict[str, np.ndarray]] = {"validation": {}, "test": {}}
        for name, values in content.items():
            part, slash, array = name.partition("/")
            if slash:
                arrays.setdefault(part, {})[array] = values
        parts = {part: Counters.from_arrays(values) for part, values in arrays.items()}
        for part, counts in parts.items():
            _check_counts(part, counts, ids[part])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}; run main.py again") from error
    except (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} does not hold the counts of a run ({one_line(error)}); run main.py again") from error
    if str(content["identity"]) != identity:
        raise UserError(f"{path} is not of the run that the metrics.json beside it describes; run main.py again")
    return parts


def _check_headers(headers: Mapping[str, Header], ids: Mapping[str, Sequence[str]]) -> None:
    """Refuse arrays of another type or shape than the counts of these images have."""
    parts: dict[str, dict[str, Header]] = {}
    for name, found in headers.items():
        part, slash, array = name.partition("/")
        if slash:
            parts.setdefault(part, {})[array] = found
        elif name != "identity" or found.shape != () or found.dtype.kind != "U":
            raise ValueError(f"{name!r:.40} is {found}")
    if "identity" not in headers or not {"validation", "test"} <= parts.keys() <= ids.keys():
        raise ValueError("it is not of the parts of the run")
    for part, found_in in parts.items():
        _check_part(part, found_in, len(ids[part]))


def _check_part(part: str, headers: Mapping[str, Header], count: int) -> None:
    frame: dict[str, tuple[str, tuple[Side, ...]]] = {
        "ids": ("U", (count,)), "scores": ("U", ("S",)), "lambdas": ("f", ("L",)), "bins": ("i", ()),
    }
    sides: dict[str, int] = {}
    for name, (kind, shape) in frame.items():
        _check(f"{part}/{name}", headers[name], kind, shape, sides)
    edges = headers["edges"]
    if len(edges.shape) != 2 or edges.dtype.kind not in "if" or max(edges.shape) > MOST["Q"]:
        raise ValueError(f"{part}/edges is {edges}")
    sides["Q"] = edges.shape[1] + 1
    for name, found in headers.items():
        if name.startswith("image_") and name[6:] in IMAGE_ARRAYS:
            kind, shape = IMAGE_ARRAYS[name[6:]]
            _check(f"{part}/{name}", found, kind, (count, *shape), sides)
        elif name == "pooled_fine":
            _check(f"{part}/{name}", found, "i", ("S", A, HISTOGRAM_BINS), sides)
        elif name not in (*frame, "edges"):
            raise ValueError(f"{part}/{name!r:.40} does not belong there")


def _check(place: str, found: Header, kind: str, shape: Sequence[Side], sides: dict[str, int]) -> None:
    """Compare the head of an array with what it must be; a letter stands for the first length that is met under it."""
    fits = len(found.shape) == len(shape) and found.dtype.kind == kind
    for side, length in zip(shape, found.shape):
        expected = side if isinstance(side, int) else sides.setdefault(side, length)
        fits = fits and length == expected and (isinstance(side, int) or length <= MOST[side])
    if not fits:
        raise ValueError(f"{place} is {found}")


def _check_counts(part: str, counts: Counters, ids: Sequence[str]) -> None:
    """Refuse counts of other images, and values that no counting gives."""
    if list(counts.ids) != sorted(ids):
        raise ValueError(f"{part} is of other images")
    lengths = {values.shape[-1] for name, values in counts.images.items() if name in ("count", "lambda_count")}
    if not 1 <= counts.bins <= MOST["B"] or not lengths <= {counts.bins}:
        raise ValueError(f"{part} has {counts.bins} bins")
    arrays: dict[str, Any] = {**counts.images, **counts.pooled, "lambdas": np.asarray(counts.lambdas)}
    for name, values in arrays.items():
        if name == "pass_dice":  # NaN where the maps did not say it
            values = values[~np.isnan(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if not math.isfinite(low) or not math.isfinite(high) or low < (-1 if name in ("empty_cams", "pass_dice") else 0):
            raise ValueError(f"{part}/{name} holds values from {low:g} to {high:g}")
