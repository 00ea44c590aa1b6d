"""Where a run's images come from: a named folder, the download, or the built-in synthetic lesions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from isic.layout import folders_of_set, is_synthetic, isic_folders
from runtime.config import Config
from runtime.errors import UserError
from runtime.progress import progress_bar, say
from runtime.reading import real_path

DATA = Path("data")
SYNTHETIC_BANNER = """\
************************************************************************
*  SYNTHETIC LESIONS. No dataset was named, and data/ISIC2018 is not   *
*  here, so this run draws its own images and trains a small network.  *
*  Its numbers show that the pipeline works; they say nothing about    *
*  patients. README.md: how to get ISIC.                               *
************************************************************************"""


class Source(NamedTuple):
    """Where the images come from.

    Attributes:
        name: names the results folder.
        images, masks: the two folders.
        synthetic: whether the images are made up.
    """

    name: str
    images: Path
    masks: Path
    synthetic: bool


def needs_synthetic(config: Config) -> bool:
    """Whether no dataset is named and none is there."""
    named = config.download or config.images is not None or config.data is not None
    return not named and not (DATA / "ISIC2018").exists()


def find_source(config: Config) -> Source:
    """Find the images, or draw them where none are named and none are there.

    Raises:
        UserError: the named folder is missing, or the download fails.
    """
    if needs_synthetic(config):
        say(SYNTHETIC_BANNER)
        from isic.synthetic import write_synthetic_dataset  # loads SciPy

        root = DATA / f"synthetic-{config.synthetic_images}"
        with progress_bar("drawing synthetic lesions", config.synthetic_images, "image") as bar:
            write_synthetic_dataset(root, config.synthetic_images, progress=bar.update)
        return Source("synthetic", *isic_folders(root), True)
    if config.download:
        from isic.download import download_isic  # loads torchvision

        download_isic(DATA / "ISIC2018")
    if config.images is not None:
        images, masks = Path(config.images), Path(config.masks or "")
        check_names(images, masks)
        return Source(real_path(images).name.lower(), images, masks, is_synthetic(real_path(images).parent))
    root = Path(config.data or DATA / "ISIC2018")
    check_names(root)
    return Source(real_path(root).name.lower(), *isic_folders(root), is_synthetic(root))


def check_names(*folders: Path) -> None:
    """Refuse folders whose full path is no text; ``config.json`` names them.

    Raises:
        UserError: names the folder, with the bytes escaped.
    """
    for folder in folders:
        try:
            str(real_path(folder)).encode()
        except UnicodeEncodeError:
            raise UserError(f"the full path of {folder}, {real_path(folder)}, holds bytes that are no text; rename it") from None


# ---------------------------------------------------------------- other test sets


class TargetFolders(NamedTuple):
    """Another test set.

    Attributes:
        name: of its folder, made safe for file names; no two sets have the same.
        images, masks: the two folders.
    """

    name: str
    images: Path
    masks: Path


def find_targets(config: Config) -> list[TargetFolders]:
    """The other test sets that are named, those of ``--test-data`` first.

    Raises:
        UserError: a folder is missing or holds no test set, or one set is named twice.
    """
    found = [(Path(root), *folders_of_set(Path(root))) for root in config.test_data or ()]
    for images, masks in zip(map(Path, config.test_images or ()), map(Path, config.test_masks or ())):
        for flag, folder in (("--test-images", images), ("--test-masks", masks)):
            if not folder.is_dir():
                raise UserError(f"{flag} {folder} is no folder; give the folder of a test set's {flag[7:]}")
        root = real_path(images)
        found.append((root.parent if root.name.lower() in ("images", "img", "imgs") else root, images, masks))
    places = [(real_path(images), real_path(masks)) for _, images, masks in found]
    for place, folders in enumerate(places):
        if folders in places[:place]:
            raise UserError(f"the test set {found[place][1]} is named twice; name each once")
    check_names(*(folder for place in places for folder in place))
    names = distinct_names(real_path(root).name for root, _, _ in found)
    return [TargetFolders(name, images, masks) for name, (_, images, masks) in zip(names, found)]


def distinct_names(names: Iterable[str]) -> list[str]:
    """The names in letters, digits, ``_`` and ``-`` alone, told apart by numbers even where case does not count.

    Example:
        >>> distinct_names(["HAM10000", "my set!", "ham10000", "..."])
        ['HAM10000', 'my-set', 'ham10000-2', 'set']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-") or "set"
        taken, number, unique = {one.lower() for one in found}, 2, plain
        while unique.lower() in taken:
            unique, number = f"{plain}-{number}", number + 1
        found.append(unique)
    return found
