"""What a training leaves after an epoch, and when the next one goes on from it."""

from __future__ import annotations

import pytest
import torch

from model import UNet
from runtime.checkpoints import load_checkpoint, load_model, save_checkpoint, weights_fingerprint
from runtime.errors import UserError
from runtime.training_state import BEST, STATE, Progress, resumable_state, save_best

CPU = torch.device("cpu")


def paths(results):
    return results / STATE, results / BEST


def _state(epoch, best_epoch, model, identity="identity", **fields):
    progress = Progress(epoch, 0.75, best_epoch, weights_fingerprint(model), epoch - best_epoch, [{"epoch": 1}] * epoch)
    return {
        "model": model.state_dict(), "options": model.options, "identity": identity,
        "progress": {**vars(progress), **fields}, "optimizer": {"state": {}, "param_groups": []}, "scaler": {},
    }


def test_a_state_of_another_run_or_without_its_best_weights_starts_over(tmp_path):
    state_path, best_path = paths(tmp_path)
    assert resumable_state(tmp_path, "identity") is None
    model = UNet(2)
    save_checkpoint(state_path, _state(3, 2, model))
    assert resumable_state(tmp_path, "identity") is None  # the best weights are lost, and were of an earlier epoch
    save_best(best_path, _state(2, 2, model))
    assert resumable_state(tmp_path, "another") is None
    assert resumable_state(tmp_path, "identity")["progress"] == vars(
        Progress(3, 0.75, 2, weights_fingerprint(model), 1, [{"epoch": 1}] * 3))
    save_checkpoint(state_path, {key: value for key, value in _state(3, 2, model).items() if key != "progress"})
    with pytest.raises(UserError, match="training_state.pth is not a checkpoint of this program: the file lacks progress"):
        resumable_state(tmp_path, "identity")


def test_a_run_that_died_between_its_two_files_makes_the_best_weights_again(tmp_path):
    state_path, best_path = paths(tmp_path)
    older, newer = UNet(2), UNet(2)
    for left in (None, older):
        best_path.unlink(missing_ok=True)
        if left is not None:
            save_best(best_path, _state(2, 2, left))
        save_checkpoint(state_path, _state(3, 3, newer))
        assert resumable_state(tmp_path, "identity") is not None
        best = load_checkpoint(best_path)
        assert (best["epoch"], best["validation_dice"], best["identity"]) == (3, 0.75, "identity")
        assert weights_fingerprint(load_model(best_path, UNet, CPU)) == weights_fingerprint(newer)


def test_weights_that_are_not_those_of_the_best_epoch_are_refused(tmp_path):
    state_path, best_path = paths(tmp_path)
    save_best(best_path, _state(2, 2, UNet(2)))
    save_checkpoint(state_path, _state(3, 2, UNet(2)))
    with pytest.raises(UserError, match=r"best_model.pth does not hold the weights of this run's best epoch \(2\)"):
        resumable_state(tmp_path, "identity")
