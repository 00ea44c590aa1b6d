"""Which image belongs to which mask: the official layout, and folders with names of any kind."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import UserError

ISIC_IMAGES = "ISIC2018_Task1-2_Training_Input"
ISIC_MASKS = "ISIC2018_Task1_Training_GroundTruth"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SYNTHETIC_MARKER = "SYNTHETIC.txt"  # lies in a folder of made-up images
#: Bytes of an id at most: file systems take 255, and its maps are called ``<id>.npz``.
LONGEST_ID = 251
MASK_ENDINGS = ("_segmentation", "_lesion", "_mask")


class Pair(NamedTuple):
    """An image and its mask; ``id`` is the image file's stem."""

    id: str
    image: Path
    mask: Path


class SkippedPair(NamedTuple):
    """An id whose pair cannot be used: the file to blame, and what is wrong with it."""

    id: str
    file: str
    reason: str


def isic_folders(root: Path) -> tuple[Path, Path]:
    """The image and the mask folder of the official layout under ``root``.

    Raises:
        UserError: ``root`` or one of the two is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"dataset folder {root} does not exist; give --data a folder that holds {ISIC_IMAGES}")
    for name in (ISIC_IMAGES, ISIC_MASKS):
        if not (root / name).is_dir():
            raise UserError(
                f"{root} has no folder {name}; unpack the ISIC 2018 Task 1 archives there "
                "(--download goes on with what it began in data/ISIC2018), or give --images DIR --masks DIR for another layout"
            )
    return root / ISIC_IMAGES, root / ISIC_MASKS


def folders_of_set(root: Path) -> tuple[Path, Path]:
    """The image and the mask folder of a test set: ``images`` and ``masks`` under ``root``, or the official layout.

    Raises:
        UserError: ``root`` is not a folder, or holds neither.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--test-data {root} is no folder; give one that holds images/ and masks/, or the ISIC 2018 layout")
    for images, masks in (("images", "masks"), (ISIC_IMAGES, ISIC_MASKS)):
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    raise UserError(
        f"--test-data {root} holds neither images/ and masks/ nor {ISIC_IMAGES} and {ISIC_MASKS}; "
        "for other names give --test-images DIR --test-masks DIR"
    )


def is_synthetic(root: Path) -> bool:
    """Whether the images below a folder were drawn by this program and not photographed."""
    return (Path(root) / SYNTHETIC_MARKER).is_file()


def find_pairs(images: Path, masks: Path, skipped: list[SkippedPair] | None = None) -> list[Pair]:
    """All image files of one folder with their masks from another, sorted by id.

    A mask belongs to an image when its stem equals the image's, with or
    without one of ``MASK_ENDINGS``. The two may be the same folder: files
    with such an ending are then masks. An id is the stem in Unicode's composed
    form: two systems may spell the same accent differently.

    Args:
        images, masks: the folders.
        skipped: if given, ids without exactly one image and one mask of their own
            are appended here and left out; otherwise the first of them is an error.

    Raises:
        UserError: a folder is missing, holds no image, an image has no mask,
            two files claim the same id, or two images the same mask.
    """
    images, masks = Path(images), Path(masks)
    # not Path.resolve, which fails on a link to itself
    same = os.path.realpath(images) == os.path.realpath(masks)
    found = _by_stem(images, skip_masks=same)
    candidates = _by_stem(masks)
    if not found:
        raise UserError(f"no image files ({', '.join(IMAGE_SUFFIXES)}) in {images}; check the folder")
    pairs: list[Pair] = []
    owners: dict[Path, str] = {}
    for stem, files in sorted(found.items()):
        try:
            mask = _mask_of(stem, files, candidates, masks, MASK_ENDINGS if same else ("", *MASK_ENDINGS))
            if mask in owners:
                raise UserError(f"{mask} is the mask of both {owners[mask]} and {stem}; rename one of the images", mask)
        except UserError as error:
            skip(stem, files[0], error, skipped)
        else:
            owners[mask] = stem
            pairs.append(Pair(stem, files[0], mask))
    return pairs


def skip(id: str, image: Path, error: UserError, skipped: list[SkippedPair] | None) -> None:
    """Put a pair that cannot be used on the list; without a list, raise what is wrong with it."""
    if skipped is None:
        raise UserError(f"{error}, or give --skip-bad to leave out every broken pair", error.file) from error
    skipped.append(SkippedPair(id, str(error.file or image), str(error)))


def _mask_of(stem: str, files: list[Path], candidates: dict[str, list[Path]], masks: Path, endings: Sequence[str]) -> Path:
    image = files[0]
    if not stem.isprintable() or "\\" in stem:
        # such a name can neither be printed nor be the name of a map everywhere
        raise UserError(f"{image} has a line break, a backslash or bytes that are no text in its name; rename it", image)
    if len(os.fsencode(stem)) > LONGEST_ID:
        raise UserError(f"the name of {image} is too long for a file of its maps; rename it to {LONGEST_ID} bytes at most", image)
    if len(files) > 1:
        raise UserError(f"{image} and {files[1].name} have the same stem; keep one", image)
    names = [stem + ending for ending in endings if stem + ending in candidates]
    if not names:
        raise UserError(
            f"image {image} has no mask: expected {stem} with or without "
            f"{', '.join(MASK_ENDINGS)} in {masks}; add it or remove the image", image
        )
    if len(names) > 1:
        raise UserError(f"image {image} has several masks in {masks}: {', '.join(names)}; keep one", image)
    found = candidates[names[0]]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} have the same stem; keep one", found[0])
    return found[0]


def _by_stem(folder: Path, skip_masks: bool = False) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; check --images and --masks")
    found: dict[str, list[Path]] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}; check its permissions") from error
    for path in entries:
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if skip_masks and path.stem.endswith(MASK_ENDINGS):
            continue
        # the official image folder also holds superpixel maps in some copies
        if path.stem.endswith("_superpixels"):
            continue
        found.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    return found


def limit_pairs(pairs: Sequence[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` pairs (or ids), evenly spaced over the sorted ids; None keeps all."""
    if limit is None or limit >= len(pairs):
        return list(pairs)
    return [pairs[i * len(pairs) // limit] for i in range(limit)]
