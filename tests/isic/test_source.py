"""Where the images come from: a named folder, the download, or the synthetic lesions."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_pairs

import isic.download
import isic.synthetic
from isic.layout import ISIC_IMAGES, ISIC_MASKS, SYNTHETIC_MARKER
from isic.source import DATA, Source, distinct_names, find_source, find_targets, needs_synthetic
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


# ---------------------------------------------------------------- other test sets


def test_other_test_sets_are_found_in_either_layout_and_named_by_their_folder(here):
    official = write_pairs(here / "official", 1)
    for folder in ("plain/images", "plain/masks", "loose/pictures", "loose/truth", "clinic/IMAGES", "clinic/m"):
        (here / folder).mkdir(parents=True)
    config = Config(
        test_data=["official", "plain"], test_images=["loose/pictures", "clinic/IMAGES"], test_masks=["loose/truth", "clinic/m"])
    found = find_targets(config)
    assert [target.name for target in found] == ["official", "plain", "pictures", "clinic"]
    assert [(target.images.name, target.masks.name) for target in found] == [
        (ISIC_IMAGES, ISIC_MASKS), ("images", "masks"), ("pictures", "truth"), ("IMAGES", "m")]
    assert found[0].images == Path("official") / ISIC_IMAGES and official.is_dir()
    assert find_targets(Config()) == []


def test_names_are_safe_and_distinct_and_have_no_dot_that_a_path_of_numbers_would_break_at(here):
    assert distinct_names(["a", "A", "a", "a-2"]) == ["a", "A-2", "a-3", "a-2-2"]
    assert distinct_names(["v1.2", "\u00fcber set", "..", "x" * 99]) == ["v1-2", "ber-set", "set", "x" * 60]
    for folder in ("one/set", "two/set"):
        (here / folder / "images").mkdir(parents=True)
        (here / folder / "masks").mkdir()
    assert [target.name for target in find_targets(Config(test_data=["one/set", "two/set"]))] == ["set", "set-2"]


def test_a_test_set_that_is_not_there_is_one_line(here):
    (here / "empty").mkdir()
    (here / "set" / "images").mkdir(parents=True)
    (here / "set" / "masks").mkdir()
    for config, message in (
        (Config(test_data=["nowhere"]), "--test-data nowhere is no folder; give one that holds images/ and masks/"),
        (Config(test_data=["empty"]), f"--test-data empty holds neither images/ and masks/ nor {ISIC_IMAGES}"),
        (Config(test_images=["x"], test_masks=["empty"]), "--test-images x is no folder"),
        (Config(test_images=["empty"], test_masks=["y"]), "--test-masks y is no folder"),
        (Config(test_data=["set"], test_images=["set/images"], test_masks=["set/masks"]), "test set set/images is named twice"),
    ):
        with pytest.raises(UserError) as caught:
            find_targets(config)
        assert message in str(caught.value)
