"""Odd names and numbers on the command lines: one line, no traceback, nothing that waits for ever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, command

from isic.layout import ISIC_IMAGES, ISIC_MASKS, LONGEST_ID
from reporting.style import short_name
from runtime.config import check_text, output_file, parse_config
from runtime.errors import UserError


def refused(*arguments, cwd, script="main.py"):
    outcome = command(*arguments, cwd=cwd, script=script)
    assert outcome.returncode == 2, outcome
    (line,) = (line for line in outcome.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in outcome.stderr
    return line


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("arguments", [
    ("--data", "loop"), ("--results", "loop"), ("--cache", "loop"), ("--weights-from", "loop"), ("--split", "loop"),
    ("--groups", "loop"), ("--images", "loop", "--masks", "loop"), ("--test-data", "loop"),
    ("--test-images", "loop", "--test-masks", "loop"), ("--model", "a:b", "--model-weights", "loop"),
], ids=lambda arguments: arguments[0])
def test_a_link_to_itself_is_one_line(arguments, tiny, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    data = () if {"--data", "--images"} & {*arguments} else ("--data", tiny)
    flags = () if "--model" in arguments else TINY_FLAGS
    assert refused(*data, *arguments, *flags, cwd=tmp_path)


@pytest.mark.parametrize("arguments", [("--pool", "loop", "loop"), ("--maps", "loop", "loop")])
def test_so_is_one_to_pool_or_to_judge(arguments, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in refused(*arguments, "--results", "run", cwd=tmp_path)


def test_a_folder_behind_a_link_whose_name_is_no_text(tiny, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(tiny, folder)
    (tmp_path / "link").symlink_to(folder)
    line = refused("--data", "link", *TINY_FLAGS, cwd=tmp_path)
    assert "the full path of link" in line and r"\udcff, holds bytes that are no text; rename it" in line
    line = refused("--data", tiny, "--test-data", "link", *TINY_FLAGS, cwd=tmp_path)
    assert "holds bytes that are no text" in line


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("value", "what"), [("", "is empty"), ("a\0b", "holds a NUL byte"), ("a\udcff", "holds bytes that are no text")]
)
def test_no_name_at_all_is_one_line(value, what, tmp_path):
    for flag in ("--results", "--data", "--cache", "--data-note", "--split", "--weights-from", "--device"):
        assert refused(flag, value, cwd=tmp_path).startswith(f"error: {flag} ") and what in refused(flag, value, cwd=tmp_path)
    assert what in refused("--maps", "x", value, cwd=tmp_path)
    for flag in ("--id", "--test-set", "--output"):
        assert what in refused(flag, value, cwd=tmp_path, script="visualize.py")
    with pytest.raises(UserError, match=f"^--id .*{what}"):
        check_text("--id", value)


@pytest.mark.parametrize("name", [".", "..", "/", "dir/", "there"])
def test_an_output_that_is_a_folder_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("there")
    with pytest.raises(UserError, match=f"^--output {name} is a folder; give a file in it, such as "):
        output_file(name)
    assert "is a folder" in refused("--output", name, cwd=tmp_path, script="visualize.py")
    assert output_file("there/case.png") == Path("there/case.png")


# ---------------------------------------------------------------- long names


def renamed(tiny, root, name):
    """A copy of the pairs in which the first has another name."""
    shutil.copytree(tiny, root)
    image = min((root / ISIC_IMAGES).iterdir())
    (root / ISIC_MASKS / f"{image.stem}_segmentation.png").rename(root / ISIC_MASKS / f"{name}.png")
    image.rename(root / ISIC_IMAGES / f"{name}.jpg")
    return root


def test_the_longest_id_is_trained_on_mapped_and_drawn(tiny, tmp_path):
    id = "a" * LONGEST_ID
    data = renamed(tiny, tmp_path / "data", id)
    done = command("--data", data, "--results", "run", "--cache", "cache", *TINY_FLAGS, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for flags in ((), ("--overlay",)):
        done = command("--run", "run", "--id", id, "--device", "cpu", *flags, cwd=tmp_path, script="visualize.py")
        assert done.returncode == 0, done.stderr
        assert Path(tmp_path / done.stdout.splitlines()[-1].removeprefix("saved ")).is_file()


def test_a_longer_one_is_one_line(tiny, tmp_path):
    id = "\u0958" * 80  # 240 bytes, and twice as many in Unicode's composed form
    assert "is too long for a file of its maps" in refused(
        "--data", renamed(tiny, tmp_path / "data", id), "--results", "run", *TINY_FLAGS, cwd=tmp_path
    )


def test_names_of_pictures_are_shortened_and_told_apart():
    long = [f"case_{'é' * 130}{end}.png" for end in "ab"]
    short = [short_name(name) for name in long]
    assert short[0] != short[1] and all(len(os.fsencode(name)) <= 200 and name.endswith(".png") for name in short)
    assert short_name("case_ISIC_0000000.png") == "case_ISIC_0000000.png"


# ---------------------------------------------------------------- what blocks


@pytest.mark.parametrize("name", ["config.json", "weights/best_model.pth", "weights/training_state.pth", "metrics.json"])
def test_a_pipe_in_the_place_of_a_file_is_one_line(name, finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    cache = finished.parent / "cache"
    if name != "metrics.json":  # which is written anew
        assert "it is a pipe and not a file" in refused(
            "--data", tiny, "--results", "run", "--cache", cache, *TINY_FLAGS, cwd=tmp_path)
    if name != "weights/training_state.pth":
        line = refused("--run", "run", "--device", "cpu", cwd=tmp_path, script="visualize.py")
        assert "it is a pipe" in line or "unfinished run" in line


def test_pictures_that_link_to_devices_are_refused(tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    image = min((data / ISIC_IMAGES).iterdir())
    for target, what in (("/dev/zero", "is a folder or a device and not a file"), ("/proc/kmsg", "is empty (0 bytes)")):
        image.unlink()
        image.symlink_to(target)
        if os.path.exists(target):
            assert what in refused("--data", data, "--results", "run", *TINY_FLAGS, cwd=tmp_path)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("flags", "line"), [
    (("--lr", "1e38"), "--lr must be at most 1e+30, not 1e+38"), (("--lr", "1e300"), "--lr must be at most"),
    (("--device", "cpu:7"), "--device cpu:7: there is one cpu device; give --device cpu"),
    (("--validation-fraction", "1e-300"), "--validation-fraction must be at least 1e-06, not 1e-300"),
    (("--test-fraction", "1e-300"), "--test-fraction must be at least 1e-06"),
    (("--epochs", "1" + "0" * 400), "--epochs must be at most"), (("--passes", "1" + "0" * 30), "--passes must be at most"),
    (("--batch-size", "1" + "0" * 30), "--batch-size must be at most"), (("--warmup", "1e300"), "--warmup must be at most"),
])
def test_numbers_beyond_all_use_are_one_line(flags, line, tiny, tmp_path):
    assert refused("--data", tiny, *flags, cwd=tmp_path).startswith(f"error: {line}")


def test_the_largest_learning_rate_is_a_number_to_the_optimiser(tiny, tmp_path):
    line = refused("--data", tiny, "--results", "run", *TINY_FLAGS, "--lr", "1e30", cwd=tmp_path)
    assert "training loss is nan" in line or "training loss is inf" in line


def test_the_smallest_fractions_leave_one_image(tmp_path):
    from dataset import split_ids

    config = parse_config(["--validation-fraction", "1e-6", "--test-fraction", "1e-6"], None)
    split = split_ids([f"{i:02}" for i in range(20)], config.test_fraction, config.validation_fraction)
    assert [len(part) for part in split] == [18, 1, 1]
