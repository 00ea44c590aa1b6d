"""Upsampling by two followed by a 3 x 3 convolution, forward and backward, in the form that costs least.

Half of a decoder block's first convolution acts on an upsampled map. All four
classes here compute it and its adjoint exactly, and differ in the order of
the work alone.

Upsampling acts on positions and a 1 x 1 matrix on channels, so they commute.
With a 3 x 3 convolution written as the sum of its nine taps,

    sum_k W_k shift_k(up(x)) = sum_k shift_k(up(W_k x)),

the products then run on a quarter of the pixels; shifts and upsampling are
separable and touch each value a few times.

========================  =======================================================
:class:`Direct`           upsample, then convolve, as written
:class:`ExchangedRows`    exchanged along the rows: products on half the pixels
:class:`Exchanged`        exchanged along both axes: products on a quarter of them
:class:`Composed`         a learnt 2 x 2 upsampling (stride 2, no overlap): the two
                          maps are one transposed 4 x 4 convolution with stride 2
========================  =======================================================

Shapes: n rows of a batch, C channels in, C' channels out, h w pixels before
and 2 h, 2 w pixels after upsampling. Tensors are channels last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Callable, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: Brings a weight to the precision and memory format of the convolutions.
Cast = Callable[[Tensor], Tensor]

#: Channels from which exchanging upsampling and convolution, along the rows and along both axes, saves
#: more products than the memory traffic it adds is worth, on a CPU. Half precision halves what a
#: product costs and not the traffic; on a GPU products cost next to nothing.
EXCHANGE_ROWS_FROM, EXCHANGE_FROM, EXCHANGE_HALF_FROM = 16, 128, 128

#: Elements of the temporaries of an exchanged form that a CPU works on at a time.
BAND = 1 << 20


class UpsampledConvolution(Protocol):
    """Upsampling by two, then a 3 x 3 convolution with padding 1 and without bias."""

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        """Apply it to x and add the rest of the convolution.

        Args:
            x: (n, C, h, w), pass-major: n is a multiple of B.
            skip: (B, C', 2 h, 2 w), added in every pass.

        Returns:
            A new tensor (n, C', 2 h, 2 w).
        """

    def backward(self, g: Tensor) -> Tensor:
        """The adjoint: the gradient g (n, C', 2 h, 2 w) at the output to that at x, (n, C, h, w)."""


def bilinear_form(weight: Tensor, scale: float, dtype: torch.dtype, cast: Cast) -> UpsampledConvolution:
    """Bilinear upsampling and a convolution, in the cheapest form.

    The choice is a rule of the number of channels and the precision; on a GPU it is :class:`inference.strided.StridedAdjoint`.

    Args:
        weight: (C', C, 3, 3) in float64.
        scale: what the weight is multiplied by.
        dtype: of the convolutions.
        cast: brings weights to ``dtype``.
    """
    channels = weight.shape[1]
    form: type[Direct] | type[ExchangedRows] | type[Exchanged]
    if channels < (EXCHANGE_ROWS_FROM if dtype == torch.float32 else EXCHANGE_HALF_FROM):
        form = Direct
    else:
        form = Exchanged if channels >= EXCHANGE_FROM else ExchangedRows
    return form(weight * scale, cast)


# ---------------------------------------------------------------- tensors


def adjoint_kernel(weight: Tensor) -> Tensor:
    """The kernel whose convolution is the adjoint of the given one's: (C', C, kh, kw) to (C, C', kh, kw)."""
    return weight.flip(2, 3).transpose(0, 1)


def empty_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor like x, of another shape."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def repeat(x: Tensor, times: int) -> Tensor:
    """A copy of x (B, ...), that many times along the first axis: (times * B, ...)."""
    y = empty_channels_last(x, (times * x.shape[0], *x.shape[1:]))
    y.view(times, *x.shape).copy_(x)
    return y


def _add(y: Tensor, skip: Tensor) -> Tensor:
    """Add skip (B, ...) to every pass of y (K * B, ...), in place."""
    if skip.shape[0] > 1:
        y.view(-1, *skip.shape).add_(skip)
    else:
        y.add_(skip)
    return y


def _upsample(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.interpolate(x, scale_factor=(rows, columns), mode="bilinear", align_corners=False)


def _upsample_adjoint(g: Tensor, rows: int, columns: int) -> Tensor:
    n, c, height, width = g.shape
    x: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
        g, [height, width], [n, c, height // rows, width // columns], False, float(rows), float(columns)
    )
    return x


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution; weight (C', C, 1, 1).

    On one CPU thread ``conv2d`` hands these to the BLAS, which can be half as
    fast as the convolution library that it passes over.
    """
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    return F.conv2d(x, weight)


# ---------------------------------------------------------------- bilinear upsampling


class Direct:
    """Bilinear upsampling, then the convolution, as written.

    Args:
        weight: (C', C, 3, 3).
        cast: brings weights to the precision of the convolutions.
    """

    def __init__(self, weight: Tensor, cast: Cast) -> None:
        self.weight, self.adjoint = cast(weight), cast(adjoint_kernel(weight))

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        return _add(F.conv2d(_upsample(x, 2, 2), self.weight, padding=1), skip)

    def backward(self, g: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        return _upsample_adjoint(F.conv2d(g, self.adjoint, padding=1), 2, 2)


class ExchangedRows:
    """The same with upsampling and convolution exchanged along the rows.

    The three row taps' kernels act on an image upsampled along its columns
    alone; their results are then upsampled along the rows and shifted by the
    tap's offset. What a shift moves over the border is lost and what it moves
    in is zero, as the convolution's padding of the *upsampled* image is. This
    happens in bands of rows that stay in the CPU's cache, each with the
    one row beside it that its rows need.

    Args:
        weight: (C', C, 3, 3).
        cast: brings weights to the precision of the convolutions.
    """

    def __init__(self, weight: Tensor, cast: Cast) -> None:
        self.out = weight.shape[0]
        rows = weight.permute(2, 0, 1, 3).flatten(0, 1).unsqueeze(2)  # (3 C', C, 1, 3)
        self.weight, self.adjoint = cast(rows), cast(adjoint_kernel(rows))

    def taps(self, x: Tensor) -> Tensor:
        """x (n, C, h, w) to the three row taps' results (n, 3 C', h, 2 w)."""
        return F.conv2d(_upsample(x, 1, 2), self.weight, padding=(0, 1))

    def taps_adjoint(self, g: Tensor) -> Tensor:
        """Gradient (n, 3 C', h, 2 w) of :meth:`taps` to that of its input."""
        return _upsample_adjoint(F.conv2d(g, self.adjoint, padding=(0, 1)), 1, 2)

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        skip = skip if len(skip) == 1 else repeat(skip, len(x) // len(skip))
        y = empty_channels_last(x, (len(x), *skip.shape[1:]))
        for first, last, low, high in self._bands(x):
            above, middle, below = _upsample(self.taps(x[:, :, low:high]), 2, 1).chunk(3, 1)
            start, stop = 2 * (first - low), 2 * (last - low)
            part = y[:, :, 2 * first : 2 * last]
            torch.add(skip[:, :, 2 * first : 2 * last], middle[:, :, start:stop], out=part)
            part[:, :, 0 if start else 1 :] += above[:, :, max(start - 1, 0) : stop - 1]
            part[:, :, : part.shape[2] - (last == high)] += below[:, :, start + 1 : stop + 1]
        return y

    def backward(self, g: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        n, c, height, width = g.shape
        parts = []
        for first, last, low, high in self._bands(g[:, :, ::2, ::2]):
            rows = empty_channels_last(g, (n, 3 * c, high - low, width))
            _shifts_adjoint(g[:, :, 2 * low : 2 * high], 2, rows.chunk(3, 1))
            parts.append(self.taps_adjoint(rows[:, :, first - low : last - low]))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _bands(self, x: Tensor) -> Iterator[tuple[int, int, int, int]]:
        """Low-resolution rows of each band: first and last, and those of the band with its neighbours."""
        n, _, height, width = x.shape
        rows = max(4, BAND // (n * self.out * 4 * width))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            yield first, last, max(first - 1, 0), min(last + 1, height)


class Exchanged(ExchangedRows):
    """Exchanged along the columns too: all nine taps' products at low resolution.

    Args:
        weight: (C', C, 3, 3).
        cast: brings weights to the precision of the convolutions.
    """

    def __init__(self, weight: Tensor, cast: Cast) -> None:
        self.out = weight.shape[0]
        # for each column tap the three row taps' matrices under each other
        taps = [x.flatten(0, 1)[:, :, None, None] for x in weight.permute(3, 2, 0, 1)]  # (3 C', C, 1, 1)
        self.weights = [cast(x) for x in taps]
        self.adjoints = [cast(x.transpose(0, 1)) for x in taps]

    def taps(self, x: Tensor) -> Tensor:
        """x (n, C, h, w) to the three row taps' results (n, 3 C', h, 2 w)."""
        left, centre, right = (_upsample(_pointwise(x, weight), 1, 2) for weight in self.weights)
        centre[..., 1:] += left[..., :-1]
        centre[..., :-1] += right[..., 1:]
        return centre

    def taps_adjoint(self, g: Tensor) -> Tensor:
        """Gradient (n, 3 C', h, 2 w) of :meth:`taps` to that of its input."""
        n, c, height, width = g.shape
        columns = [empty_channels_last(g, (n, c, height, width // 2)) for _ in range(3)]
        _shifts_adjoint(g, 3, columns)
        x, *others = (_pointwise(column, weight) for column, weight in zip(columns, self.adjoints))
        for other in others:
            x += other
        return x


def _shifts_adjoint(g: Tensor, axis: int, outs: Sequence[Tensor]) -> None:
    """Adjoint, along one axis, of "upsample by two, then shift by tap - 1": one output for each of three taps.

    With e and o the even and odd entries of g, n of each, ``p = (e + 3 o) / 4``
    and ``q = (3 e + o) / 4``: tap 0 gets ``p[i] + q[i + 1]``, tap 2
    ``q[i] + p[i - 1]``, tap 1 ``3 (e + o)[i] / 4 + (o[i - 1] + e[i + 1]) / 4``.
    At the borders the interpolation repeats the outermost entry (tap 1: o[-1]
    is e[0] and e[n] is o[n - 1]), and the entry that a tap never reads gives
    nothing (tap 0: o[0] for p[0]; tap 2: e[n - 1] for q[n - 1]).
    """
    even, odd = (g[:, :, i::2] if axis == 2 else g[..., i::2] for i in (0, 1))
    n = even.shape[axis]

    def cut(x: Tensor, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    p, q = torch.lerp(odd, even, 0.25), torch.lerp(even, odd, 0.25)
    before, centre, after = outs
    torch.add(cut(p, 0, n - 1), cut(q, 1, n), out=cut(before, 0, n - 1))
    cut(before, n - 1, n).copy_(cut(p, n - 1, n))
    cut(before, 0, 1).add_(cut(odd, 0, 1) - cut(p, 0, 1))
    torch.add(cut(q, 1, n), cut(p, 0, n - 1), out=cut(after, 1, n))
    cut(after, 0, 1).copy_(cut(q, 0, 1))
    cut(after, n - 1, n).add_(cut(even, n - 1, n) - cut(q, n - 1, n))
    total, beside = p.add_(q), q
    if n == 1:
        torch.add(even, odd, out=beside)
    else:
        torch.add(cut(odd, 0, n - 2), cut(even, 2, n), out=cut(beside, 1, n - 1))
        torch.add(cut(even, 0, 1), cut(even, 1, 2), out=cut(beside, 0, 1))
        torch.add(cut(odd, n - 2, n - 1), cut(odd, n - 1, n), out=cut(beside, n - 1, n))
    torch.lerp(total, beside, 0.25, out=centre)


# ---------------------------------------------------------------- learnt upsampling


class Composed:
    """A learnt 2 x 2 upsampling and a 3 x 3 convolution in one transposed 4 x 4 convolution of stride 2.

    Args:
        weight: of the convolution, (C', C_up, 3, 3).
        up: of the transposed convolution with stride 2, (C, C_up, 2, 2).
        cast: brings weights to the precision of the convolutions.
    """

    def __init__(self, weight: Tensor, up: Tensor, cast: Cast) -> None:
        # Upsampled pixel 2 i + a is up[a] x_i, output pixel q reads upsampled pixel q + k - 1
        # through weight[k]; so x_i reaches q = 2 i + (a - k + 2) - 1: entry a - k + 2, padding 1.
        kernel = weight.new_zeros(4, 4, up.shape[0], weight.shape[0])
        for a in range(4):
            for k in range(9):
                entry = kernel[a // 2 - k // 3 + 2, a % 2 - k % 3 + 2]
                entry += up[:, :, a // 2, a % 2] @ weight[:, :, k // 3, k % 3].T
        self.weight = cast(kernel.permute(2, 3, 0, 1))  # C, C', 4, 4

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        return _add(F.conv_transpose2d(x, self.weight, stride=2, padding=1), skip)

    def backward(self, g: Tensor) -> Tensor:
        """See :class:`UpsampledConvolution`."""
        return F.conv2d(g, self.weight, stride=2, padding=1)
