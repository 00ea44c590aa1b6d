"""Where a run's images come from: a named folder, the download, or the built-in synthetic lesions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from isic.layout import is_synthetic, isic_folders
from runtime.config import Config
from runtime.progress import progress_bar, say

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
        return Source(images.resolve().name.lower(), images, masks, is_synthetic(images.resolve().parent))
    root = Path(config.data or DATA / "ISIC2018")
    return Source(root.resolve().name.lower(), *isic_folders(root), is_synthetic(root))
