"""Files of maps as something that knows nothing of this project would write them, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from constructed_maps import make_images


def arrays_of(size: int = 24, seed: int = 0, height: int | None = None) -> dict[str, Any]:
    """The arrays of one file: a disc, a prediction that errs at its border, an entropy, a variance."""
    rng = np.random.default_rng(seed)
    tall = height or size
    y, x = np.mgrid[:tall, :size]
    distance = size * 0.3 - np.hypot(y - tall / 2, x - size / 2)
    probability = 1 / (1 + np.exp(-distance - rng.normal(0, 2, distance.shape)))
    return {
        "mean_prediction": probability, "true_mask": distance > 0, "entropy": 4 * probability * (1 - probability),
        "variance": rng.random(distance.shape) ** 4,
    }


def write_given(root: Path, counts: tuple[int, int] = (4, 6), size: int = 24, **extra: Any) -> tuple[Path, Path]:
    """Two folders of ``.npz``, "val" and "test", whose images have several sizes; returns them.

    Args:
        root: where to.
        counts: how many images in each.
        size: of the first image.
        extra: more arrays of every file.
    """
    folders = root / "val", root / "test"
    for place, (folder, count) in enumerate(zip(folders, counts)):
        folder.mkdir(parents=True)
        for index in range(count):
            arrays = arrays_of(size + index % 2 * 5, 10 * place + index, size + index % 3 * 4)
            np.savez_compressed(folder / f"{folder.name}_{index}.npz", **arrays, **extra)
    return folders


def write_saved_like(root: Path, count: int, part: str, seed: int, kind: type[np.floating[Any]] = np.float32) -> Path:
    """A folder of maps of :func:`constructed_maps.make_images`, floats of a type, under the names of saved maps."""
    folder = root / part
    folder.mkdir(parents=True)
    for id, maps in make_images(count, seed=seed, prefix=part):
        floats = {name: values.numpy().astype(kind) for name, values in maps.items() if name != "true_mask"}
        np.savez(folder / f"{id}.npz", **floats, true_mask=maps["true_mask"].numpy())
    return folder
