"""Uncertainty maps: Monte-Carlo dropout and the variance of Grad-CAM, on the device.

In this order: dropout that stays on, Grad-CAM, the maps of chunks of passes,
the maps of any model, the maps of our U-Net, and :func:`uncertainty_maps`,
which is all that a user needs. Everything takes and returns tensors on the
device of its input.

Shapes: B images, T passes, K passes of one chunk, C channels, H W pixels,
h w pixels of the Grad-CAM target.

References: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML
2016; Selvaraju et al., "Grad-CAM", ICCV 2017; Vinogradova, Dibrov, Myers,
"Towards interpretable semantic segmentation via Grad-CAM", AAAI 2020 (the score of the predicted region).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from inference.flips import flip_variance
from inference.logits import ToLogits, binary_entropy_of_logits, binary_logits
from inference.masks import InPlaceDropout, MaskSource
from inference.moments import Moments, PassDice
from inference.precision import automatic_precision, float32_convolutions
from inference.threads import in_threads
from inference.unet_passes import UNetPasses, engine_of, supports
from model import UNet

__all__ = [
    "CAM_SCORES", "METHODS", "Moments", "PRECISIONS", "UncertaintyMaps", "active_dropout",
    "binary_entropy_of_logits", "capture_activations", "flip_variance", "grad_cam", "mc_dropout", "uncertainty_maps",
]

METHODS = ("auto", "general", "fast")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
#: Logits that the score of Grad-CAM sums: all, or those of the lesion that the pass predicts.
CAM_SCORES = ("all", "predicted")

#: Dropout modules whose masks can be drawn from a seed; the others have statistics of their own.
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


# ---------------------------------------------------------------- Monte-Carlo dropout


def active_dropout(model: nn.Module) -> list[_DropoutNd]:
    """The dropout modules of a model that can drop something.

    Raises:
        ValueError: there is none, one has p = 1, or one is of a kind whose masks cannot be seeded.

    Example:
        >>> active_dropout(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2), nn.Dropout(0.2)))
        [Dropout(p=0.2, inplace=False)]
    """
    active = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    foreign = [type(m).__name__ for m in active if not isinstance(m, DROPOUT_MODULES)]
    if foreign:
        raise ValueError(f"dropout of type {foreign[0]} is not supported; use nn.Dropout or nn.Dropout2d")
    if not active:
        name = type(model).__name__
        raise ValueError(f"{name} has no dropout module with p > 0: every pass would be the same and every variance zero")
    if any(m.p >= 1 for m in active):
        raise ValueError("a dropout module has p = 1 and would drop everything")
    return active


@contextmanager
def mc_dropout(model: nn.Module, seed: int | None = None) -> Iterator[MaskSource | None]:
    """Turn dropout on and everything else to evaluation mode; put all modes back afterwards.

    Batch norm stays in evaluation mode: its statistics do not move.

    Args:
        model: any module with dropout modules.
        seed: None leaves the masks to PyTorch's global generator. A number
            takes them from the yielded source, which must then be told with
            :meth:`~inference.masks.MaskSource.start` which image and passes come next.

    Raises:
        ValueError: see :func:`active_dropout`.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5)).eval()
        >>> with mc_dropout(model, seed=42) as source:
        ...     source.start("ISIC_0000000", range(2))  # two passes along the batch axis
        ...     model(torch.ones(2, 4))
        tensor([[0., 0., 0., 2.],
                [2., 0., 0., 0.]])
        >>> model(torch.ones(1, 4))
        tensor([[1., 1., 1., 1.]])
    """
    active = active_dropout(model)
    modes = [(module, module.training) for module in model.modules()]
    source = None if seed is None else MaskSource(seed)
    model.eval()
    try:
        for module in active:
            module.train()
            if source is not None:
                # an attribute of the instance hides the class's forward until it is deleted
                module.forward = lambda x, module=module: source.apply(module, x)
        yield source
    finally:
        for module in active:
            module.__dict__.pop("forward", None)
        for each, mode in modes:
            each.training = mode


# ---------------------------------------------------------------- Grad-CAM


@contextmanager
def capture_activations(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph behind a layer's output and keep that output as the leaf to differentiate by.

    Other hooks of the layer act afterwards, and what follows may work in place: the leaf stays what the layer returned.
    Yields a list that holds the activations of the newest forward; on leaving, the hook is removed.

    Example:
        >>> layer = nn.Conv2d(1, 2, 1)
        >>> with capture_activations(layer) as captured:
        ...     score = 3 * layer(torch.ones(1, 1, 4, 4)).sum()
        >>> torch.autograd.grad(score, captured)[0].mean((2, 3))
        tensor([[3., 3.]])
    """
    captured: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        captured[:] = [leaf]
        return leaf.clone()

    handle = layer.register_forward_hook(cut, prepend=True)
    try:
        yield captured
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

    Example:
        >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # two channels of 1 x 2 pixels
        >>> cam, empty = grad_cam(activations, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        >>> cam.tolist(), empty.tolist()
        ([[[1.0, 0.5]], [[0.0, 0.0]]], [False, True])
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


# ---------------------------------------------------------------- the maps of chunks of passes


class UncertaintyMaps(NamedTuple):
    """Maps of B images; float32 (B, H, W) unless said otherwise.

    Attributes:
        mean_prediction: mean over passes of the sigmoid, in [0, 1].
        pred_variance: population variance of the sigmoid over passes, in [0, 0.25].
        saliency_variance: population variance of the normalised Grad-CAM heatmap over passes, in [0, 0.25].
        expected_entropy: mean over passes of the binary entropy, in nats, in [0, ln 2].
        empty_cams: int64 (B,), how many of the T heatmaps were zero everywhere.
        fallbacks: int64 (B,), 1 where half precision overflowed and the image was computed again in fp32.
        pass_dice: float64 (B,), mean pairwise Dice of the lesions that the passes predict; see :class:`PassDice`.
    """

    mean_prediction: Tensor
    pred_variance: Tensor
    saliency_variance: Tensor
    expected_entropy: Tensor
    empty_cams: Tensor
    fallbacks: Tensor
    pass_dice: Tensor


#: Of K passes of B images: logits (K, B, H, W), heatmaps (K, B, h, w), and bool (K, B), which of these are empty.
_Chunk = tuple[Tensor, Tensor, Tensor]


def _maps_of_chunks(images: Tensor, chunks: Iterable[_Chunk]) -> list[UncertaintyMaps]:
    """The maps of each image, without the batch axis, from all passes of all images."""
    prediction, saliency, entropy, agreement = Moments(), Moments(), Moments(), PassDice()
    empty_cams = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for logits, cam, empty in chunks:
        prediction.update(torch.sigmoid(logits))
        entropy.update(binary_entropy_of_logits(logits))
        saliency.update(F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False))
        agreement.update(logits > 0)
        empty_cams += empty.sum(0)
    maps = UncertaintyMaps(
        prediction.mean, prediction.variance(), saliency.variance(), entropy.mean,
        empty_cams, torch.zeros_like(empty_cams), agreement.value(),
    )
    return [UncertaintyMaps(*row) for row in zip(*maps)]


