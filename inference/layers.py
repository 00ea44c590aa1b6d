"""Which layers a network has, as one forward pass reaches them: targets for Grad-CAM, and places where dropout can be added.

Shapes: B images, C channels, H W pixels of the images, h w pixels of a feature map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One call of a layer during a forward pass.

    Attributes:
        path: of the layer.
        shape: of its output, without the batch axis.
        gradient: what the sum of the logits has for a gradient at the output: "none" where the logits do not depend on
            it, "zero" where it is zero everywhere, else "some".
        is_map: whether it is a feature map (C, h, w) in the proportions of the images, with several channels and pixels,
            that the logits depend on.
        concatenates: whether the output is a concatenation, as of a skip connection with what it skips.
    """

    path: str
    shape: tuple[int, ...]
    gradient: str
    is_map: bool
    concatenates: bool

    @property
    def part(self) -> str:
        """The attribute of the network that holds the layer."""
        return self.path.partition(".")[0]

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of a feature map."""
        return self.shape[1:]

    @property
    def area(self) -> int:
        """Pixels of a feature map."""
        return self.shape[1] * self.shape[2]

    def __str__(self) -> str:
        return f"{self.path} ({' x '.join(map(str, self.shape))})"


def trace(forward: Callable[[Tensor], Tensor], layers: Mapping[str, nn.Module], images: Tensor) -> list[Call]:
    """One forward and one backward pass, and which calls of which layers they went through.

    Args:
        forward: from images to logits; nothing of the modes of its modules is changed.
        layers: by path.
        images: float (B, C, H, W).

    Returns:
        Calls that returned one floating-point tensor, in the order in which they ended: a layer after those inside it.

    Raises:
        ValueError: the logits are cut off from the images, so that no gradient can be taken.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 1))
        >>> for call in trace(net, dict(net.named_children()), torch.zeros(1, 3, 8, 8)):
        ...     print(call, call.gradient)
        0 (2 x 8 x 8) some
        1 (2 x 4 x 4) some
        2 (2 x 8 x 8) some
        3 (1 x 8 x 8) some
    """
    found: list[tuple[str, Tensor, bool]] = []

    def keep(path: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.append((path, output, type(output.grad_fn).__name__.startswith("Cat")))

    # in front of other hooks: what the layer itself returns
    handles = [layer.register_forward_hook(functools.partial(keep, path), prepend=True) for path, layer in layers.items()]
    try:
        with torch.enable_grad():
            logits = forward(images.detach().requires_grad_().clone())  # no leaf: a first layer may work in place
            if not logits.requires_grad:
                raise ValueError("the logits are cut off from the images, by no_grad or detach: no gradient can be taken")
            reached = [output for _, output, _ in found if output.requires_grad]
            gradients = iter(torch.autograd.grad(logits.sum(), reached, allow_unused=True) if reached else ())
    finally:
        for handle in handles:
            handle.remove()
    calls = []
    for path, output, concatenates in found:
        gradient = next(gradients) if output.requires_grad else None
        shape, kind = tuple(output.shape[1:]), "none"
        if gradient is not None:
            kind = "some" if bool((gradient != 0).any()) else "zero"
        calls.append(Call(path, shape, kind, kind != "none" and _like(shape, images), concatenates))
    return calls


def _like(shape: tuple[int, ...], images: Tensor) -> bool:
    """Whether this is the shape (C, h, w) of more than one channel and one pixel, and in the proportions of the images."""
    if len(shape) != 3 or shape[0] == 1 or shape[1] * shape[2] <= 1:
        return False
    height, width = images.shape[-2:]
    return abs(shape[1] * width - shape[2] * height) < max(height, width)


def _nesting(calls: Sequence[Call]) -> dict[str, int]:
    """How many layers around each return another size: 0 for a stage of the network, more inside a block that goes on."""
    sizes = {call.path: call.size for call in calls if len(call.shape) == 3}
    nesting = {}
    for path, size in sizes.items():
        parts = path.split(".")
        around = (".".join(parts[:end]) for end in range(1, len(parts)))
        nesting[path] = sum(sizes.get(outer, size) != size for outer in around)
    return nesting


def target_candidates(calls: Sequence[Call], most: int = 15) -> list[Call]:
    """Layers that Grad-CAM can weigh: the last at one resolution within each part of the network, in order.

    A part is what one of the network's own attributes holds (its encoder, its decoder). Layers inside a block that goes on
    at another resolution, and concatenations, are second choice; of layers that end together it is the outermost.

    Args:
        calls: from :func:`trace`.
        most: how many; of more the last at each resolution are kept, and of these those with the shortest paths.
    """
    nesting = _nesting(calls)
    stretches: list[list[Call]] = []
    for call in (call for call in calls if call.is_map):
        before = stretches[-1][-1] if stretches else None
        if before and (before.size, before.part) == (call.size, call.part):
            stretches[-1].append(call)
        else:
            stretches.append([call])
    chosen = [min(reversed(calls), key=lambda call: (call.concatenates, nesting[call.path])) for calls in stretches]
    chosen = list({call.path: call for call in chosen}.values())  # a layer that is called again counts where it was last
    if len(chosen) > most:
        chosen = [call for call, after in zip(chosen, [*chosen[1:], None]) if after is None or after.size != call.size]
    kept = sorted(chosen, key=lambda call: call.path.count("."))[:most]
    return [call for call in chosen if call in kept]


def decoder_blocks(calls: Sequence[Call], height: int, width: int) -> list[str]:
    """The layers after which dropout suits a network: its bottleneck and the blocks of its decoder, but for the last.

    From the smallest feature map on, one layer at each resolution: the last, unless it is inside a block which goes on at
    another resolution, and of layers that end together the outermost. Full resolution is left out, as in
    :class:`model.UNet`: dropout there is noise on single pixels of the logits. So are maps of one pixel (the gates of
    attention), maps of one channel (the logits), and concatenations (dropout would act on the skip connection as well).
    A network that never leaves full resolution has its last layer before the logits.

    Args:
        calls: from :func:`trace`.
        height, width: of the images.

    Returns:
        Paths, in the order of the forward pass; empty where there is no layer to choose.
    """
    nesting = _nesting(calls)
    maps = [call for call in calls if call.is_map]
    smallest = min((call.area for call in maps), default=0)
    start = next((place for place, call in enumerate(maps) if call.area == smallest), 0)
    by_size: dict[tuple[int, ...], list[Call]] = {}
    for call in maps[start:]:
        if not call.concatenates:
            by_size.setdefault(call.size, []).append(call)
    last = [
        min((call for call in reversed(calls) if call.part == calls[-1].part), key=lambda call: nesting[call.path])
        for calls in by_size.values()
    ]
    below = [call for call in last if call.area < height * width]
    return [call.path for call in sorted(below or last, key=maps.index)]


def insert_after(layer: nn.Module, inserted: nn.Module) -> None:
    """Let ``inserted`` act on whatever ``layer`` returns from now on; names of weights and modules stay."""
    layer.register_forward_hook(functools.partial(_then, inserted))


def _then(inserted: nn.Module, layer: nn.Module, inputs: object, output: Tensor) -> Any:
    return inserted(output)
