"""All pictures of a run together: which files are drawn, and what the galleries say of the run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from saved_runs import make_run, plain_image, texts

from experiment.saved_run import load_run
from reporting.charts import RUN_FIGURES
from reporting.galleries import RULES, choose
from reporting.run_pictures import ROWS, draw_galleries, draw_gallery, draw_run, labels, run_seed
from reporting.run_pictures import candidates_of as candidates


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


def test_a_gallery_says_its_rule_and_shows_the_saved_maps(saved, run):
    figure = draw_gallery(run, "complex", 2, 0, plain_image)
    said = texts(figure)
    assert "most complex boundary" in said
    assert said.count("boundary complexity ") == 2
    id = choose("complex", candidates(run, 0), 1)[0].id
    with np.load(saved / "uncertainty_maps" / "test" / f"{id}.npz") as maps:
        np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), maps["mean_prediction"])
    assert "random, seed 9" in texts(draw_gallery(run, "random", 1, 9, plain_image))
    row = next(row for row in run.rows if row["id"] == id)
    assert f"{id}   Dice {row['dice']:.4f}   Jaccard {row['jaccard']:.4f}" in said


def test_a_rule_that_is_defined_for_no_image_gives_no_gallery(tmp_path):
    run = load_run(make_run(tmp_path, images=2, foreground=False))
    assert draw_gallery(run, "complex", 2, 0, plain_image) is None
    stale = run.folder / "figures" / "gallery_complex.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier run")
    assert draw_galleries(run, plain_image, ["complex", "best"]) == [run.folder / "figures" / "gallery_best.png"]
    assert not stale.exists()


def test_a_run_is_drawn_whole_or_without_its_images(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy", ignore=shutil.ignore_patterns("figures", "report.*"))
    run = load_run(tmp_path / "copy")
    figures, reports = [f"{name}.png" for name in RUN_FIGURES], ["report.html", "report.md"]
    assert [path.name for path in draw_run(run)] == [*figures, *reports]
    galleries = [f"gallery_{name}.png" for name in RULES]
    kept = (run.folder / "figures" / "forest.png").read_bytes()
    assert [path.name for path in draw_run(run, plain_image)] == [*figures, *galleries, *reports]
    assert {path.name for path in (run.folder / "figures").iterdir()} == {*figures, *galleries}
    assert (run.folder / "figures" / "forest.png").read_bytes() == kept  # the same picture is the same file


def test_labels_say_how_a_picture_was_made(run):
    weight = f"{run.metrics['lambda']:g}"
    assert labels(run) == {"note": f"T = 30, λ = {weight}", "synthetic": True, "data_note": "tiny discs"}
    assert labels(run, "--seed 7")["note"] == f"--seed 7, T = 30, λ = {weight}"
    assert run_seed(run) == 42
    assert ROWS == 3
