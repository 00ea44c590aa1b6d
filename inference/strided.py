"""Upsampling by two and a 3 x 3 convolution whose adjoint is one convolution of four phases: the form for a GPU.

The plain adjoint convolves the gradient at full resolution and then adds each of its pixels to four sources, which CUDA
does atomically: in no fixed order, and with a map of C channels at full resolution written and read on the way. Both
steps are linear and shift by whole low-resolution pixels, so together they are one 3 x 3 convolution of the four phases
(rows and columns even and odd) of the gradient, with as many products, to the low resolution.

Borders are the one exception. Upsampling repeats the outermost pixel, so the plain adjoint adds the outermost row of the
convolved gradient once more where the composed one adds the row that the convolution has beyond the border. The
difference of those two rows, and of the two columns, is a convolution of the two outermost rows of the gradient.

Shapes: n rows of a batch, C channels in, C' channels out, h w pixels before and 2 h, 2 w pixels after upsampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.upsampling import Cast, Direct, adjoint_kernel, empty_channels_last
from runtime.upsampling import adjoint_along


def _along(taps: Tensor, axis: int) -> Tensor:
    """Kernels (C, C', kh, kw) composed along an axis of length 3 with the adjoint of upsampling: that axis gets length 6.

    Source i is ``(G[2 i - 1] + 3 G[2 i] + 3 G[2 i + 1] + G[2 i + 2]) / 4`` and ``G[p] = sum_k taps[k] g[p + k - 1]``,
    so that it reads g[2 i - 2] to g[2 i + 3].
    """
    shape = list(taps.shape)
    shape[axis] = 6
    composed = taps.new_zeros(shape)
    for first, share in enumerate((0.25, 0.75, 0.75, 0.25)):
        composed.narrow(axis, first, 3).add_(taps, alpha=share)
    return composed


def phases(g: Tensor) -> Tensor:
    """The four phases of g (n, c, 2 h, 2 w) as channels: (n, 4 c, h, w), row phase outermost, channels last."""
    n, c, height, width = g.shape
    out = empty_channels_last(g, (n, 4 * c, height // 2, width // 2))
    out.view(n, 2, 2, c, height // 2, width // 2).copy_(g.view(n, c, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4))
    return out


class StridedAdjoint(Direct):
    """Bilinear upsampling and the convolution as written; their adjoint as one convolution of the gradient's phases.

    Args:
        weight: (C', C, 3, 3).
        cast: brings weights to the precision of the convolutions.
    """

    def __init__(self, weight: Tensor, cast: Cast) -> None:
        super().__init__(weight, cast)
        taps = adjoint_kernel(weight)  # (C, C', 3, 3)
        inputs, outputs = taps.shape[:2]
        whole = _along(_along(taps, 2), 3)  # (C, C', 6, 6), of positions 2 i - 2 to 2 i + 3: three of each phase
        by_phase = whole.view(inputs, outputs, 3, 2, 3, 2).permute(0, 3, 5, 1, 2, 4)  # C, two, two, C', 3, 3
        self.by_phase = cast(by_phase.reshape(inputs, 4 * outputs, 3, 3))
        # a quarter of the difference between the outermost row of the convolved gradient and the one beyond it
        first, middle, last = taps.unbind(2)
        self.top = cast(torch.stack([middle - last, last], 2) / 4)  # (C, C', 2, 3)
        self.bottom = cast(torch.stack([first, middle - first], 2) / 4)
        first, middle, last = _along(taps, 2).unbind(3)
        self.left = cast(torch.stack([middle - last, last], 3) / 4)  # (C, C', 6, 2)
        self.right = cast(torch.stack([first, middle - first], 3) / 4)

    def backward(self, g: Tensor) -> Tensor:
        """See :class:`inference.upsampling.UpsampledConvolution`."""
        x = F.conv2d(phases(g), self.by_phase, padding=1)
        for weight, strip, place in ((self.left, g[..., :2], x[..., :1]), (self.right, g[..., -2:], x[..., -1:])):
            place += F.conv2d(strip, weight, stride=(2, 1), padding=(2, 0))
        for weight, strip, place in ((self.top, g[:, :, :2], x[:, :, :1]), (self.bottom, g[:, :, -2:], x[:, :, -1:])):
            place += adjoint_along(F.conv2d(strip, weight, padding=(0, 1)), 3)
        return x
