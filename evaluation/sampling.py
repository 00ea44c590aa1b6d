"""Samples of pixels, for fitting rules and error models to a split that is larger than memory."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.arrays import Array
from evaluation.fusion import Fusion, Sample
from evaluation.image_maps import Split, checked_maps, pixels_in_region, wrong_pixels
from evaluation.names import PREDICTIVE, REGIONS, SALIENCY


def draw_pixels(identifier: str, candidates: Tensor, limit: int, seed: int) -> Tensor:
    """At most `limit` of some pixels, by chance that depends on seed and id alone.

    Args:
        identifier: of the image.
        candidates: numbers of the pixels, ascending int64 (N,).
        limit: how many are drawn; all where there are no more.
        seed: of the draw.

    Returns:
        Numbers of the drawn pixels, ascending, on the same device.

    Example:
        >>> draw_pixels("a", torch.tensor([3, 5, 8]), limit=3, seed=42).tolist()
        [3, 5, 8]
        >>> len(draw_pixels("a", torch.arange(1000), limit=3, seed=42))
        3
    """
    if len(candidates) <= limit:
        return candidates
    rng = np.random.default_rng([seed, zlib.crc32(str(identifier).encode())])
    chosen = np.sort(rng.choice(len(candidates), size=limit, replace=False))
    return candidates[torch.from_numpy(chosen).to(candidates.device)]


def _weights(drawn: Tensor, candidates: Tensor) -> Array:
    """The number of pixels that each drawn one stands for, (n,)."""
    return np.full(len(drawn), len(candidates) / max(len(drawn), 1))


def foreground_sample(images: Split, fusion: Fusion, limit: int = 512, seed: int = 42) -> Sample:
    """A sample of ground-truth foreground pixels, for fitting rules.

    Args:
        images: pairs of id and maps; at least one.
        fusion: its normalisations make the features.
        limit: pixels drawn at most from each image.
        seed: of the draws.

    Returns:
        Features, errors and weights of the drawn pixels of all images; the weights make up for images with more
        foreground than `limit` pixels.
    """
    features, wrong, weight = [], [], []
    for identifier, maps in images:
        inside = maps["true_mask"].reshape(-1).nonzero().view(-1)
        index = draw_pixels(identifier, inside, limit, seed)
        both = fusion.normalise(maps[PREDICTIVE].reshape(-1)[index], maps[SALIENCY].reshape(-1)[index])
        features.append(torch.stack(both, 1).cpu().double().numpy())
        wrong.append((maps["mean_prediction"].reshape(-1)[index] <= maps.get("threshold", 0.5)).cpu().numpy())
        weight.append(_weights(index, inside))
    return Sample(np.concatenate(features), np.concatenate(wrong), np.concatenate(weight))


class DrawnPixels(NamedTuple):
    """Pixels drawn from one region of one image."""

    maps: dict[str, Tensor]  # mean prediction, both variances and "predicted", (n,) each, on the CPU
    wrong: Array  # (n,) bool
    weight: Array  # (n,): the number of pixels that each one stands for


def drawn_pixels(images: Split, limit: int, seed: int) -> dict[str, list[DrawnPixels]]:
    """A sample of the pixels of every region, for fitting error models.

    Args:
        images: pairs of id and maps.
        limit: pixels drawn at most from each region of each image.
        seed: of the draws.

    Returns:
        Per region a list with one entry per image, in their order.

    Raises:
        ValueError: see :func:`image_maps.checked_maps`.
    """
    drawn: dict[str, list[DrawnPixels]] = {region: [] for region in REGIONS}
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        outcome = flat["outcome"]
        for region, entries in drawn.items():
            inside = pixels_in_region(outcome, region)
            index = draw_pixels(identifier, inside, limit, seed)
            values = {name: flat[name][index].cpu() for name in ("mean_prediction", PREDICTIVE, SALIENCY, "predicted")}
            entries.append(DrawnPixels(values, wrong_pixels(outcome[index]).cpu().numpy(), _weights(index, inside)))
    return drawn
