"""What each command loads: a wrong flag is answered without PyTorch, a picture of saved numbers drawn without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

#: Loads a script, calls its ``main`` with the other arguments, and prints its exit code and the packages then loaded.
PROGRAM = """
import importlib, json, sys
script, *arguments = sys.argv[1:]
try:
    code = importlib.import_module(script).main(arguments)
except SystemExit as error:
    code = error.code
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]))
"""
#: Each takes between a tenth of a second and several seconds to load.
HEAVY = {"torch", "torchvision", "sklearn", "numpy", "matplotlib", "albumentations", "scipy", "PIL"}


def loaded(script: str, *arguments: object, cwd: Path) -> tuple[int, set[str]]:
    """The exit code of a command in a fresh process, and the heavy packages that it loaded."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, script, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )
    assert outcome.returncode == 0, outcome.stderr
    code, names = json.loads(outcome.stdout.splitlines()[-1])
    return code or 0, set(names) & HEAVY


@pytest.mark.parametrize("script", ["main", "visualize"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--wrong-flag", 2)])
def test_help_and_a_wrong_flag_load_nothing_heavy(tmp_path, script, flag, code):
    found, heavy = loaded(script, flag, cwd=tmp_path)
    assert found == code
    assert not heavy & {"torch", "torchvision", "sklearn", "numpy", "matplotlib", "albumentations", "scipy"}


def test_a_flag_out_of_range_loads_nothing_heavy(tmp_path):
    assert loaded("main", "--passes", 1, cwd=tmp_path) == (2, set())
    assert loaded("visualize", "--gallery", "no such rule", cwd=tmp_path) == (2, set())


@pytest.mark.parametrize("flags", [("--summary",), ("--gallery", "best")])
def test_pictures_of_saved_numbers_need_neither_model_nor_scikit_learn(saved, tmp_path, flags):
    run = shutil.copytree(saved, tmp_path / "run")
    code, heavy = loaded("visualize", "--run", run, *flags, cwd=tmp_path)
    assert code == 0
    assert "matplotlib" in heavy and not heavy & {"torch", "torchvision", "sklearn", "albumentations"}


def test_a_case_is_computed_without_what_only_training_needs(finished, tmp_path):
    code, heavy = loaded("visualize", "--run", finished, "--seed", 1, "--output", tmp_path / "x.png", cwd=tmp_path)
    assert code == 0 and (tmp_path / "x.png").is_file()
    assert "torch" in heavy and not heavy & {"torchvision", "sklearn", "albumentations"}
