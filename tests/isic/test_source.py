"""Where the images come from: a named folder, the download, or the synthetic lesions."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_pairs

import isic.download
import isic.synthetic
from isic.layout import ISIC_IMAGES, ISIC_MASKS, SYNTHETIC_MARKER
from isic.source import DATA, Source, find_source, needs_synthetic
from runtime.config import Config
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_synthetic_lesions_stand_in_only_where_nothing_is_named_and_nothing_there(here):
    assert needs_synthetic(Config())
    assert not needs_synthetic(Config(data="x"))
    assert not needs_synthetic(Config(images="x", masks="y"))
    assert not needs_synthetic(Config(download=True))
    (here / DATA / "ISIC2018").mkdir(parents=True)
    assert not needs_synthetic(Config())
    with pytest.raises(UserError, match=f"has no folder {ISIC_IMAGES}"):  # there, but not filled
        find_source(Config())


def test_synthetic_lesions_are_drawn_and_announced(here, monkeypatch, capsys):
    def draw(root, count, progress):
        write_pairs(root, count)
        for _ in range(count):
            progress()

    monkeypatch.setattr(isic.synthetic, "write_synthetic_dataset", draw)
    source = find_source(Config(synthetic_images=9))
    root = DATA / "synthetic-9"
    assert source == Source("synthetic", root / ISIC_IMAGES, root / ISIC_MASKS, True)
    assert len(list(source.images.iterdir())) == 9
    assert "SYNTHETIC LESIONS" in capsys.readouterr().out


def test_named_folders_name_the_run(here):
    root = write_pairs(here / "My Data", 1)
    assert find_source(Config(data="My Data")) == Source("my data", *(_under("My Data")), False)
    named = Config(images=str(root / ISIC_IMAGES), masks=str(root / ISIC_MASKS))
    assert find_source(named) == Source(ISIC_IMAGES.lower(), root / ISIC_IMAGES, root / ISIC_MASKS, False)
    (root / SYNTHETIC_MARKER).write_text("")  # whoever names the folder does not make the lesions real
    assert find_source(named).synthetic and find_source(Config(data="My Data")).synthetic
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_source(Config(data="nowhere"))


def test_the_download_comes_first(here, monkeypatch):
    monkeypatch.setattr(isic.download, "download_isic", lambda root: write_pairs(root, 2))
    assert find_source(Config(download=True)) == Source("isic2018", *_under("data/ISIC2018"), False)
    assert find_source(Config()).name == "isic2018"


def _under(root: str) -> tuple[Path, Path]:
    return Path(root) / ISIC_IMAGES, Path(root) / ISIC_MASKS
