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
    dropout: ``W_s skip`` and all biases are computed once per image.
4.  *Dropout's scale in the weights.* ``W_u up(m x / (1 - p)) =
    (W_u / (1 - p)) up(m x)``: what acts in a pass is a mask of zeros and ones.
5.  *Backward by hand.* The network behind the target is piecewise linear, so
    its gradient is the transposed convolutions between the ReLU and dropout
    masks of the forward. Where both masks follow each other one stored tensor
    has both: ``m relu(z) > 0`` exactly where ``m = 1`` and ``z > 0``. Parameters
    have no gradient, and the score is the sum of the logits, so the gradient at
    the last ReLU's output is the head's weight in every pixel: it is folded
    into the transposed convolution that follows. Where the score sums the
    positive logits alone, it is so in their pixels and zero elsewhere.
6.  *Sums instead of the last convolution.* With ``y[p] = sum_k W_k x[p + k]``
    the spatial sum of x's gradient is ``sum_k W_k^T sum_p g[p]``, p over the
    positions whose p + k lies inside: nine border-corrected sums of g and a
    matrix product. The skip half of ``decoder4`` ends so for ``encoder4``.
    Max-pooling hands each gradient to exactly one position, so it keeps the
    spatial sum: the path through the bottleneck ends so, too.
7.  *Upsampling and convolution exchanged* or, where the upsampling is learnt,
    composed into one: see :mod:`inference.upsampling`.

References: Ronneberger et al., MICCAI 2015 (the U-Net); Selvaraju et al.,
ICCV 2017 (Grad-CAM).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from inference.strided import StridedAdjoint
from inference.upsampling import Cast, Composed, UpsampledConvolution, adjoint_kernel, bilinear_form, repeat
from model import Decoder, DoubleConv, UNet

#: ``drop(x, site, first)`` zeroes, in place, what the site's masks drop of x (n, C, h, w):
#: rows first to first + n of the pass-major batch of all the passes asked for.
Drop = Callable[[Tensor, int, int], None]

#: Elements of one feature map that a CPU works on at a time; on a GPU.
PIECE, PIECE_CUDA = 1 << 18, 1 << 27


def supports(model: nn.Module, target: nn.Module) -> bool:
    """Whether the algebra holds: an unmodified :class:`UNet`, without hooks, and one of the two targets.

    Not on Metal, which has no float64 to fold the weights in.

    Args:
        model: any module.
        target: one of its submodules.

    Example:
        >>> model = UNet(width=2)
        >>> supports(model, model.encoder4), supports(model, model.encoder3)
        (True, False)
    """
    if type(model) is not UNet or not any(target is t for t in (model.encoder4, model.bottleneck)):
        return False
    if model.head.weight.device.type == "mps":
        return False
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    return not hooks and _structure(model) == _blueprint(tuple(model.options.items()))


#: Names and types of a network's modules, names and shapes of its tensors.
_Structure = tuple[list[tuple[str, type]], list[tuple[str, torch.Size]]]


def _structure(model: nn.Module) -> _Structure:
    modules = [(name, type(m)) for name, m in model.named_modules()]
    return modules, [(name, tensor.shape) for name, tensor in model.state_dict().items()]


@functools.lru_cache(maxsize=8)
def _blueprint(options: tuple[tuple[str, Any], ...]) -> _Structure:
    """The structure of an unmodified U-Net."""
    with torch.device("meta"):
        return _structure(UNet(**dict(options)))


# ---------------------------------------------------------------- weights and sums


