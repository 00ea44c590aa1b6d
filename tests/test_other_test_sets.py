"""The command on other test sets, with tables of parts and of groups, as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_FLAGS, command, write_pairs, write_sealed

from isic.layout import ISIC_IMAGES, ISIC_MASKS
from runtime.records import WALL_CLOCK


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Six pairs in images/ and masks/, with ids of their own."""
    root = tmp_path_factory.mktemp("sets")
    source = write_pairs(root / "source", 6, seed=8)
    for folder, name in ((ISIC_IMAGES, "images"), (ISIC_MASKS, "masks")):
        (root / "clinic" / name).mkdir(parents=True)
        for path in (source / folder).iterdir():
            shutil.copy(path, root / "clinic" / name / path.name.replace("ISIC", "far"))
    return root / "clinic"


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished.parent / "cache", tmp_path / "cache")
    return tmp_path / "run"


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def record_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def one_line(outcome, text: str) -> None:
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert text in outcome.stderr.splitlines()[-1] and outcome.stderr.splitlines()[-1].startswith("error: ")


def without(metrics: dict, *names: str) -> dict:
    return {name: value for name, value in metrics.items() if name not in names}


def test_a_finished_run_goes_to_another_test_set_and_nothing_of_it_is_made_again(copied, finished, tiny, clinic):
    flags = ("--data", tiny, "--results", copied, "--cache", copied.parent / "cache", *TINY_FLAGS)
    stamps = {path: path.stat().st_mtime_ns for path in [*copied.glob("*/*.pth"), *copied.glob("*/*/*.npz")]}
    outcome = command(*flags, "--test-data", clinic, cwd=copied.parent)
    assert outcome.returncode == 0, outcome.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    metrics, before = metrics_of(copied), metrics_of(finished)
    assert metrics["identity"] == before["identity"]
    assert without(metrics, "targets", "warnings", *WALL_CLOCK, "checksum", "files") == without(
        before, "warnings", *WALL_CLOCK, "checksum", "files")
    found = metrics["targets"]["clinic"]
    assert set(found) == {"test", "bootstrap", "conclusion", "shift", "warnings"}
    assert [warning["text"].startswith("clinic: ") for warning in found["warnings"]] == [True] * len(found["warnings"])
    assert sorted(path.stem for path in (copied / "uncertainty_maps" / "target-clinic").iterdir()) == [
        f"far_{index:07d}" for index in range(6)]
    with open(copied / "per_image_clinic.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 and found["test"]["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    with np.load(copied / "calibration.npz", allow_pickle=False) as arrays:
        assert list(arrays["target:clinic/ids"]) == [row["id"] for row in rows]
        assert np.array_equal(arrays["target:clinic/edges"], arrays["test/edges"])  # of the source's validation images
    (entry,) = record_of(copied)["targets"]
    assert entry["name"] == "clinic" and entry["images"] == str(clinic / "images") and len(entry["ids"]) == 6
    # the scale and lambda of the source make the fused score
    (low, high), (first, last) = (metrics["normalisation"][key] for key in ("pred_variance", "saliency_variance"))
    for path in (copied / "uncertainty_maps" / "target-clinic").iterdir():
        with np.load(path) as maps:
            u = np.clip((maps["pred_variance"] - low) / (high - low), 0, 1)
            v = np.clip((maps["saliency_variance"] - first) / (last - first), 0, 1)
            fused = metrics["lambda"] * u + (1 - metrics["lambda"]) * v
            np.testing.assert_allclose(maps["fused_score"], fused, atol=1e-6)
    report = (copied / "report.md").read_text()
    assert "## Other test sets" in report and "No correction runs over the sets" in report
    assert (copied / "figures" / "test_sets.png").is_file() and "clinic" in outcome.stdout.split("test set ")[-1]

    outcome = command(*flags, cwd=copied.parent)  # the sets of a run are those of its last command
    assert outcome.returncode == 0, outcome.stderr
    assert "targets" not in metrics_of(copied) and "targets" not in record_of(copied)
    assert not (copied / "per_image_clinic.csv").exists() and not (copied / "figures" / "test_sets.png").exists()
    assert "Other test sets" not in (copied / "report.md").read_text()


@pytest.fixture(scope="module")
def tested(finished, tiny, clinic, tmp_path_factory):
    """The finished run with another test set."""
    root = tmp_path_factory.mktemp("tested")
    shutil.copytree(finished, root / "run")
    outcome = command("--data", tiny, "--results", root / "run", "--cache", finished.parent / "cache", *TINY_FLAGS,
                      "--test-data", clinic, cwd=root)
    assert outcome.returncode == 0, outcome.stderr
    return root / "run"


@pytest.mark.usefixtures("no_pictures")
def test_weights_alone_are_enough_for_another_test_set_even_where_the_images_are_gone(tested, clinic, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(tested, run)
    shutil.rmtree(run / "uncertainty_maps")
    record = {**record_of(run), "images": "/nowhere/images", "masks": "/nowhere/masks"}
    write_sealed(run / "config.json", record)
    outcome = command("--weights-from", run, "--test-data", clinic, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    found = tmp_path / "results" / "moved-on-clinic"
    metrics, whole = metrics_of(found), metrics_of(tested)
    for name in ("targets", "test", "validation", "conclusion", "lambda", "normalisation", "warnings"):
        assert metrics[name] == whole[name], name
    assert metrics["numbers_from"] == str(run)
    assert record_of(found)["decides"] == {**record_of(run)["decides"], "weights": record_of(found)["decides"]["weights"]}
    for name in ("per_image.csv", "per_image_clinic.csv", "training_log.csv", "weights/best_model.pth"):
        assert (found / name).read_bytes() == (tested / name).read_bytes(), name
    drawn = command("--run", found, "--id", "far_0000001", "--test-set", "clinic", cwd=tmp_path, script="visualize.py")
    assert drawn.returncode == 0, drawn.stderr
    again = command("--weights-from", run, "--test-data", clinic, cwd=tmp_path)
    assert again.returncode == 0 and "0 of them made now" in again.stdout
    assert without(metrics_of(found), *WALL_CLOCK) == without(metrics, *WALL_CLOCK)


@pytest.mark.usefixtures("no_pictures")
def test_with_another_setting_the_images_of_the_source_are_measured_as_well(tested, clinic, tmp_path):
    outcome = command("--weights-from", tested, "--test-data", clinic, "--passes", 4, "--results", "r", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    metrics, record = metrics_of(tmp_path / "r"), record_of(tmp_path / "r")
    assert "numbers_from" not in metrics and metrics["test"] != metrics_of(tested)["test"]
    assert record["split"] == record_of(tested)["split"] and record["configuration"]["passes"] == 4
    assert metrics["targets"]["clinic"]["test"] != metrics_of(tested)["targets"]["clinic"]["test"]


def test_weights_are_checked_before_an_image_is_decoded(finished, clinic, tmp_path):
    outcome = command("--weights-from", finished, "--test-data", clinic, "--dropout", 0.4, cwd=tmp_path)
    one_line(outcome, "trained otherwise: dropout is 0.2 there and 0.4 here")
    assert "decoding" not in outcome.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_several_trainings_go_to_another_test_set_and_are_pooled_on_it(tiny, clinic, tmp_path):
    flags = ("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--trainings", 2, "--results", tmp_path / "two")
    outcome = command(*flags, "--test-data", clinic, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    pool, parts = metrics_of(tmp_path / "two"), [metrics_of(tmp_path / "two" / f"seed-{seed}") for seed in (42, 43)]
    found = pool["targets"]["clinic"]
    assert found["conclusion"]["trainings"] == 2 == len(found["by_training"])
    assert found["test"]["dice"] == pytest.approx(np.mean([part["targets"]["clinic"]["test"]["dice"] for part in parts]))
    for place, entry in enumerate(found["conclusion"]["endpoints"]):
        single = [part["targets"]["clinic"]["conclusion"]["endpoints"][place]["value"] for part in parts]
        if None not in single:
            assert entry["by_training"] == pytest.approx(single)
    assert "## Other test sets" in (tmp_path / "two" / "report.md").read_text()
    again = command(*flags, "--test-data", clinic, cwd=tmp_path)
    assert again.stdout.count("finished before, used again") == 2
    taken = command("--weights-from", tmp_path / "two", "--test-data", clinic, cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert metrics_of(tmp_path / "results" / "two-on-clinic")["targets"] == pool["targets"]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_by_tables_draws_groups_and_remembers_them(tiny, clinic, tmp_path):
    ids = [f"ISIC_{index:07d}" for index in range(24)]
    parts = {id: ("training", "validation", "test")[index // 2 % 3] for index, id in enumerate(ids[:18])}
    groups = {id: f"patient {index // 2}" for index, id in enumerate(ids)} | {"far_0000000": "z", "far_0000001": "z"}
    for name, column, rows in (("split", "part", parts), ("groups", "group", groups)):
        (tmp_path / f"{name}.csv").write_text(f"id,{column}\n" + "".join(f"{id},{value}\n" for id, value in rows.items()))
    flags = ("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--results", tmp_path / "run",
             "--split", "split.csv", "--groups", "groups.csv")
    outcome = command(*flags, "--test-data", clinic, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "6 of 24 images are not in --split split.csv and are left out" in outcome.stderr
    metrics, record = metrics_of(tmp_path / "run"), record_of(tmp_path / "run")
    assert metrics["bootstrap"]["unit"] == metrics["targets"]["clinic"]["bootstrap"]["unit"] == "group"
    assert record["split"]["test"] == [id for id, part in parts.items() if part == "test"]
    assert record["groups"] == {id: groups[id] for id in ids[:18]}
    assert record["targets"][0]["groups"] == {"far_0000000": "z", "far_0000001": "z"}
    assert {"split", "groups"} <= record["decides"].keys()
    report = (tmp_path / "run" / "report.md")
    assert not report.exists() or "18 images are in 9 groups" in report.read_text()

    refused = command(*flags[:-4], cwd=tmp_path)  # by chance now
    assert refused.returncode == 2 and "holds a run with other settings" in refused.stderr
    for name in ("split.csv", "groups.csv"):  # what was taken from them is in the record
        (tmp_path / name).unlink()
    taken = command("--weights-from", "run", "--passes", 4, "--results", "other", cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert record_of(tmp_path / "other")["groups"] == record["groups"]
    assert record_of(tmp_path / "other")["split"] == record["split"]
    assert metrics_of(tmp_path / "other")["bootstrap"]["unit"] == "group"


@pytest.mark.parametrize(("flags", "message"), [
    (("--test-data", "nowhere"), "--test-data nowhere is no folder"),
    (("--split", "parts.csv"), "lists 1 images that are not in"),
    (("--split", "twice.csv"), "ISIC_0000001 is listed twice"),
    (("--groups", "parts.csv"), "has no column group"),
    (("--groups", "gone.csv"), "cannot read --groups gone.csv: No such file"),
])
def test_bad_input_is_one_line_and_leaves_no_folder(tiny, tmp_path, flags, message):
    (tmp_path / "parts.csv").write_text("id,part\nISIC_0000001,test\nISIC_99,training\n")
    (tmp_path / "twice.csv").write_text("id,part\nISIC_0000001,test\nISIC_0000001,test\n")
    outcome = command("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, *flags, cwd=tmp_path)
    one_line(outcome, message)
    assert not (tmp_path / "results").exists()


def test_training_images_in_a_test_set_are_one_line_before_any_training(tiny, tmp_path):
    outcome = command("--data", tiny, "--cache", tmp_path / "cache", *TINY_FLAGS, "--test-data", tiny, cwd=tmp_path)
    one_line(outcome, "19 of 24 images of test set tiny0")
    assert not list(tmp_path.glob("results/*/weights"))
