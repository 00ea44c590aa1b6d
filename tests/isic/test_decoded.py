"""Decoded pairs while a run uses them: a cache that changes meanwhile is noticed, never the end of the process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_pairs

from dataset import batches
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from runtime.errors import UserError


@pytest.fixture
def pairs(tmp_path):
    return decode_pairs(find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4))), 32, tmp_path / "cache")


def test_a_cache_that_is_cut_short_is_one_line(pairs):
    os.truncate(pairs.records.path, 2 * pairs.records.length + 100)
    good = [id for id in pairs.ids if pairs.slots[id] < 2]
    for id in good:
        assert pairs.pair(id)[1].any()
    (cut, gone) = sorted(set(pairs.ids) - set(good), key=pairs.slots.get)
    for id in (cut, gone):
        with pytest.raises(UserError, match=f"ends before the decoded image {id}: .*; run the same command again"):
            pairs.image(id)
    with pytest.raises(UserError, match="ends before"):
        pairs.check()


@pytest.mark.parametrize("fill", [b"\0", b"\x80"])
def test_a_cache_that_is_overwritten_is_one_line_and_no_number(pairs, fill):
    with open(pairs.records.path, "r+b") as stream:
        stream.seek(pairs.slots[pairs.ids[1]] * pairs.records.length + 17)
        stream.write(fill * 40)
    assert pairs.mask(pairs.ids[0]).any()
    with pytest.raises(UserError, match=f"does not hold any more the decoded image {pairs.ids[1]}"):
        list(batches(pairs, pairs.ids, 2, torch.device("cpu")))


def test_a_cache_that_is_replaced_is_not_this_run_s(pairs):
    before = pairs.pair(pairs.ids[2])
    os.unlink(pairs.records.path)
    pairs.records.path.write_bytes(b"another")
    after = pairs.pair(pairs.ids[2])
    assert all(np.array_equal(one, two) for one, two in zip(before, after))
    received = pickle.loads(pickle.dumps(pairs))  # a process that is started afresh finds the other one
    with pytest.raises(UserError, match="ends before"):
        received.check()
    os.unlink(pairs.records.path)
    with pytest.raises(UserError, match="cannot read the cache .*pairs.uint8: No such file"):
        pickle.loads(pickle.dumps(pairs)).check()


def test_helpers_report_the_same_line(pairs, tmp_path):
    code = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "from runtime.errors import UserError\n"
        "from train import Training, EpochBatches\n"
        "from runtime.config import Config\n"
        "from runtime.processes import ProcessGroup\n"
        "if __name__ == '__main__':\n"
        "    pairs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "    config = Config(image_size=32, width=2, batch_size=2, augment='none', workers=2)\n"
        "    training = Training(config, pairs, pairs.ids, ProcessGroup(0, 1, torch.device('cpu')))\n"
        "    try:\n"
        "        training.run_epoch(0, lambda count, note: None, '', '')\n"
        "    except UserError as error:\n"
        "        print('line:', error)\n"
    )
    (tmp_path / "go.py").write_text(code)
    (tmp_path / "pairs.pickle").write_bytes(pickle.dumps(pairs))
    os.truncate(pairs.records.path, 100)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "go.py", "pairs.pickle"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith(f"line: {pairs.records.path} ends before the decoded image "), done.stdout + done.stderr
    assert "Traceback" not in done.stdout and done.stdout.count("\n") == 1