def _folded(block: DoubleConv) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias, float64, of both convolutions of a block with their batch norms (step 2)."""
    folded: list[tuple[Tensor, Tensor]] = []
    for convolution, norm in ((block[0], block[1]), (block[3], block[4])):
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        folded.append(fuse_conv_bn_weights(
            convolution.weight.double(), None, mean, variance, norm.eps, norm.weight.double(), norm.bias.double()
        ))
    return folded


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


def _where_positive(g: Tensor, y: Tensor) -> Tensor:
    """g where y > 0, else 0, in place: the backward of the ReLU, and of dropout where y has passed both."""
    torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
    return g


# ---------------------------------------------------------------- the network


class _DecoderPass:
    """The weights of one decoder block, ready for a pass.

    Args:
        block: the decoder block; only read.
        skip_channels: how many of its first convolution's inputs are the skip's.
        scale: of the dropout in front, 1 / (1 - p).
        gradient_scale: what the gradient at the block's output is multiplied by, (C_out, 1, 1, 1) or 1.
        dtype: of the convolutions.
        cast: to that precision.
    """

    def __init__(
        self, block: Decoder, skip_channels: int, scale: float, gradient_scale: Tensor | float,
        dtype: torch.dtype, cast: Cast,
    ) -> None:
        (first, bias), (second, second_bias) = _folded(block.convolutions)
        self.skip_weight, self.skip_bias = cast(first[:, :skip_channels]), cast(bias)
        # sums of the gradient to gradient of the skip's sum: (9 C', C_skip) in float32
        self.skip_sums = _sum_matrix(first[:, :skip_channels])
        up = first[:, skip_channels:]
        self.up_bias: tuple[Tensor, Tensor] | None = None
        self.up: UpsampledConvolution
        if isinstance(block.up, nn.ConvTranspose2d):
            if block.up.bias is not None:  # no dropout acts on it: it joins the skip half
                self.up_bias = cast(block.up.bias.double().view(1, -1, 1, 1)), cast(up)
            self.up = Composed(up * scale, block.up.weight.double(), cast)
        elif up.is_cuda:
            self.up = StridedAdjoint(up * scale, cast)
        else:
            self.up = bilinear_form(up, scale, dtype, cast)
        self.weight, self.bias = cast(second), cast(second_bias)
        self.adjoint = cast(adjoint_kernel(second * gradient_scale))

    def constant(self, skip: Tensor) -> Tensor:
        """What the first convolution adds in every pass (step 3): (B, C', H, W)."""
        y = F.conv2d(skip, self.skip_weight, self.skip_bias, padding=1)
        if self.up_bias is not None:
            value, weight = self.up_bias
            y += F.conv2d(value.expand(1, -1, *skip.shape[-2:]), weight, padding=1)
        return y


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
        predicted_only: whether the score sums the positive logits alone, not all.

    Attributes:
        rates: dropout probability of each site; a dropout with p = 0 is no site.

    Example:
        >>> model = UNet(width=2, dropout=0.2).eval()
        >>> engine = UNetPasses(model, model.encoder4)
        >>> encoded = engine.encode(torch.zeros(1, 3, 16, 32))
        >>> logits, weights = engine(encoded, 5, lambda x, site, first: None)  # nothing is dropped
        >>> logits.shape, weights.shape, engine.rates
        (torch.Size([5, 16, 32]), torch.Size([5, 16]), [0.2, 0.2, 0.2, 0.2])
    """

    def __init__(
        self, model: UNet, target: nn.Module, dtype: torch.dtype = torch.float32, predicted_only: bool = False
    ) -> None:
        def cast(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()

        with torch.no_grad():
            self.dtype, self.at_bottleneck, self.predicted_only = dtype, target is model.bottleneck, predicted_only
            self.width = model.head.in_channels
            encoders = (model.encoder1, model.encoder2, model.encoder3, model.encoder4, model.bottleneck)
            blocks = [block for encoder in encoders for block in encoder.modules() if isinstance(block, DoubleConv)]
            self.encoders = [[(cast(w), cast(b)) for w, b in _folded(block)] for block in blocks]
            first, second = _folded(blocks[-1])
            self.bottleneck_sums, self.bottleneck_adjoint = _sum_matrix(first[0]), cast(adjoint_kernel(second[0]))
            decoders = [model.decoder4, model.decoder3, model.decoder2, model.decoder1]
            dropouts = [model.dropout] + [block.dropout for block in decoders[:-1]]
            rates = [m.p if isinstance(m, nn.Dropout) else 0.0 for m in dropouts]
            # sites are numbered over the dropouts that drop something, None where one does not
            self.rates = [rate for rate in rates if rate > 0]
            self.sites = [sum(r > 0 for r in rates[:i]) if rates[i] > 0 else None for i in range(4)]
            skips = [len(bias) for _, (_, bias) in self.encoders[3::-1]]  # channels, deepest first
            head = model.head.weight.double()  # 1, C, 1, 1
            assert model.head.bias is not None
            self.head, self.head_bias = head.float(), model.head.bias.float()
            # the last ReLU's mask is all that reaches the last block's adjoint: the head's weight is in it (step 5)
            gradient_scales: list[Tensor | float] = [1.0, 1.0, 1.0, head.view(-1, 1, 1, 1)]
            self.decoders = [
                _DecoderPass(block, skip, 1.0 / (1.0 - rate), factor, dtype, cast)
                for block, skip, rate, factor in zip(decoders, skips, rates, gradient_scales)
            ]

    def group_and_chunk(self, size: Sequence[int], device: torch.device) -> tuple[int, int]:
        """How many images to encode together, and how many of their passes to compute together.

        A rule of the size of the largest feature map and the kind of device: a
        CPU is fastest when a chunk's maps stay in its cache; a GPU wants many
        rows at once.

        Args:
            size: H and W of the images.
            device: that they are on.
        """
        if device.type != "cuda":
            return 1, 8
        rows = max(1, PIECE_CUDA // (self.width * size[0] * size[1]))
        group = max(1, min(8, rows // 15))
        return group, max(1, min(30, rows // group))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """What the passes share (steps 1 to 3).

        Args:
            images: float (B, C, H, W), H and W multiples of 16.

        Raises:
            ValueError: H or W is no multiple of 16.
        """
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"height and width must be multiples of 16, not {images.shape[-2]} x {images.shape[-1]}")
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
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
            gradient of each map's score at the target: float32 (K * B, C).
        """
        height, width = encoded.activations.shape[-2:]
        x = repeat(encoded.bottleneck, passes)
        if self.sites[0] is not None:
            drop(x, self.sites[0], 0)
        logits, g, skip_sums = self._decode(0, x, 0, encoded, drop)
        if self.at_bottleneck:
            if self.sites[0] is not None:
                drop(g, self.sites[0], 0)
            return logits, g.float().mean((2, 3))
        g = F.conv2d(_where_positive(g, x), self.bottleneck_adjoint, padding=1)
        _where_positive(g, repeat(encoded.hidden, passes))
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
            encoded: from :meth:`encode`.
            drop: the dropout.

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
                self._decode(level, part, first + i * rows, encoded, drop)
                for i, part in enumerate(torch.split(x, rows))
            ]
            logits, g, sums = (torch.cat(column) for column in zip(*parts))
            return logits, g, sums
        between = decoder.up.forward_add(x, constant).relu_()
        y = F.conv2d(between, decoder.weight, decoder.bias, padding=1).relu_()
        if level == 3:
            logits = F.conv2d(y.float(), self.head)[:, 0] + self.head_bias
            g = y.sign_()  # the mask of the last ReLU; the adjoint that follows has the head's weight in it
            if self.predicted_only:
                g *= (logits > 0)[:, None]
        else:
            site = self.sites[level + 1]
            if site is not None:
                drop(y, site, first)
            logits, g, _ = self._decode(level + 1, y, first, encoded, drop)
            _where_positive(g, y)
        g = _where_positive(F.conv2d(g, decoder.adjoint, padding=1), between)
        sums = _border_sums(g) if level == 0 else g.new_empty(len(g), 0)
        return logits, decoder.up.backward(g), sums


