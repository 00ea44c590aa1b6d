"""Which device computes, in which precision the network is trained on it, and how data get there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:N" or "mps" into a device that is there.

    Raises:
        UserError: the device is unknown or absent.
    """
    mps = getattr(torch.backends, "mps", None)
    has_mps = mps is not None and mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    if device.type != "cuda" and device.index:  # PyTorch takes any number for the one CPU
        raise UserError(f"--device {name}: there is one {device.type} device; give --device {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is available here; use --device auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: only {torch.cuda.device_count()} CUDA devices are here")
    if device.type == "mps" and not has_mps:
        raise UserError(f"--device {name}: no MPS device is available here; use --device auto or cpu")
    return device


def training_precision(name: str, device: torch.device) -> torch.dtype:
    """The type in which the network is evaluated while training; weights and loss stay float32.

    "auto" is bfloat16 where the device multiplies in it natively (CUDA from
    compute capability 8.0, CPUs with AVX-512 BF16 or AMX), float16 on older
    CUDA devices, and float32 elsewhere.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of that type; nothing for float32, about which some devices would warn."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


@contextmanager
def reproducible_convolutions() -> Iterator[None]:
    """Within: cuDNN takes only algorithms that give the same bits each time; put back afterwards.

    ``torch.backends.cudnn.benchmark`` stays as it is, which is off: it takes the algorithm that was fastest in a race, and
    the winner, with its rounding, may be another one in the next process.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    try:
        cudnn.deterministic = True
        yield
    finally:
        cudnn.deterministic = before


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; on its way to CUDA nobody waits, neither for it nor for what is being computed."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
