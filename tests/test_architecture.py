"""What each of the six scripts may import; between the packages import-linter watches (pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"runtime", "isic", "inference", "evaluation", "experiment", "reporting"}
MAY_IMPORT = {
    "model": set(),
    "dataset": {"isic", "runtime"},
    "uncertainty": {"model", "inference"},
    "train": {"model", "dataset", "isic", "evaluation", "experiment", "runtime"},
    "visualize": {"model", "dataset", "uncertainty", *PACKAGES},
    "main": {"model", "dataset", "uncertainty", "train", "visualize", *PACKAGES},
}


def imported(path: Path) -> set[str]:
    """The rooms and scripts that a file names in an import, wherever that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
    return found & (PACKAGES | MAY_IMPORT.keys())


def test_a_forbidden_import_would_be_found(tmp_path):
    (tmp_path / "x.py").write_text("import os\ndef f():\n    from evaluation.fusion import Fusion\nimport train, numpy\n")
    assert imported(tmp_path / "x.py") == {"evaluation", "train"}


@pytest.mark.parametrize("script", MAY_IMPORT)
def test_scripts_import_what_lies_below_them(script):
    assert imported(ROOT / f"{script}.py") <= MAY_IMPORT[script]
