"""Stochastic passes of the U-Net at a fraction of their usual cost, by exact algebra.

A pass of Monte-Carlo dropout with Grad-CAM asks for two things only: the
logits, and per channel the spatial mean of the score's gradient at the target
activations. Everything that this file leaves out is left out because it can be
proved to be the same in all passes, or to cancel; nothing is approximated.
Dropout itself is the caller's: a function that zeroes elements.

Shapes: B images, K passes of a chunk, N = K * B pass-major batch, C channels,
H W pixels of the image, h w pixels of a deeper map.

1.  *Encoder once.* Dropout first acts behind the bottleneck, so encoder and
    bottleneck are the same function of the image in every pass; the possible
    targets (``encoder4``, ``bottleneck``) lie in front of it, so the
    activations A are shared too and only the channel weights differ.
2.  *Batch norm folded.* ``(W x - m) g / s + b = (g / s) W x + (b - m g / s)``:
    in evaluation mode it is an affine map of the convolution's output.
3.  *Skip half once.* ``W [skip, up] = W_s skip + W_u up``, and ``skip`` has no
    dropout: ``W_s skip`` and all biases are computed once an image.
4.  *Dropout's scale in the weights.* ``W_u up(m x / (1 - p)) =
    (W_u / (1 - p)) up(m x)``: what acts in a pass is a mask of zeros and ones.
5.  *Backward by hand.* The network behind the target is piecewise linear, so
    its gradient is the transposed convolutions between the ReLU and dropout
    masks of the forward. Where both masks follow each other one stored tensor
    has both: ``m relu(z) > 0`` exactly where ``m = 1`` and ``z > 0``. Parameters
    have no gradient, and the score is the sum of the logits, so the gradient at
    the last ReLU's output is the head's weight in every pixel: it is folded
    into the transposed convolution that follows.
6.  *Sums instead of the last convolution.* With ``y[p] = sum_k W_k x[p + k]``
    the spatial sum of x's gradient is ``sum_k W_k^T sum_p g[p]``, p over the
    positions whose p + k lies inside: nine border-corrected sums of g and a
    matrix product. The skip half of ``decoder4`` ends so for ``encoder4``.
    Max-pooling hands each gradient to exactly one position, so it keeps the
    spatial sum: the path through the bottleneck ends so, too.
7.  *Upsampling and convolution exchanged.* Upsampling acts on positions and a
    1 x 1 matrix on channels, so they commute: ``sum_k W_k shift_k(up(x)) =
    sum_k shift_k(up(W_k x))``. The products then run on a quarter of the
    pixels; shifts and upsampling are separable and touch each value a few
    times. For a learnt 2 x 2 upsampling (stride 2, no overlap) the two maps
    compose into one transposed 4 x 4 convolution with stride 2.

References: Ronneberger et al., MICCAI 2015 (the U-Net); Selvaraju et al.,
ICCV 2017 (Grad-CAM).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DoubleConv, UNet

#: ``drop(x, site, first)`` zeroes, in place, what the site's masks drop of x (n, C, h, w):
#: rows first to first + n of the pass-major batch of all the passes asked for.
Drop = Callable[[Tensor, int, int], None]

#: Channels from which exchanging upsampling and convolution, along the rows and along both axes, saves
#: more products than the memory traffic it adds is worth, on a processor. Half precision halves what a
#: product costs and not the traffic; on a GPU products cost next to nothing.
EXCHANGE_ROWS_FROM, EXCHANGE_FROM, EXCHANGE_HALF_FROM = 16, 128, 128

#: Elements of one feature map that the processor works on at a time; on a GPU.
PIECE, PIECE_CUDA = 1 << 18, 1 << 27
#: The same for the temporaries of the exchanged upsampling.
BAND = 1 << 20

_CHANNELS_LAST = torch.channels_last


def supports(model: nn.Module, target: nn.Module) -> bool:
    """Whether the algebra holds: an unmodified :class:`UNet`, without hooks, and one of the two targets.

    Not on Metal, which has no float64 to fold the weights in.
    """
    if type(model) is not UNet or not any(target is t for t in (model.encoder4, model.bottleneck)):
        return False
    if model.head.weight.device.type == "mps":
        return False
    modules = [(name, type(m)) for name, m in model.named_modules()]
    shapes = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    return not hooks and (modules, shapes) == _blueprint(tuple(model.options.items()))


@functools.lru_cache(maxsize=8)
def _blueprint(options: tuple[tuple[str, object], ...]) -> tuple[list, list]:
    """Names and types of a U-Net's modules, names and shapes of its tensors."""
    with torch.device("meta"):
        plain = UNet(**dict(options))  # type: ignore[arg-type]
    modules = [(name, type(m)) for name, m in plain.named_modules()]
    return modules, [(name, tensor.shape) for name, tensor in plain.state_dict().items()]


