"""All states that a power loss may leave of each kind of run: started again, each ends like an undisturbed run.

    python -m pytest -n 0 -s tests/faults/test_every_power_loss.py
"""

from __future__ import annotations

import itertools

import pytest
from conftest import write_pairs
from crash_model import tree_hash
from power_loss import SCENARIOS, check_states, record

#: Distinct states of all kinds together, at least.
STATES = 1_000
found: dict[str, int] = {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_state(name, tmp_path):
    data = write_pairs(tmp_path / "data", 12)
    recording = record(SCENARIOS[name], data, tmp_path / "disk")
    # leftovers of files that were being written are removed by their names alone
    distinct = {
        tree_hash({path: content for path, content in state.tree.items() if not path.endswith(".partial")})
        for state in recording.states
    }
    tried = itertools.count(1)
    check_states(
        SCENARIOS[name], data, tmp_path / "disk", recording, recording.states,
        lambda: print(f"\r{name}: {next(tried)} of {len(recording.states)}", end="", flush=True),
    )
    found[name] = len(recording.states)
    count = f"{len(recording.states)} states, {len(distinct)} of them in more than leftovers"
    print(f"\n{name}: {len(recording.log)} changes, {count}")
    assert len(found) < len(SCENARIOS) or sum(found.values()) >= STATES
