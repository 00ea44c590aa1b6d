"""Content is bound to what it is: what was edited or put in another's place is made again, or refused in one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_FLAGS, command, write_sealed

from experiment.map_files import MAP_ARRAYS, maps_checksum

PARTS = ("validation", "test")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(run: Path, tiny: Path, finished: Path):
    return command("--data", tiny, "--results", run, "--cache", finished.parent / "cache", *TINY_FLAGS, cwd=run.parent)


def maps_of(run: Path, part: str = "test") -> list[Path]:
    return sorted((run / "uncertainty_maps" / part).iterdir())


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as content:
        return dict(content)


def edited(path: Path, **arrays: np.ndarray) -> None:
    """Change arrays of a map file and leave the rest, its identity and its checksum as they are."""
    np.savez(path, **{**arrays_of(path), **arrays})


def another_image(run: Path) -> Path:
    one, other = maps_of(run)[:2]
    shutil.copy(other, one)
    return one


def another_part(run: Path) -> Path:
    path = maps_of(run)[0]
    shutil.copy(maps_of(run, "validation")[0], path)
    return path


def with_arrays(**values):
    def change(run: Path) -> Path:
        path = maps_of(run)[0]
        arrays = arrays_of(path)
        edited(path, **{name: np.full_like(arrays[name], value) for name, value in values.items()})
        return path

    change.__name__ = " ".join(f"{name}={value}" for name, value in values.items())
    return change


def without_checksum(run: Path) -> Path:
    path = maps_of(run)[0]
    arrays = {**arrays_of(path), "pred_variance": np.zeros_like(arrays_of(path)["pred_variance"])}
    del arrays["checksum"]
    np.savez(path, **arrays)
    return path


def out_of_range_but_sealed(run: Path) -> Path:
    path = maps_of(run)[0]
    arrays = arrays_of(path)
    arrays["mean_prediction"] = np.full_like(arrays["mean_prediction"], 5)
    np.savez(path, **{**arrays, "checksum": np.array(maps_checksum(path, arrays))})
    return path


MAPS = [
    another_image, another_part, without_checksum, out_of_range_but_sealed,
    with_arrays(pred_variance=0), with_arrays(true_mask=0),
    with_arrays(fused_score=0.5), with_arrays(mean_prediction=5), with_arrays(saliency_variance=-1), with_arrays(true_mask=7),
    with_arrays(empty_cams=2), with_arrays(pass_dice=0.5),
]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("change", MAPS, ids=lambda change: change.__name__)
def test_a_map_file_that_was_changed_is_made_again(copied, finished, tiny, change):
    before = {path.name: path.read_bytes() for path in maps_of(copied)}
    change(copied)
    outcome = again(copied, tiny, finished)
    assert outcome.returncode == 0, outcome.stderr
    assert {path.name: path.read_bytes() for path in maps_of(copied)} == before
    one, other = (json.loads((run / "metrics.json").read_text()) for run in (copied, finished))
    assert one["checksum"] == other["checksum"]


@pytest.mark.parametrize("change", MAPS, ids=lambda change: change.__name__)
def test_no_gallery_is_drawn_from_a_map_file_that_was_changed(copied, change, tmp_path):
    path = change(copied)
    flags = ("--gallery", "disagreement", "--n", 99, "--output", "x.png")
    outcome = command("--run", copied, *flags, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and path.name in outcome.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("change", [another_image, with_arrays(fused_score=0.5)], ids=lambda change: change.__name__)
def test_no_summary_is_drawn_with_a_map_file_that_was_changed(copied, change, tmp_path):
    path = change(copied)
    outcome = command("--run", copied, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and path.name in outcome.stderr


# ---------------------------------------------------------------- tables, counts, records


def replaced(name: str, change):
    def edit(run: Path) -> str:
        path = run / name
        rows = list(csv.reader(path.read_text().splitlines()))
        change(rows)
        with open(path, "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)
        return name

    return edit


def put(row: int, column: int, value: str):
    return lambda rows: rows[row].__setitem__(column, value)


def no_column(rows):
    for row in rows:
        del row[1]


TABLES = {
    f"{what} in {name}": replaced(name, change) for name in ("per_image.csv", "training_log.csv") for what, change in {
        "another number": put(1, 1, "0.123"), "a word": put(1, 1, "good"), "no column": no_column,
        "a row less": lambda rows: rows.pop(),
        "a long field": put(1, 1, "1" * 200_000), "infinity": put(1, 1, "inf"), "a short row": lambda rows: rows[1].pop(),
        "a column twice": put(0, 1, "id"),
    }.items()
}


@pytest.mark.parametrize("what", TABLES)
def test_a_summary_is_not_drawn_from_tables_that_were_changed(copied, what, tmp_path):
    before = (copied / "report.html").read_bytes()
    name = TABLES[what](copied)
    outcome = command("--run", copied, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and name in outcome.stderr
    assert (copied / "report.html").read_bytes() == before


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["per_image.csv", "training_log.csv"])
def test_the_same_command_writes_the_tables_again(copied, finished, tiny, name):
    TABLES[f"another number in {name}"](copied)
    assert again(copied, tiny, finished).returncode == 0
    assert (copied / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("edit", [
    lambda record: record["configuration"].update(seed=43), lambda record: record["configuration"].update(passes=9),
    lambda record: record["configuration"].update(threshold=0.25), lambda record: record["split"]["test"].pop(),
    lambda record: record["skipped"].append({"id": "x", "file": "x", "reason": "x"}), lambda record: record.pop("checksum"),
], ids=["seed", "passes", "threshold", "split", "skipped", "checksum"])
@pytest.mark.parametrize("flags", [("--summary",), ("--gallery", "best"), ("--seed", 1)], ids=lambda flags: flags[0])
def test_no_picture_is_drawn_with_a_configuration_that_was_edited(copied, edit, flags, tmp_path):
    record = json.loads((copied / "config.json").read_text())
    edit(record)
    (copied / "config.json").write_text(json.dumps(record))
    outcome = command("--run", copied, *flags, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and "config.json was changed" in outcome.stderr


@pytest.mark.parametrize("change", [
    lambda record: record.update(earlier=None), lambda record: record.update(skipped=5), lambda record: record.update(split=[]),
    lambda record: record["split"]["test"].append("../x"), lambda record: record["configuration"].update(threshold="x"),
    lambda record: record.update(images=7), lambda record: record["configuration"].update(margin=[1]),
], ids=range(7))
def test_a_record_whose_seal_is_right_and_whose_content_is_odd(copied, finished, tiny, change, tmp_path):
    record = json.loads((copied / "config.json").read_text())
    change(record)
    write_sealed(copied / "config.json", record)
    outcome = command("--run", copied, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and "config.json is not of this program" in outcome.stderr


@pytest.mark.usefixtures("no_pictures")
def test_odd_earlier_environments_are_forgotten(copied, finished, tiny):
    record = json.loads((copied / "config.json").read_text())
    write_sealed(copied / "config.json", {**record, "earlier": None})
    outcome = again(copied, tiny, finished)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((copied / "config.json").read_text())["earlier"] == []


# ---------------------------------------------------------------- runs of earlier versions


def as_before(run: Path) -> None:
    """A finished run as a version without these checksums left it."""
    for part in PARTS:
        for path in maps_of(run, part):
            arrays = arrays_of(path)
            del arrays["checksum"]
            np.savez(path, **arrays)
    record = json.loads((run / "config.json").read_text())
    del record["checksum"]
    (run / "config.json").write_text(json.dumps(record))
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["files"]
    write_sealed(run / "metrics.json", metrics)


def test_a_run_of_an_earlier_version_is_used_again_and_sealed(copied, finished, tiny, tmp_path, monkeypatch):
    import experiment.maps

    as_before(copied)
    for flags in (("--gallery", "best", "--n", 2), ("--summary",)):
        outcome = command("--run", copied, *flags, script="visualize.py", cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
    monkeypatch.setattr(experiment.maps, "uncertainty_maps", None)  # none is made
    assert again(copied, tiny, finished).returncode == 0
    for part in PARTS:
        for one, other in zip(maps_of(copied, part), maps_of(finished, part)):
            assert one.read_bytes() == other.read_bytes()
    assert (copied / "weights" / "best_model.pth").read_bytes() == (finished / "weights" / "best_model.pth").read_bytes()
    metrics, expected = (json.loads((run / "metrics.json").read_text()) for run in (copied, finished))
    assert metrics["checksum"] == expected["checksum"]


def test_maps_of_an_earlier_version_must_be_of_the_run(copied, finished, tiny):
    as_before(copied)
    path = maps_of(copied)[0]
    edited(path, identity=np.array("another"))
    assert again(copied, tiny, finished).returncode == 0
    assert path.read_bytes() == (finished / "uncertainty_maps" / "test" / path.name).read_bytes()
    assert set(MAP_ARRAYS) <= arrays_of(path).keys()
