"""Runs that are killed at random moments of every stage, with one and two processes, with and without data-loading helpers.

    KILLS=200 python -m pytest -n 0 -s tests/faults/test_kills.py

A chain of kills, one in each stage, ends with a run that is let through and must have left what an undisturbed one leaves.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from test_interruption import FLAGS, _await, _end, _state, partials, reference, same, start  # noqa: F401 - fixtures

#: Kills of all kinds together.
KILLS = int(os.environ.get("KILLS", "200"))
#: What is waited for in each stage, and how long at most after it.
STAGES = {
    "training": ("weights/*", 0.15), "maps": ("uncertainty_maps/*/*", 0.1), "evaluation": (None, 0.8),
    "drawing": ("figures/*", 0.3),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Seconds within which a run must have ended after a signal to one of its processes.
PATIENCE = 40
KINDS = [(processes, workers) for processes in (1, 2) for workers in (0, 2)]
done: Counter = Counter()


def _start_all(start, processes: int, workers: int, root: Path, data: Path) -> list:  # noqa: F811
    """Start a run of one process, or of several as torchrun would."""
    flags = ("--data", data, "--results", root / "run", "--cache", root / "cache", *FLAGS, "--workers", workers, "--amp", "fp32")
    if processes == 1:
        return [start(*flags)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(*flags, environment={**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(processes)]


def _ended(running: list) -> list[str]:
    """Wait for all processes of a run; returns what they printed."""
    deadline = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(deadline - time.monotonic(), 0.1))
    left = [process for process in running if process.exitcode is None]
    for process in left:
        process.kill()
        process.join()
    assert not left, f"{len(left)} of {len(running)} processes did not end within {PATIENCE} s"
    return [_end(process) for process in running]


def _kill(rng: random.Random, running: list, root: Path, stage: str, signum: int) -> bool:
    """Send a signal in a stage to one process, or as a terminal does to all; whether it arrived before the end."""
    pattern, delay = STAGES[stage]
    run = root / "run"
    if pattern is None:
        _await(lambda: len(list(run.glob("uncertainty_maps/*/*.npz"))) == 8, running[0])
    else:
        before = _state(run, pattern)
        _await(lambda: _state(run, pattern) != before, running[0])
    time.sleep(rng.uniform(0, delay))
    targets = running if rng.random() < 0.5 else [rng.choice(running)]
    for process in targets:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(process.pid, signum)
    return True


def _tracebacks(texts: list[str], running: list, signum: int) -> list[str]:
    """What the processes printed that were not killed outright, where it is more than lines."""
    return [text for text, process in zip(texts, running) if process.exitcode != -signal.SIGKILL and "Traceback" in text]


@pytest.fixture(scope="module")
def undisturbed(start, tiny, tmp_path_factory):  # noqa: F811
    """Folders of undisturbed runs by the number of processes."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"undisturbed{processes}")
        running = _start_all(start, processes, 0, folders[processes], tiny)
        texts = _ended(running)
        assert [process.exitcode for process in running] == [0] * processes, texts
    return folders


@pytest.mark.parametrize(("processes", "workers"), KINDS)
def test_kills(start, undisturbed, tiny, tmp_path, processes, workers):  # noqa: F811
    rng, faults, kills, chain = random.Random(f"{processes} {workers}"), [], 0, 0
    while kills < KILLS / len(KINDS):
        root = tmp_path / str(chain)
        for stage in STAGES:
            signum = SIGNALS[(chain + kills) % 3]
            running = _start_all(start, processes, workers, root, tiny)
            _kill(rng, running, root, stage, signum)
            where = f"chain {chain}, {signal.Signals(signum).name} in {stage}"
            try:
                texts = _ended(running)
            except AssertionError as error:
                faults.append(f"{where}: {error}")
                continue
            codes = [process.exitcode for process in running]
            if any(codes):
                kills += 1
                done[processes, workers, stage, signal.Signals(signum).name] += 1
            if tracebacks := _tracebacks(texts, running, signum):
                faults.append(f"{where}: exit codes {codes}\n{tracebacks[0][-1500:]}")
        running = _start_all(start, processes, workers, root, tiny)
        texts = _ended(running)
        if any(process.exitcode for process in running):
            faults.append(f"chain {chain} did not get through: {texts}")
        else:
            try:
                same(root / "run", undisturbed[processes] / "run")
                assert partials(root) == []
            except AssertionError as error:
                faults.append(f"chain {chain} ended otherwise: {error}")
        chain += 1
    print(f"\n{processes} processes, {workers} helpers: {kills} kills in {chain} chains, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    if KILLS >= 200 and len({key[:2] for key in done}) == len(KINDS):
        _check_stages_and_signals()


def _check_stages_and_signals() -> None:
    """After the last kind of a whole run: every stage and every signal was met."""
    for place, names in ((2, set(STAGES)), (3, {signum.name for signum in SIGNALS})):
        assert {key[place] for key in done} == names
    print("\nkills by stage and signal:", dict(Counter((key[2], key[3]) for key in done.elements())))
