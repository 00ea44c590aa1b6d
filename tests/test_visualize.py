"""The picture command: what it draws, prints and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import command, write_sealed
from PIL import Image
from saved_runs import make_run

from experiment.case_images import newest_run
from experiment.map_files import MAP_ARRAYS, read_maps, write_maps
from experiment.saved_run import load_run
from experiment.tables import mark
from reporting import run_pictures
from reporting.charts import RUN_FIGURES
from reporting.galleries import RULES, choose
from runtime.errors import UserError
from runtime.records import fingerprint


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
    write_sealed(copy / "config.json", json.loads(text))
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
        (("--test-set", "x", "--summary"), "--test-set says where an image is looked for"),
        (("--test-set", "x"), "has no test set x; the run was tested on its own images"),
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


def with_test_set(saved: Path, folder: Path) -> Path:
    """A copy of a run with another test set, "clinic": its own images once more, under other ids."""
    run = Path(shutil.copytree(saved, folder))
    record = json.loads((run / "config.json").read_text())
    ids = record["split"]["test"]
    for kind in ("images", "masks"):
        (folder.parent / kind).mkdir()
        for id in ids:
            shutil.copy(Path(record[kind]) / f"{id}.png", folder.parent / kind / f"c_{id}.png")
    (run / "uncertainty_maps" / "target-clinic").mkdir()
    for id in ids:
        maps = read_maps(run / "uncertainty_maps" / "test" / f"{id}.npz")
        arrays = {name: maps[name] for name in MAP_ARRAYS}
        write_maps(run / "uncertainty_maps" / "target-clinic" / f"c_{id}.npz", arrays, 0, fingerprint(["identity", "f"]))
    table = (run / "per_image.csv").read_text()
    header, *rows = table.splitlines()
    (run / "per_image_clinic.csv").write_text("\n".join([header, *(f"c_{row}" for row in rows)]))
    record["targets"] = [{
        "name": "clinic", "images": str(folder.parent / "images"), "masks": str(folder.parent / "masks"),
        "ids": [f"c_{id}" for id in ids], "fingerprint": "f", "skipped": []}]
    write_sealed(run / "config.json", record)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["files"]["per_image_clinic.csv"] = mark(run / "per_image_clinic.csv")
    write_sealed(run / "metrics.json", metrics)
    return run


def test_a_gallery_of_another_test_set(saved, tmp_path):
    run = with_test_set(saved, tmp_path / "run")
    gallery = ("--gallery", "best", "--n", "2", "--test-set", "clinic")
    outcome = command("--run", run, *gallery, "--output", "c.svg", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    own = command("--run", run, *gallery[:4], "--output", "o.svg", script="visualize.py", cwd=tmp_path)
    lines = [said.stdout.splitlines()[:2] for said in (own, outcome)]
    assert lines[1] == [f"c_{line}" for line in lines[0]]
    assert f"--run {run} --gallery best --n 2 --test-set clinic --output c.svg" in outcome.stdout
    drawn = (tmp_path / "c.svg").read_text()
    assert "images of clinic, highest Dice" in drawn and "test images, highest Dice" in (tmp_path / "o.svg").read_text()
    # what is known of the images of the run is not known of these
    assert "SYNTHETIC LESIONS" not in drawn and "SYNTHETIC LESIONS" in (tmp_path / "o.svg").read_text()
    shutil.rmtree(run / "uncertainty_maps" / "test")
    alone = command("--run", run, "--gallery", "best", script="visualize.py", cwd=tmp_path)
    assert alone.returncode == 2 and "choose one with --test-set: clinic" in alone.stderr
    outcome = command("--run", run, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_more_images_than_there_are_is_said(saved, tmp_path):
    gallery = ("--gallery", "best", "--n", "90", "--output", "g.png")
    outcome = command("--run", saved, *gallery, script="visualize.py", cwd=tmp_path)
    assert "there are 6 test images; --n 90 draws all of these" in outcome.stdout
    few = command("--run", saved, *gallery[:2], "--n", "3", "--output", "g.png", script="visualize.py", cwd=tmp_path)
    assert "there are" not in few.stdout


def test_an_unfinished_run_is_one_line_with_the_command_that_finishes_it(saved, tmp_path):
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    (run / "metrics.json").unlink()
    outcome = command("--run", run, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and len(outcome.stderr.splitlines()) == 1
    assert "this finishes it: python main.py --data 'a folder'" in outcome.stderr
