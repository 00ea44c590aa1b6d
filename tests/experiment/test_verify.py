"""``--verify``: nothing is wrong with a finished run, whatever was changed since is named, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, command, write_sealed

from isic.layout import ISIC_IMAGES, ISIC_MASKS
from runtime.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def place(tiny, tmp_path):
    """A copy of the images, of the cache and of a finished run on them."""
    shutil.copytree(tiny, tmp_path / "data")
    outcome = command("--data", "data", "--results", "run", "--cache", "cache", *TINY_FLAGS, "--epochs", 1, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    return tmp_path


def content(place):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.rglob("*") if path.is_file()}


def verify(place, *flags):
    before = content(place)
    outcome = command("--results", "run", "--cache", "cache", "--quiet", "--verify", *flags, cwd=place)
    assert content(place) == before
    return outcome


def change_maps(place, name="true_mask"):
    (path, *_) = sorted((place / "run" / "uncertainty_maps" / "test").iterdir())
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[name] = 1 - arrays[name]
    np.savez(path, **arrays)
    return path.name


def exchange_picture(place):
    one, other = sorted((place / "data" / ISIC_IMAGES).iterdir())[:2]
    one.write_bytes(other.read_bytes())
    return one.name


def remove_mask(place):
    mask = sorted((place / "data" / ISIC_MASKS).iterdir())[3]
    mask.unlink()
    return mask.name.split("_seg")[0]


def damage_cache(place):
    (path,) = (place / "cache").glob("*/pairs.uint8")
    with open(path, "r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff\x00\xff")
    return "pairs.uint8"


def change_weights(place):
    path = place / "run" / "weights" / "best_model.pth"
    found = torch.load(path, weights_only=True)
    found["model"]["head.bias"] += 1
    save_checkpoint(path, {name: value for name, value in found.items() if name != "checksum"})
    return "best_model.pth"


def change_text(name, old, new):
    def change(place):
        path = place / "run" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return name

    return change


def change_log(place):
    path = place / "run" / "training_log.csv"
    rows = path.read_text().splitlines()
    rows[1] = rows[1].replace("1,", "1,0", 1)
    path.write_text("\n".join([*rows, ""]))
    path.write_text(path.read_text().replace("0.", "0.1", 1))
    return "training_log.csv"


def change_counts(place):
    path = place / "run" / "calibration.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["test/image_clipped"] = arrays["test/image_clipped"] + 1
    np.savez_compressed(path, **arrays)
    return "calibration.npz"


def test_nothing_is_wrong_with_a_finished_run(place):
    outcome = verify(place)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("run: ") and "files are as they were when the run was finished" in outcome.stdout
    # the command of the run says the same, and where the cache lies is remembered
    outcome = command("--data", "data", "--results", "run", *TINY_FLAGS, "--verify", cwd=place)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("change", [
    change_maps, exchange_picture, remove_mask, damage_cache, change_weights, change_log, change_counts,
    change_text("per_image.csv", "0.", "0.1"), change_text("metrics.json", '"lambda": ', '"lambda": 0'),
    change_text("config.json", '"threshold": 0.5', '"threshold": 0.25'),
], ids=lambda change: getattr(change, "__name__", "text"))
def test_whatever_was_changed_is_named(place, change):
    name = change(place)
    outcome = verify(place)
    lines = outcome.stderr.splitlines()
    assert outcome.returncode == 2 and lines[-1].startswith("error: ")
    assert any(name in line for line in lines), outcome.stderr
    assert all(line.startswith("wrong: ") for line in lines[:-1]) and "Traceback" not in outcome.stderr


def test_a_picture_of_the_same_size_and_time_is_named(place):
    file = sorted((place / "data" / ISIC_IMAGES).iterdir())[0]
    before, bytes_before = file.stat(), file.read_bytes()
    file.write_bytes(bytes_before[:-10] + bytes(10))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    outcome = verify(place)
    assert outcome.returncode == 2 and f"{file.name} is another file than the one that was decoded" in outcome.stderr


def test_without_its_cache_the_files_are_compared_with_the_fingerprint(place):
    shutil.rmtree(place / "cache")
    assert verify(place).returncode == 0
    exchange_picture(place)
    outcome = verify(place)
    assert outcome.returncode == 2 and "are others than those of the run" in outcome.stderr


def test_maps_that_are_all_right_but_of_another_mask(place):
    """Maps sealed anew are still compared with the masks of the images."""
    from experiment.map_files import read_maps, write_maps

    (path, *_) = sorted((place / "run" / "uncertainty_maps" / "test").iterdir())
    maps = read_maps(path)
    maps["true_mask"] = 1 - maps["true_mask"]
    arrays = {name: values for name, values in maps.items() if isinstance(values, np.ndarray)}
    write_maps(path, arrays, maps["empty_cams"], maps["identity"], fusion=maps["fusion"], pass_dice=maps["pass_dice"])
    outcome = verify(place)
    assert outcome.returncode == 2 and f"{path.name}: true_mask is not the mask of the image" in outcome.stderr


def test_several_trainings_are_verified_one_by_one(tiny, tmp_path):
    flags = ("--data", tiny, "--results", "run", "--cache", "cache", *TINY_FLAGS, "--epochs", 1)
    outcome = command(*flags, "--trainings", 2, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert verify(tmp_path).returncode == 0
    path = tmp_path / "run" / "seed-43" / "per_image.csv"
    path.write_text(path.read_text().replace("0.", "0.1", 1))
    outcome = verify(tmp_path)
    assert outcome.returncode == 2 and "seed-43/per_image.csv was changed" in outcome.stderr


def test_what_is_not_finished_cannot_be_verified(tmp_path):
    outcome = command("--results", "run", "--verify", cwd=tmp_path)
    assert outcome.returncode == 2 and "run holds no finished run (no metrics.json)" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_a_sealed_record_of_another_run_is_named(place):
    path = place / "run" / "config.json"
    record = json.loads(path.read_text())
    write_sealed(path, {**record, "decides": {**record["decides"], "passes": 9}})
    assert "config.json was changed after the run wrote it" in verify(place).stderr
