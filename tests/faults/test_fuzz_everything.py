"""50,000 damaged and odd files of every kind that is read.

    FUZZ=50000 python -m pytest -n 0 -s tests/faults/test_fuzz_everything.py

FUZZ_SEED chooses other inputs; the first input of each complaint is kept in the folder that FUZZ_KEEP names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzzing import fuzz, kinds
from test_fuzzing import KINDS

INPUTS = int(os.environ.get("FUZZ", "50000"))
SEED = os.environ.get("FUZZ_SEED", "0")
KEEP = os.environ.get("FUZZ_KEEP")


@pytest.fixture(scope="module")
def files(finished, tiny, tmp_path_factory):
    return kinds(finished, tiny, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", KINDS)
def test_only_lines_come_out(files, name):
    count = round(INPUTS * files[name].share / sum(kind.share for kind in files.values()))
    faults = fuzz(files[name], count, f"{SEED} {name}", Path(KEEP) / name if KEEP else None)
    print(f"\n{name}: {count} inputs, {sum(map(len, faults.values()))} complaints")
    assert not faults, "\n".join(f"{len(numbers)} times, first {numbers[0]}: {text}" for text, numbers in faults.items())
