"""Which image belongs to which mask, in the official layout and in folders with names of any kind."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from isic.layout import (
    ISIC_IMAGES,
    ISIC_MASKS,
    SYNTHETIC_MARKER,
    SkippedPair,
    find_pairs,
    is_synthetic,
    isic_folders,
    limit_pairs,
    skip,
)
from runtime.errors import UserError


def _grey(path: Path, value: int = 255, size=(20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def test_official_layout(tiny):
    pairs = find_pairs(*isic_folders(tiny))
    assert len(pairs) == 24
    assert pairs[0].id == "ISIC_0000000"
    assert pairs[0].mask.name == "ISIC_0000000_segmentation.png"


@pytest.mark.parametrize("ending", ["", "_segmentation", "_lesion", "_mask"])
def test_masks_pair_by_stem_with_any_ending(tmp_path, ending):
    _grey(tmp_path / "images" / "a b é.bmp")
    _grey(tmp_path / "masks" / f"a b é{ending}.png")
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert pair.id == "a b é"
    assert pair.mask == tmp_path / "masks" / f"a b é{ending}.png"


def test_images_and_masks_in_one_folder(tmp_path):
    _grey(tmp_path / "x.png")
    _grey(tmp_path / "x_lesion.png")
    (pair,) = find_pairs(tmp_path, tmp_path)
    assert (pair.image.name, pair.mask.name) == ("x.png", "x_lesion.png")


def test_errors_of_the_folders_name_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        isic_folders(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"has no folder {ISIC_IMAGES}"):
        isic_folders(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="no image files"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    _grey(tmp_path / "images" / "lonely.png")
    with pytest.raises(UserError, match="lonely.png has no mask"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    _grey(tmp_path / "masks" / "lonely.png")
    _grey(tmp_path / "masks" / "lonely_mask.png")
    with pytest.raises(UserError, match="several masks"):
        find_pairs(tmp_path / "images", tmp_path / "masks")
    _grey(tmp_path / "images" / "lonely.jpg")
    with pytest.raises(UserError, match="same stem"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


def test_limit_is_evenly_spaced_and_keeps_the_order():
    assert limit_pairs(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert limit_pairs(list(range(3)), 5) == [0, 1, 2]
    assert limit_pairs(list(range(3)), None) == [0, 1, 2]


def test_the_limit_keeps_no_two_of_one_place():
    for count in range(8, 40):
        kept = limit_pairs(list(range(count)), 8)
        assert len(set(kept)) == 8 and kept == sorted(kept) and kept[0] == 0


def test_superpixels_hidden_files_and_other_files_are_no_images(tmp_path):
    for name in ("a.JPG", "a_superpixels.png", ".hidden.png", "LICENSE.txt", "b.pdf"):
        _grey(tmp_path / "images" / "x.png").rename(tmp_path / "images" / name)
    _grey(tmp_path / "masks" / "a.png")
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert (pair.id, pair.image.name) == ("a", "a.JPG")


def test_an_id_is_composed_however_the_file_name_spells_it(tmp_path):
    for form, folder in (("NFD", "images"), ("NFC", "masks")):
        _grey(tmp_path / folder / f"{unicodedata.normalize(form, 'lésion')}.png")
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert pair.id == unicodedata.normalize("NFC", "lésion")


def test_pairs_that_cannot_be_used_go_on_the_list_or_stop(tmp_path):
    for name in ("a", "b", "c"):
        _grey(tmp_path / "images" / f"{name}.png")
    for name in ("a", "c", "c_mask"):
        _grey(tmp_path / "masks" / f"{name}.png")
    skipped: list[SkippedPair] = []
    assert [pair.id for pair in find_pairs(tmp_path / "images", tmp_path / "masks", skipped)] == ["a"]
    assert [(entry.id, Path(entry.file).name) for entry in skipped] == [("b", "b.png"), ("c", "c.png")]
    assert "has no mask" in skipped[0].reason and "has several masks" in skipped[1].reason

    error = UserError("broken", tmp_path / "m.png")
    with pytest.raises(UserError) as caught:
        skip("a", tmp_path / "a.png", error, None)
    assert str(caught.value) == "broken, or give --skip-bad to leave out every broken pair"
    assert caught.value.file == error.file
    for failure, file in ((error, "m.png"), (UserError("broken"), "a.png")):  # without a file to blame it is the image
        skip("a", tmp_path / "a.png", failure, skipped)
        assert skipped[-1] == SkippedPair("a", str(tmp_path / file), "broken")


def test_a_folder_of_made_up_images_says_so(tmp_path):
    (tmp_path / ISIC_IMAGES).mkdir()
    (tmp_path / ISIC_MASKS).mkdir()
    assert not is_synthetic(tmp_path)
    (tmp_path / SYNTHETIC_MARKER).write_text("")
    assert is_synthetic(tmp_path)
    assert isic_folders(tmp_path) == (tmp_path / ISIC_IMAGES, tmp_path / ISIC_MASKS)
