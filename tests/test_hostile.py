"""Broken, foreign and malicious files: each is one line that names the file, or works; nothing else comes out."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, command, write_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import experiment.maps
import isic.cache
import isic.download
import train
from dataset import split_ids
from experiment.map_files import MAP_ARRAYS, read_maps, write_maps
from isic.cache import decode_pairs
from isic.decoding import decode_pair, read_image, read_mask
from isic.layout import ISIC_IMAGES, ISIC_MASKS, Pair, SkippedPair, find_pairs, isic_folders
from model import UNet
from runtime.checkpoints import load_checkpoint, load_model, save_checkpoint
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.records import read_json, seal

CPU = torch.device("cpu")


def refused(call, *parts: object) -> None:
    """The call raises a UserError: one line, with all the parts in it."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable()
    for part in parts:
        assert str(part) in line


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    return find_pairs(*isic_folders(write_pairs(tmp_path / "d", 10)))


# ---------------------------------------------------------------- images


def _png(width: int, height: int) -> bytes:
    """The header of a PNG that declares a size, and nothing to fill it with."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BROKEN_IMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot decode"),
    "bomb": (lambda path: path.write_bytes(_png(60_000, 60_000)), "too many pixels to be a photograph"),
    "smaller bomb": (lambda path: path.write_bytes(_png(12_000, 8_000)), "too many pixels to be a photograph"),
    "bytes short": (lambda path: path.write_bytes(_png(3_000, 3_000)), "cannot decode"),
    "empty": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "text": (lambda path: path.write_text("this is no picture"), "is not an image"),
    "program": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is not an image"),
    "folder": (_folder, "is a folder or a device"),
    "loop": (_loop, "cannot read"),
    "pipe": (_pipe, "is a folder or a device"),
    "gone": (lambda path: path.unlink(), "cannot read"),
    "one pixel": (lambda path: Image.new("RGB", (1, 1)).save(path), "is 1 x 1 pixels, too small"),
    "strip": (lambda path: Image.new("RGB", (10, 20_000)).save(path), "is 10 x 20000 pixels, too small or too long"),
}


@pytest.mark.parametrize("what", BROKEN_IMAGES)
def test_a_broken_image_is_named_and_left_out_on_request(pairs, tmp_path, what):
    damage, message = BROKEN_IMAGES[what]
    damage(pairs[3].image)
    refused(lambda: decode_pairs(pairs, 32, tmp_path / "cache"), pairs[3].image.name, message)
    skipped: list[SkippedPair] = []
    decoded = decode_pairs(pairs, 32, tmp_path / "cache", skipped=skipped)
    assert decoded.ids == [pair.id for pair in pairs if pair is not pairs[3]]
    ((id, file, reason),) = skipped
    assert (id, file) == (pairs[3].id, str(pairs[3].image))
    assert message in reason


def test_a_bomb_takes_no_memory(pairs):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((60_000, 60_000), (12_000, 8_000)):  # 10 GiB and 288 MB when decoded
        pairs[0].image.write_bytes(_png(*size))
        refused(lambda: read_image(pairs[0].image, 32), "too many pixels")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_wrong_extension_is_fine_as_long_as_it_is_a_picture(pairs):
    expected = read_image(pairs[0].image)
    Image.fromarray(expected).save(pairs[0].image, format="PNG")
    np.testing.assert_array_equal(read_image(pairs[0].image), expected)


def test_a_link_loop_as_a_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(lambda: find_pairs(tmp_path / "loop", tmp_path / "loop"), "loop does not exist")


def test_images_that_hold_nan(tmp_path):
    values = np.ones((8, 8), np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    refused(lambda: read_image(tmp_path / "x.tif"), "x.tif", "NaN")
    refused(lambda: read_mask(tmp_path / "x.tif"), "x.tif", "NaN")


# ---------------------------------------------------------------- masks


def _disc(size: int = 64, radius: float = 20) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return ((y * y + x * x < radius * radius) * 255).astype(np.uint8)


def _classes(*levels: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.uint8)
    for index, level in enumerate(levels):
        mask[8:30, 5 + 12 * index : 15 + 12 * index] = level
    return mask


@pytest.mark.parametrize("levels", [(127, 255), (1, 2), (1, 2, 3), (85, 170, 255), (50, 100, 150, 200, 250)])
def test_a_mask_of_several_classes_is_refused(tmp_path, levels):
    Image.fromarray(_classes(*levels)).save(tmp_path / "m.png")
    refused(lambda: read_mask(tmp_path / "m.png"), "m.png", f"{len(levels) + 1} grey levels (0, {levels[0]}", "save it with two")


def test_masks_with_soft_or_compressed_edges_are_not(tmp_path):
    disc = Image.fromarray(_disc())
    sharp = _disc() > 0
    for quality in (30, 75, 95):
        disc.save(tmp_path / "m.jpg", quality=quality)
        assert (read_mask(tmp_path / "m.jpg") != sharp).mean() < 0.02
    for factor in (2, 3, 4):
        for method in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX):
            disc.resize((64 * factor,) * 2, method).save(tmp_path / "large.png")
            assert read_mask(tmp_path / "large.png").mean() == pytest.approx(sharp.mean(), abs=0.03)
            disc.resize((64 // factor,) * 2, method).save(tmp_path / "small.png")
            assert read_mask(tmp_path / "small.png").mean() == pytest.approx(sharp.mean(), abs=0.05)
    Image.fromarray(np.where(_disc() > 0, 254, 1).astype(np.uint8)).save(tmp_path / "m.png")  # two levels, neither 0 nor 255
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), sharp)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: Image.new("L", (9, 7), 255).save(path), "is 9 x 7"),
        (lambda path: Image.new("L", (48, 40)).save(path), "is empty"),
        (lambda path: path.write_bytes(_png(60_000, 60_000)), "too many pixels"),
        (lambda path: path.write_bytes(b"no mask"), "is not an image"),
    ],
)
def test_a_broken_mask_is_the_file_to_blame(pairs, tmp_path, damage, message):
    damage(pairs[2].mask)
    refused(lambda: decode_pair(pairs[2], 32), pairs[2].mask.name, message)
    skipped: list[SkippedPair] = []
    decode_pairs(pairs, 32, tmp_path / "cache", skipped=skipped)
    assert skipped[0].file == str(pairs[2].mask)


# ---------------------------------------------------------------- names


def _save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((16, 20), np.uint8)
    mask[4:12, 5:15] = 255
    Image.fromarray(mask).save(path)
    return path


def test_spaces_and_accents_in_any_spelling(tmp_path):
    _save(tmp_path / "i" / "le\u0301sion \u00df \U0001f600 1.png")  # e and an accent
    _save(tmp_path / "m" / "l\u00e9sion \u00df \U0001f600 1_mask.png")  # one letter with an accent
    (pair,) = find_pairs(tmp_path / "i", tmp_path / "m")
    assert pair.id == "l\u00e9sion \u00df \U0001f600 1"
    assert decode_pairs([pair], 32, tmp_path / "cache").ids == [pair.id]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\\..\\b", os.fsdecode(b"a\xffb")])
def test_names_that_cannot_be_shown_or_saved(tmp_path, name):
    _save(tmp_path / "i" / "fine.png")
    _save(tmp_path / "m" / "fine.png")
    for folder in "im":
        shutil.copy(_save(tmp_path / "x.png"), tmp_path / folder / f"{name}.png")
    refused(lambda: find_pairs(tmp_path / "i", tmp_path / "m"), "in its name; rename it")
    skipped: list[SkippedPair] = []
    assert [pair.id for pair in find_pairs(tmp_path / "i", tmp_path / "m", skipped)] == ["fine"]
    assert len(skipped) == 1


def test_files_that_claim_the_same_id_or_mask(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "b_mask.png", "c.png", "d.png"):
        _save(tmp_path / "i" / name)
    for name in ("a.png", "b_mask.png", "c.png", "c.bmp", "d.png"):
        _save(tmp_path / "m" / name)
    skipped: list[SkippedPair] = []
    assert [pair.id for pair in find_pairs(tmp_path / "i", tmp_path / "m", skipped)] == ["b", "d"]
    assert [entry.id for entry in skipped] == ["a", "b_mask", "c"]
    assert "a.jpg and a.png have the same stem" in skipped[0].reason
    assert "b_mask.png is the mask of both b and b_mask" in skipped[1].reason
    assert "c.bmp and c.png have the same stem" in skipped[2].reason
    refused(lambda: find_pairs(tmp_path / "i", tmp_path / "m"), "have the same stem; keep one")


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("x" * 251 + ".npz")
    write_maps(path, {name: np.zeros((4, 4), kind) for name, kind in MAP_ARRAYS.items()}, 0, "")
    assert read_maps(path)["identity"] == ""


# ---------------------------------------------------------------- --skip-bad


@pytest.mark.usefixtures("no_pictures")
def test_skip_bad_lists_what_it_leaves_out_and_keeps_the_split(finished, tiny, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(tiny, data)
    split = json.loads((finished / "config.json").read_text())["split"]
    # one of each part: no mask, broken, a mask of another size
    one, two, three = split["train"][0], split["validation"][1], split["test"][2]
    (data / ISIC_MASKS / f"{one}_segmentation.png").unlink()
    (data / ISIC_IMAGES / f"{two}.jpg").write_bytes(b"not an image")
    Image.new("L", (9, 7), 255).save(data / ISIC_MASKS / f"{three}_segmentation.png")
    flags = ("--data", data, "--results", "run", "--cache", "cache", *TINY_FLAGS, "--epochs", 1)
    outcome = command(*flags, cwd=tmp_path)
    assert outcome.returncode == 2
    assert "has no mask" in outcome.stderr
    outcome = command(*flags, "--skip-bad", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    (warning,) = [line for line in outcome.stderr.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: 3 of 24 pairs are left out: ")
    assert all(id in warning for id in (one, two, three))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["skipped"] == metrics["skipped"]
    assert sorted((entry["id"], Path(entry["file"]).name) for entry in metrics["skipped"]) == sorted(
        [(one, f"{one}.jpg"), (two, f"{two}.jpg"), (three, f"{three}_segmentation.png")]
    )
    assert all(entry["reason"] for entry in metrics["skipped"])
    assert record["split"] == {part: [id for id in ids if id not in (one, two, three)] for part, ids in split.items()}
    # and again: nothing is done twice; repaired: another experiment
    assert command(*flags, "--skip-bad", cwd=tmp_path).returncode == 0
    shutil.copy(tiny / ISIC_IMAGES / f"{two}.jpg", data / ISIC_IMAGES)
    outcome = command(*flags, "--skip-bad", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "skipped was" in outcome.stderr
    # visualize.py still finds its way in the incomplete folder
    outcome = command("--run", "run", "--id", split["test"][0], "--output", "x.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.usefixtures("no_pictures")
def test_without_bad_pairs_skip_bad_changes_nothing(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flags = ("--data", tiny, "--results", "run", "--cache", finished.parent / "cache", *TINY_FLAGS)
    outcome = command(*flags, "--skip-bad", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped"] == []


def test_a_part_that_skip_bad_empties_is_an_error(finished, tiny, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(tiny, data)
    for id in json.loads((finished / "config.json").read_text())["split"]["validation"]:
        (data / ISIC_IMAGES / f"{id}.jpg").write_bytes(b"")
    outcome = command("--data", data, "--results", "run", "--cache", "c", *TINY_FLAGS, "--skip-bad", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "without the 3 bad pairs the validation part has 0 images" in outcome.stderr
    for path in (data / ISIC_IMAGES).iterdir():
        path.write_bytes(b"")
    outcome = command("--data", data, "--results", "run", "--cache", "c", *TINY_FLAGS, "--skip-bad", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "no pair is left" in outcome.stderr


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", ["record", "short", "gone", "index", "foreign index", "older program", "slots"])
def test_a_damaged_cache_is_decoded_anew(pairs, tmp_path, monkeypatch, damage):
    decode_pairs(pairs, 32, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    data, index = folder / "pairs.uint8", folder / "index.json"
    if damage == "record":
        content = bytearray(data.read_bytes())
        content[5000] ^= 1
        data.write_bytes(content)
    elif damage == "short":
        data.write_bytes(data.read_bytes()[:9999])
    elif damage == "gone":
        data.unlink()
    elif damage == "index":
        index.write_text("{")
    elif damage == "foreign index":
        index.write_text('{"pairs": [1]}')
    elif damage == "older program":
        monkeypatch.setattr(isic.cache, "_maker", lambda size: {"decoding": 99})
    else:
        content = json.loads(index.read_text())
        content["pairs"][pairs[0].id]["slot"] = content["pairs"][pairs[1].id]["slot"]
        index.write_text(json.dumps(content))
    decoded = decode_pairs(pairs, 32, tmp_path / "cache")
    for pair in pairs:
        image, mask = decode_pair(pair, 32)
        np.testing.assert_array_equal(decoded.image(pair.id), image)
        np.testing.assert_array_equal(decoded.mask(pair.id), mask)


def test_a_run_keeps_its_pixels_when_another_one_decodes_changed_files(pairs, tmp_path):
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    before = first.image(pairs[1].id).copy()
    Image.new("RGB", (48, 40), (1, 2, 3)).save(pairs[1].image)
    second = decode_pairs(pairs, 32, tmp_path / "cache")
    np.testing.assert_array_equal(first.image(pairs[1].id), before)
    assert (second.image(pairs[1].id) != before).any()


# ---------------------------------------------------------------- checkpoints, maps, metrics


class Code:
    def __reduce__(self):
        return (os.mkdir, ("must_not_exist",))


def _zip(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as content:
        for name, data in members.items():
            content.writestr(name, data)


def test_checkpoints_that_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    torch.save({"model": Code(), "options": {}}, path)
    refused(lambda: load_checkpoint(path), "x.pth is not a checkpoint")
    assert not (tmp_path / "must_not_exist").exists()
    _zip(path, {"archive/data.pkl": pickle.dumps(Code()), "archive/version": b"3\n"})
    refused(lambda: load_checkpoint(path), "x.pth is not a checkpoint")
    assert not (tmp_path / "must_not_exist").exists()
    _zip(path, {"archive/data.pkl": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED)  # a bomb
    refused(lambda: load_checkpoint(path), "x.pth is not a checkpoint")
    for content in (os.urandom(3000), b"", b"PK"):
        path.write_bytes(content)
        refused(lambda: load_checkpoint(path), "x.pth", "delete it")
    for options in (None, 3, {"width": [2]}):
        save_checkpoint(path, {"model": UNet(4).state_dict(), "options": options})
        refused(lambda: load_model(path, UNet, CPU), "x.pth is not a checkpoint of this program: the file.options", "delete it")
    for options in ({"width": 2**20}, {"width": -2}, {"width": "a"}, {"colour": 1}):
        save_checkpoint(path, {"model": UNet(4).state_dict(), "options": options})
        refused(lambda: load_model(path, UNet, CPU), "x.pth does not fit")
    for model in (None, {"a": 1}):
        save_checkpoint(path, {"model": model, "options": UNet(4).options})
        refused(lambda: load_model(path, UNet, CPU), "x.pth is not a checkpoint of this program: the file.model", "delete it")
    for model in ({}, UNet(4).double().state_dict(), UNet(4).bfloat16().state_dict()):
        save_checkpoint(path, {"model": model, "options": UNet(4).options})
        refused(lambda: load_model(path, UNet, CPU), "x.pth does not fit")
    state = UNet(4).state_dict()
    state["head.bias"] = torch.tensor([float("nan")])
    save_checkpoint(path, {"model": state, "options": UNet(4).options})
    refused(lambda: load_model(path, UNet, CPU), "x.pth holds weights that are NaN")


def test_weights_edited_by_hand_are_noticed(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"model": UNet(4).state_dict(), "options": UNet(4).options})
    load_model(path, UNet, CPU)
    content = torch.load(path, weights_only=True)
    content["model"]["head.bias"] += 1
    torch.save(content, path)
    refused(lambda: load_model(path, UNet, CPU), "x.pth was changed after a run wrote it")


def _again(run: Path, tiny: Path, cache: Path, *flags: object):
    return command("--data", tiny, "--results", run, "--cache", cache, *TINY_FLAGS, *flags, cwd=run.parent)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.usefixtures("no_pictures")
def test_weights_of_another_run_and_lost_weights(copied, finished, tiny, tmp_path):
    cache, weights = finished.parent / "cache", copied / "weights" / "best_model.pth"
    original = weights.read_bytes()
    outcome = _again(tmp_path / "other", tiny, cache, "--seed", 7)
    assert outcome.returncode == 0, outcome.stderr
    shutil.copy(tmp_path / "other" / "weights" / "best_model.pth", weights)
    outcome = command("--run", copied, "--seed", 1, "--output", "x.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "was not made from the weights" in outcome.stderr
    outcome = _again(copied, tiny, cache)
    # the best epoch was the last one: its weights are made again from the training state; else the run stops
    state = load_checkpoint(copied / "weights" / "training_state.pth")["progress"]
    assert outcome.returncode == (0 if state["best_epoch"] == state["epoch"] else 2)
    if outcome.returncode:
        assert "best_model.pth does not hold the weights of this run's best epoch" in outcome.stderr
    weights.unlink()
    outcome = _again(copied, tiny, cache)
    assert outcome.returncode == 0, outcome.stderr
    assert weights.read_bytes() == original
    for name in ("metrics.json", "calibration.npz", "per_image.csv"):
        if name != "metrics.json":
            assert (copied / name).read_bytes() == (finished / name).read_bytes()
    assert read_json(copied / "metrics.json")["checksum"] == read_json(finished / "metrics.json")["checksum"]


@pytest.mark.usefixtures("no_pictures")
def test_maps_being_made_again_are_not_called_finished(copied, finished, tiny, monkeypatch):
    next((copied / "uncertainty_maps" / "test").iterdir()).unlink()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.maps, "uncertainty_maps", interrupted)
    assert _again(copied, tiny, finished.parent / "cache").returncode == 130
    assert not (copied / "metrics.json").exists()
    monkeypatch.undo()
    assert _again(copied, tiny, finished.parent / "cache").returncode == 0
    assert read_json(copied / "metrics.json")["checksum"] == read_json(finished / "metrics.json")["checksum"]


@pytest.mark.usefixtures("no_pictures")
def test_a_fused_score_of_another_fusion_is_made_again(copied, finished, tiny):
    path = sorted((copied / "uncertainty_maps" / "test").iterdir())[0]
    before, maps = path.read_bytes(), read_maps(path)
    maps["fused_score"] = np.zeros_like(maps["fused_score"])
    write_maps(path, {**{name: maps[name] for name in MAP_ARRAYS}, "fusion": np.array("another")}, 0, maps["identity"])
    assert _again(copied, tiny, finished.parent / "cache").returncode == 0
    assert np.array_equal(read_maps(path)["fused_score"], np.load(io.BytesIO(before))["fused_score"])


@pytest.mark.parametrize("name", ["identity", "pred_variance", "empty_cams"])
def test_maps_with_a_missing_key_or_an_object(tmp_path, name):
    maps = {key: np.ones((4, 4), kind) for key, kind in MAP_ARRAYS.items()}
    arrays = {**maps, "identity": np.array("a"), "empty_cams": np.int64(0), "fallbacks": np.int64(0)}
    np.savez(tmp_path / "x.npz", **{key: value for key, value in arrays.items() if key != name})
    refused(lambda: read_maps(tmp_path / "x.npz"), f"x.npz lacks {name}", "delete it and run main.py again")
    np.savez(tmp_path / "x.npz", **{**arrays, name: np.array([Code()], dtype=object)})
    refused(lambda: read_maps(tmp_path / "x.npz"), "x.npz", "delete it")
    np.savez_compressed(tmp_path / "x.npz", **arrays)  # not how they are written: it could be a bomb
    refused(lambda: read_maps(tmp_path / "x.npz"), "x.npz is not a map file")


EDITS = {
    "number": lambda m: m.update({"lambda": 0.123}),
    "text": lambda m: m.update({"lambda": "0.5"}),
    "range": lambda m: m.update({"normalisation": [1, 2]}),
    "gone": lambda m: m.pop("test"),
    "checksum gone": lambda m: m.pop("checksum"),
}


@pytest.mark.parametrize("edit", [*EDITS, "NaN", "half", "list", "deep"])
def test_metrics_edited_by_hand(copied, tmp_path, edit):
    path = copied / "metrics.json"
    text = path.read_text()
    if edit in EDITS:
        content = json.loads(text)
        EDITS[edit](content)
        path.write_text(json.dumps(content))
    else:
        path.write_text({"NaN": '{"lambda": NaN}', "half": text[: len(text) // 2], "list": "[1]", "deep": "[" * 10**5}[edit])
    outcome = command("--run", copied, "--seed", 1, "--output", "x.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert "metrics.json" in outcome.stderr
    assert "run" in outcome.stderr


@pytest.mark.parametrize("text", ['{"decides": []}', "{}", "{", "[]", '{"decides": {}}'])
def test_a_configuration_edited_by_hand(copied, finished, tiny, text):
    (copied / "config.json").write_text(text)
    outcome = _again(copied, tiny, finished.parent / "cache")
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    assert str(copied) in outcome.stderr
    assert "--fresh" in outcome.stderr or "delete it" in outcome.stderr


# ---------------------------------------------------------------- archives


def _unpack(archive: Path, root: Path) -> None:
    isic.download._unpack(archive, root, "inner")


def test_archives_that_are_hostile(tmp_path, monkeypatch):
    root, archive = tmp_path / "root", tmp_path / "root" / "x.zip"
    root.mkdir()
    for name in ("../escaped", "inner/../../escaped", str(tmp_path / "escaped")):
        _zip(archive, {name: b"x"})
        refused(lambda: _unpack(archive, root), "x.zip holds the unsafe path")
    _zip(archive, {"inner/zeros": b"\0" * 30_000_000}, zipfile.ZIP_DEFLATED)
    refused(lambda: _unpack(archive, root), "x.zip would grow from", "to 30000000 in 1 files", "delete it")
    monkeypatch.setattr(isic.download, "MAX_MEMBERS", 3)
    _zip(archive, {f"inner/{i}": b"" for i in range(4)})
    refused(lambda: _unpack(archive, root), "in 4 files")
    # a member that declares less than it holds stops at what it declared, and its checksum tells
    _zip(archive, {"inner/a": b"\0" * 100_000}, zipfile.ZIP_DEFLATED)
    content = archive.read_bytes().replace(struct.pack("<I", 100_000), struct.pack("<I", 10))
    archive.write_bytes(content)
    refused(lambda: _unpack(archive, root), "x.zip is broken")
    _zip(archive, {"other/a": b"x"})
    refused(lambda: _unpack(archive, root), "x.zip does not hold the folder inner")
    for end in (os.urandom(200), struct.pack("<4H2LH", 0, 0, 1, 1, 1000, 0, 0)):  # a directory before the beginning
        archive.write_bytes(b"PK\x05\x06" + end)
        refused(lambda: _unpack(archive, root), "x.zip is broken")
    assert not (tmp_path / "escaped").exists()
    assert not (root / "inner").exists()


# ---------------------------------------------------------------- numbers


def test_the_first_step_without_a_finite_loss_is_named(tiny, tmp_path, monkeypatch):
    config = Config(image_size=32, width=4, epochs=3, batch_size=4, lr=1e-3, augment="none")
    decoded = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path / "cache")
    split = split_ids(decoded.ids)  # 16 for training: 4 steps an epoch

    def attempt(folder):
        train.train(config, decoded, split.train, split.validation, ProcessGroup(0, 1, CPU), folder, "identity")

    real, calls = train.F.binary_cross_entropy_with_logits, [0]

    def loss(logits, target, reduction="mean"):
        value = real(logits, target, reduction=reduction)
        if reduction == "mean":  # a training step
            calls[0] += 1
            return value * float("nan") if calls[0] in (4 + 2, 4 + 3) else value
        return value

    monkeypatch.setattr(train.F, "binary_cross_entropy_with_logits", loss)
    refused(lambda: attempt(tmp_path / "run"), "training loss is nan at step 2 of 4 of epoch 2", "best_model.pth", "--lr")
    weights = tmp_path / "run" / "weights"
    assert load_checkpoint(weights / "training_state.pth")["progress"]["epoch"] == 1
    load_model(weights / "best_model.pth", UNet, CPU)
    calls[0] = 100
    attempt(tmp_path / "run")  # from the epoch before, and as if nothing had happened
    attempt(tmp_path / "undisturbed")
    other = tmp_path / "undisturbed" / "weights"
    assert (weights / "best_model.pth").read_bytes() == (other / "best_model.pth").read_bytes()


# ---------------------------------------------------------------- fuzzing the readers

#: Inputs a reader; FUZZ=5000 for a long run.
EXAMPLES = int(os.environ.get("FUZZ", "60"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw, originals: list[bytes]) -> bytes:
    """Bytes of a valid file with some changed, cut, doubled or inserted; now and then no valid file at all."""
    content = bytearray(draw(st.sampled_from(originals)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(0, 6))):
        where = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 200))
        kind = rng.randrange(5)
        if kind == 0:
            content[where] = rng.randrange(256)
        elif kind == 1:
            content[where : where + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\1\0"])
        elif kind == 2:
            del content[where : where + rng.randrange(1, 200)]
        elif kind == 3:
            content[where:where] = rng.randbytes(rng.randrange(1, 20))
        else:
            del content[where:]
        if not content:
            content = bytearray(rng.randbytes(rng.randrange(50)))
        if not content:
            break
    return bytes(content)


def _encoded(kind: str, picture: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [("JPEG", {"exif": exif}), ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
             ("WEBP", {}), ("GIF", {}), ("JPEG", {"progressive": True})]
    grey = [_encoded("PNG", Image.fromarray(_disc(24, 8))), _encoded("TIFF", Image.fromarray(_disc(24, 8) / np.float32(255))),
            _encoded("PNG", Image.fromarray(_disc(24, 8).astype(np.uint16) * 257)), _encoded("PNG", colour.convert("P"))]
    return [_encoded(kind, colour, **options) for kind, options in kinds] + grey


def only_user_errors(read, path: Path, content: bytes):
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        assert path.name in str(error)
        assert str(error).isprintable()
        return None


@fuzz
@given(damaged(_pictures()))
def test_fuzz_images(tmp_path, content):
    image = only_user_errors(lambda path: read_image(path, 32), tmp_path / "x.jpg", content)
    assert image is None or (image.dtype, image.shape) == (np.uint8, (32, 32, 3))


@fuzz
@given(damaged(_pictures()))
def test_fuzz_masks(tmp_path, content):
    mask = only_user_errors(lambda path: read_mask(path, 32), tmp_path / "x.png", content)
    assert mask is None or ((mask.dtype, mask.shape) == (np.uint8, (32, 32)) and mask.max() <= 1)


def _map_file() -> bytes:
    stream = io.BytesIO()
    maps = {name: np.ones((4, 4), kind) for name, kind in MAP_ARRAYS.items()}
    np.savez(stream, **maps, empty_cams=np.int64(0), fallbacks=np.int64(0), identity=np.array("abc"))
    return stream.getvalue()


@fuzz
@given(damaged([_map_file()]))
def test_fuzz_maps(tmp_path, content):
    maps = only_user_errors(read_maps, tmp_path / "x.npz", content)
    assert maps is None or all(np.isfinite(maps[name]).all() for name in MAP_ARRAYS)


def _checkpoint() -> bytes:
    stream = io.BytesIO()
    torch.save({"model": UNet(2).state_dict(), "options": UNet(2).options}, stream)
    return stream.getvalue()


@fuzz
@given(damaged([_checkpoint()]))
def test_fuzz_checkpoints(tmp_path, content):
    model = only_user_errors(lambda path: load_model(path, UNet, CPU), tmp_path / "x.pth", content)
    assert model is None or isinstance(model, UNet)


@fuzz
@given(damaged([json.dumps(seal({"lambda": 0.5, "normalisation": {"pred_variance": [0, 1]}, "a": [None, True]})).encode()]))
def test_fuzz_json(tmp_path, content):
    only_user_errors(read_json, tmp_path / "x.json", content)
