"""The script for a machine with a GPU: what it calls wrong, and what it writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    return decode_pairs(find_pairs(*isic_folders(tiny))[:4], 32, tmp_path_factory.mktemp("cache"))


def test_a_device_that_computes_the_same_is_right(pairs):
    step = gpu.compare_with_cpu(None, pairs, CPU, 4, 3)
    assert step.right and "0.0e+00" in step.details and "none" in step.details


@pytest.mark.parametrize("name", ["mean_prediction", "saliency_variance"])
def test_maps_that_deviate_are_wrong(pairs, monkeypatch, name):
    calls = []

    def deviating(*arguments, **options):
        maps, first = gpu_maps(*arguments, **options), len(calls) < 2  # those of the CPU
        calls.append(name)
        return maps if first else maps._replace(**{name: getattr(maps, name) * 1.01})

    gpu_maps = gpu.uncertainty_maps
    monkeypatch.setattr(gpu, "uncertainty_maps", deviating)
    assert not gpu.compare_with_cpu(None, pairs, CPU, 4, 3).right


def test_counts_that_deviate_are_wrong_and_named(pairs, monkeypatch):
    made = []

    class Miscounted:
        def to_arrays(self):
            made.append(self)
            return {"image_count": np.arange(3) + len(made)}

    monkeypatch.setattr(gpu, "count_scores", lambda *arguments: Miscounted())
    step = gpu.compare_with_cpu(None, pairs, CPU, 4, 3)
    assert not step.right and "others: image_count" in step.details


def test_a_command_that_fails_or_takes_too_long_is_wrong(tmp_path):
    runs = gpu.Runs(tmp_path, "cpu")
    assert runs("fails", ["-c", "raise SystemExit(3)"], 60)[0] == 3
    assert runs("hangs", ["-c", "import time; time.sleep(600)"], 0.5)[0] == 124
    code, text, _ = runs("prints", ["-c", "print('a\\n\\nb')"], 60)
    assert code == 0 and gpu.last_line(text) == "b" and (tmp_path / "prints.txt").read_text() == "a\n\nb\n"


def test_the_report_says_what_is_wrong():
    steps = [gpu.Step("one", True, 1.0, "fine"), gpu.Step("two", False, 2.0, "not fine", "- why")]
    lines = gpu.written(steps, CPU, True).splitlines()
    assert "| one | right | 1 | fine |" in lines and "| two | **wrong** | 2 | not fine |" in lines
    assert lines[-3:] == ["## Two", "", "- why"] and "whose times say nothing" in lines[2]


def test_tables_are_taken_from_what_is_printed():
    printed = "noise\ntitle\n\n| a |\n| --- |\n| 1 |\nnoise\n"
    assert gpu.table(printed) == "title\n\n| a |\n| --- |\n| 1 |"


def test_the_tests_that_run_on_the_device_are_there():
    assert all((gpu.ROOT / name).is_file() for name in gpu.TESTS)


def test_the_shell_script_is_one():
    script = Path(gpu.ROOT / "benchmarks" / "gpu.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0 and script.stat().st_mode & 0o100
