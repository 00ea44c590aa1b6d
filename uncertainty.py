"""Uncertainty maps: Monte-Carlo dropout and the variance of Grad-CAM, on the device.

Everything here takes and returns tensors on the device of its input.
Shapes: B images, T passes, K passes of one chunk, C channels, H W pixels,
h w pixels of the Grad-CAM target.

References: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML
2016; Selvaraju et al., "Grad-CAM", ICCV 2017; Chan, Golub, LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances",
1979.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_inference import UNetPasses, supports

METHODS = ("auto", "general", "fast")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
#: What "auto" stands for.
AUTO_PRECISION = "fp32"

#: Dropout modules whose masks can be drawn from a seed; the others have statistics of their own.
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class UncertaintyMaps(NamedTuple):
    """Maps of B images; float32 (B, H, W) unless said otherwise.

    Attributes:
        mean_prediction: mean over passes of the sigmoid, in [0, 1].
        pred_variance: population variance of the sigmoid over passes, in [0, 0.25].
        saliency_variance: population variance of the normalised Grad-CAM
            heatmap over passes, in [0, 0.25].
        expected_entropy: mean over passes of the binary entropy, in nats, in [0, ln 2].
        empty_cams: int64 (B,), how many of the T heatmaps were zero everywhere.
        fallbacks: int64 (B,), 1 where half precision overflowed and the image
            was computed again in fp32.
    """

    mean_prediction: Tensor
    pred_variance: Tensor
    saliency_variance: Tensor
    expected_entropy: Tensor
    empty_cams: Tensor
    fallbacks: Tensor


# ---------------------------------------------------------------- dropout masks


def mask_key(seed: int, image_id: str, pass_index: int, site: int) -> int:
    """The 32-bit key of one dropout mask, as a signed integer.

    A SHA-256 of the four arguments: masks of different seeds, images, passes
    and sites are unrelated, and none depends on what else is computed.
    """
    digest = hashlib.sha256(f"{seed}|{image_id}|{pass_index}|{site}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers that scatters neighbours; works in place.

    Multiplication by an odd constant and xor with the own upper half, twice:
    the construction of MurmurHash3's finaliser. Products wrap around. The
    mask after ``>>`` makes the shift of a signed integer a logical one,
    without which the step would lose the sign bit.
    """
    x.mul_(0x2C1B3C6D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x297A2D39)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def mask_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """The part of the masks' random numbers that depends on the position alone: int32 ``shape``."""
    count = 1
    for length in shape:
        count *= length
    return _mix(torch.arange(1, count + 1, dtype=torch.int32, device=device)).view(*shape)


def dropout_masks(keys: Tensor, noise: Tensor, p: float) -> Tensor:
    """Keep-masks for some passes: bool (K, *noise.shape), True with probability 1 - p.

    Element i of the mask with key k is kept when ``mix(noise_i xor k)``, an
    integer uniform over 32 bits, is at least ``p * 2^32``. This is a
    counter-based generator: any mask can be drawn at any time, on any device,
    in any order, with the same bits.

    Args:
        keys: int32 (K,), from :func:`mask_key`.
        noise: int32, from :func:`mask_noise`.
        p: probability of dropping an element.
    """
    return _mix(keys.view(-1, *[1] * noise.dim()) ^ noise) >= _bound(p)


def _bound(p: float) -> int:
    """``p * 2^32``, counted from the smallest signed integer."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def zero_dropped(x: Tensor, keys: Tensor, noise: Tensor, p: float) -> Tensor:
    """``x * dropout_masks(keys, noise, p)``, in place.

    Args:
        x: (K, C, h, w), of any memory format.
        keys: int32 (K,).
        noise: int32 (1, C, h, w), best in the memory format of x.
        p: as in :func:`dropout_masks`.
    """
    if not x.is_cpu:
        return x.mul_(dropout_masks(keys, noise[0], p))
    if x.dtype != torch.float32:
        return x.copy_(zero_dropped(x.float(), keys, noise, p))
    # The threshold operator, zero where the random number is at most bound - 1, on the bits of x taken as
    # integers: one vectorised sweep, where a comparison and a product with booleans cost many times as much.
    mixed, bits = _mix(keys.view(-1, 1, 1, 1) ^ noise), x.view(torch.int32)
    torch.ops.aten.threshold_backward.grad_input(bits, mixed, max(_bound(p) - 1, -(2**31)), grad_input=bits)
    return x


class _MaskSource:
    """Hands the masks of a chunk of passes to the dropout sites, in the order they are reached."""

    def __init__(self, seed: int):
        self.seed = seed
        self.image_id, self.passes, self.site = "", range(0), 0

    def start(self, image_id: str, passes: range) -> None:
        """Begin a forward whose batch axis is ``passes`` of one image."""
        self.image_id, self.passes, self.site = image_id, passes, 0

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the module would return, under the masks of this site."""
        if isinstance(module, nn.Dropout):
            shape = x.shape[1:]
        else:  # the channel-wise ones drop whole feature maps
            shape = torch.Size([x.shape[1]] + [1] * (x.dim() - 2))
        keys = [mask_key(self.seed, self.image_id, t, self.site) for t in self.passes]
        self.site += 1
        masks = dropout_masks(
            torch.tensor(keys, dtype=torch.int32, device=x.device), mask_noise(shape, x.device), module.p
        )
        return x * masks.to(x.dtype) * (1.0 / (1.0 - module.p))


