"""Calibration errors by loops, straight from the formulas."""

from __future__ import annotations

import numpy as np


def slow_error(confidence, correct, bins=15):
    """ECE by a loop over bins, in float64."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > (b / bins if b else -1)) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def slow_foreground_error(images, weights, constants, bins=15):
    """Foreground ECE of a convex fusion straight from the maps, by the formulas, in NumPy."""
    confidence, correct = [], []
    for _, maps in images:
        inside = maps["true_mask"].numpy() == 1
        score = 0.0
        for name, weight in weights.items():
            low, high = constants[name]
            normalised = (maps[name].numpy()[inside] - np.float32(low)) / (np.float32(high) - np.float32(low))
            score = score + weight * np.clip(normalised, 0, 1)
        confidence.append(1.0 - score)
        correct.append(maps["mean_prediction"].numpy()[inside] > 0.5)
    return slow_error(np.concatenate(confidence), np.concatenate(correct), bins)
