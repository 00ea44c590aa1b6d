"""Which image a picture is of: by id, by seed, of the run's own images or of another test set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from saved_runs import METRICS, make_run

from experiment.case_images import any_picture, check_finished, choose_image, image_sets, named_set, pick
from experiment.saved_run import load_run, sealed_metrics
from runtime.errors import UserError
from runtime.records import seal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another test set, "clinic", of two images that its own data do not have and one that they have."""
    root = tmp_path_factory.mktemp("sets")
    folder = make_run(root, images=3)
    for kind in ("images", "masks"):
        (root / "clinic" / kind).mkdir(parents=True)
        for id in ("c1", "c2", "test_0000"):
            Image.new("RGB" if kind == "images" else "L", (30, 30), 200).save(root / "clinic" / kind / f"{id}.png")
    record = json.loads((folder / "config.json").read_text())
    record["targets"] = [{
        "name": "clinic", "images": str(root / "clinic" / "images"), "masks": str(root / "clinic" / "masks"),
        "ids": ["c1", "c2", "test_0000"], "fingerprint": "f", "skipped": []}]
    record["split"]["train"] = ["test_0002"]
    record["split"]["test"] = ["test_0000", "test_0001"]
    del record["checksum"]
    (folder / "config.json").write_text(json.dumps(seal(record)))
    table = folder / "per_image.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    metrics = {key: value for key, value in json.loads((folder / "metrics.json").read_text()).items() if key != "checksum"}
    (folder / "metrics.json").write_text(json.dumps(sealed_metrics(metrics, folder)))
    return folder


def record_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def test_a_seed_stands_for_an_id_and_every_id_is_as_likely():
    ids = ["c", "a", "b"]
    drawn = [pick(ids, seed) for seed in range(300)]
    assert drawn == [pick(sorted(ids), seed) for seed in range(300)]
    assert all(70 < drawn.count(id) < 130 for id in ids)


def test_the_sets_of_a_run(run):
    own, clinic = image_sets(run, record_of(run))
    assert (own.name, own.maps, own.table) == ("", run / "uncertainty_maps" / "test", run / "per_image.csv")
    assert (clinic.name, clinic.maps.name, clinic.table.name) == ("clinic", "target-clinic", "per_image_clinic.csv")
    assert set(clinic.pairs()) == {"c1", "c2", "test_0000"} and {row["id"] for row in own.rows(METRICS)} == set(own.test)
    assert named_set(run, record_of(run), None) == own
    assert named_set(run, record_of(run), "clinic") == clinic
    with pytest.raises(UserError, match="has no test set clinics; there are clinic; leave it out"):
        named_set(run, record_of(run), "clinics")
    with pytest.raises(UserError, match="has no test set x; the run was tested on its own images"):
        named_set(run, {**record_of(run), "targets": []}, "x")


@pytest.mark.parametrize(
    ("id", "test_set", "folder", "detail", "how"),
    [
        ("test_0001", None, "data", "", ("--id", "test_0001")),
        ("test_0002", None, "data", "training image", ("--id", "test_0002")),
        ("c2", None, "clinic", "test set clinic", ("--id", "c2")),
        ("test_0000", None, "data", "", ("--id", "test_0000")),
        ("test_0000", "clinic", "clinic", "test set clinic", ("--id", "test_0000", "--test-set", "clinic")),
    ],
)
def test_an_id_is_found_in_the_own_images_first_and_then_in_the_other_sets(run, id, test_set, folder, detail, how):
    chosen = choose_image(run, record_of(run), id, None, test_set)
    assert chosen.file is not None and chosen.file.parent.parent.name == folder
    assert (chosen.id, chosen.detail, chosen.how) == (id, detail, how)


def test_a_random_image_is_one_of_the_set_and_can_be_asked_for_again(run):
    for test_set, ids in ((None, {"test_0000", "test_0001"}), ("clinic", {"c1", "c2", "test_0000"})):
        found = {choose_image(run, record_of(run), None, seed, test_set).id for seed in range(20)}
        assert found == ids
        chosen = choose_image(run, record_of(run), None, None, test_set)
        assert choose_image(run, record_of(run), None, int(chosen.how[1]), test_set) == chosen


def test_an_id_that_is_nowhere_is_one_line(run):
    with pytest.raises(UserError, match="there is no image x in .*data/images or .*clinic/images; give --id one of that folder"):
        choose_image(run, record_of(run), "x", None, None)
    with pytest.raises(UserError, match="image x was left out of the run: no mask"):
        choose_image(run, {**record_of(run), "skipped": [{"id": "x", "reason": "no mask"}]}, "x", None, None)


def test_a_picture_of_no_set(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a b.png")
    chosen = any_picture(tmp_path / "a b.png")
    assert (chosen.id, chosen.pair, chosen.how) == ("a b", None, ("--image", str(tmp_path / "a b.png")))
    with pytest.raises(UserError, match="; give --image another file"):
        any_picture(tmp_path / "none.png")


def test_an_unfinished_run_names_the_command_that_finishes_it(run, tmp_path):
    check_finished(run)
    with pytest.raises(UserError, match="holds no finished run .no metrics.json.; run main.py first"):
        check_finished(tmp_path)
    (tmp_path / "config.json").write_text('{"command": ["main.py", "--data", "a folder"]}')
    with pytest.raises(UserError, match="unfinished run .* this finishes it: python main.py --data 'a folder'"):
        check_finished(tmp_path)


def test_images_are_read_at_the_size_of_their_maps(run):
    own, clinic = image_sets(run, record_of(run))
    assert own.reader(32, METRICS)("test_0001").shape == (32, 32, 3)
    assert clinic.reader(16, METRICS)("c1").shape == (16, 16, 3)
    with pytest.raises(UserError, match="there is no image c1 in .*data"):
        own.reader(32, METRICS)("c1")
    assert load_run(run).rows[0]["id"] == own.rows(METRICS)[0]["id"]