def active_dropout(model: nn.Module) -> list[nn.Module]:
    """The dropout modules of a model that can drop something.

    Raises:
        ValueError: there is none, all have p = 0, one has p = 1, or one is of
            a kind whose masks cannot be seeded.
    """
    modules = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    foreign = [type(m).__name__ for m in modules if not isinstance(m, DROPOUT_MODULES) and m.p > 0]
    if foreign:
        raise ValueError(f"dropout of type {foreign[0]} is not supported; use nn.Dropout or nn.Dropout2d")
    active = [m for m in modules if m.p > 0]
    if not active:
        raise ValueError(
            f"{type(model).__name__} has no dropout module with p > 0: every pass would be the same "
            "and every variance zero"
        )
    if any(m.p >= 1 for m in active):
        raise ValueError("a dropout module has p = 1 and would drop everything")
    return active


@contextmanager
def mc_dropout(model: nn.Module, seed: int | None = None) -> Iterator[_MaskSource | None]:
    """Turn dropout on and everything else to evaluation mode; put all modes back afterwards.

    Batch norm stays in evaluation mode: its statistics do not move.

    Args:
        model: any module with dropout modules.
        seed: None leaves the masks to PyTorch's global generator. A number
            takes them from :func:`dropout_masks`; the yielded source must then
            be told with ``start`` which image and passes come next.

    Raises:
        ValueError: see :func:`active_dropout`.
    """
    active = active_dropout(model)
    modes = [(module, module.training) for module in model.modules()]
    source = None if seed is None else _MaskSource(seed)
    model.eval()
    try:
        for module in active:
            module.train()
            if source is not None:
                # an attribute of the instance hides the class's forward until it is deleted
                module.forward = lambda x, module=module: source.apply(module, x)  # type: ignore[method-assign]
        yield source
    finally:
        for module in active:
            module.__dict__.pop("forward", None)
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- Grad-CAM


