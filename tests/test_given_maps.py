"""Given maps, by the commands: equal to a run's own numbers, in the names of their scores, drawn and pooled."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Outcome, command
from given_maps import write_given, write_saved_like
from PIL import Image
from saved_runs import Page
from test_two_processes import torchrun

from experiment.map_files import read_maps
from experiment.saved_run import load_run
from experiment.terms import Terms, terms_of
from reporting import charts
from reporting.report import write_report
from reporting.style import save_figure
from runtime.records import WALL_CLOCK

SCORES = ("--scores", "entropy", "variance")
FEW = ("--resamples", 100, "--device", "cpu")
#: Words about what made the maps of another kind of run.
FOREIGN = re.compile(r"predictive variance|saliency|grad-cam|dropout|\bpass(?:es)?\b|heatmap", re.IGNORECASE)


def is_one_line(outcome: Outcome, message: str) -> None:
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which maps of several sizes were written and judged; the run is in results/maps-mine."""
    root = tmp_path_factory.mktemp("judged")
    folders = write_given(root / "mine", (6, 8))
    with np.load(folders[1] / "test_3.npz") as content:
        arrays = dict(content)
    np.savez(folders[1] / "test_3.npz", **arrays, image=np.full((*arrays["entropy"].shape, 3), (200, 150, 140), np.uint8))
    outcome = command("--maps", *folders, *SCORES, *FEW, cwd=root)
    assert outcome.returncode == 0, outcome.stderr
    (root / "stdout.txt").write_text(outcome.stdout)
    return root


