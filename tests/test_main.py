"""The commands as a user runs them: a whole small experiment, reuse, refusal, every error line."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, command, process, write_pairs, write_sealed
from PIL import Image

from evaluation.conclusion import ENDPOINT_NAMES
from evaluation.fusion import Fusion, Linear
from experiment.case_images import Chosen, newest_run
from experiment.computed_case import compute_case
from experiment.map_files import MAP_ARRAYS
from isic.layout import ISIC_IMAGES, ISIC_MASKS, find_pairs
from isic.source import find_source
from model import UNet
from reporting import run_pictures
from reporting.console import endpoint_table, result_table
from runtime.checkpoints import load_model
from runtime.config import parse_config
from runtime.records import WALL_CLOCK, fingerprint


def test_a_run_leaves_what_the_readme_says(finished):
    files = ("config.json", "metrics.json", "per_image.csv", "training_log.csv", "calibration.npz", "weights/best_model.pth")
    figures = (f"figures/{name}.png" for name in ("gallery_random", "reliability", "lambda_curve", "training"))
    for name in (*files, *figures):
        assert (finished / name).is_file(), name
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["schema_version"] == 1
    assert metrics["synthetic"] is False
    assert metrics["lambda"] in [k / 10 for k in range(11)]
    assert len(metrics["validation"]["foreground_ece_by_lambda"]) == 11
    assert set(metrics["test"]["foreground_ece"]) == {"predictive_variance", "saliency_variance", "fused"}
    # 24 ids: 5 test, 3 of the remaining 19 validation
    assert (metrics["validation"]["images"], metrics["test"]["images"]) == (3, 5)
    for part, count in (("validation", 3), ("test", 5)):
        files = sorted((finished / "uncertainty_maps" / part).iterdir())
        assert len(files) == count
        for path in files:
            with np.load(path, allow_pickle=False) as maps:
                for key, kind in MAP_ARRAYS.items():
                    assert (maps[key].dtype, maps[key].shape) == (kind, (32, 32))
    with open(finished / "per_image.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    checkpoint = torch.load(finished / "weights" / "best_model.pth", weights_only=True)
    assert checkpoint["options"]["width"] == 4
    load_model(finished / "weights" / "best_model.pth", UNet, torch.device("cpu"))


def test_config_says_what_made_the_run(finished, tiny):
    record = json.loads((finished / "config.json").read_text())
    assert record["versions"]["torch"] == metadata.version("torch") and record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert (record["device"], record["configuration"]["seed"], record["synthetic"], record["earlier"]) == ("cpu", 42, False, [])
    assert sum(len(ids) for ids in record["split"].values()) == 24
    sums = [[path.stem, *(hashlib.sha256(one.read_bytes()).hexdigest() for one in (
        path, tiny / ISIC_MASKS / f"{path.stem}_segmentation.png"))] for path in sorted((tiny / ISIC_IMAGES).iterdir())]
    assert record["data_fingerprint"] == fingerprint(sums)


def test_config_keeps_the_versions_that_made_what_is_used_again(copied, tiny):
    path = copied / "config.json"
    record = json.loads(path.read_text())
    now, older = record["versions"], {**record["versions"], "torch": "1.0"}
    write_sealed(path, {**record, "versions": older})
    for _ in range(2):
        assert _run_again(copied, tiny).returncode == 0
        record = json.loads(path.read_text())
        assert record["versions"] == now and [entry["versions"] for entry in record["earlier"]] == [older]
    assert "made on another device or with other versions: cpu with torch 1.0" in (copied / "report.md").read_text()


def test_metrics_follow_from_the_saved_maps(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    maps = {part: [np.load(path) for path in sorted((finished / "uncertainty_maps" / part).iterdir())]
            for part in ("validation", "test")}
    for key in ("pred_variance", "saliency_variance"):
        values = np.concatenate([m[key].ravel() for m in maps["validation"]])
        assert metrics["normalisation"][key] == [float(values.min()), float(values.max())]
    fused = Fusion(*(Linear(*metrics["normalisation"][key]) for key in ("pred_variance", "saliency_variance")),
                   "convex", metrics["lambda"])
    dices, jaccards = [], []
    for m in maps["test"]:
        expected = fused(torch.from_numpy(m["pred_variance"]), torch.from_numpy(m["saliency_variance"])).numpy()
        np.testing.assert_array_equal(m["fused_score"], expected)
        predicted, truth = m["mean_prediction"] > 0.5, m["true_mask"] == 1
        both, either = (predicted & truth).sum(), (predicted | truth).sum()
        dices.append(2 * both / (predicted.sum() + truth.sum()))
        jaccards.append(both / either)
    assert metrics["test"]["dice"] == pytest.approx(np.mean(dices), abs=1e-12)
    assert metrics["test"]["jaccard"] == pytest.approx(np.mean(jaccards), abs=1e-12)
    # foreground ECE of the fused score by the plainest loop there is
    confidence = np.concatenate([1 - m["fused_score"][m["true_mask"] == 1].astype(float) for m in maps["test"]])
    correct = np.concatenate([(m["mean_prediction"] > 0.5)[m["true_mask"] == 1] for m in maps["test"]])
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15) | ((confidence == 0) & (b == 0))
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics["test"]["foreground_ece"]["fused"] == pytest.approx(ece, abs=1e-7)


def test_the_printed_table_says_what_metrics_hold(finished):
    text = (finished.parent / "stdout.txt").read_text()
    metrics = json.loads((finished / "metrics.json").read_text())
    for value in metrics["test"]["foreground_ece"].values():
        assert f"{value:.4f}" in text
    assert metrics["verdict"] in text
    assert str(finished) in text


def _run_again(finished: Path, tiny: Path, *flags: object):
    return command("--data", tiny, "--results", finished, "--cache", finished.parent / "cache", *TINY_FLAGS, *flags,
                   cwd=finished.parent)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished.parent / "cache", tmp_path / "cache")
    return tmp_path / "run"


def _numbers(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    for name in WALL_CLOCK:
        del metrics[name]
    return metrics


@pytest.mark.usefixtures("no_pictures")
def test_a_second_run_reuses_weights_and_maps_and_a_lost_map_is_made_again(copied, finished, tiny):
    stamps = {path: path.stat().st_mtime_ns for path in copied.glob("*/*.pth")}
    stamps |= {path: path.stat().st_mtime_ns for path in copied.glob("*/*/*.npz")}
    lost = sorted(path for path in stamps if path.parent.name == "test")[1]
    before = lost.read_bytes()
    lost.unlink()
    broken = sorted(path for path in stamps if path.parent.name == "validation")[0]
    broken.write_bytes(b"half a fi")
    outcome = _run_again(copied, tiny)
    assert outcome.returncode == 0, outcome.stderr
    assert lost.read_bytes() == before
    for path, stamp in stamps.items():
        if path not in (lost, broken):
            assert path.stat().st_mtime_ns == stamp, path
    assert _numbers(copied) == _numbers(finished)


@pytest.mark.usefixtures("no_pictures")
def test_another_configuration_is_refused_with_the_difference_named(copied, tiny):
    outcome = _run_again(copied, tiny, "--passes", 4)
    assert outcome.returncode == 2
    assert "passes was 3 and is now 4" in outcome.stderr
    assert "--fresh" in outcome.stderr
    outcome = _run_again(copied, tiny, "--passes", 4, "--fresh")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((copied / "config.json").read_text())["configuration"]["passes"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_weights_of_another_run_give_what_training_them_again_would(finished, tiny, tmp_path):
    shared = ("--data", tiny, "--cache", finished.parent / "cache", *TINY_FLAGS, "--passes", 4)
    taken = command(*shared, "--results", tmp_path / "taken", "--weights-from", finished, cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert "none; the weights are those of" in taken.stdout
    trained = command(*shared, "--results", tmp_path / "trained", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    first, second = (_numbers(tmp_path / name) for name in ("taken", "trained"))
    assert first["test"] == second["test"] and first["lambda"] == second["lambda"]
    assert first["test"] != _numbers(finished)["test"]
    drawn = command("--run", tmp_path / "taken", "--seed", 1, cwd=tmp_path, script="visualize.py")
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.parametrize(
    ("flags", "spoil", "message"),
    [
        (("--dropout", 0.4), None, "trained otherwise: dropout is 0.2 there and 0.4 here"),
        (("--seed", 1), None, "seed is 42 there and 1 here"),
        (("--limit", 20), None, "limit is None there and 20 here"),
        ((), "metrics.json", "holds no finished run (no metrics.json)"),
        ((), "weights/best_model.pth", "there is no checkpoint"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied, tiny, tmp_path, flags, spoil, message):
    if spoil:
        (copied / spoil).unlink()
    outcome = command("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--weights-from", copied,
                      "--results", tmp_path / "other", *flags, cwd=tmp_path)
    assert outcome.returncode == 2 and message in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "other" / "weights").exists()


def test_a_run_does_not_take_its_own_weights_nor_delete_them(copied, tiny, tmp_path):
    outcome = command("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--passes", 4, "--weights-from", copied,
                      "--results", copied, "--fresh", cwd=tmp_path)
    _is_one_line(outcome, "give another --results folder")
    assert (copied / "weights" / "best_model.pth").is_file() and (copied / "metrics.json").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_taken_weights_are_part_of_what_a_run_is(copied, tiny, tmp_path):
    flags = ("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--results", tmp_path / "other")
    for _ in range(2):
        outcome = command(*flags, "--weights-from", copied, cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
    outcome = command(*flags, cwd=tmp_path)
    assert outcome.returncode == 2 and "weights was" in outcome.stderr


def test_the_script_itself(finished, tiny, tmp_path):
    running = process("--data", tiny, "--results", tmp_path / "run", "--cache", tmp_path / "cache", *TINY_FLAGS, cwd=tmp_path)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert _numbers(tmp_path / "run") == _numbers(finished)  # the same run in another process and folder: the same bits
    for path in (finished / "uncertainty_maps").rglob("*.npz"):
        assert (tmp_path / "run" / path.relative_to(finished)).read_bytes() == path.read_bytes()
    assert "<" in err  # progress bars with the time that remains
    running = process("--passes", "0", cwd=tmp_path)
    assert running.communicate(timeout=300)[1] == "error: --passes must be at least 2, not 0\n"
    assert running.returncode == 2


@pytest.mark.usefixtures("no_pictures")
def test_without_data_the_run_is_synthetic_and_says_so_everywhere(tmp_path):
    paper = ("--schedule", "constant")  # said, and therefore kept, though it is the default that the preset replaces
    outcome = command("--synthetic-images", 24, *TINY_FLAGS[1:], *paper, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "SYNTHETIC LESIONS" in outcome.stdout.split("training")[0]
    used = json.loads((tmp_path / "results" / "synthetic" / "config.json").read_text())["configuration"]
    assert (used["lr"], used["schedule"], used["image_size"]) == (1e-3, "constant", 32)
    run = tmp_path / "results" / "synthetic"
    assert json.loads((run / "metrics.json").read_text())["synthetic"] is True
    assert json.loads((run / "config.json").read_text())["synthetic"] is True
    drawn = tmp_path / "data" / "synthetic-24"
    assert len(list((drawn / ISIC_IMAGES).glob("ISIC_*.jpg"))) == 24
    for named in (("--data", drawn), ("--images", drawn / ISIC_IMAGES, "--masks", drawn / ISIC_MASKS)):
        source = find_source(parse_config([str(word) for word in named], ""))
        assert source.synthetic  # whoever names the folder does not make the lesions real


@pytest.mark.usefixtures("no_pictures")
def test_other_names_and_modes_work(tmp_path):
    source = write_pairs(tmp_path / "source", 12)
    (tmp_path / "p").mkdir()
    (tmp_path / "m").mkdir()
    for index, path in enumerate(sorted((source / ISIC_IMAGES).iterdir())):
        image = Image.open(path).convert(["RGB", "L", "RGBA", "P"][index % 4])
        image.save(tmp_path / "p" / f"polyp {index}.png")
        mask = Image.open(source / ISIC_MASKS / f"{path.stem}_segmentation.png").point(lambda v: v // 255)
        mask.save(tmp_path / "m" / f"polyp {index}{['', '_mask', '_lesion'][index % 3]}.png")
    outcome = command("--images", "p", "--masks", "m", *TINY_FLAGS, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "results" / "p-quick" / "metrics.json").is_file()


# ---------------------------------------------------------------- the conclusion, and several trainings


def test_a_run_concludes_with_one_verdict(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    conclusion = metrics["conclusion"]
    assert [entry["name"] for entry in conclusion["endpoints"]] == list(ENDPOINT_NAMES)
    assert (conclusion["trainings"], conclusion["seeds"], conclusion["lambda"]) == (1, [42], [metrics["lambda"]])
    assert conclusion["resamples"] == 200 and len(conclusion["notes"]) == 1
    assert metrics["verdict"] == conclusion["sentence"] and set(metrics["verdict_recalibrated"])
    error = metrics["test"]["foreground_ece"]
    assert conclusion["endpoints"][0]["value"] == pytest.approx(error["fused"] - error["predictive_variance"], abs=1e-12)
    record = json.loads((finished / "config.json").read_text())
    assert metrics["config_identity"] == record["identity"] == fingerprint(record["decides"])
    said = (finished.parent / "stdout.txt").read_text()
    assert endpoint_table(metrics) in said and conclusion["notes"][0] in said
    assert result_table(metrics) in said


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_is_concluded_again_with_another_margin(copied, finished, tiny):
    outcome = _run_again(copied, tiny, "--margin", "brier=0.25", "--margin", "foreground_ece=0.5")
    assert outcome.returncode == 0, outcome.stderr
    margins = {entry["name"]: entry["margin"] for entry in _numbers(copied)["conclusion"]["endpoints"]}
    before = {entry["name"]: entry["margin"] for entry in _numbers(finished)["conclusion"]["endpoints"]}
    assert margins == {**before, "brier": 0.25, "foreground_ece": 0.5}
    used = json.loads((copied / "config.json").read_text())["configuration"]
    assert used["margin"] == {"brier": 0.25, "foreground_ece": 0.5}
    assert _numbers(copied)["identity"] == _numbers(finished)["identity"]


SEVERAL = ("--seed", 42, "--trainings", 2)


@pytest.fixture(scope="module")
def trainings(tiny, finished, tmp_path_factory):
    """Two tiny trainings by one command, without galleries, and what it printed."""
    folder = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_pictures, "draw_galleries", lambda run, read: [])
        outcome = _several(folder / "both", tiny, finished)
    assert outcome.returncode == 0, outcome.stderr
    (folder / "stdout.txt").write_text(outcome.stdout)
    return folder / "both"


def _several(results: Path, tiny: Path, finished: Path, *flags: object):
    where = ("--data", tiny, "--results", results, "--cache", finished.parent / "cache")
    return command(*where, *TINY_FLAGS, *SEVERAL, *flags, cwd=results.parent)


def test_each_of_several_trainings_is_an_ordinary_run(trainings, finished):
    for seed in (42, 43):
        for name in ("metrics.json", "calibration.npz", "report.html", "report.md", "weights/best_model.pth", "per_image.csv"):
            assert (trainings / f"seed-{seed}" / name).is_file(), name
    assert _numbers(trainings / "seed-42") == _numbers(finished)  # as if it had been run alone
    assert _numbers(trainings / "seed-43")["identity"] != _numbers(finished)["identity"]
    assert not [path for path in trainings.iterdir() if path.suffix == ".csv"]


def test_the_pool_holds_both_and_one_conclusion(trainings):
    metrics = json.loads((trainings / "metrics.json").read_text())
    parts = [json.loads((trainings / f"seed-{seed}" / "metrics.json").read_text()) for seed in (42, 43)]
    assert metrics["pooled"] == [
        {"name": f"seed-{seed}", "seed": seed, "identity": part["identity"], "dice": part["test"]["dice"],
         "lambda": part["lambda"]} for seed, part in zip((42, 43), parts)]
    conclusion = metrics["conclusion"]
    assert (conclusion["trainings"], conclusion["seeds"]) == (2, [42, 43]) and conclusion["notes"][0].startswith("Two trainings")
    for row, *ones in zip(conclusion["endpoints"], *(part["conclusion"]["endpoints"] for part in parts)):
        assert row["by_training"] == [one["value"] for one in ones], row["name"]
    assert metrics["test"]["images"] == 5
    assert metrics["test"]["dice"] == pytest.approx(np.mean([part["test"]["dice"] for part in parts]))
    for score, value in metrics["test"]["foreground_ece"].items():
        assert value == pytest.approx(np.mean([part["test"]["foreground_ece"][score] for part in parts]))
    for name in ("report.html", "report.md", "figures/endpoints.png"):
        assert (trainings / name).is_file()
    said = (trainings.parent / "stdout.txt").read_text()
    assert endpoint_table(metrics) in said and metrics["verdict"] in said
    assert f"report       {trainings / 'report.html'}" in said and str(trainings / "seed-43" / "report.html") in said


def test_the_same_command_again_uses_both_trainings(trainings, finished, tiny, tmp_path):
    copy = shutil.copytree(trainings, tmp_path / "both")
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("seed-*/*") if path.is_file() and path.name != ".lock"}
    before = (copy / "metrics.json").read_bytes()
    outcome = _several(copy, tiny, finished)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("finished before, used again") == 2
    assert (copy / "metrics.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.usefixtures("no_pictures")
def test_a_training_that_was_lost_is_resumed_and_the_pool_is_the_same(trainings, finished, tiny, tmp_path):
    copy = shutil.copytree(trainings, tmp_path / "both")
    for name in ("metrics.json", "calibration.npz", "uncertainty_maps/test"):
        path = copy / "seed-43" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = _several(copy, tiny, finished, "--quiet", "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout) == json.loads((trainings / "metrics.json").read_text())


def test_pooling_the_runs_gives_what_training_them_together_gave(trainings, tmp_path):
    outcome = command("--pool", trainings / "seed-43", trainings / "seed-42", "--resamples", 200, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    pool = tmp_path / "results" / "pooled"
    assert (pool / "metrics.json").read_bytes() == (trainings / "metrics.json").read_bytes()
    link = os.path.relpath((trainings / "seed-42" / "report.html").resolve(), pool.resolve())
    assert link in (pool / "report.html").read_text()
    outcome = command("--pool", *trainings.glob("seed-*"), "--resamples", 200, "--margin", "brier=0.5", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((pool / "metrics.json").read_text())["conclusion"]["endpoints"][1]["margin"] == 0.5
    assert json.loads((pool / "config.json").read_text())["configuration"]["margin"] == {"brier": 0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pool", "{one}"), "--pool pools at least two finished runs"),
        (("--pool", "{one}", "nowhere"), "nowhere holds no finished run (no metrics.json)"),
        (("--pool", "{one}", "{one}"), "are both of seed 42; leave one out"),
        (("--pool", "{both}", "{one}"), "is a pool itself; name the folders of its trainings"),
        (("--pool", "{one}", "{two}", "--results", "{one}"), "holds a single run; choose another --results folder"),
        (("--pool", "{one}", "{two}", "--margin", "x=1"), f"there are {', '.join(ENDPOINT_NAMES)}"),
        (("--pool", "{one}", "{two}", "--passes", "3"), "leave --passes out"),
        (("--margin", "x=1", "--data", "nowhere"), f"no endpoint x; there are {', '.join(ENDPOINT_NAMES)}"),
    ],
)
def test_what_cannot_be_pooled_is_one_line(trainings, tmp_path, flags, message):
    names = {"one": trainings / "seed-42", "two": trainings / "seed-43", "both": trainings}
    before = (trainings / "seed-42" / "metrics.json").read_bytes()
    _is_one_line(command(*(flag.format(**names) for flag in flags), cwd=tmp_path), message)
    assert (trainings / "seed-42" / "metrics.json").read_bytes() == before


def test_visualize_of_several_trainings_names_them_and_picks_one(trainings, tmp_path):
    names = f"{trainings / 'seed-42'}, {trainings / 'seed-43'}"
    _is_one_line(command("--run", trainings, script="visualize.py", cwd=tmp_path), f"choose one of them: {names}")
    assert newest_run(trainings) == trainings / "seed-43"
    assert newest_run(trainings.parent) == trainings / "seed-43"


# ---------------------------------------------------------------- the error lines


def _damage(root: Path, what: str) -> None:
    images, masks = root / ISIC_IMAGES, root / ISIC_MASKS
    image, mask = images / "ISIC_0000003.jpg", masks / "ISIC_0000003_segmentation.png"
    if what == "no mask":
        mask.unlink()
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:500])
    elif what == "sizes":
        Image.new("L", (7, 9), 255).save(mask)
    elif what == "empty":
        Image.new("L", (48, 40), 0).save(mask)
    elif what == "no pairs":
        shutil.rmtree(images)
        images.mkdir()
    elif what == "few":
        for path in sorted(images.iterdir())[2:]:
            path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", "ISIC_0000003.jpg has no mask"),
        ("truncated", "cannot decode"),
        ("sizes", "48 x 40 but its mask ISIC_0000003_segmentation.png is 7 x 9"),
        ("empty", "ISIC_0000003_segmentation.png is empty"),
        ("no pairs", "no image files"),
        ("few", "2 images are too few to split"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(tmp_path, what, message):
    _damage(write_pairs(tmp_path / "d", 10), what)
    outcome = command("--data", tmp_path / "d", *TINY_FLAGS, cwd=tmp_path)
    _is_one_line(outcome, message)
    assert not (tmp_path / "results" / "d-quick" / "metrics.json").exists()


def _is_one_line(outcome, message: str) -> None:
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    complaint = [line for line in outcome.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(complaint) == 1
    assert message in complaint[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere"), "nowhere does not exist"),
        (("--images", "nowhere", "--masks", "nowhere"), "folder nowhere does not exist"),
        (("--passes", "0"), "--passes must be at least 2"),
        (("--device", "cuda:7"), "CUDA device"),
        (("--device", "tpu"), "--device must be"),
        (("--results", "file/below"), "cannot write to file/below"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, tiny, flags, message):
    (tmp_path / "file").write_text("")
    data = () if {"--data", "--images"} & set(flags) else ("--data", tiny)
    _is_one_line(command(*data, *flags, cwd=tmp_path), message)


def test_a_named_dataset_is_never_replaced_by_synthetic_lesions(tmp_path):
    (tmp_path / "data" / "ISIC2018").mkdir(parents=True)  # there, but not filled
    outcome = command(*TINY_FLAGS, cwd=tmp_path)
    _is_one_line(outcome, f"has no folder {ISIC_IMAGES}")
    assert "SYNTHETIC" not in outcome.stdout


# ---------------------------------------------------------------- visualize.py


def test_visualize_before_any_run(tmp_path):
    _is_one_line(command(script="visualize.py", cwd=tmp_path), "run main.py first")


def test_visualize_draws_a_random_case_and_says_how_to_draw_it_again(finished, tmp_path):
    first = command("--run", finished, "--output", "a.png", script="visualize.py", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    seed = first.stdout.split("--seed ")[1].split()[0]
    again = command("--run", finished, "--seed", seed, "--output", "b.png", script="visualize.py", cwd=tmp_path)
    assert first.stdout.splitlines()[0] == again.stdout.splitlines()[0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").width > 2000


def test_visualize_by_id_and_for_any_picture(finished, tiny, tmp_path):
    outcome = command("--run", finished, "--id", "ISIC_0000007", "--output", "a.svg", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "ISIC_0000007" in (tmp_path / "a.svg").read_text()
    picture = tmp_path / "my picture.png"
    Image.new("RGB", (50, 70), (200, 150, 140)).save(picture)
    outcome = command("--run", finished, "--image", picture, "--output", "b.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "Dice" not in outcome.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--id", "no such id"), "there is no image no such id"),
        (("--image", "missing.png"), "missing.png is not a readable file"),
        (("--output", "x.docx"), "cannot draw a picture of type .docx"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--id", "a", "--image", "b"), "not both"),
        (("--run", "elsewhere"), "elsewhere"),
    ],
)
def test_visualize_errors_are_one_line(finished, tmp_path, flags, message):
    run = () if "--run" in flags else ("--run", finished)
    _is_one_line(command(*run, *flags, script="visualize.py", cwd=tmp_path), message)


def test_visualize_refuses_a_configuration_that_was_edited(copied, tmp_path):
    record = json.loads((copied / "config.json").read_text())
    for part in ("configuration", "decides"):
        (copied / "config.json").write_text(json.dumps({**record, part: {**record[part], "passes": 7}}))
        _is_one_line(command("--run", copied, script="visualize.py", cwd=tmp_path), "config.json was changed after the run")


def test_visualize_shows_the_maps_that_the_run_saved(finished):
    record = json.loads((finished / "config.json").read_text())
    pairs = {pair.id: pair for pair in find_pairs(Path(record["images"]), Path(record["masks"]))}
    id = record["split"]["test"][2]
    case = compute_case(finished, Chosen(id, None, pairs[id].image, pairs[id], "", ()), "cpu")
    with np.load(finished / "uncertainty_maps" / "test" / f"{id}.npz") as saved:
        for key in ("mean_prediction", "pred_variance", "saliency_variance", "fused_score"):
            np.testing.assert_array_equal(case.maps[key], saved[key])
        np.testing.assert_array_equal(case.truth, saved["true_mask"])
