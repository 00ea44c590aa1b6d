"""The picture command: what it draws, prints and refuses."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from conftest import command
from PIL import Image
from saved_runs import make_run

from experiment.saved_run import load_run
from reporting import run_pictures
from reporting.charts import RUN_FIGURES
from reporting.galleries import RULES, choose
from runtime.errors import UserError
from visualize import newest_run


def test_summary_draws_everything_without_weights(saved):
    assert not (saved / "weights").exists()
    expected = {*RUN_FIGURES, *(f"gallery_{name}" for name in RULES)}
    assert {path.stem for path in (saved / "figures").iterdir()} == expected
    assert (saved / "report.html").is_file()
    assert (saved / "report.md").is_file()


def test_summary_goes_on_without_the_dataset_and_says_so(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("figures"))
    text = (copy / "config.json").read_text().replace(str(saved.parent), "/nowhere")
    (copy / "config.json").write_text(text)
    outcome = command("--run", copy, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "galleries not redrawn" in outcome.stdout
    assert {path.stem for path in (copy / "figures").iterdir()} == set(RUN_FIGURES)


def test_a_gallery_by_command_prints_its_choice_and_its_seed(saved, tmp_path):
    outcome = command("--run", saved, "--gallery", "worst", "--n", "2", "--output", "w.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    images = run_pictures.candidates_of(load_run(saved), 0)
    chosen = [choice.id for choice in choose("worst", images, 2)]
    assert [line.split()[0] for line in outcome.stdout.splitlines()[:2]] == chosen
    first = command("--run", saved, "--gallery", "random", "--n", "2", "--output", "r.png", script="visualize.py", cwd=tmp_path)
    seed = first.stdout.split("--seed ")[1].split()[0]
    again = command("--run", saved, "--gallery", "random", "--n", "2", "--seed", seed, "--output", "s.png",
                    script="visualize.py", cwd=tmp_path)
    assert first.stdout.splitlines()[:2] == again.stdout.splitlines()[:2]
    assert (tmp_path / "r.png").read_bytes() == (tmp_path / "s.png").read_bytes()


def test_a_gallery_whose_rule_is_defined_for_no_image_is_one_line(tmp_path):
    empty = make_run(tmp_path, images=2, foreground=False)
    outcome = command("--run", empty, "--gallery", "complex", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "defined for no test image" in outcome.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gallery", "nicest"), "there is no gallery nicest"),
        (("--n", "3"), "--n says how many"),
        (("--gallery", "best", "--n", "0"), "--n must be at least 1"),
        (("--gallery", "best", "--summary"), "do not go together"),
        (("--gallery", "best", "--id", "a"), "leave --id and --image out"),
        (("--summary", "--output", "a.png"), "leave --output out"),
        (("--overlay", "beauty"), "there is no map beauty"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(saved, tmp_path, flags, message):
    outcome = command("--run", saved, *flags, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_the_newest_run_is_a_single_one(tmp_path):
    with pytest.raises(UserError, match="there is no finished run in"):
        newest_run(tmp_path)
    for place, name in enumerate(("old", "several/seed-2", "several/seed-1", "several", "pooled")):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.json").write_text('{"pooled": []}' if name in ("several", "pooled") else "{}")
        (tmp_path / name / "metrics.json").write_text("{}")
        os.utime(tmp_path / name / "metrics.json", (place, place))
    assert newest_run(tmp_path) == newest_run(tmp_path / "several") == tmp_path / "several" / "seed-1"
    with pytest.raises(UserError, match="there is no finished run in"):
        newest_run(tmp_path / "pooled")


def test_a_training_image_is_called_one(finished, tmp_path):
    split = json.loads((finished / "config.json").read_text())["split"]
    said = {}
    for part in ("train", "validation", "test"):
        outcome = command("--run", finished, "--id", split[part][0], "--output", "c.png", script="visualize.py", cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
        said[part] = outcome.stdout.splitlines()[0]
    assert said["train"].endswith("training image")
    assert said["validation"].endswith("validation image")
    assert not said["test"].endswith("image")


def test_the_overlay_command(finished, tmp_path):
    picture = tmp_path / "big picture.png"
    Image.new("RGB", (1000, 90), (200, 150, 140)).save(picture)
    outcome = command("--run", finished, "--image", picture, "--overlay", "pred_variance", "--output", "o.png",
                      script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert Image.open(tmp_path / "o.png").width == 2000
