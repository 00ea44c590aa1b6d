"""Finding pairs, the split, decoding of every kind of file, the cache, augmentation, the download."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pairs
from PIL import Image

import dataset
from dataset import (
    ISIC_IMAGES,
    ISIC_MASKS,
    TrainingImages,
    decode_pairs,
    find_pairs,
    isic_folders,
    limit_pairs,
    normalise,
    split_ids,
)
from decoding import decode_pair, read_image, read_mask
from download import download_isic
from storage import UserError

# ---------------------------------------------------------------- the split


def test_split_of_2594_sorted_names_is_the_study_s():
    ids = [f"ISIC_{i:07d}" for i in range(2594)]
    split = split_ids(ids)
    assert [len(part) for part in split] == [1815, 260, 519]
    assert sorted(sum(split, [])) == ids
    # taken once from scikit-learn, so that a change of the library would be noticed
    assert split.test[:4] == ["ISIC_0000029", "ISIC_0000030", "ISIC_0000043", "ISIC_0000044"]
    digest = [hashlib.sha256("\n".join(part).encode()).hexdigest()[:12] for part in split]
    assert digest == SPLIT_DIGESTS


SPLIT_DIGESTS = ["c290c14d948d", "6a65d8c78d2f", "d78b94bc690c"]


def test_split_does_not_depend_on_the_order_of_the_ids():
    ids = [f"case {i}" for i in range(40)]
    assert split_ids(ids) == split_ids(ids[::-1])


def test_split_of_too_few_images_is_one_line():
    with pytest.raises(UserError, match="2 images are too few to split"):
        split_ids(["a", "b"])


def test_limit_is_evenly_spaced_and_keeps_the_order():
    assert limit_pairs(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert limit_pairs(list(range(3)), 5) == [0, 1, 2]
    assert limit_pairs(list(range(3)), None) == [0, 1, 2]


# ---------------------------------------------------------------- finding pairs


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


# ---------------------------------------------------------------- decoding


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
    assert read_mask(_grey(tmp_path / "m.png", 255)).all()


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


# ---------------------------------------------------------------- the cache


def _calls(monkeypatch) -> list[str]:
    calls: list[str] = []
    original = dataset.decode_pair
    monkeypatch.setattr(dataset, "decode_pair", lambda pair, size: (calls.append(pair.id), original(pair, size))[1])
    return calls


def test_each_pair_is_decoded_once_and_a_changed_one_again(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "d", 6)
    calls = _calls(monkeypatch)
    pairs = find_pairs(*isic_folders(root))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    assert sorted(calls) == [pair.id for pair in pairs]
    for pair in pairs:
        image, mask = decode_pair(pair, 32)
        np.testing.assert_array_equal(first.image(pair.id), image)
        np.testing.assert_array_equal(first.mask(pair.id), mask)

    calls.clear()
    assert decode_pairs(pairs, 32, tmp_path / "cache").fingerprint() == first.fingerprint()
    assert calls == []

    Image.new("RGB", (48, 40), (1, 2, 3)).save(pairs[2].image)
    changed = decode_pairs(pairs, 32, tmp_path / "cache")
    assert calls == [pairs[2].id]
    assert np.abs(changed.image(pairs[2].id).astype(int) - [1, 2, 3]).max() <= 2  # JPEG rounds
    assert changed.fingerprint() != first.fingerprint()

    calls.clear()
    fewer = decode_pairs(pairs[1:], 32, tmp_path / "cache")
    assert calls == []
    assert fewer.fingerprint() != changed.fingerprint()


def test_a_process_that_is_started_afresh_maps_the_cache_itself(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    sent = pickle.dumps(pairs)
    assert len(sent) < pairs.records.nbytes / 4
    received = pickle.loads(sent)
    assert isinstance(received.records, np.memmap) and np.array_equal(received.records, pairs.records)


def test_an_interrupted_decoding_goes_on(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "d", 6)
    pairs = find_pairs(*isic_folders(root))
    good = pairs[4].image.read_bytes()
    pairs[4].image.write_bytes(b"not an image")
    with pytest.raises(UserError, match="ISIC_0000004"):
        decode_pairs(pairs, 32, tmp_path / "cache")
    pairs[4].image.write_bytes(good)
    calls = _calls(monkeypatch)
    decoded = decode_pairs(pairs, 32, tmp_path / "cache")
    assert pairs[0].id not in calls
    assert pairs[4].id in calls
    np.testing.assert_array_equal(decoded.image(pairs[4].id), decode_pair(pairs[4], 32)[0])


# ---------------------------------------------------------------- tensors


def test_normalise_is_torchvision_s():
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (2, 8, 6, 3), dtype=torch.uint8)
    reference = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
    )(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(normalise(images), reference)


def test_augmentation_depends_on_seed_epoch_and_id_alone(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    forwards = TrainingImages(pairs, pairs.ids, "full", 1)
    one = [forwards[(3, i)] for i in range(8)]
    backwards = TrainingImages(pairs, pairs.ids, "full", 1)
    other = [backwards[(3, i)] for i in reversed(range(8))][::-1]
    for (image, mask), (image2, mask2) in zip(one, other):
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(mask, mask2)
        assert set(np.unique(mask)) <= {0, 1}
    assert any((a[0] != b[0]).any() for a, b in zip(one, [forwards[(4, i)] for i in range(8)]))
    assert any((a[0] != b[0]).any() for a, b in zip(one, [TrainingImages(pairs, pairs.ids, "full", 2)[(3, i)] for i in range(8)]))


# ---------------------------------------------------------------- the download


class _Archives(http.server.SimpleHTTPRequestHandler):
    """Serves files with byte ranges and can be told to hang up half-way."""

    break_at: int | None = None
    ranges: list[str] = []

    def do_GET(self):
        data = (Path(self.directory) / self.path[1:]).read_bytes()
        start = 0
        if "Range" in self.headers:
            self.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].split("=")[1].rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : type(self).break_at])
        type(self).break_at = None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Archives, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def _archive(folder: Path, name: str, root: Path) -> None:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for path in sorted((root / name).iterdir()):
            archive.write(path, f"{name}/{path.name}")


def test_download_resumes_verifies_and_unpacks(server, tmp_path):
    folder, url = server
    source = write_pairs(tmp_path / "source", 5)
    archives = [(f"{url}/{name}.zip", name) for name in (ISIC_IMAGES, ISIC_MASKS)]
    for _, name in archives:
        _archive(folder, name, source)
    _Archives.break_at = 1000
    _Archives.ranges = []
    with pytest.raises(UserError, match="run the same command again to continue"):
        download_isic(tmp_path / "target", archives)
    assert not (tmp_path / "target" / ISIC_IMAGES).exists()
    download_isic(tmp_path / "target", archives)
    assert _Archives.ranges == ["bytes=1000-"]
    assert len(find_pairs(*isic_folders(tmp_path / "target"))) == 5
    shutil.rmtree(folder)  # everything is there: nothing is fetched again
    folder.mkdir()
    download_isic(tmp_path / "target", archives)


def test_download_refuses_paths_outside_the_folder(server, tmp_path):
    folder, url = server
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.writestr("../escaped.txt", "x")
    with pytest.raises(UserError, match="unsafe path '../escaped.txt'"):
        download_isic(tmp_path / "target", [(f"{url}/evil.zip", "evil")])
    assert not (tmp_path / "escaped.txt").exists()


def test_download_of_a_broken_archive_and_without_a_server(server, tmp_path):
    folder, url = server
    (folder / "bad.zip").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="bad.zip is broken"):
        download_isic(tmp_path / "target", [(f"{url}/bad.zip", "bad")])
    with pytest.raises(UserError, match="cannot download"):
        download_isic(tmp_path / "target", [("http://127.0.0.1:9/none.zip", "none")])
