"""Decoding images and masks of every kind; broken ones are named."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conftest import write_pairs
from PIL import Image

from isic.decoding import decode_pair, read_image, read_mask
from isic.layout import find_pairs, isic_folders
from runtime.errors import UserError


def _ramp(height=24, width=32) -> np.ndarray:
    return np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16", "I", "F"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    ramp = _ramp()
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(ramp.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32) / 255)
    else:
        image = Image.fromarray(ramp).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F", "I") else "x.png")
    image.save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.shape == (24, 32, 3)
    expected = np.asarray(Image.fromarray(ramp).convert("1").convert("L")) if mode == "1" else ramp
    assert np.abs(read.astype(int) - expected[..., None]).max() <= (6 if mode == "P" else 1)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(_ramp())
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").shape == (32, 24, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 0], np.rot90(_ramp(), -1))


@pytest.mark.parametrize("high", [1, 255, 128])
def test_masks_are_binary_at_half_of_their_range(tmp_path, high):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:6] = high
    Image.fromarray(mask).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask > 0)


def test_soft_and_16_bit_masks(tmp_path):
    soft = np.tile(np.arange(0, 201, 20, dtype=np.uint8), (4, 1))  # 0, 20, ... 200: half is 100
    Image.fromarray(soft).save(tmp_path / "soft.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "soft.png")[0], [0] * 6 + [1] * 5)
    deep = np.array([[0, 65535], [65535, 0]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), [[0, 1], [1, 0]])


@pytest.mark.parametrize("levels", [2, 5, 40])
def test_a_resized_mask_is_the_full_one_at_the_nearest_pixels(tmp_path, levels):
    rng = np.random.default_rng(levels)
    values = rng.integers(0, levels, (61, 83), dtype=np.uint8)
    values[::2] //= max(levels - 1, 1)  # levels between do not fill areas: no map of classes
    Image.fromarray(values).save(tmp_path / "m.png")
    whole = Image.fromarray(read_mask(tmp_path / "m.png"))
    np.testing.assert_array_equal(whole, values > values.max() / 2)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 32), whole.resize((32, 32), Image.Resampling.NEAREST))


def test_a_mask_that_is_all_lesion_stays_all_lesion(tmp_path):
    Image.new("L", (20, 16), 255).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").all()


def test_images_are_resized_bilinearly_with_antialiasing_and_masks_by_nearest(tmp_path):
    # stripes a pixel wide average to grey when halved; without antialiasing they would alias
    stripes = np.tile(np.array([0, 255] * 32, np.uint8), (64, 1))
    Image.fromarray(stripes).save(tmp_path / "x.png")
    inner = read_image(tmp_path / "x.png", 32)[:, 2:-2]
    assert 100 < inner.min() <= inner.max() < 155
    assert set(np.unique(read_mask(tmp_path / "x.png", 32))) <= {0, 1}


def test_reduced_jpeg_decoding_stays_close_to_the_full_one(tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((2048, 1536), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "x.jpg", quality=92)
    with Image.open(tmp_path / "x.jpg") as image:
        full = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR)).astype(float)
    reduced = read_image(tmp_path / "x.jpg", 128).astype(float)
    difference = np.abs(full - reduced)
    assert difference.mean() < 0.5
    assert difference.max() <= 4


def test_reduced_jpeg_decoding_does_not_shift_the_picture_against_its_mask(tmp_path):
    # 2049 pixels are 256.125 of the reduced ones, of which the decoder gives 257
    waves = 128 + 100 * np.sin(np.arange(2049) * 2 * np.pi / 256)
    Image.fromarray(np.tile(waves.astype(np.uint8), (2049, 1))).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        full = np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(full - read_image(tmp_path / "x.jpg", 128)[..., 0]).max() <= 4


# ---------------------------------------------------------------- broken files

@pytest.fixture
def pair(tmp_path):
    return find_pairs(*isic_folders(write_pairs(tmp_path / "d", 1)))[0]


def test_truncated_jpeg(pair):
    pair.image.write_bytes(pair.image.read_bytes()[:400])
    with pytest.raises(UserError, match=r"cannot decode .*ISIC_0000000.jpg"):
        decode_pair(pair, 32)


def test_empty_file(pair):
    pair.image.write_bytes(b"")
    with pytest.raises(UserError, match=r"ISIC_0000000.jpg is empty \(0 bytes\)"):
        decode_pair(pair, 32)


def test_sizes_that_differ(pair):
    Image.new("L", (10, 10), 255).save(pair.mask)
    with pytest.raises(UserError, match="is 48 x 40 but its mask .* is 10 x 10"):
        decode_pair(pair, 32)


def test_mask_without_lesion(pair):
    Image.new("L", (48, 40), 0).save(pair.mask)
    with pytest.raises(UserError, match="_segmentation.png is empty"):
        decode_pair(pair, 32)


def test_masks_are_turned_like_their_image(tmp_path):
    mask = np.zeros((6, 8), np.uint8)
    mask[:2, :3] = 255
    image = Image.fromarray(mask)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), np.rot90(mask > 0, -1))


def test_a_lesion_that_vanishes_when_shrunk(pair):
    mask = np.zeros((40, 48), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(pair.mask)
    with pytest.raises(UserError, match="vanishes at 8 x 8 pixels.*larger --image-size"):
        decode_pair(pair, 8)
    assert decode_pair(pair, 48)[1].sum() >= 1


def test_a_chunk_that_claims_gigabytes_takes_no_memory(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    place = content.index(b"IDAT") - 4
    (tmp_path / "x.png").write_bytes(content[:place] + b"\x7f\xff\xff\xffiCCP" + content[place + 8:])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="x.png"):
            read_image(tmp_path / "x.png")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as stream:
        stream.truncate(2**31 + 1)  # a hole, which takes no room
    with pytest.raises(UserError, match=r"x.png is too large to be a photograph \(2147483649 bytes; at most 2147483648\)"):
        read_image(tmp_path / "x.png")
