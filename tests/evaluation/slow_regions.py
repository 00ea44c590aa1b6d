"""Regions of an image by loops over its pixels, straight from their definitions."""

from __future__ import annotations

import numpy as np


def slow_band(label, reach):
    """Pixels (H, W) that have one of the other label within `reach` along rows and columns."""
    height, width = label.shape
    band = np.zeros(label.shape, dtype=bool)
    for row in range(height):
        for column in range(width):
            around = label[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            band[row, column] = around.min() != around.max()
    return band


def slow_regions(maps):
    """Every region of `names.REGIONS` as a mask (N,) of the pixels, and which pixels are wrong."""
    truth, label = maps["true_mask"].numpy() > 0, maps["mean_prediction"].numpy() > 0.5
    band = slow_band(label, max(1, round(min(label.shape) * 3 / 128)))
    regions = {
        "foreground": truth,
        "predicted_foreground": label,
        "union": truth | label,
        "whole_image": np.ones_like(truth),
        "predicted_background": ~label,
        "boundary_band": band,
    }
    return {region: mask.ravel() for region, mask in regions.items()}, (truth != label).ravel()


def slow_outcome(maps):
    """Code of every pixel (N,): 2 * truth + predicted, and 4 more inside the band."""
    regions, _ = slow_regions(maps)
    return 2 * regions["foreground"] + regions["predicted_foreground"] + 4 * regions["boundary_band"]
