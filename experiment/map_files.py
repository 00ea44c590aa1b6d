"""The file of one image's maps: what it may hold, written whole, bound to its image and its run, checked when read."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError, one_line
from runtime.npz import Header, read_npz
from runtime.records import write_npz

#: The arrays of a map file and their types; all are (H, W).
MAP_ARRAYS = {
    "mean_prediction": np.float32,
    "pred_variance": np.float32,
    "saliency_variance": np.float32,
    "expected_entropy": np.float32,
    "fused_score": np.float32,
    "true_mask": np.uint8,
}
#: Arrays that a file holds where they were asked for; also (H, W).
EXTRA_ARRAYS = {"flip_variance": np.float32}
#: The picture that maps from elsewhere may bring along: uint8 (H, W, 3).
IMAGE = "image"
#: The largest value of an array, where it has one; the smallest is 0. Rounding may go a little beyond.
LARGEST = {"mean_prediction": 1.0, "expected_entropy": math.log(2) * (1 + 1e-5), "fused_score": 1 + 1e-5, "true_mask": 1}
#: The numbers and texts beside the arrays: kinds of NumPy type, the type they come back as, smallest and largest value.
NUMBERS: dict[str, tuple[str, type, float, float]] = {
    "empty_cams": ("iu", int, -1, 2**31),
    "fallbacks": ("iu", int, 0, 1),
    "pass_dice": ("f", float, 0, 1),
    "identity": ("U", str, 0, 0),
    "fusion": ("U", str, 0, 0),
    "checksum": ("U", str, 0, 0),
}
#: Of "empty_cams": the maps are not those of a network that this program ran.
NO_HEATMAPS = -1
REMEDY = "delete it and run main.py again"


def write_maps(
    path: Path, maps: Mapping[str, np.ndarray], empty_cams: int, identity: str, fallbacks: int = 0, fusion: str | None = None,
    pass_dice: float = math.nan,
) -> None:
    """Save the maps of one image, with a checksum of all of it and of the image's id.

    Args:
        path: ``<id>.npz``.
        maps: arrays (H, W) named as in ``MAP_ARRAYS`` and ``EXTRA_ARRAYS``, and perhaps ``IMAGE``; "fused_score" may come later.
        empty_cams: how many Grad-CAM heatmaps were zero everywhere; ``NO_HEATMAPS`` where there were none.
        identity: fingerprint of what made the maps.
        fallbacks: 1 where the maps overflowed in half precision and were made in fp32, else 0.
        fusion: fingerprint of the fusion that made "fused_score", where that is there.
        pass_dice: mean pairwise Dice of the lesions that the passes predict; NaN, which is not written, where it is unknown.
    """
    arrays: dict[str, np.ndarray] = {
        **maps, "empty_cams": np.array(empty_cams, np.int64), "fallbacks": np.array(fallbacks, np.int64),
        "identity": np.array(identity),
    }
    if fusion is not None:
        arrays["fusion"] = np.array(fusion)
    if not math.isnan(pass_dice):
        arrays["pass_dice"] = np.array(pass_dice, np.float64)
    write_npz(path, {**arrays, "checksum": np.array(maps_checksum(path, arrays))})


def maps_checksum(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the id that a file is called after, and of name, type, shape and bytes of every array but the checksum."""
    digest = hashlib.sha256(f"maps of {unicodedata.normalize('NFC', path.stem)}\n".encode())
    for name in sorted(arrays.keys() - {"checksum"}):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {arrays[name].shape}\n".encode())
        digest.update(values.tobytes() if values.dtype.kind == "U" else values.data.cast("B"))
    return digest.hexdigest()


