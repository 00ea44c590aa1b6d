"""Drawing and reporting load no package that only computing needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "sklearn", "albumentations", "cv2"}
MODULES = sorted(f"reporting.{path.stem}" for path in (ROOT / "reporting").glob("*.py") if path.stem != "__init__")


def loaded_by(code: str) -> set[str]:
    """The packages that a fresh Python has loaded after some code."""
    outcome = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in outcome.stdout.split()}


def test_no_module_of_the_report_loads_pytorch_or_scikit_learn():
    assert len(MODULES) > 10
    found = loaded_by(f"import {', '.join(MODULES)}")
    assert {"reporting", "matplotlib"} <= found
    assert not found & HEAVY


def test_drawing_a_run_does_not_either(saved, tmp_path):
    code = f"""
import shutil
import numpy as np
from experiment.saved_run import load_run
from reporting.run_pictures import draw_run
shutil.copytree({str(saved)!r}, {str(tmp_path / "copy")!r})
paths = draw_run(load_run({str(tmp_path / "copy")!r}), lambda id: np.zeros((24, 24, 3), np.uint8))
assert len(paths) == 14
"""
    assert not loaded_by(code) & HEAVY
