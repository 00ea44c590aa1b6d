"""Too little memory, too few threads or open files: one line with the stage and what to lower."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from torch.utils.data import DataLoader

from runtime.errors import UserError
from runtime.loading import loaded
from runtime.resources import naming_shortage, shortage

OF_MEMORY = (
    MemoryError(), MemoryError("Unable to allocate 9.09 TiB for an array with shape (1000,)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("could not create a primitive"), RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.OutOfMemoryError("CUDA out of memory."), OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
)


@pytest.mark.parametrize("error", OF_MEMORY, ids=str)
def test_no_memory_is_one_line_with_the_stage_and_what_to_lower(error):
    assert shortage(error) == "memory"
    with pytest.raises(UserError, match="^training: not enough memory.*; lower --batch-size; what is finished is kept"), \
            naming_shortage("training", "lower --batch-size"):
        raise error


@pytest.mark.parametrize(("error", "what"), [
    (OSError(errno.EMFILE, "Too many open files"), "open files"), (OSError("[Errno 24] Too many open files: 'x'"), "open files"),
    (RuntimeError("received 0 items of ancdata"), "open files"), (RuntimeError("can't start new thread"), "threads"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "processes or threads"),
])
def test_other_shortages(error, what):
    assert shortage(error) == what
    with pytest.raises(UserError, match=f"^stage: not enough {what}.*raise the limit"), naming_shortage("stage", "nothing"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), OSError(errno.ENOENT, "No such file"),
                                   ValueError("memory"), UserError("out of memory"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    assert shortage(error) is None
    with pytest.raises(type(error)) as raised, naming_shortage("stage", "nothing"):
        raise error
    assert raised.value is error


def test_the_inner_stage_is_named():
    @naming_shortage("outer", "this")
    def work():
        with naming_shortage("inner", "that"):
            raise MemoryError

    with pytest.raises(UserError, match="^inner: not enough memory; that;"):
        work()


# ---------------------------------------------------------------- whole commands


def limited(kind, limit, *arguments, cwd):
    """Run main.py under a limit of the system."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=120, preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
    )


def one_line_of(done):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("count", [12, 16, 20])
def test_helpers_without_open_files(count, tiny, tmp_path):
    done = limited(resource.RLIMIT_NOFILE, count, "--data", tiny, *TINY_FLAGS, "--workers", 2, cwd=tmp_path)
    assert "2 data-loading processes need" in one_line_of(done) and f"and {count} are allowed" in one_line_of(done)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_a_training_without_memory(tiny, tmp_path):
    flags = (*TINY_FLAGS, "--image-size", 1024, "--width", 64, "--batch-size", 12, "--epochs", 1)
    line = one_line_of(limited(resource.RLIMIT_AS, 4_500 << 20, "--data", tiny, *flags, cwd=tmp_path))
    assert line.startswith("error: training: not enough memory") and "lower --batch-size" in line


def test_a_limit_that_may_be_raised_is_raised(monkeypatch):
    limits = [[20, 1000]]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits[-1]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(list(pair)))
    batches = list(loaded(DataLoader(list(range(8)), batch_size=4, num_workers=2)))  # type: ignore[arg-type]
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]] and limits[-1] == [1000, 1000]
