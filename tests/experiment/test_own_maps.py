"""Given maps: what is found and refused, the results folder that they get, and what a second command uses again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from given_maps import arrays_of, write_given

from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from experiment.map_files import read_maps
from experiment.own_maps import GivenMaps, claim_maps, described, find_maps, kept_of_maps, maps_folder, take_maps
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.records import read_json, write_json

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
SCORES = ["entropy", "variance"]


def config_of(root: Path, **changes: object) -> Config:
    maps = [str(root / "val"), str(root / "test")]
    return Config(**{"maps": maps, "scores": SCORES, "results": str(root / "run"), **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_given(tmp_path)
    return tmp_path


def spoil(path: Path, **changes: object) -> None:
    with np.load(path) as content:
        arrays = {**content, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


# ---------------------------------------------------------------- finding


def test_files_are_found_in_the_order_of_their_ids(root):
    (root / "val" / "notes.txt").write_text("not a map")
    (root / "val" / "._val_0.npz").write_bytes(b"what another system leaves")
    given = find_maps(config_of(root), ALONE)
    assert given.split == {"validation": [f"val_{n}" for n in range(4)], "test": [f"test_{n}" for n in range(6)]}
    assert (given.entropy, given.without_image, given.groups, given.scores) == (False, 10, {}, ("entropy", "variance"))


def test_the_processes_of_a_group_find_the_same(root):
    alone = find_maps(config_of(root), ALONE)
    facts: list[list[object]] = [[], []]

    class Rank(ProcessGroup):
        def shared(self, work):
            return work()

        def gathered(self, part):
            facts[self.rank] = part
            return facts

    with pytest.raises(IndexError):
        find_maps(config_of(root), Rank(1, 2, ALONE.device))  # the other share is not there yet
    assert find_maps(config_of(root), Rank(0, 2, ALONE.device)) == alone


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["entropy", "entropy"], "--scores names entropy twice"),
        (["true_mask", "entropy"], "--scores true_mask: that array is no score"),
        (["entropy", "x" * 31], "at most 30 characters"),
        (["entropy", "a\nb"], "must be printable"),
        (["entropy", "beauty"], "val_0.npz holds no array beauty; it holds entropy, mean_prediction, true_mask, variance"),
    ],
)
def test_names_that_are_no_scores_are_one_line(root, scores, message):
    with pytest.raises(UserError, match=message):
        find_maps(config_of(root, scores=scores), ALONE)


def test_a_missing_an_empty_and_the_same_folder_are_one_line(root):
    with pytest.raises(UserError, match="--maps .*nowhere is no folder that can be read"):
        find_maps(config_of(root, maps=[str(root / "val"), str(root / "nowhere")]), ALONE)
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="--maps .*empty holds no .npz file"):
        find_maps(config_of(root, maps=[str(root / "empty"), str(root / "test")]), ALONE)
    with pytest.raises(UserError, match="--maps names .*val twice"):
        find_maps(config_of(root, maps=[str(root / "val"), str(root / "val" / "..") + "/val"]), ALONE)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a ", "\udce9"])
def test_a_name_that_is_not_safe_is_one_line(root, name):
    shutil.copy(root / "val" / "val_0.npz", root / "val" / f"{name}.npz")
    with pytest.raises(UserError, match="in its name; rename it") as error:
        find_maps(config_of(root), ALONE)
    assert str(error.value).isprintable()


def test_one_id_twice_is_one_line(root):
    shutil.copy(root / "val" / "val_1.npz", root / "test")
    with pytest.raises(UserError, match="val_1.npz and .*test.*val_1.npz have the same id"):
        find_maps(config_of(root), ALONE)
    (root / "test" / "val_1.npz").unlink()
    for name in ("e\u0301", "\u00e9"):
        shutil.copy(root / "val" / "val_1.npz", root / "test" / f"{name}.npz")
    with pytest.raises(UserError, match="have the same id; keep one"):
        find_maps(config_of(root), ALONE)


def test_a_folder_named_like_a_file_is_one_line(root):
    (root / "val" / "x.npz").mkdir()
    with pytest.raises(UserError, match="x.npz is no file; remove it"):
        find_maps(config_of(root), ALONE)


def test_the_first_file_that_is_wrong_is_named(root):
    for name in ("test/test_1", "val/val_2"):
        spoil(root / f"{name}.npz", variance=None)
    with pytest.raises(UserError, match="val_2.npz holds no array variance"):
        find_maps(config_of(root), ALONE)


def test_expected_entropy_is_in_all_files_or_in_none(root):
    spoil(root / "test" / "test_3.npz", expected_entropy=np.zeros(arrays_of(29, height=24)["entropy"].shape))
    with pytest.raises(UserError, match="val_0.npz holds no expected_entropy and others do"):
        find_maps(config_of(root), ALONE)


@pytest.mark.parametrize("part", ["val", "test"])
def test_what_would_make_every_number_void_is_one_line(root, part):
    for path in (root / part).iterdir():
        with np.load(path) as content:
            shape = content["entropy"].shape
        spoil(path, entropy=np.full(shape, 0.25))
    with pytest.raises(UserError, match=f"entropy is 0.25 in every pixel of .*{part}, so that it ranks nothing"):
        find_maps(config_of(root), ALONE)
    find_maps(config_of(root, scores=["variance", "entropy"]), ALONE)  # as the second it adds nothing, which is an answer
    for path in (root / part).iterdir():
        with np.load(path) as content:
            shape = content["entropy"].shape
        spoil(path, true_mask=np.zeros(shape, bool))
    with pytest.raises(UserError, match=f"no true_mask in .*{part} holds a pixel of 1"):
        find_maps(config_of(root, scores=["variance", "entropy"]), ALONE)


def test_groups_come_from_the_files_and_the_table_wins(root, capsys):
    for part in ("val", "test"):
        for path in (root / part).iterdir():
            spoil(path, group=np.array(part))
    assert set(find_maps(config_of(root), ALONE).groups.values()) == {"val", "test"}
    (root / "groups.csv").write_text("id,group\nval_0,p1\nval_1,p1\ntest_0,p2\nelsewhere,p1\n")
    found = find_maps(config_of(root, groups=str(root / "groups.csv")), ALONE).groups
    assert (found["val_0"], found["val_1"], found["val_2"], found["test_0"], len(found)) == ("p1", "p1", "val", "p2", 10)
    (root / "groups.csv").write_text("id,group\nval_0,p1\ntest_4,p1\n")
    with pytest.raises(UserError, match=r"group p1 is in validation \(val_0\) and in test \(test_4\)"):
        find_maps(config_of(root, groups=str(root / "groups.csv")), ALONE)
    with pytest.raises(UserError, match="cannot read --groups"):
        find_maps(config_of(root, groups=str(root / "none.csv")), ALONE)


def test_images_without_a_group_are_counted(root, capsys):
    (root / "groups.csv").write_text("id,group\nval_0,p1\n")
    find_maps(config_of(root, groups=str(root / "groups.csv")), ALONE)
    assert "9 of 10 images are in no group" in capsys.readouterr().out


# ---------------------------------------------------------------- the results folder


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a/My_Maps/val", "maps-my_maps"), ("results/isic/uncertainty_maps/validation", "maps-isic")],
)
def test_the_folder_is_called_after_what_holds_the_maps(tmp_path, folder, name):
    assert maps_folder(config_of(tmp_path, maps=[str(tmp_path / folder), "x"], results=None)) == Path("results") / name
    assert maps_folder(config_of(tmp_path)) == tmp_path / "run"


def claimed(root: Path, **changes: object):
    config = config_of(root, **changes)
    given = find_maps(config, ALONE)
    return claim_maps(Path(str(config.results)), config, given, ALONE), given


def test_the_record_says_whose_maps_and_what_decides(root):
    run, given = claimed(root)
    record = read_json(root / "run" / "config.json")
    assert record["maps"] == {
        "validation": str(root / "val"), "test": str(root / "test"), "fingerprint": given.content, "scores": SCORES,
        "expected_entropy": False, "without_image": 10}
    assert record["score_names"] == {"first": "entropy", "second": "variance"}
    assert record["split"] == given.split and record["identity"] == run.identity
    assert record["decides"] == {
        "threshold": 0.5, "bins": 15, "lambda_steps": 10, "seed": 42, "scores": SCORES, "data": given.truth,
        "maps": given.content}
    assert "passes" not in record["configuration"] and "image_size" not in record["configuration"]


@pytest.mark.parametrize(
    ("changes", "named"), [({"bins": 10}, "bins was 15 and is now 10"), ({"scores": ["variance", "entropy"]}, "scores was")],
)
def test_another_configuration_is_refused_and_fresh_starts_over(root, changes, named):
    run, _ = claimed(root)
    assert claimed(root)[0].identity == run.identity
    with pytest.raises(UserError, match=f"holds a run with other settings: .*{named}"):
        claimed(root, **changes)
    assert claimed(root, fresh=True, **changes)[0].identity != run.identity


def test_changed_maps_are_noticed(root):
    claimed(root)
    spoil(root / "test" / "test_0.npz", variance=np.zeros((24, 24)))
    with pytest.raises(UserError, match="holds a run with other settings: maps was"):
        claimed(root)


def test_a_folder_of_another_kind_of_run_is_refused(root):
    write_json(root / "run" / "config.json", {"decides": {"seed": 42, "passes": 30}})
    with pytest.raises(UserError, match="holds a run that made its own maps"):
        claimed(root)


def test_maps_are_never_written_over_themselves(root):
    shutil.move(root / "val", root / "run" / "uncertainty_maps" / "validation")
    with pytest.raises(UserError, match="lies in .*run, where this run would write"):
        claimed(root, maps=[str(root / "run" / "uncertainty_maps" / "validation"), str(root / "test")])
    assert not (root / "run" / "config.json").exists()


# ---------------------------------------------------------------- taking over


def test_maps_are_taken_over_as_a_run_saves_them(root):
    image = np.full((24, 24, 3), 9, np.uint8)
    spoil(root / "test" / "test_0.npz", image=image)
    run, given = claimed(root)
    taken = take_maps(run, given, "test")
    assert taken.ids == given.split["test"] and kept_of_maps(root / "run") == "6 maps that were taken over"
    for id, maps in taken:
        with np.load(root / "test" / f"{id}.npz") as source:
            for name, array in (("pred_variance", "entropy"), ("saliency_variance", "variance"), ("true_mask", "true_mask")):
                np.testing.assert_array_equal(maps[name], source[array].astype(maps[name].numpy().dtype))
        assert "expected_entropy" not in maps
    np.testing.assert_array_equal(taken.picture("test_0"), image)
    grey = np.rint(255 * taken.read("test_1")["mean_prediction"]).astype(np.uint8)
    np.testing.assert_array_equal(taken.picture("test_1")[..., 1], grey)
    fusion = Fusion(Linear(0.0, 1.0), Linear(0.0, 1.0), "convex", 0.5)
    taken.add_fused_scores(fusion, ALONE)
    saved = read_maps(root / "run" / "uncertainty_maps" / "test" / "test_0.npz", ("fused_score", "image"))
    np.testing.assert_array_equal(saved["image"], image)
    assert (saved["empty_cams"], saved["fallbacks"]) == (-1, 0)
    np.testing.assert_allclose(saved["fused_score"], (saved["pred_variance"] + saved["saliency_variance"]) / 2, rtol=1e-6)


def test_what_is_there_is_used_again_and_what_is_lost_is_taken_over(root):
    run, given = claimed(root)
    take_maps(run, given, "test")
    folder = root / "run" / "uncertainty_maps" / "test"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "test_2.npz").write_bytes(b"half a fi")
    (folder / "test_4.npz").unlink()
    (root / "run" / "metrics.json").write_text("{}")
    take_maps(run, given, "test")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"test_2.npz", "test_4.npz"}
    assert not (root / "run" / "metrics.json").exists()  # what it says came from a map that was lost


def test_metrics_say_the_names_and_where_they_are_from(root):
    run, given = claimed(root, data_note="my scanner")
    told = described(given, run, {"verdict": "Fused against predictive variance", "lambda": 1.0})
    assert told == {
        "verdict": "Fused against entropy", "lambda": 1.0, "score_names": {"first": "entropy", "second": "variance"},
        "synthetic": False, "data_note": "my scanner", "identity": run.identity, "config_identity": run.identity, "skipped": []}
    assert isinstance(given, GivenMaps)
