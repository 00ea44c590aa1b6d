"""What stands at the top: six scripts, each read in one sitting."""

from __future__ import annotations

import pytest
from conftest import ROOT

#: The most lines of each.
LINES = {"main.py": 230, "uncertainty.py": 480, "visualize.py": 350, "train.py": 350, "dataset.py": 350, "model.py": 350}


def test_six_scripts_stand_at_the_top_and_nothing_else():
    assert {path.name for path in ROOT.glob("*.py")} == LINES.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_script_is_read_in_one_sitting(name):
    count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert count <= LINES[name], f"{name} has {count} lines"
