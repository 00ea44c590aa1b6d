"""Whole runs under torchrun: the weights, maps and numbers of one process, one error line, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, command
from launched import torchrun

from runtime.lock import FolderLock
from runtime.records import WALL_CLOCK

FLAGS = (*TINY_FLAGS, "--amp", "fp32", "--batch-size", 6)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The same experiment with one process and with two."""
    folder = tmp_path_factory.mktemp("processes")
    common = ("--data", tiny, "--cache", folder / "cache", *FLAGS)
    alone = command(*common, "--results", folder / "one", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(2, *common, "--results", folder / "two", cwd=folder)
    out, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    assert out.count("metrics  ") == 1  # one process prints
    assert "FutureWarning" not in err
    return folder / "one", folder / "two"


def test_two_processes_train_the_same_weights_up_to_summation_order(runs):
    one, two = (torch.load(run / "weights" / "best_model.pth", weights_only=True)["model"] for run in runs)
    assert one.keys() == two.keys()
    for name in one:
        # Adam divides by a running root mean square: where a gradient is all rounding error it amplifies it
        assert (one[name].float() - two[name].float()).abs().max() < 2e-3, name
    logs = [np.genfromtxt(run / "training_log.csv", delimiter=",", names=True) for run in runs]
    np.testing.assert_allclose(logs[0]["train_loss"], logs[1]["train_loss"], rtol=1e-3)


def test_two_processes_make_the_very_same_maps_and_numbers(runs, tiny, tmp_path):
    # the maps depend on the weights, so both make those of the same weights
    one, two = runs
    for path in [*(two / "uncertainty_maps").rglob("*.npz"), two / "metrics.json", two / "calibration.npz"]:
        path.unlink()
    for name in ("best_model.pth", "training_state.pth"):
        (two / "weights" / name).write_bytes((one / "weights" / name).read_bytes())
    together = torchrun(2, "--data", tiny, "--cache", two.parent / "cache", *FLAGS, "--results", two, cwd=tmp_path)
    _, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    paths = sorted((one / "uncertainty_maps").rglob("*.npz"))
    assert len(paths) == 8
    for path in paths:
        assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for part in metrics:
        for name in WALL_CLOCK:
            del part[name]
    assert metrics[0] == metrics[1]


def test_a_killed_rank_ends_the_run_which_resumes_with_another_number_of_ranks(tiny, tmp_path):
    where = ("--data", tiny, "--cache", tmp_path / "cache", "--results", tmp_path / "run")
    common = (*where, *FLAGS, "--epochs", 60, "--patience", 60)
    together = torchrun(2, *common, cwd=tmp_path)
    log = tmp_path / "run" / "training_log.csv"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(together.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = together.communicate(timeout=120)
    assert together.returncode != 0
    assert err.count("error: process 1 ended without a word (killed, or out of memory?); what is finished is kept") == 1
    assert "main.py\", line" not in err and "Exception raised from" not in err
    epochs = len(log.read_text().splitlines()) - 1
    assert 1 <= epochs < 60
    resumed = command(*common, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert log.read_text().splitlines()[epochs].split(",")[0] == str(epochs)
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_folder_in_use_is_one_line_from_all_processes(tiny, tmp_path):
    with FolderLock(tmp_path / "run"):
        together = torchrun(2, "--data", tiny, "--results", tmp_path / "run", *FLAGS, cwd=tmp_path)
        complaint = together.communicate(timeout=300)[1]
    assert together.returncode != 0
    assert complaint.count("is in use by another run") == 1 and "broadcast" not in complaint
    assert "main.py\", line" not in complaint  # no traceback of ours; torchrun writes its own


def test_several_trainings_are_run_by_all_processes_and_pooled_by_one(tiny, tmp_path):
    flags = ("--data", tiny, "--cache", tmp_path / "cache", "--results", tmp_path / "both", *FLAGS, "--epochs", 1)
    together = torchrun(2, *flags, "--trainings", 2, cwd=tmp_path)
    said, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert [entry["seed"] for entry in metrics["pooled"]] == [42, 43]
    assert said.count(metrics["verdict"]) == 1
    for name in ("report.html", "seed-42/report.html", "seed-43/metrics.json"):
        assert (tmp_path / "both" / name).is_file(), name
