"""The file of one image's maps: its schema, written whole, checked when read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.records import check_stored, write_npz

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
#: Of "empty_cams": the maps are not those of a network that this program ran.
NO_HEATMAPS = -1


def write_maps(
    path: Path, maps: Mapping[str, np.ndarray], empty_cams: int, identity: str, fallbacks: int = 0, fusion: str | None = None,
    pass_dice: float = math.nan,
) -> None:
    """Save the maps of one image.

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
    write_npz(path, arrays)


def read_maps(path: Path, need: Iterable[str] = MAP_ARRAYS) -> dict[str, Any]:
    """Read and check the maps of one image: the arrays, "empty_cams", "fallbacks", "identity", "pass_dice", perhaps "fusion".

    A file of an earlier version has no "pass_dice"; it is NaN then.

    Raises:
        UserError: the file is missing or broken, lacks an array of ``need``,
            or holds NaN or a shape, type or value that does not belong there.
    """
    remedy = "delete it and run main.py again"
    try:
        check_stored(path)
        with np.load(path, allow_pickle=False) as content:
            maps = {name: content[name] for name in content.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except Exception as error:  # zipfile and numpy raise many kinds on broken bytes
        raise UserError(f"{path} is not a map file of this program ({type(error).__name__}); {remedy}") from error
    for name in (*need, "empty_cams", "fallbacks", "identity"):
        if name not in maps:
            raise UserError(f"{path} lacks {name}; {remedy}")
    shape = maps["mean_prediction"].shape if "mean_prediction" in maps else ()
    for name, kind in {**MAP_ARRAYS, **EXTRA_ARRAYS}.items():
        if name in maps:
            values = maps[name]
            if values.dtype != kind or values.ndim != 2 or values.shape != shape or values.size == 0:
                raise UserError(f"{path}: {name} is {values.dtype} {values.shape}, not {np.dtype(kind)} (H, W); {remedy}")
            if not np.isfinite(values).all():
                raise UserError(f"{path}: {name} holds NaN or infinite values; {remedy}")
    if IMAGE in maps and (maps[IMAGE].dtype != np.uint8 or maps[IMAGE].shape != (*shape, 3)):
        raise UserError(f"{path}: {IMAGE} is {maps[IMAGE].dtype} {maps[IMAGE].shape}, not uint8 (H, W, 3); {remedy}")
    numbers = (("empty_cams", "iu", int), ("fallbacks", "iu", int), ("identity", "U", str), ("pass_dice", "f", float))
    for name, kinds, plain in numbers:
        if name not in maps:  # only the last can be missing
            continue
        if maps[name].ndim != 0 or maps[name].dtype.kind not in kinds:
            raise UserError(f"{path}: {name} is {maps[name].dtype} {maps[name].shape}; {remedy}")
        maps[name] = plain(maps[name])
    if "pass_dice" not in maps:
        maps["pass_dice"] = math.nan
    elif not 0 <= maps["pass_dice"] <= 1:
        raise UserError(f"{path}: pass_dice is {maps['pass_dice']}, outside 0 to 1; {remedy}")
    if "fusion" in maps:
        maps["fusion"] = str(maps["fusion"])
    return maps


def picture_of(maps: Mapping[str, Any]) -> np.ndarray:
    """The picture behind the maps of an image, uint8 (H, W, 3): ``IMAGE`` among them, else the mean prediction in grey."""
    if IMAGE in maps:
        return np.asarray(maps[IMAGE])
    grey = np.rint(255 * maps["mean_prediction"]).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
