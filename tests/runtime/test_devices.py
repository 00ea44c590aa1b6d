"""Which device computes, and in which precision it trains."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from runtime.devices import autocast, reproducible_convolutions, resolve_device, sent, training_precision
from runtime.errors import UserError

CPU = torch.device("cpu")


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is available here"):
        resolve_device("cuda:1")
    for name in ("abacus", "meta"):
        with pytest.raises(UserError, match="must be auto, cpu"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:2: only 2 CUDA devices are here"):
        resolve_device("cuda:2")


def test_metal_comes_after_cuda_and_before_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, chosen in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert resolve_device("auto") == torch.device(chosen)
    with pytest.raises(UserError, match="no MPS device is available here"):
        resolve_device("mps")


def test_precision_of_training(monkeypatch):
    assert training_precision("fp16", CPU) == torch.float16
    assert training_precision("bf16", CPU) == torch.bfloat16
    assert training_precision("fp32", torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert training_precision("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert training_precision("auto", CPU) == torch.bfloat16


@pytest.mark.parametrize(("major", "precision"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_precision_on_cuda_is_bf16_where_it_is_native(monkeypatch, major, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert training_precision("auto", torch.device("cuda")) == precision


def test_autocast_is_nothing_for_float32():
    assert isinstance(autocast(CPU, torch.float32), nullcontext)
    x = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(CPU, precision):
            assert (x @ x).dtype == precision


def test_convolutions_are_reproducible_within_and_as_before_afterwards():
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with pytest.raises(ZeroDivisionError), reproducible_convolutions():
        assert cudnn.deterministic and cudnn.benchmark == before[1]
        raise ZeroDivisionError
    assert (cudnn.deterministic, cudnn.benchmark) == before


def test_what_is_sent_to_the_cpu_is_what_was_given():
    x = torch.arange(4)
    assert sent(x, torch.device("cpu")) is x
