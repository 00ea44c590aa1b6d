"""A process of a group that fails alone: all end soon, with one line."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
from conftest import TINY_FLAGS, command
from launched import Ranks

from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders

#: From the failure to the end of all; 2 to 4 on an idle machine, and 60 to 300 where a collective call waits in vain.
SECONDS = 30
FLAGS = (*TINY_FLAGS, "--amp", "fp32", "--batch-size", 6)
#: Marks the moment of the failure, for the clock.
MARK = "open('failed', 'w').close()\n"
#: Fails in the second epoch, in the middle of what the processes do together.
IN_TRAINING = """
import train
step = train.Training._step
def failing(self, epoch, number, *rest):
    if (epoch, number) == (1, 1):
        open('failed', 'w').close()
        {0}
    return step(self, epoch, number, *rest)
train.Training._step = failing
"""


def end_of(ranks, tmp_path, seconds=120):
    """How all ended, and the seconds from the mark to the last of them."""
    ended = ranks.wait(seconds)
    return ended, max(one.at for one in ended) - (os.stat(tmp_path / "failed").st_mtime - time.time() + time.monotonic())


def lines_of(ended):
    lines = [line.replace("[rank1]: ", "") for one in ended for line in one.err.splitlines()]  # PyTorch's mark
    return [line for line in lines if line.startswith(("error", "Traceback", "stopped"))]


@pytest.fixture
def flags(tiny, tmp_path):
    """Of a run whose images are decoded already."""
    return ("--data", tiny, "--cache", "cache", "--results", "run", *FLAGS)


CASES = {
    "no device": (1, "import runtime.processes\nfrom runtime.errors import UserError\n"
                  "def none(name):\n    open('failed', 'w').close()\n    raise UserError('--device cuda: no CUDA device')\n"
                  "runtime.processes.resolve_device = none\n", "error: process 1: --device cuda: no CUDA device"),
    "bad data": (1, IN_TRAINING.format("from runtime.errors import UserError; raise UserError('the disk is broken')"),
                 "error: process 1: the disk is broken"),
    "no memory": (1, IN_TRAINING.format("raise RuntimeError(\"can't allocate memory\")"),
                  "error: process 1: training: not enough memory"),
    "killed in training": (1, IN_TRAINING.format("os.kill(os.getpid(), 9)"), "error: process 1 ended without a word"),
    "main killed in training": (0, IN_TRAINING.format("os.kill(os.getpid(), 9)"), "error: process 0 ended without a word"),
    "main fails": (0, IN_TRAINING.format("from runtime.errors import UserError; raise UserError('the disk is broken')"),
                   "error: the disk is broken"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_failure_of_one_ends_all_with_one_line(case, flags, tmp_path):
    rank, code, line = CASES[case]
    ended, seconds = end_of(Ranks(2, *flags, cwd=tmp_path, code={rank: code}), tmp_path)
    assert seconds < SECONDS, ended
    assert [one[: len(line)] for one in lines_of(ended)] == [line], ended
    assert {one.code for one in ended} <= {2, -signal.SIGKILL}
    assert ended[1 - rank].code == 2


def test_a_fault_of_the_program_is_one_traceback_and_one_line(flags, tmp_path):
    ended, seconds = end_of(Ranks(2, *flags, cwd=tmp_path, code={1: IN_TRAINING.format("1 / 0")}), tmp_path)
    assert seconds < SECONDS, ended
    assert lines_of(ended) == ["error: process 1: ZeroDivisionError: division by zero", "Traceback (most recent call last):"]
    assert [one.code for one in ended] == [2, 1]


def test_after_the_failure_of_one_the_same_command_goes_on(flags, tmp_path):
    code = {1: IN_TRAINING.format("os.kill(os.getpid(), 9)")}
    Ranks(2, *flags, cwd=tmp_path, code=code).wait(120)
    log = (tmp_path / "run" / "training_log.csv").read_text()
    assert len(log.splitlines()) == 2  # the first epoch
    done = command(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "training_log.csv").read_text().startswith(log)


@pytest.mark.parametrize(
    ("signum", "told"), [(signal.SIGINT, (0, 1)), (signal.SIGINT, (1,)), (signal.SIGTERM, (0,)), (signal.SIGTERM, (1,))]
)
def test_a_signal_is_heard_inside_a_collective_call(signum, told, flags, tmp_path):
    busy = MARK + (
        "import experiment.inputs, time\n"
        "def slow(*rest):\n"
        "    open('busy', 'w').close()\n"
        "    for _ in range(1000): time.sleep(0.1)\n"
        "experiment.inputs.find_source = slow\n"
    )
    ranks = Ranks(2, *flags, cwd=tmp_path, code={0: busy})
    while not (tmp_path / "busy").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # the other waits for the main process by now
    started = time.monotonic()
    for rank in told:
        ranks.processes[rank].send_signal(signum)
    ended = ranks.wait(60)
    assert max(one.at for one in ended) - started < SECONDS, ended
    assert [one.code for one in ended] == [128 + signum] * 2, ended
    assert lines_of(ended) == [f"stopped by {signum.name}; the same command goes on from there"], ended


def test_one_that_never_starts_keeps_nobody_from_being_stopped(flags, tmp_path):
    ranks = Ranks(2, *flags, cwd=tmp_path, code={1: MARK + "os.kill(os.getpid(), 9)"})
    ranks.processes[1].wait(60)
    time.sleep(6)  # the main process has come to wait for it
    started = time.monotonic()
    ranks.processes[0].send_signal(signal.SIGTERM)
    ended = ranks.wait(60)
    assert ended[0].at - started < SECONDS and ended[0].code == 143
    assert lines_of(ended) == ["stopped by SIGTERM; process 1 had not started; the same command goes on from there"], ended


@pytest.mark.parametrize("other", ["lacks the files", "sees other files"])
def test_processes_that_see_other_data_are_found_out_before_training(other, tiny, flags, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if other == "sees other files":
        decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path / "cache")
        shutil.copytree(tmp_path / "cache", elsewhere / "cache")
        records = next(elsewhere.glob("cache/*/pairs.uint8"))
        records.write_bytes(records.read_bytes()[::-1])
    ended, _ = end_of(Ranks(2, *flags, cwd=tmp_path, code={1: f"{MARK}os.chdir('elsewhere')"}), tmp_path)
    what = {"lacks the files": "cannot read the cache", "sees other files": "does not hold any more the decoded image"}[other]
    assert len(lines_of(ended)) == 1 and lines_of(ended)[0].startswith("error: process 1: ") and what in lines_of(ended)[0]
    assert [one.code for one in ended] == [2, 2]
    assert not (tmp_path / "run" / "weights").exists()