# ---------------------------------------------------------------- the maps of any model


@dataclass(frozen=True)
class _Options:
    """What the images of one call have in common; see :func:`uncertainty_maps`."""

    target_layer: nn.Module
    passes: int
    seed: int
    chunk: int | None
    normalise_cam: bool
    predicted_only: bool  # the score sums the positive logits alone
    to_logits: ToLogits
    half: torch.dtype | None  # precision of the convolutions, if not float32

    def chunks(self, by_rule: int, device: torch.device) -> Iterator[range]:
        """The passes in chunks, of a length by rule where none is given; on a GPU as equal as can be."""
        step = self.chunk or by_rule
        if self.chunk is None and device.type == "cuda":
            step = math.ceil(self.passes / math.ceil(self.passes / step))
        for start in range(0, self.passes, step):
            yield range(start, min(start + step, self.passes))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter takes a gradient: no graph in front of the target, no weight gradients behind it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _gradient(logits: Tensor, captured: Sequence[Tensor], predicted_only: bool) -> Tensor:
    """The gradient of the summed logits, or positive logits, at the captured activations (K, C, h, w)."""
    if not captured:
        raise ValueError("the forward pass does not reach the target layer")
    if captured[0].dim() != 4:
        raise ValueError(f"the target layer must return (B, C, h, w), not {tuple(captured[0].shape)}")
    score = F.relu(logits) if predicted_only else logits  # the gradient of relu is 1 where z > 0, and 0 at 0
    gradient = torch.autograd.grad(score.sum(), captured, allow_unused=True)[0] if logits.requires_grad else None
    if gradient is None:
        raise ValueError("the logits do not depend on the output of the target layer")
    return gradient