@pytest.fixture
def copied(judged: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose maps stay where they are."""
    return Path(shutil.copytree(judged / "results" / "maps-mine", tmp_path / "run"))


# ---------------------------------------------------------------- numbers


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The dotted paths of shared keys whose values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        shared = (one.keys() & other.keys()) - {*WALL_CLOCK}
        return [found for key in shared for found in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for index, pair in enumerate(zip(one, other)) for found in differences(*pair, f"{path}.{index}")]
    return [] if one == other else [path]


def test_the_maps_of_a_run_given_back_have_its_numbers_to_the_last_digit(finished, tmp_path, no_pictures):
    maps = finished / "uncertainty_maps"
    outcome = command("--maps", maps / "validation", maps / "test", "--results", tmp_path / "run", "--resamples", 200,
                      "--device", "cpu", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    own, given = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path / "run"))
    # a note says how more trainings would be judged; how many heatmaps were empty is not known of given maps
    assert set(differences(own, given)) <= {
        ".checksum", ".identity", ".files.calibration.npz", ".files.per_image.csv", ".config_identity",
        ".conclusion.notes.0", ".warnings", ".validation.empty_cams", ".test.empty_cams"}
    assert len(own["test"]["regions"]) == 6 and not own.keys() - given.keys() and own["verdict"] == given["verdict"]
    assert given["test"]["empty_cams"] is None and "baselines" not in given["test"]["ranking_of_images"]
    for id in json.loads((finished / "config.json").read_text())["split"]["test"]:
        one, other = (read_maps(folder / "uncertainty_maps" / "test" / f"{id}.npz") for folder in (finished, tmp_path / "run"))
        np.testing.assert_array_equal(one["fused_score"], other["fused_score"])


def test_the_same_command_again_uses_the_maps_that_are_there_and_says_the_same(judged, copied, tmp_path, no_pictures):
    folders = judged / "mine" / "val", judged / "mine" / "test"
    before = json.loads((copied / "metrics.json").read_text())
    lost = copied / "uncertainty_maps" / "validation" / "val_2.npz"
    content = lost.read_bytes()
    lost.unlink()
    outcome = command("--maps", *folders, *SCORES, *FEW, "--results", copied, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "6 validation images, 1 of them taken over now" in outcome.stdout
    assert "8 test images, 0 of them taken over now" in outcome.stdout
    after = json.loads((copied / "metrics.json").read_text())
    assert differences(before, after) == []
    assert lost.read_bytes() == content
    other = command("--maps", *folders, *SCORES, *FEW, "--bins", 7, "--quiet", "--results", copied, cwd=tmp_path)
    is_one_line(other, "bins was 15 and is now 7")


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_floats_of_any_width_are_judged(tmp_path, no_pictures, kind):
    folders = [write_saved_like(tmp_path / "m", count, part, seed, kind) for part, count, seed in (("v", 4, 1), ("t", 4, 2))]
    outcome = command("--maps", *folders, *FEW, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    metrics = json.loads((tmp_path / "results" / "maps-m" / "metrics.json").read_text())
    assert metrics["score_names"] == {"first": "predictive variance", "second": "saliency variance"}
    assert "mutual_information" in metrics["test"]["regions"]["foreground"]["scores"]


# ---------------------------------------------------------------- names


def test_every_text_is_in_the_names_of_the_scores(judged):
    run = judged / "results" / "maps-mine"
    said = (judged / "stdout.txt").read_text()
    page = Page((run / "report.html").read_text())
    alts = " ".join(attributes["alt"] for attributes in page.all("img"))
    verdict = json.loads((run / "metrics.json").read_text())["verdict"]
    for text in (said, page.text, alts, (run / "report.md").read_text(), verdict):
        assert not FOREIGN.findall(text)
        assert "entropy" in text
    for part in ("entropy alone (lambda = 1)", "variance alone (lambda = 0)", "minus entropy"):
        assert part in said
    for part in ("Fusing entropy and variance: maps-mine", "another image's variance", "The score that is judged is entropy",
                 "Maps of the validation images: val; of the test images: test."):
        assert part in page.text
    assert "AUROC of errors that variance adds" in said and "AUROC of errors that variance adds" in page.text


def test_every_figure_is_in_the_names_of_the_scores(judged, tmp_path):
    run = load_run(judged / "results" / "maps-mine")
    assert not (run.folder / "figures" / "training.png").exists() and not (run.folder / "weights").exists()
    for name, draw in charts.RUN_FIGURES.items():
        if name != "training":
            text = save_figure(draw(run), tmp_path / f"{name}.svg", terms_of(run)).read_text()
            assert not FOREIGN.findall(re.sub("<style.*?</style>", "", text, flags=re.DOTALL)), name
    assert ">variance</text>" in (tmp_path / "forest.svg").read_text()
    assert ">entropy</text>" in (tmp_path / "reliability.svg").read_text()


def test_the_study_is_in_the_names_of_the_scores_too(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    run = load_run(folder)
    names = {"first": "total_u", "second": "maximum softmax"}
    entry = {"value": 0.5, "interval": [0.25, 0.75]}
    widest = {"image": "saliency map 1", "largest": 0.75, "largest_elsewhere": 0.5, "lambda": 0.3, "foreground_ece_difference": {
        f"{score}_minus_predictive_variance": entry for score in ("fused", "saliency_variance")}}
    metrics = json.loads(json.dumps({**run.metrics, "score_names": names}))
    metrics["study"]["without_widest_image"] = widest
    for part in ("validation", "test"):
        metrics[part]["empty_cams"] = None
    metrics["test"]["ranking_of_images"].pop("baselines", None)
    record = {key: value for key, value in run.record.items() if key not in ("images", "masks")}
    record["maps"] = {"validation": "/x/v", "test": "/x/t", "scores": list(names.values()), "without_image": 2}
    record["configuration"] = {key: record["configuration"][key] for key in ("threshold", "bins", "seed")}
    given = run._replace(metrics=Terms(**names).in_metrics(metrics), record=record)
    page = Page(write_report(given)[0].read_text())
    text = page.text.replace("saliency map 1", "")
    assert not FOREIGN.findall(text)
    assert "saliency map 1 has the largest maximum softmax, 0.7500" in page.text  # an id is no term
    assert "What maximum softmax adds" in page.text and "total_u" in page.text


# ---------------------------------------------------------------- pictures


def test_cases_are_drawn_from_the_saved_maps(judged, tmp_path):
    run = judged / "results" / "maps-mine"
    outcome = command("--run", run, "--id", "test_3", "--output", "a b.svg", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    drawn = (tmp_path / "a b.svg").read_text()
    assert ">entropy</text>" in drawn and ">entropy, log scale</text>" in drawn and ">variance, log scale</text>" in drawn
    assert not FOREIGN.findall(re.sub("<style.*?</style>", "", drawn, flags=re.DOTALL))
    row = next(row for row in load_run(run).rows if row["id"] == "test_3")
    assert f"Dice {row['dice']:.4f}   Jaccard {row['jaccard']:.4f}" in outcome.stdout
    assert "stands in its place" not in outcome.stdout
    assert f"visualize.py --run {run} --id test_3 --output 'a b.svg'" in outcome.stdout
    overlay = ("--overlay", "pred_variance", "--output", "b.png")
    outcome = command("--run", run, "--id", "val_1", *overlay, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "validation image" in outcome.stdout and "the mean prediction, in grey, stands in its place" in outcome.stdout


def test_a_random_case_and_galleries_of_images_of_several_sizes(judged, tmp_path):
    run = judged / "results" / "maps-mine"
    first = command("--run", run, "--output", "a.png", script="visualize.py", cwd=tmp_path)
    seed = first.stdout.split("--seed ")[1].split()[0]
    command("--run", run, "--output", "b.png", "--seed", seed, script="visualize.py", cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    gallery = ("--gallery", "disagreement", "--n", 50, "--output", "g.png")
    outcome = command("--run", run, *gallery, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "there are 8 test images; --n 50 draws all of these" in outcome.stdout
    width, height = Image.open(tmp_path / "g.png").size
    assert height > 1.2 * width  # eight rows
    outcome = command("--run", run, "--gallery", "uncertain", "--n", 2, "--output", "u.svg", script="visualize.py", cwd=tmp_path)
    assert "highest mean fused score" in outcome.stdout and not FOREIGN.findall(outcome.stdout)
    assert "7 maps came without an image" not in (tmp_path / "u.svg").read_text()
    assert "13 maps came without an image: in its place, the mean prediction in grey" in (tmp_path / "u.svg").read_text()


def test_the_report_is_drawn_again_from_what_was_saved(copied, tmp_path):
    report = (copied / "report.html").read_bytes()
    for name in ("report.html", "figures/forest.png", "figures/gallery_best.png"):
        (copied / name).unlink()
    moved = Path(shutil.move(copied, tmp_path / "maps-mine"))
    outcome = command("--run", moved, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0 and "not redrawn" not in outcome.stdout, outcome.stderr
    again = (moved / "report.html").read_bytes()
    redrawn = rb"--run [^\n<]*maps-mine"
    assert re.sub(redrawn, b"", again) == re.sub(redrawn, b"", report)
    assert (moved / "figures" / "gallery_best.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image", "a.png"), "--image needs a network, and"),
        (("--id", "nobody"), "there are no maps of an image nobody in"),
        (("--test-set", "x"), "has no test set x"),
    ],
)
def test_what_needs_more_than_maps_is_one_line(judged, tmp_path, flags, message):
    is_one_line(command("--run", judged / "results" / "maps-mine", *flags, script="visualize.py", cwd=tmp_path), message)


# ---------------------------------------------------------------- several trainings


def test_maps_of_several_trainings_are_pooled_in_their_names(judged, tmp_path, no_pictures):
    other = tmp_path / "again"
    shutil.copytree(judged / "mine", other)
    rng = np.random.default_rng(9)
    for path in other.glob("*/*.npz"):
        with np.load(path) as content:
            arrays = dict(content)
        arrays["variance"] = rng.random(arrays["variance"].shape) ** 4
        arrays["mean_prediction"] = arrays["mean_prediction"] ** 1.5
        np.savez(path, **arrays)
    runs = []
    for seed, root in ((1, other), (2, judged / "mine"), (3, judged / "mine")):
        runs.append(tmp_path / f"run-{seed}")
        place = ("--seed", seed, "--results", runs[-1])
        outcome = command("--maps", root / "val", root / "test", *SCORES, *FEW, *place, cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
    pool = ("--results", "pool", "--resamples", 100, "--ensemble")
    is_one_line(command("--pool", *runs, *pool, cwd=tmp_path), "judged the same maps, which are those of one training")
    outcome = command("--pool", *runs[:2], *pool, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    page = Page((tmp_path / "pool" / "report.html").read_text())
    for text in (outcome.stdout, page.text, (tmp_path / "pool" / "report.md").read_text()):
        assert not FOREIGN.findall(text)
        assert "AUROC of errors that variance adds" in text
    metrics = json.loads((tmp_path / "pool" / "metrics.json").read_text())
    assert metrics["ensemble"]["trainings"] == 2 and metrics["verdict"].startswith("Fused against entropy, 2 trainings")


# ---------------------------------------------------------------- the command line and the page of the documentation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scores", "a", "b"), "--scores names arrays of --maps; give both"),
        (("--maps", "a", "b", "--passes", 3), "--maps judges maps that are there and makes none; leave --passes out"),
        (("--maps", "a"), "expected 2 arguments"),
        (("--maps", "a", "b", "--margin", "beauty=1"), "--margin names no endpoint beauty"),
        (("--maps", "a", "b"), "--maps a is no folder that can be read"),
    ],
)
def test_flags_that_do_not_fit_are_one_line_and_nothing_is_written(tmp_path, flags, message):
    is_one_line(command(*flags, cwd=tmp_path), message)
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_documentation_works_word_for_word(tmp_path, monkeypatch, no_pictures):
    text = (ROOT / "docs" / "OWN_MAPS.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    line = re.search(r"python main.py (--maps my_maps.*)", text)
    assert example and line
    assert len([code for code in example[1].splitlines() if code.strip()]) <= 22
    monkeypatch.chdir(tmp_path)
    exec(example[1], {})
    outcome = command(*line[1].split(), *FEW, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "results" / "maps-my_maps" / "metrics.json").is_file()


# ---------------------------------------------------------------- several processes, and a death


def test_two_processes_say_what_one_says(judged, tmp_path):
    folders = judged / "mine" / "val", judged / "mine" / "test"
    together = torchrun(2, "--maps", *folders, *SCORES, *FEW, "--results", tmp_path / "two", cwd=tmp_path)
    out, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    assert out.count("metrics  ") == 1  # one process prints
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (judged / "results" / "maps-mine", tmp_path / "two"))
    assert differences(one, two) == []
    wrong = tmp_path / "wrong"
    shutil.copytree(judged / "mine", wrong)
    for name in ("val/val_1", "test/test_0"):  # one file for each process
        (wrong / f"{name}.npz").write_bytes(b"half a file")
    together = torchrun(2, "--maps", wrong / "val", wrong / "test", *SCORES, *FEW, "--results", tmp_path / "x", cwd=tmp_path)
    _, err = together.communicate(timeout=300)
    assert together.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        f"error: {wrong / 'val' / 'val_1.npz'} is not a whole .npz file (File is not a zip file); write it again"]
    assert not (tmp_path / "x").exists()


def test_a_run_that_was_killed_while_it_took_maps_over_ends_like_an_undisturbed_one(judged, tmp_path, no_pictures, monkeypatch):
    from experiment.own_maps import TakenMaps

    folders = judged / "mine" / "val", judged / "mine" / "test"
    write, written = TakenMaps.write, []

    def dying(self: TakenMaps, id: str, maps: Any) -> None:
        if len(written) == 8:
            raise KeyboardInterrupt
        written.append(id)
        write(self, id, maps)

    monkeypatch.setattr(TakenMaps, "write", dying)
    stopped = command("--maps", *folders, *SCORES, *FEW, "--results", tmp_path / "run", cwd=tmp_path)
    assert stopped.returncode == 130 and "kept in" in stopped.stderr and "8 maps that were taken over" in stopped.stderr
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr(TakenMaps, "write", write)
    outcome = command("--maps", *folders, *SCORES, *FEW, "--results", tmp_path / "run", cwd=tmp_path)
    assert "8 test images, 6 of them taken over now" in outcome.stdout, outcome.stderr
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (judged / "results" / "maps-mine", tmp_path / "run"))
    assert differences(one, two) == []
