"""The switches for the precision of float32 arithmetic, which are PyTorch's and process-wide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_convolutions(precision: str) -> Iterator[None]:
    """Within: float32 convolutions in a given precision, matrix products in true float32; put back afterwards.

    On CUDA PyTorch's own default lets convolutions round their inputs to TF32's ten bits.

    Args:
        precision: "ieee" for true float32, or "tf32", which changes nothing on a CPU.
    """
    backends = torch.backends
    values: list[tuple[Any, object]]
    if hasattr(backends.cudnn, "conv"):  # the switches of PyTorch 2.9 and later
        name = "fp32_precision"
        values = [(backends.cudnn.conv, precision), (backends.cudnn.rnn, precision), (backends.cuda.matmul, "ieee")]
        values += [(getattr(backends.mkldnn, kind), "ieee") for kind in ("conv", "matmul")]
    else:
        name = "allow_tf32"
        values = [(backends.cudnn, precision == "tf32"), (backends.cuda.matmul, False)]
    before = [getattr(switch, name) for switch, _ in values]
    try:
        for switch, value in values:
            setattr(switch, name, value)
        yield
    finally:
        for (switch, _), value in zip(values, before):
            setattr(switch, name, value)
