"""The synthetic set: reproducible to the byte, in the official layout, varied, never half written."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from isic.layout import ISIC_IMAGES, ISIC_MASKS
from isic.lesions import ANNOTATIONS, annotate, noise
from isic.synthetic import MARKER, is_synthetic, render_lesion, write_synthetic_dataset
from runtime.errors import UserError


@pytest.fixture(scope="module")
def lesions():
    return [render_lesion(index, seed=42) for index in range(60)]


def contents(root):
    """Every file below `root`, hidden ones too: relative name -> bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def test_render_depends_on_index_and_seed_alone():
    np.random.seed(0)
    first = render_lesion(3, seed=7)
    np.random.seed(1)
    render_lesion(4, seed=7)  # a picture in between changes nothing
    again = render_lesion(3, seed=7)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert np.array_equal(first.outline, again.outline) and first.attributes == again.attributes
    for other in (render_lesion(3, seed=8), render_lesion(4, seed=7)):
        assert other.image.shape != first.image.shape or not np.array_equal(other.image, first.image)


def test_shorter_set_is_a_prefix_and_processes_change_no_byte(tmp_path):
    calls = []
    write_synthetic_dataset(tmp_path / "one", 5, seed=3, processes=1, progress=lambda: calls.append(1))
    write_synthetic_dataset(tmp_path / "two", 7, seed=3, processes=2, progress=lambda: calls.append(2))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert calls == [1] * 5 + [2] * 7
    assert len(one) == 2 * 5 + 1 and len(two) == 2 * 7 + 1
    assert {name: two[name] for name in one} == one
    assert multiprocessing.active_children() == []


def test_layout_and_formats(tmp_path):
    write_synthetic_dataset(tmp_path, 3, seed=5, processes=1)
    names = [f"ISIC_{number}" for number in (9000000, 9000001, 9000002)]
    assert sorted(contents(tmp_path)) == sorted(
        [MARKER] + [str(Path(ISIC_IMAGES, f"{n}.jpg")) for n in names]
        + [str(Path(ISIC_MASKS, f"{n}_segmentation.png")) for n in names])
    for index, name in enumerate(names):
        lesion = render_lesion(index, seed=5)
        with Image.open(tmp_path / ISIC_IMAGES / f"{name}.jpg") as image, \
                Image.open(tmp_path / ISIC_MASKS / f"{name}_segmentation.png") as mask:
            assert (image.format, image.mode, mask.format, mask.mode) == ("JPEG", "RGB", "PNG", "L")
            assert image.size == mask.size
            assert np.array_equal(np.asarray(mask), lesion.mask)
            error = np.abs(np.asarray(image, np.float32) - lesion.image)
            assert error.mean() < 6  # grey levels lost to JPEG


def test_existing_files_are_left_alone_and_missing_ones_restored(tmp_path):
    write_synthetic_dataset(tmp_path, 3, seed=5, processes=1)
    whole = contents(tmp_path)
    kept = tmp_path / ISIC_IMAGES / "ISIC_9000000.jpg"
    kept.write_bytes(b"mine")
    (tmp_path / ISIC_MASKS / "ISIC_9000000_segmentation.png").unlink()
    (tmp_path / ISIC_IMAGES / "ISIC_9000002.jpg").unlink()
    write_synthetic_dataset(tmp_path, 3, seed=5, processes=1)
    assert kept.read_bytes() == b"mine"
    kept.write_bytes(whole[str(kept.relative_to(tmp_path))])
    assert contents(tmp_path) == whole


def test_pictures_of_another_seed_or_version_are_drawn_again(tmp_path, monkeypatch):
    assert not is_synthetic(tmp_path)
    write_synthetic_dataset(tmp_path, 2, seed=5, processes=1)
    first = contents(tmp_path)
    (tmp_path / ISIC_IMAGES / "mine.jpg").write_bytes(b"mine")
    write_synthetic_dataset(tmp_path, 2, seed=6, processes=1)
    (tmp_path / ISIC_IMAGES / "mine.jpg").unlink()  # what another made there is not deleted
    other = contents(tmp_path)
    assert is_synthetic(tmp_path) and other.keys() == first.keys() and all(other[name] != first[name] for name in first)
    monkeypatch.setattr("isic.synthetic.VERSION", 0)
    (tmp_path / ISIC_IMAGES / "ISIC_9000000.jpg").write_bytes(b"of version 0")
    write_synthetic_dataset(tmp_path, 2, seed=6, processes=1)
    assert {name for name, value in contents(tmp_path).items() if value != other[name]} == {MARKER}


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("disk gone")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="disk gone"):
        write_synthetic_dataset(tmp_path, 1, seed=5, processes=1)
    assert contents(tmp_path) == {}


