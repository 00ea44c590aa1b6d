"""A finished run, loaded to compute with: its configuration, its model, its fusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.fusion import Fusion
from experiment.networks import Network, UserNetwork, architecture, load_network
from experiment.saved_fusion import fusion_of
from experiment.saved_run import read_metrics, read_record
from runtime.checkpoints import weights_fingerprint
from runtime.config import IDENTITY_FIELDS, Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.records import fingerprint


class TrainedRun(NamedTuple):
    """What another computation needs of a finished run.

    Attributes:
        config: as the run resolved it.
        model: the network of the best epoch, in evaluation mode on the device that was asked for.
        fusion: with the scales and the lambda that the run tuned.
        metrics: ``metrics.json``.
    """

    config: Config
    model: Network
    fusion: Fusion
    metrics: Mapping[str, Any]


def load_trained_run(folder: Path, device: torch.device) -> TrainedRun:
    """Load a finished run, after checking that its files belong together.

    Raises:
        UserError: a file is missing, damaged, or was changed after the run wrote it; or the factory of ``--model``
            is gone, or makes another network than it did.
    """
    record, metrics = read_record(folder), read_metrics(folder)
    config = Config.from_dict(record.get("configuration"), folder / "config.json")
    inputs = record.get("decides") or {}
    # the precision of training is recorded as "auto" was resolved
    same = all(key == "amp" or inputs.get(key) == getattr(config, key) for key in IDENTITY_FIELDS)
    if not same or record.get("identity") != fingerprint(inputs):
        raise UserError(f"{folder / 'config.json'} was changed after the run wrote it; run main.py again")
    fusion = fusion_of(metrics, folder / "metrics.json")
    model = load_network(folder / "weights" / "best_model.pth", config, ProcessGroup(0, 1, device))
    if isinstance(model, UserNetwork) and inputs.get("architecture") != architecture(model):
        raise UserError(f"{config.model} makes another network now than when {folder} was made; undo that, or run main.py again")
    if metrics.get("identity") != fingerprint([record.get("identity"), weights_fingerprint(model)]):
        raise UserError(f"{folder / 'metrics.json'} was not made from the weights and config.json beside it; run main.py again")
    return TrainedRun(config, model, fusion, metrics)
