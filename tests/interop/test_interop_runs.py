"""One short run of each library's networks through the command line: trained, judged, drawn, and used again."""

from __future__ import annotations

import json

import pytest
from conftest import command

FLAGS = ("--synthetic-images", 40, "--quick", "--image-size", 64, "--epochs", 2, "--passes", 4, "--resamples", 100,
         "--device", "cpu")


@pytest.mark.parametrize(
    ("factory", "target", "dropout"),
    [
        ("smp_unet", "encoder.layer4", ("--insert-dropout", 0.2)),
        ("monai_unet_with_dropout", "model.1.submodule.1.submodule.1.submodule", ()),
        ("torchvision_lraspp", "backbone.16", ("--insert-dropout", 0.2)),
    ],
)
def test_a_run_from_training_to_the_verdict(factory, target, dropout, no_pictures, tmp_path):
    network = ("--model", f"interop_networks:{factory}", "--target-layer", target, *dropout)
    outcome = command(*FLAGS, *network, "--results", tmp_path / "run", "--cache", tmp_path / "cache", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["verdict"] and len(list((tmp_path / "run").glob("uncertainty_maps/test/*.npz"))) == 8
    outcome = command("--run", tmp_path / "run", "--seed", 1, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    weights = tmp_path / "run" / "weights" / "best_model.pth"
    given = ("--model-weights", weights, "--results", tmp_path / "given", "--cache", tmp_path / "cache")
    again = command(*FLAGS, *network, *given, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "given" / "metrics.json").read_text())["test"] == metrics["test"]
