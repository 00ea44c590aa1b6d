"""What is asked of a network's output: one logit per pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: From a network's output to logits (B, 1, H, W).
ToLogits = Callable[..., Tensor]


def binary_logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    """The logits of a network that returns them, or a dictionary that has them under "out".

    Raises:
        ValueError: they are not (B, 1, H, W).
    """
    logits = output["out"] if isinstance(output, dict) else output
    if logits.dim() != 4 or logits.shape[1] != 1:
        raise ValueError(f"the model must return logits (B, 1, H, W), not {tuple(logits.shape)}; to_logits can make them")
    return logits


class WrongOutput(ValueError):
    """A network returned something else than one logit per pixel; the message goes on from its name."""


def selected_logits(output: Any, key: str | None, images: Tensor) -> Tensor:
    """The logits in whatever a network returns.

    Args:
        output: a tensor, or a mapping, tuple, list, named tuple or data class that holds one.
        key: of the tensor, or its place; None stands for the tensor itself, or for "out".
        images: (B, C, H, W), that the network was given.

    Returns:
        float (B, 1, H, W).

    Raises:
        WrongOutput: there is no such part, or it is not float (B, 1, H, W) or (B, H, W).

    Example:
        >>> images = torch.zeros(2, 3, 4, 4)
        >>> selected_logits((torch.zeros(1), torch.zeros(2, 4, 4)), "-1", images).shape
        torch.Size([2, 1, 4, 4])
    """
    logits = output if isinstance(output, Tensor) and key is None else _part(output, key)
    if not isinstance(logits, Tensor):
        raise WrongOutput(f"returned {_described(logits)}, but one tensor of logits is expected; choose it with --output")
    height, width = images.shape[-2:]
    expected = (len(images), 1, height, width)
    if not logits.is_floating_point():
        raise WrongOutput(f"returned {_described(logits)}; logits are floating-point numbers, of which the sigmoid is taken")
    found = logits.unsqueeze(1) if logits.dim() == 3 else logits
    if tuple(found.shape) != expected:
        hint = ""
        if found.dim() == 4 and found.shape[-2:] != images.shape[-2:]:
            hint = "; upsample them to the size of the images"
        elif found.dim() == 4 and found.shape[1] == 2:
            hint = "; of two classes, return the difference of their logits"
        given = f"{_described(logits)} for images {tuple(images.shape)}"
        raise WrongOutput(f"returned {given}, but one logit per pixel is expected, {expected}{hint}")
    return found


#: Steps of autograd that only look at their input in another way.
_VIEWS = ("View", "Unsafe", "Squeeze", "Unsqueeze", "Select", "Slice", "Alias", "Clone", "Reshape", "Index")


def are_probabilities(logits: Tensor) -> bool:
    """Whether a network's output, made with gradients, ends in a sigmoid or a softmax.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> are_probabilities((3 * weight).sigmoid()[None]), are_probabilities(3 * weight.sigmoid())
        (True, False)
    """
    step: Any = logits.grad_fn
    while step is not None and type(step).__name__.startswith(_VIEWS):
        step = step.next_functions[0][0]
    return type(step).__name__.startswith(("Sigmoid", "Softmax"))


def _part(output: Any, key: str | None) -> Any:
    """What a container holds under a key or at a place."""
    if isinstance(output, Tensor):
        raise WrongOutput(f"returned one tensor, {_described(output)}; leave --output out")
    by_place: dict[str, Any] = {}
    if isinstance(output, Mapping):
        parts = {str(name): value for name, value in output.items()}
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {item.name: getattr(output, item.name) for item in dataclasses.fields(output)}
    elif isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", range(len(output)))
        parts = {str(name): value for name, value in zip(names, output)}
        by_place = {str(place): output[place] for place in range(-len(output), len(output))}
    else:
        raise WrongOutput(f"returned {_described(output)}, but a tensor of logits is expected, or something that holds one")
    wanted = "out" if key is None else key
    if wanted not in parts and wanted not in by_place:
        there = ", ".join(f"{name} ({_described(value)})" for name, value in parts.items()) or "nothing"
        missing = "" if key is None else f"nothing under {key!r} but "
        raise WrongOutput(f"returned a {type(output).__name__} with {missing}{there}; name the logits with --output")
    return {**by_place, **parts}[wanted]


def _described(value: Any) -> str:
    """Shape and type of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).rpartition('.')[2]}"
    return f"a {type(value).__name__}"


def binary_entropy_of_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli(sigmoid(z)): ``softplus(z) - z sigmoid(z)``, of finite z.

    Example:
        >>> binary_entropy_of_logits(torch.tensor([0.0, 200.0]))  # ln 2, and none
        tensor([0.6931, 0.0000])
    """
    z = logits.abs()  # symmetric, and free of cancellation for z >= 0: log1p(exp(-z)) + z sigmoid(-z)
    return F.softplus(-z) + z * torch.sigmoid(-z)
