"""Zeroing what dropout drops in one sweep over the memory of a GPU, where the plain operators take eleven.

Imported where Triton is there. The bits are those of :func:`inference.masks.zero_dropped`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements that one program of the grid works on.
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(x: Any, keys: Any, noise: Any, size: Any, bound: Any, block: tl.constexpr) -> None:
    """Row ``program_id(1)`` of x, ``size`` elements in memory order; see :func:`inference.masks._mix`."""
    row = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size
    mixed = tl.load(noise + place, mask=inside, other=0) ^ tl.load(keys + row)
    mixed *= 0x2C1B3C6D
    mixed = mixed ^ ((mixed >> 15) & 0x1FFFF)
    mixed *= 0x297A2D39
    mixed = mixed ^ ((mixed >> 15) & 0x1FFFF)
    here = x + row.to(tl.int64) * size + place
    value = tl.load(here, mask=inside)
    tl.store(here, tl.where(mixed >= bound, value, 0.0), mask=inside)


@torch.library.custom_op("inference::zero_dropped", mutates_args=("x",))
def zero_dropped_fused(x: Tensor, keys: Tensor, noise: Tensor, bound: int) -> None:
    """Zero, in place, the elements whose random number is below the bound.

    Args:
        x: float (K, C, h, w), channels last.
        keys: int32 (K,), contiguous or not.
        noise: int32 (1, C, h, w), channels last.
        bound: from ``p``, in signed 32-bit integers.
    """
    size = noise.numel()
    _kernel[(triton.cdiv(size, BLOCK), len(x))](x, keys.contiguous(), noise, size, bound, block=BLOCK)


@zero_dropped_fused.register_fake
def _(x: Tensor, keys: Tensor, noise: Tensor, bound: int) -> None:
    """Nothing is returned, so that there is nothing to say about shapes."""
