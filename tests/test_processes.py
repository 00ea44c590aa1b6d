"""One process against two: the same batches, batch norm, dropout, weights, maps and numbers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, command
from torch import nn

from processes import Processes, RowDropout, process_group, with_group_batch_norm, with_row_dropout
from storage import FolderLock, UserError


def torchrun(count: int, *arguments: object, cwd: Path) -> subprocess.Popen:
    """Start main.py in ``count`` processes, as the README says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", f"--master-port={port}",
         str(ROOT / "main.py"), *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


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
        del part["minutes"]
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
    assert "terminated; finished epochs and maps are kept" in err or "Signal 9 (SIGKILL)" in err
    epochs = len(log.read_text().splitlines()) - 1
    assert 1 <= epochs < 60
    resumed = command(*common, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert log.read_text().splitlines()[epochs].split(",")[0] == str(epochs)
    assert (tmp_path / "run" / "metrics.json").is_file()


# ---------------------------------------------------------------- the parts


def test_a_folder_in_use_is_one_line_from_all_processes(tiny, tmp_path):
    with FolderLock(tmp_path / "run"):
        together = torchrun(2, "--data", tiny, "--results", tmp_path / "run", *FLAGS, cwd=tmp_path)
        complaint = together.communicate(timeout=300)[1]
    assert together.returncode != 0
    assert complaint.count("is in use by another run") == 1 and "broadcast" not in complaint
    assert "main.py\", line" not in complaint  # no traceback of ours; torchrun writes its own


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu") as group:
        assert (group.rank, group.world, group.device) == (0, 1, torch.device("cpu"))
        assert group.shard([1, 2, 3]) == [1, 2, 3]
        assert group.shared(lambda: 5) == 5
        assert group.gathered("x") == ["x"]
    assert Processes(1, 3, torch.device("cpu")).shard(list(range(8))) == [1, 4, 7]


def test_rows_of_a_shared_dropout_mask_are_those_of_the_whole():
    x = torch.ones(7, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    site = nn.Sequential(nn.Dropout(0.3)).train()
    torch.manual_seed(1)
    native = site(x)
    (row_site,) = with_row_dropout(site)
    assert isinstance(row_site, RowDropout)
    torch.manual_seed(1)
    whole = row_site(x)
    torch.testing.assert_close(whole, native)
    torch.manual_seed(1)
    row_site.rows, row_site.total = slice(2, 5), 7
    torch.testing.assert_close(row_site(x[2:5].contiguous(memory_format=torch.channels_last)), whole[2:5])
    site.eval()
    assert row_site(x) is x


def test_group_batch_norm_of_one_is_pytorch_s(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        with_group_batch_norm(ours, Processes(0, 2, torch.device("cpu")))
        assert type(ours) is not nn.BatchNorm2d
        x = torch.randn(4, 3, 5, 6)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.randn(4, 3, 5, 6)
        for _ in range(3):
            (ours(one) * weight).sum().backward()
            (theirs(two) * weight).sum().backward()
        torch.testing.assert_close(one.grad, two.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    finally:
        dist.destroy_process_group()


def test_several_processes_do_not_share_metal(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("processes.resolve_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="cannot share Metal"), process_group("auto"):
        pass
