from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import evaluation

ROOT = Path(__file__).resolve().parents[2]


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def test_every_export_has_a_home_and_comes_from_it():
    homes = {name: module for module, names in evaluation._HOME.items() for name in names}
    assert sorted(homes) == evaluation.__all__ == sorted(evaluation.__all__)
    for name, module in homes.items():
        assert getattr(evaluation, name).__module__ == f"evaluation.{module}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        evaluation.evalute  # noqa: B018


def test_the_package_and_its_names_load_nothing_heavy():
    heavy = {"torch", "numpy", "sklearn", "scipy"}
    assert not loaded_after("import evaluation, evaluation.names") & heavy


def test_scikit_learn_is_loaded_by_the_fits_alone():
    found = loaded_after("import evaluation.protocol, evaluation.study")
    assert "torch" in found and "sklearn" not in found