def read_maps(
    path: Path, need: Iterable[str] = MAP_ARRAYS, identity: str | None = None, sealed: bool = False
) -> dict[str, Any]:
    """Read and check the maps of one image: the arrays, "empty_cams", "fallbacks", "identity", "pass_dice", perhaps "fusion".

    A file of an earlier version has no "pass_dice"; it is NaN then. One without a checksum comes back with a further
    entry, "unsealed".

    Args:
        path: ``<id>.npz``.
        need: the arrays that must be there.
        identity: that the file must have.
        sealed: whether it must carry a checksum; one that is there must always be right.

    Raises:
        UserError: the file is missing or broken, lacks an array of ``need``, was changed since it was written, is that of
            another image or run, or holds NaN or a shape, type or value that does not belong there.
    """
    need = tuple(need)
    try:
        maps: dict[str, Any] = dict(read_npz(path, lambda headers: _check_headers(path, headers, need)))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}; {REMEDY}") from error
    except Exception as error:  # zipfile and numpy raise many kinds on broken bytes
        raise UserError(f"{path} is not a map file of this program ({type(error).__name__}); {REMEDY}") from error
    for name in (*MAP_ARRAYS, *EXTRA_ARRAYS):
        if name in maps:
            _check_values(path, name, maps[name])
    if "checksum" not in maps and sealed:
        raise UserError(f"{path} carries no checksum; {REMEDY}")
    if "checksum" in maps and str(maps["checksum"]) != maps_checksum(path, maps):
        raise UserError(f"{path} was changed after the run wrote it, or is that of another image; {REMEDY}")
    unsealed = maps.pop("checksum", None) is None
    for name, (_, plain, low, high) in NUMBERS.items():
        if name in maps:
            maps[name] = plain(maps[name])
            if plain is not str and not low <= maps[name] <= high:
                raise UserError(f"{path}: {name} is {maps[name]}, outside {low:g} to {high:g}; {REMEDY}")
    maps.setdefault("pass_dice", math.nan)
    if identity is not None and maps["identity"] != identity:
        raise UserError(f"{path} was not made by the run that is in its folder; {REMEDY}")
    return {**maps, "unsealed": True} if unsealed else maps


def _check_headers(path: Path, headers: Mapping[str, Header], need: tuple[str, ...]) -> None:
    """Refuse arrays that lack, do not belong there, or have another type or shape."""
    for name in (*need, "empty_cams", "fallbacks", "identity"):
        if name not in headers:
            raise UserError(f"{path} lacks {name}; {REMEDY}")
    arrays = {**MAP_ARRAYS, **EXTRA_ARRAYS}
    shape = headers["mean_prediction"].shape if "mean_prediction" in headers else ()
    for name, found in headers.items():
        if name in arrays:
            if found.dtype != arrays[name] or len(found.shape) != 2 or found.shape != shape or 0 in shape:
                raise UserError(f"{path}: {name} is {found}, not {np.dtype(arrays[name])} (H, W); {REMEDY}")
        elif name == IMAGE:
            if found.dtype != np.uint8 or found.shape != (*shape, 3):
                raise UserError(f"{path}: {IMAGE} is {found}, not uint8 (H, W, 3); {REMEDY}")
        elif name not in NUMBERS:
            raise UserError(f"{path} holds an array {name!r:.40} that does not belong there; {REMEDY}")
        elif found.shape != () or found.dtype.kind not in NUMBERS[name][0]:
            raise UserError(f"{path}: {name} is {found}; {REMEDY}")


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    """Refuse values outside their range."""
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{path}: {name} holds NaN or infinite values; {REMEDY}")
    if low < 0 or high > LARGEST.get(name, math.inf):
        must_be = f"from 0 to {LARGEST[name]:.6g}" if name in LARGEST else "0 or more"
        raise UserError(f"{path}: {name} must be {must_be}; found values from {low:.6g} to {high:.6g}; {REMEDY}")


def picture_of(maps: Mapping[str, Any]) -> np.ndarray:
    """The picture behind the maps of an image, uint8 (H, W, 3): ``IMAGE`` among them, else the mean prediction in grey."""
    if IMAGE in maps:
        return np.asarray(maps[IMAGE])
    grey = np.rint(255 * maps["mean_prediction"]).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
