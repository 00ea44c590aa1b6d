"""Small uncertainty maps with known properties, for the tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from device import DEVICE


class Images:
    """A re-iterable of (id, maps), as the pipeline passes them."""

    def __init__(self, items: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self.items = list(items)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def make_images(count: int, size: int = 24, seed: int = 0, prefix: str = "image") -> Images:
    """`count` images, not all of one size, of a disc-shaped lesion whose mean prediction errs near the border."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        height, width = size + index % 3, size
        centre = torch.rand(2, generator=generator) * 4 - 2
        y = torch.arange(height)[:, None] - height / 2 + centre[0]
        x = torch.arange(width)[None] - width / 2 + centre[1]
        distance = (y**2 + x**2).sqrt() - size * (0.2 + 0.15 * float(torch.rand(1, generator=generator)))
        probability = torch.sigmoid(-distance + torch.randn(height, width, generator=generator) * 2.0)
        spread = torch.rand(height, width, generator=generator)
        maps = {
            "mean_prediction": probability,
            "pred_variance": (probability * (1 - probability) * spread).square(),
            "saliency_variance": 0.1 * torch.rand(height, width, generator=generator) ** 4,
            "expected_entropy": 0.6 * probability * (1 - probability),
            "true_mask": (distance < 0).to(torch.uint8),
        }
        items.append((f"{prefix}_{index:04d}", {name: value.to(DEVICE) for name, value in maps.items()}))
    return Images(items)


def constructed_images(count: int, kind: str, size: int = 32, seed: int = 0, prefix: str = "image") -> Images:
    """Images whose foreground errs with a probability that the two variances a and b (uniform) determine.

    "informative": (a + b) / 2, so that lambda = 0.5 is calibrated and lambda = 1 is not, its ECE being
    the mean of |a - (a / 2 + 1 / 4)|, 1/8. "noise": a, so that lambda = 1 is calibrated; b is the fourth power of
    a uniform number (for a uniform b, lambda = 0.5 would be calibrated as well). "equal": a, with b = a.
    """
    rng = np.random.default_rng(seed)
    items = []
    for index in range(count):
        first = rng.random((size, size), dtype=np.float32)
        second = first if kind == "equal" else rng.random((size, size), dtype=np.float32)
        if kind == "noise":
            second = second**4
        chance = (first + second) / 2 if kind == "informative" else first
        wrong = rng.random((size, size)) < chance
        truth = np.zeros((size, size), dtype=np.uint8)
        truth[:, size // 4 :] = 1
        maps = {
            "mean_prediction": np.where(wrong == (truth == 1), 0.125, 0.875).astype(np.float32),
            "pred_variance": first / 4,
            "saliency_variance": second / 8,
            "true_mask": truth,
        }
        items.append((f"{prefix}_{index:04d}", {name: torch.from_numpy(value) for name, value in maps.items()}))
    return Images(items)


def label_copies(count: int = 12, seed: int = 1) -> Images:
    """Images whose saliency variance is high wherever foreground is predicted, and knows nothing of errors beyond that."""
    images, generator = make_images(count, seed=seed), torch.Generator().manual_seed(seed)
    for _, maps in images:
        predicted = (maps["mean_prediction"] > 0.5).float()
        maps["saliency_variance"] = 0.1 * predicted + 0.05 * torch.rand(predicted.shape, generator=generator).to(DEVICE)
    return images
