"""How the commands use the CPUs: set before PyTorch loads, inherited, and never against the user."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from runtime.cpu import DECIDED_BY, WAITING

#: Runs a script as a command with its other arguments, and prints what the environment was when PyTorch was imported.
PROGRAM = """
import json, os, runpy, sys
names, script, *sys.argv[1:] = json.loads(sys.argv[1]), *sys.argv[2:]

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({key: os.environ.get(key) for key in names}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv[0] = script
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def when_torch_loads(script: str, *arguments: str, **environment: str) -> dict[str, str | None]:
    """The deciding variables when a command first imports PyTorch."""
    clean = {name: value for name, value in os.environ.items() if name not in DECIDED_BY}
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(DECIDED_BY), str(ROOT / script), *arguments],
        env={**clean, **environment}, capture_output=True, text=True, timeout=120,
    )
    assert outcome.returncode == 0 and outcome.stdout, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1])


@pytest.fixture
def arguments(finished, tiny, tmp_path):
    return {
        "main.py": ("--data", str(tiny), "--quick", "--results", str(tmp_path / "results"), "--device", "cpu"),
        "visualize.py": ("--run", str(finished), "--seed", "1", "--output", str(tmp_path / "x.png")),
    }


@pytest.mark.parametrize("script", ["main.py", "visualize.py"])
def test_waiting_threads_sleep_in_every_command_from_before_torch_loads(script, arguments):
    assert when_torch_loads(script, *arguments[script]) == {**dict.fromkeys(DECIDED_BY), **WAITING}


@pytest.mark.parametrize("script", ["main.py", "visualize.py"])
@pytest.mark.parametrize("name,value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")])
def test_what_the_user_set_wins(script, name, value, arguments):
    assert when_torch_loads(script, *arguments[script], **{name: value}) == {**dict.fromkeys(DECIDED_BY), name: value}
