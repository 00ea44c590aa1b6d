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
    """

    mean_prediction: Tensor
    pred_variance: Tensor
    saliency_variance: Tensor
    expected_entropy: Tensor
    empty_cams: Tensor


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
    bound = min(round(p * 2**32), 2**32 - 1) - 2**31
    mixed = keys.view(-1, *[1] * noise.dim()) ^ noise
    return _mix(mixed) >= bound


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
    empty = peak <= torch.finfo(cam.dtype).eps * size.amax(1, keepdim=True)
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
    """Entropy in nats of Bernoulli(sigmoid(z)): ``softplus(z) - z sigmoid(z)``, 0 at infinite z."""
    z = logits.abs()  # symmetric, and free of cancellation for z >= 0: log1p(exp(-z)) + z sigmoid(-z)
    return F.softplus(-z) + z * torch.sigmoid(-z)


# ---------------------------------------------------------------- the maps


def default_chunk(height: int, width: int) -> int:
    """Passes a forward: a rule of the image size alone, so that maps do not depend on the machine."""
    return max(1, min(30, (1 << 18) // (height * width)))


def _binary_logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    logits = output["out"] if isinstance(output, dict) else output
    if logits.dim() != 4 or logits.shape[1] != 1:
        raise ValueError(f"the model must return logits (B, 1, H, W), not {tuple(logits.shape)}")
    return logits


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
) -> UncertaintyMaps:
    """Mean prediction, predictive variance and saliency variance of each image.

    With ``z_t`` the logits of pass t and ``p_t = sigmoid(z_t)``:
    ``mean_t p_t``, ``mean_t (p_t - p)^2``; the score ``S_t`` is the sum of all
    logits, ``a_c = mean_ij dS_t / dA_cij`` its gradient at the activations A of
    ``target_layer``, ``L_t`` the heatmap of :func:`grad_cam`, upsampled
    bilinearly (half-pixel centres) to the image; its population variance is the
    saliency variance. One forward and one backward a pass serve all of it, and
    the backward ends at the target.

    The masks of pass t of an image depend on (seed, image id, t) alone, so the
    maps of an image do not depend on the other images, nor on their order.

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
            depend on it. None: :func:`default_chunk`.
        normalise_cam: whether each heatmap is divided by its maximum.
        to_logits: how to get logits (K, 1, H, W) from the model's output.

    Returns:
        Maps on the device of ``images``.

    Raises:
        ValueError: no active dropout, a model that does not reach the target or
            whose logits do not depend on it, or non-finite logits.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    ids = [str(i) for i in range(len(images))] if image_ids is None else list(image_ids)
    if len(ids) != len(images):
        raise ValueError(f"{len(images)} images but {len(ids)} ids")
    height, width = images.shape[-2:]
    chunk = chunk or default_chunk(height, width)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results: list[tuple[Tensor, ...]] = []
    try:
        for parameter in trainable:  # no graph in front of the target, no weight gradients behind it
            parameter.requires_grad_(False)
        with mc_dropout(model, seed) as source, watch(target_layer) as seen, torch.enable_grad():
            assert source is not None
            for image, image_id in zip(images, ids):
                prediction, saliency, entropy = Moments(), Moments(), Moments()
                empty = torch.zeros((), dtype=torch.int64, device=images.device)
                for start in range(0, passes, chunk):
                    block = range(start, min(start + chunk, passes))
                    seen.clear()
                    source.start(image_id, block)
                    logits = to_logits(model(image.expand(len(block), -1, -1, -1)))
                    if not seen:
                        raise ValueError("the forward pass does not reach the target layer")
                    activations = seen[0]
                    if activations.dim() != 4:
                        raise ValueError(f"the target layer must return (B, C, h, w), not {tuple(activations.shape)}")
                    (gradient,) = torch.autograd.grad(logits.sum(), activations)
                    with torch.no_grad():
                        logits = logits.detach()[:, 0].float()
                        cam, is_empty = grad_cam(
                            activations.detach().float(), gradient.float().mean((2, 3)), normalise_cam
                        )
                        cam = F.interpolate(cam[:, None], (height, width), mode="bilinear", align_corners=False)
                        prediction.update(torch.sigmoid(logits))
                        entropy.update(binary_entropy_of_logits(logits))
                        saliency.update(cam[:, 0])
                        empty += is_empty.sum()
                if not torch.isfinite(prediction.mean).all():
                    raise ValueError(f"the logits of image {image_id} are not finite")
                results.append(
                    (prediction.mean, prediction.variance(), saliency.variance(), entropy.mean, empty)
                )
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return UncertaintyMaps(*(torch.stack(column) for column in zip(*results)))
