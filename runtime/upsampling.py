"""Bilinear upsampling by two whose gradient is the same bits each time, on CUDA too.

PyTorch's gradient on CUDA adds every upsampled pixel to its four sources atomically, in whatever order the threads come
and in the type of the tensor. Each source has just one of four phases in every 2 x 2 block of pixels, so its sum can be
written down instead.

Shapes: n rows of a batch, c channels, h w pixels before and 2 h, 2 w pixels after upsampling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def adjoint_along(g: Tensor, axis: int) -> Tensor:
    """The adjoint of bilinear upsampling by two (half-pixel centres) along one axis.

    With e and o the even and odd entries of g: ``3 (e + o)[i] / 4 + (o[i - 1] + e[i + 1]) / 4``. Upsampling repeats the
    outermost entry, so that at the borders ``o[-1]`` is e[0] and ``e[n]`` is o[n - 1].

    Args:
        g: float, of even length 2 n along the axis.
        axis: 2 or 3 of (n, c, h, w).

    Returns:
        Of length n along the axis.

    Example:
        >>> adjoint_along(torch.tensor([[[[4.0, 0.0, 8.0, 0.0]]]]), 3)  # 3 and 1 fourths of 4, 1 and 3 fourths of 8
        tensor([[[[6., 6.]]]])
    """
    even, odd = (g[:, :, i::2] if axis == 2 else g[..., i::2] for i in (0, 1))
    last = even.shape[axis] - 1
    before = torch.cat([even.narrow(axis, 0, 1), odd.narrow(axis, 0, last)], axis)
    after = torch.cat([even.narrow(axis, 1, last), odd.narrow(axis, last, 1)], axis)
    return torch.lerp(even + odd, before.add_(after), 0.25)


def upsample_adjoint(g: Tensor) -> Tensor:
    """The gradient (n, c, 2 h, 2 w) at an image upsampled by two to that at the image, (n, c, h, w)."""
    return adjoint_along(adjoint_along(g, 2), 3)


class _UpsampleByTwo(torch.autograd.Function):
    """Bilinear upsampling by two, and :func:`upsample_adjoint` as its gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> Tensor:
        return upsample_adjoint(g)


class ReproducibleUpsample(nn.Upsample):
    """``nn.Upsample`` by two, bilinear, with a gradient without atomic additions."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n, c, h, w) to (n, c, 2 h, 2 w)."""
        upsampled: Tensor = _UpsampleByTwo.apply(x)
        return upsampled


def with_reproducible_upsampling(model: nn.Module, device: torch.device) -> None:
    """Give the bilinear upsamplings by two of a model in training on CUDA a reproducible gradient; elsewhere it has one.

    Names and weights stay, so that checkpoints fit with and without.
    """
    if device.type != "cuda":
        return
    for module in model.modules():
        by_two = type(module) is nn.Upsample and module.size is None and module.scale_factor in (2, 2.0, (2.0, 2.0))
        if by_two and module.mode == "bilinear" and not module.align_corners:
            module.__class__ = ReproducibleUpsample
