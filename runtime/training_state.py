"""What a training leaves after each epoch, and how the next one goes on from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from runtime.checkpoints import (
    load_checkpoint,
    load_training_state,
    save_checkpoint,
    state_fingerprint,
    weights_fingerprint,
)
from runtime.errors import UserError
from runtime.records import write_csv

#: Below the results folder: all that the next epoch needs, and the weights of the best one.
STATE, BEST = Path("weights/training_state.pth"), Path("weights/best_model.pth")


@dataclass(frozen=True)
class Progress:
    """How far a training has come; saved with its state.

    Attributes:
        epoch: finished epochs.
        best_dice: the best mean validation Dice so far; -1 before the first epoch.
        best_epoch: the epoch (from 1) that reached it.
        best_weights: fingerprint of that epoch's weights.
        epochs_without_improvement: finished since.
        log: a row per finished epoch.
    """

    epoch: int = 0
    best_dice: float = -1.0
    best_epoch: int = 0
    best_weights: str = ""
    epochs_without_improvement: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def after_epoch(self, row: dict[str, Any], model: nn.Module) -> Progress:
        """The progress after one more epoch, of which this is the row of the log, and ``model`` the network."""
        epoch, dice = self.epoch + 1, row["validation_dice"]
        after = replace(
            self, epoch=epoch, log=[*self.log, row], epochs_without_improvement=self.epochs_without_improvement + 1
        )
        if not dice > self.best_dice:
            return after
        weights = weights_fingerprint(model)
        return replace(after, best_dice=dice, best_epoch=epoch, best_weights=weights, epochs_without_improvement=0)


def save_epoch(results: Path, state: dict[str, Any]) -> None:
    """Write what an epoch left: its state, its weights where they are the best so far, the log."""
    progress = state["progress"]
    # the state first: from it a lost or older best_model.pth can be made again, not the other way round
    save_checkpoint(results / STATE, state)
    if progress["best_epoch"] == progress["epoch"]:
        save_best(results / BEST, state)
    write_csv(results / "training_log.csv", progress["log"])


def save_best(path: Path, state: dict[str, Any]) -> None:
    """Save the weights of the best epoch so far, with its number and validation Dice."""
    best = {key: state[key] for key in ("model", "options", "identity")}
    progress = state["progress"]
    save_checkpoint(path, {**best, "epoch": progress["best_epoch"], "validation_dice": progress["best_dice"]})


def resumable_state(results: Path, identity: str) -> dict[str, Any] | None:
    """The state to go on from, with the best weights in place; None where training starts over.

    It starts over where a file is missing or was made by another configuration.

    Raises:
        UserError: a file is damaged, or the best weights are not those that
            the state says were the best.
    """
    state_path, best_path = results / STATE, results / BEST
    if not state_path.exists():
        return None
    state = load_training_state(state_path)
    if state["identity"] != identity:
        return None
    progress = Progress(**state["progress"])
    if progress.best_epoch == progress.epoch:
        # a run that died between the two files left an older best, or none; this epoch's weights are the best
        found = load_checkpoint(best_path) if best_path.exists() else {}
        if found.get("identity") != identity or found.get("epoch") != progress.epoch:
            save_best(best_path, state)
    if not best_path.exists():
        return None
    best = load_checkpoint(best_path)
    if best.get("identity") != identity or state_fingerprint(best["model"]) != progress.best_weights:
        raise UserError(
            f"{best_path} does not hold the weights of this run's best epoch ({progress.best_epoch}); "
            f"put the original back, or delete {best_path.parent} to train again"
        )
    return state
