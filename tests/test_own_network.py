"""Whole runs with a network of the user's: alone and with two processes, its weights, its pictures, its mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import constructed_networks
import pytest
import torch
from conftest import TINY_FLAGS, command
from constructed_networks import SmallNet
from test_two_processes import torchrun
from torch import nn

from runtime.records import WALL_CLOCK

FLAGS = (*TINY_FLAGS[:3], *TINY_FLAGS[5:], "--amp", "fp32", "--batch-size", 6)  # without --width
NETWORK = ("--model", "constructed_networks:plain", "--insert-dropout", 0.25, "--target-layer", "bottom")


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """A finished run; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("own")
    outcome = command("--data", tiny, "--cache", folder / "cache", *FLAGS, *NETWORK, "--results", folder / "run", cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    (folder / "stdout.txt").write_text(outcome.stdout)
    return folder / "run"


@pytest.fixture
def again(own, tiny, tmp_path):
    """Runs main.py on the same data, into a folder of its own, without pictures where possible."""

    def call(*arguments, network=NETWORK, results=tmp_path / "run"):
        return command(
            "--data", tiny, "--cache", own.parent / "cache", *FLAGS, *network, "--results", results, *arguments, cwd=tmp_path)

    return call


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_the_run_says_which_network_it_is_about(own):
    said = (own.parent / "stdout.txt").read_text()
    assert "Grad-CAM at bottom (8 x 8 x 8), dropout inserted after dropout, up2" in said.splitlines()[0]
    inputs = read(own, "config.json")["decides"]
    assert inputs["inserted_dropout"] == ["dropout", "up2"] and len(inputs["architecture"]) == 64
    report = (own / "report.md").read_text()
    assert "| model | constructed\\_networks:plain |" in report and "| dropout inserted after | dropout, up2 |" in report
    assert "| width |" not in report


def test_the_same_command_makes_nothing_again(own, again, no_pictures):
    results = own.parent / "copy"
    shutil.copytree(own, results)
    stamps = {path: path.stat().st_mtime_ns for path in results.rglob("*.npz") if path.name != "calibration.npz"}
    stamps[results / "weights" / "best_model.pth"] = (results / "weights" / "best_model.pth").stat().st_mtime_ns
    outcome = again(results=results)
    assert outcome.returncode == 0, outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    before, after = read(own, "metrics.json"), read(results, "metrics.json")
    assert {k: v for k, v in before.items() if k not in WALL_CLOCK} == {k: v for k, v in after.items() if k not in WALL_CLOCK}


def test_its_weights_serve_another_run_and_another_file(own, again, no_pictures, tmp_path):
    outcome = again("--weights-from", own, "--target-layer", "up2", network=NETWORK[:-2])
    assert outcome.returncode == 0, outcome.stderr
    assert "Grad-CAM at up2 (6 x 16 x 16), dropout inserted" in outcome.stdout
    outcome = again("--model-weights", own / "weights" / "best_model.pth", results=tmp_path / "given")
    assert outcome.returncode == 0, outcome.stderr
    assert f"training     none; the weights are those of {own}" in outcome.stdout
    # the very same weights, masks and images give the very same numbers
    numbers = [read(folder, "metrics.json") for folder in (own, tmp_path / "given")]
    assert numbers[0]["test"] == numbers[1]["test"] and numbers[0]["lambda"] == numbers[1]["lambda"]
    torch.save(SmallNet().state_dict(), tmp_path / "other.pth")
    outcome = again("--model-weights", tmp_path / "other.pth", results=tmp_path / "given")
    assert outcome.returncode == 2 and "holds a run with other settings: weights was" in outcome.stderr


def test_pictures_of_any_image_are_computed_with_it(own, tmp_path):
    for flags in (("--id", "ISIC_0000003"), ("--seed", 1), ("--gallery", "best"), ("--summary",)):
        outcome = command("--run", own, *flags, script="visualize.py", cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
    image = next((own.parent.parent).glob("tiny*/ISIC2018_Task1-2_Training_Input/*.jpg"))
    outcome = command("--run", own, "--image", image, "--output", tmp_path / "x.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0 and (tmp_path / "x.png").is_file(), outcome.stderr


def test_a_factory_that_makes_another_network_now_is_noticed(own, again, tmp_path, monkeypatch):
    class Wider(SmallNet):
        def __init__(self):
            super().__init__()
            self.more = nn.Conv2d(3, 3, 1)

    results = tmp_path / "copy"
    shutil.copytree(own, results)
    monkeypatch.setattr(constructed_networks, "plain", lambda: SmallNet(nn.Dropout(0.5)))
    outcome = command("--run", results, "--seed", 1, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert f"constructed_networks:plain makes another network now than when {results} was made" in outcome.stderr
    outcome = again(results=results)
    assert outcome.returncode == 2 and "holds a run with other settings: architecture was" in outcome.stderr
    monkeypatch.setattr(constructed_networks, "plain", Wider)
    outcome = command("--run", results, "--seed", 1, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and "does not fit the model it describes (more.weight is missing)" in outcome.stderr
    monkeypatch.delattr(constructed_networks, "plain")
    outcome = command("--run", results, "--seed", 1, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: --model constructed_networks:plain: there is no plain in")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nowhere:net"), "there is no module nowhere"),
        (("--model", "constructed_networks:in_a_tuple"), "returned a tuple with 0"),
        (("--model", "constructed_networks:plain"), "--insert-dropout P adds"),
        (("--model", "constructed_networks:with_dropout"), "there is no layer 'encoder4'"),
        ((*NETWORK, "--width", 4), "--width would change the U-Net; with --model leave it out"),
        ((*NETWORK, "--model-weights", "absent.pth"), "cannot read --model-weights absent.pth"),
        ((*NETWORK, "--model-weights", "x.pth", "--trainings", 2), "--model-weights trains nothing; leave --trainings out"),
        (("--insert-dropout", 0.5), "--insert-dropout is about a network of your own"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_decoded(tiny, tmp_path, flags, message):
    outcome = command("--data", tiny, "--cache", tmp_path / "cache", *FLAGS, *flags, "--results", tmp_path / "run", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith("error: ") and message in outcome.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_several_trainings_are_pooled(tiny, own, again, no_pictures, tmp_path):
    outcome = again("--trainings", 2, "--epochs", 1)
    assert outcome.returncode == 0, outcome.stderr
    assert [entry["seed"] for entry in read(tmp_path / "run", "metrics.json")["pooled"]] == [42, 43]


def test_two_processes_train_and_judge_it_as_one_does(own, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(constructed_networks.__file__).parent))
    where = ("--data", tiny, "--cache", tmp_path / "cache", "--results", tmp_path / "two")
    together = torchrun(2, *where, *FLAGS, *NETWORK, cwd=tmp_path)
    said, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    assert said.count("dropout inserted after") == 1
    one, two = (torch.load(run / "weights" / "best_model.pth", weights_only=True)["model"] for run in (own, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name].float() - two[name].float()).abs().max() < 2e-3, name
    wrong = torchrun(2, "--data", tiny, *FLAGS, "--model", "constructed_networks:plain", cwd=tmp_path)
    complaint = wrong.communicate(timeout=300)[1]
    assert wrong.returncode != 0 and complaint.count("error: --model constructed_networks:plain: the network has no dropout") == 1
