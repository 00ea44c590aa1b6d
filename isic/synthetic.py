"""A data set of synthetic lesions in the layout of ISIC 2018 Task 1, written once and kept."""

from __future__ import annotations

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Callable

from PIL import Image

from isic.layout import ISIC_IMAGES, ISIC_MASKS, is_synthetic
from isic.layout import SYNTHETIC_MARKER as MARKER
from isic.lesions import Lesion, render_lesion
from runtime.errors import UserError
from runtime.files import atomic_write, remove, remove_partials
from runtime.signals import block_sigint_in_children, end_with_parent

__all__ = ["MARKER", "VERSION", "Lesion", "is_synthetic", "render_lesion", "write_synthetic_dataset"]

VERSION = 2  # of the pictures: whoever changes what is drawn raises it, and folders of older pictures are drawn again
FIRST_NUMBER = 9_000_000  # far above every published ISIC number


def pair_paths(index: int, root: Path) -> tuple[Path, Path]:
    """Where picture and mask ``index`` lie below ``root``."""
    name = f"ISIC_{FIRST_NUMBER + index:07d}"
    return root / ISIC_IMAGES / f"{name}.jpg", root / ISIC_MASKS / f"{name}_segmentation.png"


def write_pair(index: int, root: Path, seed: int) -> None:
    """Write picture and mask ``index`` below ``root``; files already there are left alone."""
    image_path, mask_path = pair_paths(index, root)
    if image_path.exists() and mask_path.exists():
        return
    lesion = render_lesion(index, seed)
    for path, pixels, kind in ((mask_path, lesion.mask, "PNG"), (image_path, lesion.image, "JPEG")):
        if not path.exists():
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, kind, quality=92)
            with atomic_write(path) as stream:
                stream.write(encoded.getvalue())


def prepare(root: Path, seed: int) -> None:
    """Mark the folder as synthetic; pictures of another version or seed that lie there are deleted first."""
    folders = (root / ISIC_IMAGES, root / ISIC_MASKS)
    remove_partials(root, *folders)
    marker = root / MARKER
    text = f"Made-up skin lesions, drawn by a program and not photographed. Version {VERSION}, seed {seed}.\n".encode()
    if marker.is_file() and marker.read_bytes() == text:
        return
    remove(*(old for folder in folders for old in folder.glob(f"ISIC_{FIRST_NUMBER // 10**6}??????*")))
    with atomic_write(marker) as stream:
        stream.write(text)


def write_synthetic_dataset(
    root: str | Path, count: int, seed: int = 42, processes: int = 2, progress: Callable[[], object] | None = None
) -> None:
    """Write ``count`` synthetic pairs in the layout of ISIC 2018 Task 1.

    Pair i depends on ``seed`` and i alone: a smaller set is a prefix of a larger one, and the number of processes
    changes no byte. Files that are there are left alone, so that an interrupted call can be repeated; those of another
    seed or version are drawn again. The file ``SYNTHETIC.txt`` tells whoever finds the folder what it is.

    Args:
        root: folder, made if missing.
        count: number of pairs, at least 1.
        seed: names the set, at least 0.
        processes: 1 draws in this process; more are started by spawn, which needs ``if __name__ == "__main__"``.
        progress: called without arguments once for each pair that is in place.

    Raises:
        ValueError: ``count`` or ``processes`` is below 1, or ``seed`` below 0.
        UserError: a file cannot be written.
    """
    if count < 1 or processes < 1 or seed < 0:
        raise ValueError(f"count and processes must be at least 1 and seed at least 0, not {count}, {processes} and {seed}")
    root = Path(root)
    prepare(root, seed)
    drawn = all(path.exists() for index in range(count) for path in pair_paths(index, root))
    write, notify = partial(write_pair, root=root, seed=seed), progress or (lambda: None)
    if processes == 1 or drawn:  # no process is worth starting to look at what is there
        for _ in map(write, range(count)):
            notify()
        return
    with ProcessPoolExecutor(min(processes, count), multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            with block_sigint_in_children():
                finished = pool.map(write, range(count), chunksize=4)
            for _ in finished:
                notify()
        except BrokenProcessPool as error:
            raise UserError(f"a process that draws into {root} died; run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a stop or a full disk the rest is not worth waiting for
