"""One ``.npz`` of maps that something else wrote: what it must hold, and everything that can be wrong with it.

=====================  =========================================================  =============
array                  type and shape                                             values
=====================  =========================================================  =============
``mean_prediction``    float (H, W)                                               0 to 1
``true_mask``          bool or integer (H, W)                                     0 or 1
first and second       float (H, W), under names of the user's choosing           0 or more
``expected_entropy``   float (H, W), in all files or in none                      0 to ln 2
``image``              uint8 (H, W, 3), not needed                                0 to 255
``group``              one text or number, not needed
=====================  =========================================================  =============

Floats may have 16, 32 or 64 bits; what is computed with, and checked, is their value in float32.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.names import PREDICTIVE, SALIENCY
from experiment.map_files import IMAGE
from runtime.errors import UserError, one_line
from runtime.npz import SUFFIX, Header, read_header
from runtime.reading import check_regular

#: Arrays that no score may be called after.
TAKEN_NAMES = ("mean_prediction", "true_mask", IMAGE, "group")
#: More pixels than this are no image.
LARGEST = 1 << 26
#: Bytes of a group's name at most.
LONGEST = 4096
#: What float32 makes of ln 2 may be a little more.
LN2 = math.log(2) * (1 + 1e-6)


class Facts(NamedTuple):
    """What a command knows of a file without its maps.

    Attributes:
        truth: fingerprint of the mask.
        content: fingerprint of everything that numbers and pictures are made from, but for the mask.
        ranges: smallest and largest value of both scores.
        foreground: whether a pixel of the mask is 1.
        entropy, image: whether the file holds ``expected_entropy``, and ``image``.
        group: what stands in ``group``.
    """

    truth: str
    content: str
    ranges: tuple[tuple[float, float], tuple[float, float]]
    foreground: bool
    entropy: bool
    image: bool
    group: str | None


def facts_of(path: Path, scores: Sequence[str]) -> Facts:
    """Read and check a file; arguments and errors as of :func:`read_given`."""
    maps = read_given(path, scores)
    truth = hashlib.sha256(_bytes("true_mask", maps["true_mask"]))
    content = hashlib.sha256()
    for name in sorted(maps):
        if name not in ("true_mask", "group"):
            content.update(_bytes(name, maps[name]))
    first, second = ((float(maps[name].min()), float(maps[name].max())) for name in (PREDICTIVE, SALIENCY))
    return Facts(
        truth.hexdigest(), content.hexdigest(), (first, second), bool(maps["true_mask"].any()), "expected_entropy" in maps,
        IMAGE in maps, maps.get("group"),
    )


def _bytes(name: str, values: np.ndarray) -> bytes:
    return f"{name} {values.shape} ".encode() + np.ascontiguousarray(values).tobytes()


def read_given(path: Path, scores: Sequence[str]) -> dict[str, Any]:
    """Read and check the maps of one image.

    Args:
        path: ``<id>.npz``.
        scores: names of the arrays that hold the first and the second score.

    Returns:
        Arrays as a map file of this program holds them: float32, the first score as ``pred_variance``, the second as
        ``saliency_variance``, ``true_mask`` uint8; and what of ``expected_entropy``, ``image`` and ``group`` (a text) is there.

    Raises:
        UserError: one line with the file, the array, what is wrong with it and what to do.
    """
    first, second = scores
    members = _members(path)
    maps: dict[str, Any] = {"mean_prediction": _floats(path, members, "mean_prediction")}
    shape = maps["mean_prediction"].shape
    _check_range(path, "mean_prediction", maps["mean_prediction"], 1.0, "a probability, from 0 to 1")
    maps["true_mask"] = _mask(path, members, shape)
    for name, array in ((PREDICTIVE, first), (SALIENCY, second)):
        maps[name] = _floats(path, members, array, shape)
        _check_range(path, array, maps[name], math.inf, "0 or more")
    if "expected_entropy" in members:
        maps["expected_entropy"] = _floats(path, members, "expected_entropy", shape)
        _check_range(path, "expected_entropy", maps["expected_entropy"], LN2, "in nats, from 0 to ln 2")
    if IMAGE in members:
        maps[IMAGE] = _picture(path, members, shape)
    if "group" in members:
        maps["group"] = _group(path, members)
    return maps


# ---------------------------------------------------------------- arrays


def _floats(path: Path, members: Mapping[str, Header], name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A finite map of floats as float32, of a shape where that is known."""
    header = _header(path, members, name)
    if header.dtype.kind != "f" or header.dtype.itemsize not in (2, 4, 8):
        raise UserError(f"{path}: {name} is of type {header.dtype}; it must be float16, float32 or float64")
    _check_shape(path, name, header, shape)
    values = _load(path, name)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name} holds NaN or infinite values; write a number for every pixel")
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    if not np.isfinite(single).all() or (np.any(values) and not np.any(single)):
        raise UserError(f"{path}: {name} holds values that float32 cannot; multiply the score by a constant, in every file")
    return single + np.float32(0)  # a negative zero becomes zero


