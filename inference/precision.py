"""What "auto" stands for, and the switches for the precision of float32 arithmetic, which are PyTorch's and process-wide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.devices import reproducible_convolutions


def automatic_precision(device: torch.device, fast: bool) -> str:
    """The precision of the maps that "auto" stands for.

    fp16 where it was measured to change nothing that matters, and pays: for the U-Net's algebra on CUDA. Its gradients
    keep their size from layer to layer; those of another network may fall below what fp16 can hold, and nobody would know.

    Args:
        device: that computes.
        fast: whether the algebra of :mod:`inference.unet_passes` does.
    """
    return "fp16" if fast and device.type == "cuda" else "fp32"


@contextmanager
def float32_convolutions(precision: str) -> Iterator[None]:
    """Within: float32 convolutions in a given precision, matrix products in true float32; put back afterwards.

    On CUDA PyTorch's own default lets convolutions round their inputs to TF32's ten bits. Within, they are also
    reproducible: see :func:`runtime.devices.reproducible_convolutions`. PyTorch's older switch, ``allow_tf32``, says the
    same as the newer ones, as reading it raises an error otherwise.

    Args:
        precision: "ieee" for true float32, or "tf32", which changes nothing on a CPU.
    """
    backends: Any = torch.backends
    older: bool | None
    values: list[tuple[Any, object]]
    if hasattr(backends.cudnn, "conv"):  # the switches of PyTorch 2.9 and later
        name, older = "fp32_precision", _cudnn_allows_tf32(backends)
        values = [(backends.cudnn.conv, precision), (backends.cudnn.rnn, precision), (backends.cuda.matmul, "ieee")]
        values += [(getattr(backends.mkldnn, kind), "ieee") for kind in ("conv", "matmul")]
    else:
        name, older = "allow_tf32", None
        values = [(backends.cudnn, precision == "tf32"), (backends.cuda.matmul, False)]
    before = [getattr(switch, name) for switch, _ in values]
    try:
        if older is not None:  # first, as it changes the newer ones as well
            backends.cudnn.allow_tf32 = precision == "tf32"
        for switch, value in values:
            setattr(switch, name, value)
        with reproducible_convolutions():
            yield
    finally:
        if older is not None:
            backends.cudnn.allow_tf32 = older
        for (switch, _), value in zip(values, before):
            setattr(switch, name, value)


def _cudnn_allows_tf32(backends: Any) -> bool:
    """PyTorch's older switch of cuDNN, which cannot be read where it contradicts the newer ones."""
    try:
        return bool(backends.cudnn.allow_tf32)
    except RuntimeError:
        return bool(backends.cudnn.conv.fp32_precision != "tf32")