# ---------------------------------------------------------------- weights


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its batch norm, float64 (step 2)."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    bias = -mean.double() * scale
    if norm.affine:
        scale, bias = scale * norm.weight.double(), bias * norm.weight.double() + norm.bias.double()
    return convolution.weight.double() * scale.view(-1, 1, 1, 1), bias


def _folded(block: DoubleConv) -> list[tuple[Tensor, Tensor]]:
    return [_fold(block[0], block[1]), _fold(block[3], block[4])]


def _transposed(weight: Tensor) -> Tensor:
    """The 3 x 3 kernel whose convolution is the adjoint of the given one's."""
    return weight.flip(2, 3).transpose(0, 1)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution; weight (C', C, 1, 1).

    On one CPU thread ``conv2d`` hands these to the BLAS, which can be half as
    fast as the convolution library that it passes over.
    """
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    return F.conv2d(x, weight)


# ---------------------------------------------------------------- upsampling followed by a convolution


class _Dense:
    """Bilinear upsampling, then a 3 x 3 convolution, as they stand."""

    def __init__(self, weight: Tensor, cast: Callable[[Tensor], Tensor]):
        self.weight, self.adjoint = cast(weight), cast(_transposed(weight))

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        y = F.conv2d(_upsample(x, 2, 2), self.weight, padding=1)
        return _add(y, skip)

    def backward(self, g: Tensor) -> Tensor:
        return _upsample_adjoint(F.conv2d(g, self.adjoint, padding=1), 2, 2)


def _upsample(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.interpolate(x, scale_factor=(rows, columns), mode="bilinear", align_corners=False)


def _upsample_adjoint(g: Tensor, rows: int, columns: int) -> Tensor:
    n, c, height, width = g.shape
    return torch.ops.aten.upsample_bilinear2d_backward(
        g, [height, width], [n, c, height // rows, width // columns], False, float(rows), float(columns)
    )


def _add(y: Tensor, skip: Tensor) -> Tensor:
    """Add skip (B, ...) to every pass of y (K * B, ...), in place."""
    y.view(-1, *skip.shape).add_(skip) if skip.shape[0] > 1 else y.add_(skip)
    return y


class _ExchangedRows:
    """The same map with upsampling and convolution exchanged along the rows (step 7).

    The three row taps' kernels act on an image upsampled along its columns
    alone; their results are then upsampled along the rows and shifted by the
    tap's offset. What a shift moves over the border is lost and what it moves
    in is zero, as the convolution's padding of the *upsampled* image is. This
    happens in bands of rows that stay in the processor's cache, each with the
    one row beside it that its rows need.
    """

    def __init__(self, weight: Tensor, cast: Callable[[Tensor], Tensor]):
        self.out = weight.shape[0]
        rows = weight.permute(2, 0, 1, 3).flatten(0, 1).unsqueeze(2)  # (3 C', C, 1, 3)
        self.weight, self.adjoint = cast(rows), cast(_transposed(rows))

    def taps(self, x: Tensor) -> Tensor:
        """x (n, C, h, w) to the three row taps' results (n, 3 C', h, 2 w)."""
        return F.conv2d(_upsample(x, 1, 2), self.weight, padding=(0, 1))

    def taps_adjoint(self, g: Tensor) -> Tensor:
        """Gradient (n, 3 C', h, 2 w) of :meth:`taps` to that of its input."""
        return _upsample_adjoint(F.conv2d(g, self.adjoint, padding=(0, 1)), 1, 2)

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        skip = skip if len(skip) == 1 else _repeat(skip, len(x) // len(skip))
        y = _empty(x, (len(x), *skip.shape[1:]))
        for first, last, low, high in self._bands(x):
            above, middle, below = _upsample(self.taps(x[:, :, low:high]), 2, 1).split(self.out, 1)
            start, stop = 2 * (first - low), 2 * (last - low)
            part = y[:, :, 2 * first : 2 * last]
            torch.add(skip[:, :, 2 * first : 2 * last], middle[:, :, start:stop], out=part)
            part[:, :, 0 if start else 1 :] += above[:, :, max(start - 1, 0) : stop - 1]
            part[:, :, : part.shape[2] - (last == high)] += below[:, :, start + 1 : stop + 1]
        return y

    def backward(self, g: Tensor) -> Tensor:
        n, c, height, width = g.shape
        parts = []
        for first, last, low, high in self._bands(g[:, :, ::2, ::2]):
            rows = _empty(g, (n, 3 * c, high - low, width))
            _shifts_adjoint(g[:, :, 2 * low : 2 * high], 2, rows.split(c, 1))
            parts.append(self.taps_adjoint(rows[:, :, first - low : last - low]))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _bands(self, x: Tensor) -> Iterator[tuple[int, int, int, int]]:
        """Low-resolution rows of each band: first and last, and those of the band with its neighbours."""
        n, _, height, width = x.shape
        rows = max(4, BAND // (n * self.out * 4 * width))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            yield first, last, max(first - 1, 0), min(last + 1, height)


class _Exchanged(_ExchangedRows):
    """Exchanged along the columns too: all nine taps' products at low resolution."""

    def __init__(self, weight: Tensor, cast: Callable[[Tensor], Tensor]):
        self.out = weight.shape[0]
        # for each column tap the three row taps' matrices under each other
        taps = [x.flatten(0, 1)[:, :, None, None] for x in weight.permute(3, 2, 0, 1)]  # (3 C', C, 1, 1)
        self.weights = [cast(x) for x in taps]
        self.adjoints = [cast(x.transpose(0, 1)) for x in taps]

    def taps(self, x: Tensor) -> Tensor:
        left, centre, right = (_upsample(_pointwise(x, weight), 1, 2) for weight in self.weights)
        centre[..., 1:] += left[..., :-1]
        centre[..., :-1] += right[..., 1:]
        return centre

    def taps_adjoint(self, g: Tensor) -> Tensor:
        n, c, height, width = g.shape
        columns = [_empty(g, (n, c, height, width // 2)) for _ in range(3)]
        _shifts_adjoint(g, 3, columns)
        x, *others = (_pointwise(column, weight) for column, weight in zip(columns, self.adjoints))
        for other in others:
            x += other
        return x


def _repeat(x: Tensor, times: int) -> Tensor:
    """A copy of x (B, ...), that many times along the first axis, channels last."""
    y = _empty(x, (times * x.shape[0], *x.shape[1:]))
    y.view(times, *x.shape).copy_(x)
    return y


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)


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


def _bilinear(weight: Tensor, dtype: torch.dtype) -> type[_Dense] | type[_ExchangedRows]:
    """The cheapest form for a weight (C', C, 3, 3): a rule of the shape, the precision and the kind of device."""
    channels = weight.shape[1]
    if weight.is_cuda or channels < (EXCHANGE_ROWS_FROM if dtype == torch.float32 else EXCHANGE_HALF_FROM):
        return _Dense
    return _Exchanged if channels >= EXCHANGE_FROM else _ExchangedRows


class _Composed:
    """A learnt 2 x 2 upsampling and a 3 x 3 convolution in one 4 x 4 kernel of stride 2 (step 7)."""

    def __init__(self, weight: Tensor, up: Tensor, cast: Callable[[Tensor], Tensor]):
        # Upsampled pixel 2 i + a is up[a] x_i, output pixel q reads upsampled pixel q + k - 1
        # through weight[k]; so x_i reaches q = 2 i + (a - k + 2) - 1: entry a - k + 2, padding 1.
        kernel = weight.new_zeros(4, 4, up.shape[0], weight.shape[0])
        for a in range(4):
            for k in range(9):
                entry = kernel[a // 2 - k // 3 + 2, a % 2 - k % 3 + 2]
                entry += up[:, :, a // 2, a % 2] @ weight[:, :, k // 3, k % 3].T
        self.weight = cast(kernel.permute(2, 3, 0, 1))  # C, C', 4, 4

    def forward_add(self, x: Tensor, skip: Tensor) -> Tensor:
        return _add(F.conv_transpose2d(x, self.weight, stride=2, padding=1), skip)

    def backward(self, g: Tensor) -> Tensor:
        return F.conv2d(g, self.weight, stride=2, padding=1)


# ---------------------------------------------------------------- the network


class _Decoder:
    """The weights of one decoder block, ready for a pass.

    Args:
        block: a :class:`model.Decoder`.
        skip_channels: how many of its first convolution's inputs are the skip's.
        scale: of the dropout in front, 1 / (1 - p).
        gradient_scale: what the gradient at the block's output is multiplied by, (C_out, 1, 1, 1) or 1.
        cast: to the precision of the convolutions.
    """

    def __init__(
        self, block: nn.Module, skip_channels: int, scale: float, gradient_scale: Tensor | float,
        cast: Callable[[Tensor], Tensor],
    ):
        (first, bias), (second, second_bias) = _folded(block.convolutions)
        self.skip_weight, self.skip_bias = cast(first[:, :skip_channels]), cast(bias)
        # sums of the gradient to gradient of the skip's sum: (9 C', C_skip) in float32
        self.skip_sums = _sum_matrix(first[:, :skip_channels])
        up = first[:, skip_channels:]
        self.up_bias: tuple[Tensor, Tensor] | None = None
        if isinstance(block.up, nn.ConvTranspose2d):
            if block.up.bias is not None:  # no dropout acts on it: it joins the skip half
                self.up_bias = cast(block.up.bias.double().view(1, -1, 1, 1)), cast(up)
            self.up: _Dense | _ExchangedRows | _Composed = _Composed(up * scale, block.up.weight.double(), cast)
        else:
            self.up = _bilinear(up, self.skip_weight.dtype)(up * scale, cast)
        self.weight, self.bias = cast(second), cast(second_bias)
        self.adjoint = cast(_transposed(second * gradient_scale))

    def constant(self, skip: Tensor) -> Tensor:
        """What the first convolution adds in every pass (step 3): (B, C', H, W)."""
        y = F.conv2d(skip, self.skip_weight, self.skip_bias, padding=1)
        if self.up_bias is not None:
            value, weight = self.up_bias
            y += F.conv2d(value.expand(1, -1, *skip.shape[-2:]), weight, padding=1)
        return y


def _sum_matrix(weight: Tensor) -> Tensor:
    """float32 (9 C', C): nine border-corrected sums of the gradient to the sum of the input's gradient."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1]).float()


def _border_sums(g: Tensor) -> Tensor:
    """Sums of g over the positions each tap of a padded 3 x 3 convolution reads from: float32 (N, 9 C').

    Tap 0 reads the input one row up, so output row 0 read padding; tap 2
    likewise leaves out the last row; columns alike.
    """
    def cut(x: Tensor, axis: int) -> Tensor:
        total = x.sum(axis)
        return torch.stack([total - x.select(axis, 0), total, total - x.select(axis, -1)], 1)

    return cut(cut(g.float(), 2), 3).transpose(1, 2).flatten(1)  # N, ky, kx, C'


class Encoded(NamedTuple):
    """What all passes of B images share.

    Attributes:
        activations: A, float32 (B, C, h, w).
        bottleneck: its output, (B, C, H/16, W/16).
        hidden: the output of its first convolution's ReLU, of the same size.
        constants: the skip halves of decoder 4, 3, 2, 1.
    """

    activations: Tensor
    bottleneck: Tensor
    hidden: Tensor
    constants: list[Tensor]


class UNetPasses:
    """The stochastic passes of a U-Net, with the weights folded for one precision.

    Args:
        model: a :class:`UNet` that :func:`supports` accepts; it is only read.
        target: ``model.encoder4`` or ``model.bottleneck``.
        dtype: of the convolutions; sums over a map and everything returned are float32.
    """

    def __init__(self, model: UNet, target: nn.Module, dtype: torch.dtype = torch.float32):
        def cast(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return x.contiguous(memory_format=_CHANNELS_LAST) if x.dim() == 4 else x.contiguous()

        with torch.no_grad():
            self.dtype, self.at_bottleneck = dtype, target is model.bottleneck
            blocks = [model.encoder1, model.encoder2[1], model.encoder3[1], model.encoder4[1], model.bottleneck[1]]
            self.encoders = [[(cast(w), cast(b)) for w, b in _folded(block)] for block in blocks]
            first, second = _folded(model.bottleneck[1])
            self.bottleneck_sums, self.bottleneck_adjoint = _sum_matrix(first[0]), cast(_transposed(second[0]))
            decoders = [model.decoder4, model.decoder3, model.decoder2, model.decoder1]
            dropouts = [model.dropout] + [block.dropout for block in decoders[:-1]]
            rates = [m.p if isinstance(m, nn.Dropout) else 0.0 for m in dropouts]
            # sites are numbered over the dropouts that drop something, None where one does not
            self.rates = [rate for rate in rates if rate > 0]
            self.width = model.head.in_channels
            self.sites = [sum(r > 0 for r in rates[:i]) if rates[i] > 0 else None for i in range(4)]
            skips = [block[3].out_channels for block in blocks[3::-1]]
            head = model.head.weight.double()  # 1, C, 1, 1
            self.head, self.head_bias = head.float(), model.head.bias.float()
            # the last ReLU's mask is all that reaches the last block's adjoint: the head's weight is in it (step 5)
            gradient_scales = [1.0, 1.0, 1.0, head.view(-1, 1, 1, 1)]
            self.decoders = [
                _Decoder(block, skip, 1.0 / (1.0 - rate), factor, cast)
                for block, skip, rate, factor in zip(decoders, skips, rates, gradient_scales)
            ]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """What the passes share; images float (B, C, H, W), H and W multiples of 16 (steps 1 to 3)."""
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"height and width must be multiples of 16, not {images.shape[-2]} x {images.shape[-1]}")
        x = images.to(self.dtype).contiguous(memory_format=_CHANNELS_LAST)
        constants, skip, hidden = [], x, x
        for depth, block in enumerate(self.encoders):
            if depth:
                constants.append(self.decoders[4 - depth].constant(x))
                skip, x = x, F.max_pool2d(x, 2)
            for i, (weight, bias) in enumerate(block):
                x = F.conv2d(x, weight, bias, padding=1).relu_()
                hidden = x if i == 0 else hidden
        return Encoded((x if self.at_bottleneck else skip).float(), x, hidden, constants[::-1])

    @torch.no_grad()
    def __call__(self, encoded: Encoded, passes: int, drop: Drop) -> tuple[Tensor, Tensor]:
        """Some passes of the encoded images.

        Args:
            encoded: from :meth:`encode`.
            passes: K, as many as ``drop`` has masks for.
            drop: the dropout; called with a channels-last tensor (K * B, C, h, w).

        Returns:
            Logits float32 (K * B, H, W), and the spatial means of the
            gradient of each map's summed logits at the target: float32 (K * B, C).
        """
        height, width = encoded.activations.shape[-2:]
        x = _repeat(encoded.bottleneck, passes)
        if self.sites[0] is not None:
            drop(x, self.sites[0], 0)
        logits, g, skip_sums = self._decode(0, x, 0, encoded, drop)
        if self.at_bottleneck:
            if self.sites[0] is not None:
                drop(g, self.sites[0], 0)
            return logits, g.float().mean((2, 3))
        g = F.conv2d(_where_positive(g, x), self.bottleneck_adjoint, padding=1)
        _where_positive(g, _repeat(encoded.hidden, passes))
        sums = _border_sums(g) @ self.bottleneck_sums + skip_sums @ self.decoders[0].skip_sums
        return logits, sums / (height * width)

    def _decode(
        self, level: int, x: Tensor, first: int, encoded: Encoded, drop: Drop
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder ``level`` and those behind it, there and back.

        Each block is computed on as many passes as fit the cache, and the
        blocks behind it, whose maps are larger, on fewer: forward and backward
        of a piece follow each other, so little is stored, and not for long.

        Args:
            level: 0 for decoder 4, to 3 for decoder 1.
            x: the block's input (n, C, h, w), after dropout.
            first: its first row in the whole batch.

        Returns:
            Logits (n, H, W), the gradient at x, and the border-corrected sums
            of the gradient at the first convolution's output; these for
            decoder 4 alone, else an empty tensor.
        """
        decoder, constant = self.decoders[level], encoded.constants[level]
        # a read of the weights should serve at least as many elements as they have
        size = PIECE_CUDA if x.is_cuda else max(PIECE, decoder.weight.numel())
        rows = constant.shape[0] * max(1, size // constant.numel())
        if rows < len(x):
            parts = [
                self._decode(level, part, first + i * rows, encoded, drop) for i, part in enumerate(x.split(rows))
            ]
            logits, g, sums = (torch.cat(column) for column in zip(*parts))
            return logits, g, sums
        between = decoder.up.forward_add(x, constant).relu_()
        y = F.conv2d(between, decoder.weight, decoder.bias, padding=1).relu_()
        if level == 3:
            logits = F.conv2d(y.float(), self.head)[:, 0] + self.head_bias
            g = y.sign_()  # the mask of the last ReLU; the adjoint that follows has the head's weight in it
        else:
            site = self.sites[level + 1]
            if site is not None:
                drop(y, site, first)
            logits, g, _ = self._decode(level + 1, y, first, encoded, drop)
            _where_positive(g, y)
        g = _where_positive(F.conv2d(g, decoder.adjoint, padding=1), between)
        sums = _border_sums(g) if level == 0 else g.new_empty(len(g), 0)
        return logits, decoder.up.backward(g), sums


def _where_positive(g: Tensor, y: Tensor) -> Tensor:
    """g where y > 0, else 0, in place: the backward of the ReLU, and of dropout where y has passed both."""
    return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)

