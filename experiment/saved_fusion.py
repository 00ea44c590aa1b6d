"""The fusion that a finished run tuned, from its saved numbers; whoever pools runs needs no network for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from runtime.errors import UserError


def fusion_of(metrics: Mapping[str, Any], source: Path) -> Fusion:
    """The fusion that a run tuned.

    Raises:
        UserError: ``metrics`` does not describe one; the line names ``source``.
    """
    try:
        scales = metrics["normalisation"]
        predictive, saliency = (
            Linear(float(low), float(high)) for low, high in (scales["pred_variance"], scales["saliency_variance"])
        )
        weight = float(metrics["lambda"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} lacks a valid normalisation or lambda; delete it and run main.py again") from error
    if not 0 <= weight <= 1:
        raise UserError(f"{source}: lambda is {weight}, outside 0 to 1; delete it and run main.py again")
    return Fusion(predictive, saliency, "convex", weight)
