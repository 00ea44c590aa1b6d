"""What is asked of a network's output: one logit per pixel."""

from __future__ import annotations

from typing import Callable

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


def binary_entropy_of_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli(sigmoid(z)): ``softplus(z) - z sigmoid(z)``, of finite z.

    Example:
        >>> binary_entropy_of_logits(torch.tensor([0.0, 200.0]))  # ln 2, and none
        tensor([0.6931, 0.0000])
    """
    z = logits.abs()  # symmetric, and free of cancellation for z >= 0: log1p(exp(-z)) + z sigmoid(-z)
    return F.softplus(-z) + z * torch.sigmoid(-z)