@contextmanager
def watch(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph behind a layer's output and keep that output as the leaf to differentiate by.

    Yields a list that holds the activations of the newest forward. The hook is
    removed on leaving.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen[:] = [leaf]
        return leaf

    handle = layer.register_forward_hook(cut)
    try:
        yield seen
    finally:
        handle.remove()


def grad_cam(activations: Tensor, weights: Tensor, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Heatmaps ``relu(sum_c a_c A_c)``, each divided by its own maximum.

    Args:
        activations: A, float (K, C, h, w), or (1, C, h, w) where all passes share it.
        weights: a, float (K, C): the spatial mean of the score's gradient.
        normalise: False leaves the heatmaps unscaled.

    Returns:
        Heatmaps float (K, h, w), in [0, 1] when normalised, and bool (K,),
        True where a map is empty. A map is empty when its maximum is no larger
        than the rounding error of its own sum, ``eps * max_ij sum_c |a_c A_c|``;
        it is then zero everywhere, never 0 / 0. The bound is relative: scaling
        the score changes nothing.
    """
    if activations.shape[0] == 1:
        flat = activations[0].flatten(1)  # C, hw
        total, size = weights @ flat, weights.abs() @ flat.abs()
    else:
        flat = activations.flatten(2)  # K, C, hw
        total = torch.einsum("kc,kcn->kn", weights, flat)
        size = torch.einsum("kc,kcn->kn", weights.abs(), flat.abs())
    cam = total.clamp_min(0)
    peak = cam.amax(1, keepdim=True)  # K, 1
    size = size.amax(1, keepdim=True)
    # what overflowed is not empty: it stays, as not a number
    empty = (peak <= torch.finfo(cam.dtype).eps * size) & size.isfinite()
    scaled = cam / torch.where(empty, torch.ones_like(peak), peak) if normalise else cam
    cam = torch.where(empty, torch.zeros_like(cam), scaled)
    return cam.view(-1, *activations.shape[-2:]), empty.flatten()


# ---------------------------------------------------------------- moments


class Moments:
    """Streaming mean and population variance over passes (Welford's update).

    ``mean += (x - mean) / n`` and ``M2 += (x - mean_before)^2 (n - 1) / n``:
    the second form never decreases, so the variance is never negative, and
    a constant sequence has variance exactly zero. The passes are taken one by
    one in their order, so chunks of any length give the same bits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.empty(0)

    def update(self, values: Tensor) -> None:
        """Add the passes along the first axis of ``values`` (K, ...)."""
        for x in values:
            self.count += 1
            if self.count == 1:
                self.mean, self.squares = x.clone(), torch.zeros_like(x)
                continue
            delta = x - self.mean
            self.mean.add_(delta, alpha=1.0 / self.count)
            self.squares.addcmul_(delta, delta, value=(self.count - 1) / self.count)

    def variance(self) -> Tensor:
        """Sum of squared deviations over the number of passes; zero for one pass."""
        return self.squares / self.count


def binary_entropy_of_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli(sigmoid(z)): ``softplus(z) - z sigmoid(z)``, of finite z."""
    z = logits.abs()  # symmetric, and free of cancellation for z >= 0: log1p(exp(-z)) + z sigmoid(-z)
    return F.softplus(-z) + z * torch.sigmoid(-z)


# ---------------------------------------------------------------- the maps


def default_chunk(height: int, width: int) -> int:
    """Passes a forward: a rule of the image size alone, so that maps do not depend on the machine."""
    return max(1, min(30, (1 << 18) // (height * width)))


def _group_and_chunk(height: int, width: int, channels: int, device: torch.device) -> tuple[int, int]:
    """Images a group and passes a chunk of the fast path, by the size of the largest feature map alone.

    A processor is fastest when a chunk's maps stay in its cache; a GPU wants
    many rows at once.
    """
    size = channels * height * width
    if device.type == "cuda":
        rows = max(1, (1 << 27) // size)
        group = max(1, min(8, rows // 15))
        return group, max(1, min(30, rows // group))
    return 1, 8


class _Accumulator:
    """The moments of B images over their passes, fed in chunks."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.prediction, self.saliency, self.entropy = Moments(), Moments(), Moments()
        self.empty: Tensor | int = 0

    def update(self, logits: Tensor, cam: Tensor, empty: Tensor) -> None:
        """Logits (K, B, H, W), heatmaps (K, B, h, w), bool (K, B): all of K passes."""
        cam = F.interpolate(cam, self.size, mode="bilinear", align_corners=False)
        self.prediction.update(torch.sigmoid(logits))
        self.entropy.update(binary_entropy_of_logits(logits))
        self.saliency.update(cam)
        self.empty = self.empty + empty.sum(0)

    def maps(self) -> list[Tensor]:
        """The columns of :class:`UncertaintyMaps` up to ``empty_cams``."""
        assert isinstance(self.empty, Tensor)
        return [
            self.prediction.mean, self.prediction.variance(), self.saliency.variance(),
            self.entropy.mean, self.empty,
        ]


def _binary_logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    logits = output["out"] if isinstance(output, dict) else output
    if logits.dim() != 4 or logits.shape[1] != 1:
        raise ValueError(f"the model must return logits (B, 1, H, W), not {tuple(logits.shape)}; to_logits can make them")
    return logits


@contextmanager
def _float32_as(precision: str) -> Iterator[None]:
    """Within: float32 convolutions in ``precision`` ("ieee" or "tf32"), products in true float32.

    Both are process-wide switches, put back afterwards. On CUDA PyTorch's own
    default lets convolutions round their inputs to TF32's ten bits.
    """
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # the switches of PyTorch 2.9 and later
        values = [(backends.cudnn.conv, precision), (backends.cudnn.rnn, precision), (backends.cuda.matmul, "ieee")]
        values += [(getattr(backends.mkldnn, kind), "ieee") for kind in ("conv", "matmul")]
        name: str = "fp32_precision"
    else:
        values = [(backends.cudnn, precision == "tf32"), (backends.cuda.matmul, False)]  # type: ignore[list-item]
        name = "allow_tf32"
    before = [getattr(switch, name) for switch, _ in values]
    try:
        for switch, value in values:
            setattr(switch, name, value)
        yield
    finally:
        for (switch, _), value in zip(values, before):
            setattr(switch, name, value)


def _general_maps(
    model: nn.Module,
    images: Tensor,
    ids: Sequence[str],
    target_layer: nn.Module,
    passes: int,
    seed: int,
    chunk: int | None,
    normalise_cam: bool,
    to_logits: Callable[..., Tensor],
    half: torch.dtype | None,
) -> list[list[Tensor]]:
    """Any model: whole forwards, and the backward by autograd from the logits to the target."""
    height, width = images.shape[-2:]
    chunk = chunk or default_chunk(height, width)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    try:
        for parameter in trainable:  # no graph in front of the target, no weight gradients behind it
            parameter.requires_grad_(False)
        with mc_dropout(model, seed) as source, watch(target_layer) as seen, torch.enable_grad():
            assert source is not None
            for image, image_id in zip(images, ids):
                moments = _Accumulator((height, width))
                for start in range(0, passes, chunk):
                    block = range(start, min(start + chunk, passes))
                    seen.clear()
                    source.start(image_id, block)
                    with torch.autocast(images.device.type, half, enabled=half is not None):
                        logits = to_logits(model(image.expand(len(block), -1, -1, -1)))
                    if not seen:
                        raise ValueError("the forward pass does not reach the target layer")
                    activations = seen[0]
                    if activations.dim() != 4:
                        raise ValueError(f"the target layer must return (B, C, h, w), not {tuple(activations.shape)}")
                    gradient = None
                    if logits.requires_grad:
                        (gradient,) = torch.autograd.grad(logits.sum(), activations, allow_unused=True)
                    if gradient is None:
                        raise ValueError("the logits do not depend on the output of the target layer")
                    with torch.no_grad():
                        dtype = torch.promote_types(logits.dtype, torch.float32)
                        cam, empty = grad_cam(
                            activations.detach().to(dtype), gradient.to(dtype).mean((2, 3)), normalise_cam
                        )
                        moments.update(logits.detach().to(dtype), cam[:, None], empty[:, None])
                results.append([column[0] for column in moments.maps()])
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return results


class _Dropper:
    """Applies the masks of some images' passes: the ``drop`` of :class:`unet_inference.UNetPasses`."""

    def __init__(self, seed: int, ids: Sequence[str], passes: int, rates: Sequence[float], device: torch.device):
        keys = [[[mask_key(seed, i, t, s) for s in range(len(rates))] for i in ids] for t in range(passes)]
        self.keys = torch.tensor(keys, dtype=torch.int32, device=device)  # T, B, sites; copied once
        self.rates = rates
        self.block = slice(0, passes)
        self.noise: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor, site: int, first: int) -> None:
        shape = x.shape[1:]
        if shape not in self.noise:
            noise = mask_noise(shape, x.device)[None]
            self.noise[shape] = noise.contiguous(memory_format=torch.channels_last)
        keys = self.keys[self.block, :, site].reshape(-1)[first : first + len(x)]
        zero_dropped(x, keys, self.noise[shape], self.rates[site])


def _fast_maps(
    engine: UNetPasses,
    images: Tensor,
    ids: Sequence[str],
    passes: int,
    seed: int,
    chunk: int | None,
    normalise_cam: bool,
) -> list[list[Tensor]]:
    """Our U-Net: see :mod:`unet_inference`."""
    height, width = images.shape[-2:]
    group, by_rule = _group_and_chunk(height, width, engine.width, images.device)
    chunk = chunk or by_rule
    results = []
    for first in range(0, len(images), group):
        # a group has always the same shape, so that no image's rounding depends on how many there are
        members = [min(i, len(images) - 1) for i in range(first, first + group)]
        encoded = engine.encode(images[members])
        drop = _Dropper(seed, [ids[i] for i in members], passes, engine.rates, images.device)
        moments = _Accumulator((height, width))
        for start in range(0, passes, chunk):
            drop.block = slice(start, min(start + chunk, passes))
            logits, weights = engine(encoded, drop.block.stop - start, drop)
            per_image = weights.unflatten(0, (-1, group)).unbind(1)
            cams = [grad_cam(a[None], w, normalise_cam) for a, w in zip(encoded.activations, per_image)]
            cam, empty = (torch.stack(parts, 1) for parts in zip(*cams))
            moments.update(logits.unflatten(0, (-1, group)), cam, empty)
        results += [list(columns) for columns in zip(*moments.maps())][: len(images) - first]
    return results


def uncertainty_maps(
    model: nn.Module,
    images: Tensor,
    *,
    target_layer: nn.Module,
    passes: int = 30,
    seed: int = 42,
    image_ids: Sequence[str] | None = None,
    chunk: int | None = None,
    normalise_cam: bool = True,
    to_logits: Callable[..., Tensor] = _binary_logits,
    method: str = "auto",
    precision: str = "fp32",
) -> UncertaintyMaps:
    """Mean prediction, predictive variance and saliency variance of each image.

    With ``z_t`` the logits of pass t and ``p_t = sigmoid(z_t)``:
    ``mean_t p_t``, ``mean_t (p_t - p)^2``; the score ``S_t`` is the sum of all
    logits, ``a_c = mean_ij dS_t / dA_cij`` its gradient at the activations A of
    ``target_layer``, ``L_t`` the heatmap of :func:`grad_cam`, upsampled
    bilinearly (half-pixel centres) to the image; its population variance is the
    saliency variance. One forward and one backward a pass serve all of it, and
    the backward ends at the target.

    The masks of pass t of an image depend on (seed, image id, t) alone, and
    images are computed in groups of one shape, so the maps of an image do not
    depend on the other images, nor on their order.

    Args:
        model: any module with dropout modules that maps (K, C, H, W) to logits
            (K, 1, H, W) or to a dictionary with those under "out". Its modes,
            hooks and gradients are left as they were.
        images: float (B, C, H, W), normalised as the model expects.
        target_layer: the submodule whose 4-d output Grad-CAM weighs.
        passes: T, at least 1 (one pass gives zero variance).
        seed: of the masks.
        image_ids: one string an image; the position in the batch if None.
        chunk: passes a forward; memory grows with it, the moments do not
            depend on it (the convolution library may round differently for
            another batch size). None: a rule of the image size, the network's
            width and the kind of device.
        normalise_cam: whether each heatmap is divided by its maximum.
        to_logits: how to get logits (K, 1, H, W) from the model's output; the
            general path only.
        method: "fast" is the algebra of :mod:`unet_inference`, for an
            unmodified :class:`model.UNet` in float32 and the targets
            ``encoder4`` and ``bottleneck``; "general" serves every model;
            "auto" takes the fast one where it can.
        precision: of the convolutions. "fp32" is true float32 on every device;
            "tf32" lets CUDA round the factors to ten bits; "bf16" and "fp16"
            store activations in half precision. Moments, sigmoid and heatmaps
            are float32 always. "auto": see :data:`AUTO_PRECISION`. An image
            whose maps are not finite in half precision is computed again in
            fp32 and counted in ``fallbacks``.

    Returns:
        Maps on the device of ``images``.

    Raises:
        ValueError: no active dropout, a model that does not reach the target or
            whose logits do not depend on it, non-finite logits in fp32, an
            unknown method or precision, or "fast" where it does not apply.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    ids = [str(i) for i in range(len(images))] if image_ids is None else list(image_ids)
    if len(ids) != len(images):
        raise ValueError(f"{len(images)} images but {len(ids)} ids")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, not {precision!r}")
    precision = AUTO_PRECISION if precision == "auto" else precision
    active_dropout(model)
    applies = (
        images.dtype == torch.float32 and to_logits is _binary_logits and supports(model, target_layer)
    )
    if method == "fast" and not applies:
        raise ValueError(
            "the fast path needs an unmodified UNet, float32 images, and encoder4 or bottleneck as the target"
        )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def compute(chosen: Sequence[int], dtype: torch.dtype | None) -> list[list[Tensor]]:
        some, names = images[list(chosen)], [ids[i] for i in chosen]
        with _float32_as("tf32" if precision == "tf32" else "ieee"):
            if applies and method != "general":
                engine = UNetPasses(model, target_layer, dtype or torch.float32)  # type: ignore[arg-type]
                return _fast_maps(engine, some, names, passes, seed, chunk, normalise_cam)
            return _general_maps(
                model, some, names, target_layer, passes, seed, chunk, normalise_cam, to_logits, dtype
            )

    def not_finite(rows: Sequence[Sequence[Tensor]]) -> list[int]:
        finite = torch.stack([torch.stack([m.isfinite().all() for m in row[:4]]).all() for row in rows]).tolist()
        return [i for i, ok in enumerate(finite) if not ok]

    rows = compute(range(len(images)), half)
    broken = not_finite(rows)
    fallbacks = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    if broken and half is not None:
        for i, row in zip(broken, compute(broken, None)):
            rows[i] = row
        fallbacks[broken] = 1
        broken = not_finite(rows)
    if broken:
        raise ValueError(f"the maps of image {ids[broken[0]]} are not finite")
    return UncertaintyMaps(*(torch.stack(column) for column in zip(*rows)), fallbacks)