def test_masks_are_binary_and_neither_empty_nor_whole(lesions):
    for lesion in lesions:
        assert lesion.image.dtype == lesion.mask.dtype == np.uint8
        assert lesion.image.shape == lesion.mask.shape + (3,) and lesion.outline.shape == lesion.mask.shape
        assert np.unique(lesion.mask).tolist() == [0, 255]
        assert lesion.outline.dtype == bool and 0.005 < lesion.outline.mean() < 0.8


def test_annotations_follow_the_outline_as_their_style_says(lesions):
    for lesion in lesions:
        drawn, true, style = lesion.mask > 0, lesion.outline, lesion.attributes["annotation"]
        dice = 2 * (drawn & true).sum() / (drawn.sum() + true.sum())
        assert dice > 0.75
        if style == "exact":
            assert dice == 1
        elif style == "generous":
            assert drawn.sum() > true.sum()
        elif style == "tight":
            assert drawn.sum() < true.sum()


def test_set_is_varied(lesions):
    assert len({lesion.image.shape for lesion in lesions[:24]}) >= 4
    described = [lesion.attributes for lesion in lesions]
    assert {a["annotation"] for a in described} == {"exact", "polygon", "generous", "tight"} == set(ANNOTATIONS)
    assert min(a["skin_type"] for a in described) <= 2 and max(a["skin_type"] for a in described) >= 5
    areas = np.array([lesion.outline.mean() for lesion in lesions])
    assert (areas < 0.03).sum() >= 3 and (areas > 0.3).sum() >= 3
    assert 3 <= sum(a["touches_frame"] for a in described) <= 30
    assert 2 <= sum(a["low_contrast"] for a in described) <= 15
    assert {"hairs", "bubbles", "ruler", "dark field"} <= {name for a in described for name in a["artefacts"]}


def test_frame_flag_and_light_agree_with_the_pixels(lesions):
    light, dark = [], []
    for lesion in lesions:
        rim = np.concatenate([lesion.outline[0], lesion.outline[-1], lesion.outline[:, 0], lesion.outline[:, -1]])
        assert lesion.attributes["touches_frame"] == rim.any()
        skin = lesion.image[~lesion.outline].mean()
        (light if lesion.attributes["skin_type"] <= 2 else dark if lesion.attributes["skin_type"] >= 5 else []).append(skin)
    assert np.mean(light) > np.mean(dark) + 40


def test_lesions_are_mostly_darker_than_the_skin_beside_them(lesions):
    darker = [lesion.image[lesion.outline].mean() < lesion.image[~lesion.outline].mean() - 4 for lesion in lesions
              if "dark field" not in lesion.attributes["artefacts"]]
    assert np.mean(darker) > 0.9


def test_lesions_are_in_one_piece_without_holes(lesions):
    for lesion in lesions:
        assert ndimage.label(lesion.outline, np.ones((3, 3)))[1] == 1
        assert np.array_equal(ndimage.binary_fill_holes(lesion.outline), lesion.outline)


@pytest.mark.parametrize("style", ANNOTATIONS)
def test_annotations_of_a_disc_and_of_a_single_pixel(style):
    y, x = np.mgrid[:200, :240]
    for seed in range(10):
        disc = (y - 90) ** 2 + (x - 130) ** 2 < 60**2
        drawn = annotate(np.random.default_rng(seed), disc, style)
        assert drawn.dtype == bool and drawn.shape == disc.shape and drawn[90, 130] and not drawn[0].any()
        radius = np.sqrt(drawn.sum() / np.pi)
        least, most = {"exact": (60, 60), "polygon": (53, 60), "generous": (61, 70), "tight": (50, 59)}[style]
        assert least - 0.1 <= radius <= most + 0.1
    pixel = np.zeros((8, 8), bool)
    pixel[3, 4] = True
    drawn = annotate(np.random.default_rng(0), pixel, style)
    assert not drawn.all() and (np.array_equal(drawn, pixel) or style in ("generous", "tight"))


@pytest.mark.parametrize("shape", [(150, 200), (300, 225)])
@pytest.mark.parametrize("fall", [0.8, 2.2, 6])
def test_noise_is_standardised_and_smoother_the_steeper_its_spectrum_falls(shape, fall):
    field = noise(np.random.default_rng(1), shape, 12, fall)
    assert field.shape == shape and field.dtype == np.float32
    assert abs(field.mean()) < 1e-4 and abs(field.std() - 1) < 1e-4
    rougher = noise(np.random.default_rng(1), shape, 12, fall - 0.5)
    assert np.abs(np.diff(field)).mean() < np.abs(np.diff(rougher)).mean()


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        render_lesion(*arguments)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"processes": 0}, {"seed": -1}])
def test_wrong_arguments_write_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least"):
        write_synthetic_dataset(tmp_path / "new", **{**{"count": 1, "seed": 1, "processes": 1}, **wrong})
    assert not (tmp_path / "new").exists()
