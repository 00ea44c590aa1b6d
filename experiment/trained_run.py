"""A finished run, loaded to compute with: its configuration, its model, its fusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from model import UNet
from runtime.checkpoints import load_model, weights_fingerprint
from runtime.config import IDENTITY_FIELDS, Config
from runtime.errors import UserError
from runtime.records import fingerprint, read_json, read_sealed


class TrainedRun(NamedTuple):
    """What another computation needs of a finished run.

    Attributes:
        config: as the run resolved it.
        model: the U-Net of the best epoch, in evaluation mode on the device that was asked for.
        fusion: with the scales and the lambda that the run tuned.
        metrics: ``metrics.json``.
    """

    config: Config
    model: UNet
    fusion: Fusion
    metrics: Mapping[str, Any]


def load_trained_run(folder: Path, device: torch.device) -> TrainedRun:
    """Load a finished run, after checking that its files belong together.

    Raises:
        UserError: a file is missing, damaged, or was changed after the run wrote it.
    """
    record, metrics = read_json(folder / "config.json"), read_sealed(folder / "metrics.json")
    config = Config.from_dict(record.get("configuration"), folder / "config.json")
    inputs = record.get("decides") or {}
    # the precision of training is recorded as "auto" was resolved
    same = all(key == "amp" or inputs.get(key) == getattr(config, key) for key in IDENTITY_FIELDS)
    if not same or record.get("identity") != fingerprint(inputs):
        raise UserError(f"{folder / 'config.json'} was changed after the run wrote it; run main.py again")
    fusion = fusion_of(metrics, folder / "metrics.json")
    model = load_model(folder / "weights" / "best_model.pth", UNet, device)
    assert isinstance(model, UNet)
    if metrics.get("identity") != fingerprint([record.get("identity"), weights_fingerprint(model)]):
        raise UserError(f"{folder / 'metrics.json'} was not made from the weights and config.json beside it; run main.py again")
    return TrainedRun(config, model, fusion, metrics)


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