# ---------------------------------------------------------------- from call to call


class _Kept(NamedTuple):
    """An engine and what it was made from: copies of the network's tensors."""

    tensors: list[Tensor]
    engine: UNetPasses


#: The engines of each network that is still in use, by everything else that they depend on.
_KEPT: WeakKeyDictionary[UNet, dict[tuple[Any, ...], _Kept]] = WeakKeyDictionary()

#: How many of a network: one for half precision, one for what overflows there.
_ENGINES = 2


def engine_of(model: UNet, target: nn.Module, dtype: torch.dtype, predicted_only: bool) -> UNetPasses:
    """The engine of a network, made again only where one of its numbers has changed since the last call.

    The numbers themselves are compared: a network may change without a trace of it, as through ``parameter.data``.

    Args:
        model, target, dtype, predicted_only: as for :class:`UNetPasses`.

    Example:
        >>> model = UNet(width=2).eval()
        >>> first = engine_of(model, model.encoder4, torch.float32, False)
        >>> first is engine_of(model, model.encoder4, torch.float32, False)
        True
        >>> model.head.bias.data += 1
        >>> first is engine_of(model, model.encoder4, torch.float32, False)
        False
    """
    numbers = tuple(getattr(m, "p", getattr(m, "eps", None)) for m in model.modules())
    options = (target is model.bottleneck, dtype, predicted_only, numbers)
    tensors, kept = list(model.state_dict().values()), _KEPT.setdefault(model, {})
    found = kept.get(options)
    if found is not None and all(a.device == b.device and torch.equal(a, b) for a, b in zip(found.tensors, tensors)):
        return found.engine
    while len(kept) >= _ENGINES:
        kept.pop(next(iter(kept)))
    kept[options] = _Kept([tensor.clone() for tensor in tensors], UNetPasses(model, target, dtype, predicted_only))
    return kept[options].engine