def _general_chunks(
    model: nn.Module, image: Tensor, image_id: str, source: MaskSource, captured: list[Tensor], options: _Options
) -> Iterator[_Chunk]:
    """The passes of one image (C, H, W)."""
    # a rule of the image size and the kind of device alone, so that maps do not depend on the machine
    pixels = 1 << 21 if image.is_cuda else 1 << 18
    for block in options.chunks(max(1, min(30, pixels // image[0].numel())), image.device):
        captured.clear()
        source.start(image_id, block, options.passes)
        with torch.enable_grad():
            with torch.autocast(image.device.type, options.half, enabled=options.half is not None):
                logits = options.to_logits(model(image.expand(len(block), -1, -1, -1).contiguous()))
            gradient = _gradient(logits, captured, options.predicted_only)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        activations, weights = captured[0].detach().to(dtype), gradient.to(dtype).mean((2, 3))
        cam, empty = grad_cam(activations, weights, options.normalise_cam)
        yield logits.detach().to(dtype), cam[:, None], empty[:, None]


def _general_maps(model: nn.Module, images: Tensor, ids: Sequence[str], options: _Options) -> list[UncertaintyMaps]:
    """Any model: whole forwards, and the backward by autograd from the logits to the target."""
    rows = []
    with _frozen(model), mc_dropout(model, options.seed) as source, capture_activations(options.target_layer) as captured:
        assert source is not None
        for image, image_id in zip(images, ids):
            rows += _maps_of_chunks(image[None], _general_chunks(model, image, image_id, source, captured, options))
    return rows


# ---------------------------------------------------------------- the maps of our U-Net


def _fast_chunks(engine: UNetPasses, images: Tensor, ids: Sequence[str], chunk: int, options: _Options) -> Iterator[_Chunk]:
    """The passes of images that are encoded together."""
    encoded = engine.encode(images)
    drop = InPlaceDropout(options.seed, ids, options.passes, engine.rates, images.device)

    def compute(block: range) -> _Chunk:
        logits, weights = engine(encoded, len(block), partial(drop, block))  # K * B rows each, pass-major
        per_image = weights.view(len(block), len(images), -1).unbind(1)
        cams = [grad_cam(a[None], w, options.normalise_cam) for a, w in zip(encoded.activations, per_image)]
        cam, empty = (torch.stack(parts, 1) for parts in zip(*cams))
        return logits.view(len(block), *images[:, 0].shape), cam, empty

    in_parallel = images.is_cpu and options.chunk is None  # whoever gives a chunk size wants to save memory
    return (in_threads if in_parallel else map)(compute, options.chunks(chunk, images.device))


def _fast_maps(model: nn.Module, images: Tensor, ids: Sequence[str], options: _Options) -> list[UncertaintyMaps]:
    """An unmodified U-Net: see :mod:`inference.unet_passes`."""
    assert isinstance(model, UNet)
    make = engine_of if images.is_cpu else UNetPasses  # elsewhere comparing the weights takes as long as folding them
    engine = make(model, options.target_layer, options.half or torch.float32, options.predicted_only)
    group, chunk = engine.group_and_chunk(images.shape[-2:], images.device)
    rows = []
    for first in range(0, len(images), group):
        # a group always has the same size, so that no image's rounding depends on how many there are
        some, names = images[first : first + group], list(ids[first : first + group])
        missing = group - len(some)
        some = torch.cat([some, some[-1:].expand(missing, -1, -1, -1)]) if missing else some
        chunks = _fast_chunks(engine, some, names + names[-1:] * missing, chunk, options)
        rows += _maps_of_chunks(some, chunks)[: len(images) - first]
    return rows


# ---------------------------------------------------------------- uncertainty maps


def _not_finite(rows: Sequence[UncertaintyMaps]) -> list[int]:
    """Positions of the images with a value that is not finite."""
    finite = torch.stack([torch.stack([m.isfinite().all() for m in row[:4]]).all() for row in rows]).tolist()
    return [i for i, ok in enumerate(finite) if not ok]


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
    cam_score: str = "all",
    to_logits: ToLogits = binary_logits,
    method: str = "auto",
    precision: str = "fp32",
) -> UncertaintyMaps:
    """Mean prediction, predictive variance and saliency variance of each image.

    With ``z_t`` the logits of pass t and ``p_t = sigmoid(z_t)``, the prediction
    is ``p = mean_t p_t`` and its variance ``mean_t (p_t - p)^2``. The score
    ``S_t`` is the sum of the logits, ``a_c = mean_ij dS_t / dA_cij`` its gradient
    at the activations A of ``target_layer``; the saliency variance is that of
    the heatmaps of :func:`grad_cam`, upsampled bilinearly (half-pixel centres).

    The masks of pass t of an image depend on (seed, image id, t) alone, and
    images are computed in groups of one shape, so the maps of an image depend
    neither on the other images nor on their order.

    Args:
        model: any module with dropout modules that maps (K, C, H, W) to logits
            (K, 1, H, W) or to a dictionary with those under "out". Its modes,
            hooks and gradients are left as they were.
        images: float (B, C, H, W), normalised as the model expects.
        target_layer: the submodule whose 4-d output Grad-CAM weighs.
        passes: T, at least 1 (one pass gives zero variance).
        seed: of the masks.
        image_ids: one string per image; the position in the batch if None.
        chunk: passes per forward; memory grows with it, and the maps depend on
            it by the convolution library's rounding alone. None: a rule of the
            image size, the network's width and the kind of device.
        normalise_cam: whether each heatmap is divided by its maximum.
        cam_score: "all" sums all logits; "predicted" those of the lesion that the pass predicts (z > 0), and a pass
            that predicts none has an empty heatmap.
        to_logits: makes logits (K, 1, H, W) of the model's output; the general path only.
        method: "general" serves every model; "fast" is the algebra of
            :mod:`inference.unet_passes`, for an unmodified float32 U-Net and the
            targets ``encoder4`` and ``bottleneck``; "auto" is fast where it can be.
        precision: of the convolutions. "fp32" is true float32 on every device;
            "tf32" lets CUDA round the factors to ten bits; "bf16" and "fp16"
            store activations in half precision; "auto" is :func:`~inference.precision.automatic_precision`.
            Moments, sigmoid and heatmaps are float32 always. An image whose maps
            are not finite in half precision is computed again in fp32.

    Returns:
        Maps on the device of ``images``.

    Raises:
        ValueError: no active dropout, a model that does not reach the target or
            whose logits do not depend on it, non-finite logits in fp32, an
            unknown method, precision or score, or "fast" where it does not apply.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = UNet(width=4, dropout=0.2)
        >>> maps = uncertainty_maps(model, torch.rand(1, 3, 16, 32), target_layer=model.encoder4, passes=2)
        >>> maps.mean_prediction.shape, bool((maps.pred_variance > 0).any())
        (torch.Size([1, 16, 32]), True)
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    ids = [str(i) for i in range(len(images))] if image_ids is None else list(image_ids)
    if len(ids) != len(images):
        raise ValueError(f"{len(images)} images but {len(ids)} ids")
    choices = (("method", method, METHODS), ("precision", precision, PRECISIONS), ("cam_score", cam_score, CAM_SCORES))
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, not {value!r}")
    active_dropout(model)
    applies = images.dtype == torch.float32 and to_logits is binary_logits and supports(model, target_layer)
    if method == "fast" and not applies:
        raise ValueError("the fast path needs an unmodified UNet, float32 images, and encoder4 or bottleneck as the target")
    fast = applies and method != "general"
    precision = automatic_precision(images.device, fast) if precision == "auto" else precision
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    options = _Options(target_layer, passes, seed, chunk, normalise_cam, cam_score == "predicted", to_logits, half)
    compute = _fast_maps if fast else _general_maps
    with float32_convolutions("tf32" if precision == "tf32" else "ieee"):
        rows = compute(model, images, ids, options)
        broken = _not_finite(rows)
        if broken and half is not None:
            again = compute(model, images[broken], [ids[i] for i in broken], replace(options, half=None))
            for i, row in zip(broken, again):
                rows[i] = row._replace(fallbacks=torch.ones_like(row.fallbacks))
            broken = _not_finite(rows)
    if broken:
        raise ValueError(f"the maps of image {ids[broken[0]]} are not finite")
    return UncertaintyMaps(*(torch.stack(column) for column in zip(*rows)))
