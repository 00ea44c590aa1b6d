"""A finished run is loaded with its model and its fusion, and refused where its files do not belong together."""

from __future__ import annotations

import json

import pytest
import torch
from saved_runs import METRICS, RECORD

from evaluation.fusion import Fusion, Linear
from experiment.trained_run import fusion_of, load_trained_run
from model import UNet
from runtime.checkpoints import save_checkpoint, weights_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.records import fingerprint, read_json, seal, write_json

CPU = torch.device("cpu")
CONFIG = Config(image_size=32, width=2, passes=4, quiet=True)
TUNED = {"normalisation": {"pred_variance": [0.0, 0.25], "saliency_variance": [0.125, 0.5]}, "lambda": 0.75}


@pytest.fixture
def run(tmp_path):
    """The three files of a finished run that matter here."""
    model = UNet(2)
    save_checkpoint(tmp_path / "weights" / "best_model.pth", {"model": model.state_dict(), "options": model.options})
    # the precision of training is recorded as "auto" was resolved
    inputs = {**CONFIG.experiment(), "amp": "torch.float32", "data": "fingerprint", "skipped": []}
    identity = fingerprint(inputs)
    write_json(tmp_path / "config.json", {**RECORD, "configuration": CONFIG.to_dict(), "decides": inputs, "identity": identity})
    made_from = fingerprint([identity, weights_fingerprint(model)])
    write_json(tmp_path / "metrics.json", seal({**METRICS, **TUNED, "identity": made_from}))
    return tmp_path


def test_a_run_comes_back_with_its_model_and_its_fusion(run):
    loaded = load_trained_run(run, CPU)
    assert loaded.config == CONFIG
    assert isinstance(loaded.model, UNet) and not loaded.model.training
    stored = torch.load(run / "weights" / "best_model.pth", weights_only=True)["model"]
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert loaded.fusion == Fusion(Linear(0.0, 0.25), Linear(0.125, 0.5), "convex", 0.75)
    assert loaded.metrics["lambda"] == 0.75


def test_a_configuration_that_was_edited_is_refused(run):
    record = read_json(run / "config.json")
    for part in ("configuration", "decides"):
        write_json(run / "config.json", {**record, part: {**record[part], "passes": 7}})
        with pytest.raises(UserError, match="config.json was changed after the run wrote it"):
            load_trained_run(run, CPU)
    both = {part: {**record[part], "passes": 7} for part in ("configuration", "decides")}
    write_json(run / "config.json", {**record, **both})  # they agree, but not with the identity
    with pytest.raises(UserError, match="config.json was changed after the run wrote it"):
        load_trained_run(run, CPU)
    write_json(run / "config.json", {**record, "configuration": {**record["configuration"], "quiet": False}})
    assert load_trained_run(run, CPU).config.quiet is False  # it decides no number


def test_files_of_another_run_are_refused(run):
    metrics = read_json(run / "metrics.json")
    other = UNet(2)
    save_checkpoint(run / "weights" / "best_model.pth", {"model": other.state_dict(), "options": other.options})
    with pytest.raises(UserError, match="metrics.json was not made from the weights and config.json beside it"):
        load_trained_run(run, CPU)
    (run / "metrics.json").write_text(json.dumps({**metrics, "lambda": 0.5}))
    with pytest.raises(UserError, match="metrics.json was changed after the run wrote it"):
        load_trained_run(run, CPU)
    (run / "metrics.json").unlink()
    with pytest.raises(UserError, match="cannot read .*metrics.json"):
        load_trained_run(run, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda": None}, "lacks a valid normalisation or lambda"),
        ({"lambda": 1.5}, "lambda is 1.5, outside 0 to 1"),
        ({"lambda": -0.5}, "lambda is -0.5, outside 0 to 1"),
        ({"normalisation": [1, 2]}, "lacks a valid normalisation or lambda"),
        ({"normalisation": {"pred_variance": [0, 1]}}, "lacks a valid normalisation or lambda"),
        ({"normalisation": {"pred_variance": [0, 1], "saliency_variance": [0, "x"]}}, "lacks a valid normalisation"),
    ],
)
def test_a_fusion_that_is_none_names_the_file(tmp_path, changes, message):
    assert fusion_of(TUNED, tmp_path / "metrics.json") == Fusion(Linear(0.0, 0.25), Linear(0.125, 0.5), "convex", 0.75)
    with pytest.raises(UserError, match=f"metrics.json:? ?{message}"):
        fusion_of({**TUNED, **changes}, tmp_path / "metrics.json")