def _check_range(path: Path, name: str, values: np.ndarray, high: float, must_be: str) -> None:
    smallest, largest = float(values.min()), float(values.max())
    if smallest < 0 or largest > high:
        raise UserError(f"{path}: {name} must be {must_be}; found values from {smallest:.6g} to {largest:.6g}")


def _check_shape(path: Path, name: str, header: Header, shape: tuple[int, ...] | None) -> None:
    if len(header.shape) != 2 or 0 in header.shape:
        raise UserError(f"{path}: {name} has shape {header.shape}; it must be (H, W), height and width of the image")
    if header.shape[0] * header.shape[1] > LARGEST:
        raise UserError(f"{path}: {name} has shape {header.shape}, more than {LARGEST:,} pixels; make the maps smaller")
    if shape is not None and header.shape != shape:
        raise UserError(f"{path}: {name} has shape {header.shape}, mean_prediction {shape}; all maps of an image have one shape")


def _mask(path: Path, members: Mapping[str, Header], shape: tuple[int, ...]) -> np.ndarray:
    """The true mask as uint8."""
    header = _header(path, members, "true_mask")
    if header.dtype.kind not in "biu":
        raise UserError(f"{path}: true_mask is of type {header.dtype}; it must be bool or an integer type")
    _check_shape(path, "true_mask", header, shape)
    values = _load(path, "true_mask")
    if not ((values == 0) | (values == 1)).all():
        found = ", ".join(map(str, np.unique(values)[:5]))
        raise UserError(f"{path}: true_mask must hold 0 and 1; found {found}; write mask > 0, say")
    return np.asarray(values, np.uint8)


def _picture(path: Path, members: Mapping[str, Header], shape: tuple[int, ...]) -> np.ndarray:
    """The picture, uint8 (H, W, 3)."""
    header = _header(path, members, IMAGE)
    if header.dtype != np.uint8 or header.shape != (*shape, 3):
        raise UserError(f"{path}: {IMAGE} is {header.dtype} {header.shape}; it must be uint8 {(*shape, 3)}, or be left out")
    return np.asarray(_load(path, IMAGE))


def _group(path: Path, members: Mapping[str, Header]) -> str:
    """The group as a text; a whole number is the same group whatever its type."""
    header = _header(path, members, "group")
    if header.dtype.kind not in "USiuf" or math.prod(header.shape) != 1 or header.dtype.itemsize > LONGEST:
        raise UserError(f"{path}: group is {header.dtype} {header.shape}; it must be one text or one number, or be left out")
    value = _load(path, "group").reshape(()).item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text or text == "nan":
        raise UserError(f"{path}: group is empty; name one, or leave the array out")
    return text


# ---------------------------------------------------------------- the file


def _header(path: Path, members: Mapping[str, Header], name: str) -> Header:
    if name not in members:
        raise UserError(f"{path} holds no array {name}; it holds {', '.join(sorted(members)) or 'none'}")
    header = members[name]
    if header.dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are never loaded; write an array of numbers")
    return header


def _members(path: Path) -> dict[str, Header]:
    """The heads of all arrays, by name; none of them can claim more memory than its member of the zip file has bytes."""
    found = {}
    with _Reading(path):
        check_regular(path)
    with _Reading(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(SUFFIX):
                continue
            with archive.open(entry) as stream:
                header = read_header(stream)
            if not header.dtype.hasobject and math.prod(header.shape) * header.dtype.itemsize > entry.file_size:
                raise ValueError("an array is larger than its file")
            found[entry.filename[: -len(SUFFIX)]] = header
    return found


def _load(path: Path, name: str) -> np.ndarray:
    with _Reading(path), zipfile.ZipFile(path) as archive, archive.open(name + SUFFIX) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


class _Reading:
    """Turns what zipfile and numpy raise on a file that is missing or broken into the one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError)):
            raise UserError(f"{self.path} is not a whole .npz file ({one_line(error)}); write it again") from error
        if isinstance(error, OSError):
            raise UserError(f"cannot read {self.path}: {error.strerror or one_line(error)}") from error
