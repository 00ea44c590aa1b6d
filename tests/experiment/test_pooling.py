"""Pooling finished trainings: what is read, what is refused and in which words, and what the pool holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from concluded import conclusion_of, make_training
from conftest import ROOT

from evaluation.conclusion import DEFAULT_MARGINS, ENDPOINT_NAMES, PERMUTATIONS
from evaluation.normalisation import Linear
from experiment import pooling
from experiment.pooling import (
    NEEDED,
    RESAMPLES,
    check_margins,
    check_pooled_folder,
    conclude_run,
    pool_folder,
    pool_trainings,
    read_training,
    write_pool,
)
from experiment.saved_run import is_pooled, load_pooled, load_run
from runtime.config import Config
from runtime.errors import UserError
from runtime.lock import FolderLock
from runtime.records import read_json, read_sealed, seal, write_json


@pytest.fixture
def asked(monkeypatch):
    """What the conclusion is asked, whose numbers are made up."""
    calls = []

    def conclude(trainings, **options):
        options.pop("report")(len(trainings))
        calls.append((trainings, options))
        return conclusion_of([training.seed for training in trainings], options["margins"])

    monkeypatch.setattr(pooling, "conclude", conclude)
    return calls


@pytest.fixture
def two(tmp_path):
    """Two finished trainings, the later seed first."""
    return [make_training(tmp_path / name, seed) for name, seed in (("b", 43), ("a", 42))]


def edit(path, **changes):
    write_json(path, {**read_json(path), **changes})


# ---------------------------------------------------------------- reading


def test_a_finished_training_is_its_fusion_and_its_counts(two):
    found = read_training(two[0])
    assert (found.folder, found.result.name, found.result.seed) == (two[0], "seed-43", 43)
    assert found.result.fusion.predictive == Linear(0.0, 0.25) and found.result.fusion.parameter == 43 / 128
    for counts in (found.result.validation, found.result.test):
        assert counts.ids == ("a", "b") and set(counts.images) == set(NEEDED)


def test_what_is_not_finished_or_not_a_training_is_refused(two, tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no finished run \(no metrics.json\)"):
        read_training(tmp_path / "nowhere")
    write_json(two[0] / "metrics.json", seal({"pooled": []}))
    with pytest.raises(UserError, match="b is a pool itself; name the folders of its trainings"):
        read_training(two[0])


def test_files_that_do_not_belong_together_are_refused(two):
    one, other = two
    shutil.copy(other / "calibration.npz", one)
    with pytest.raises(UserError, match="b/calibration.npz is not of the run that the metrics.json beside it describes"):
        read_training(one)
    shutil.copy(other / "config.json", one)
    with pytest.raises(UserError, match="b/metrics.json does not belong to the config.json beside it"):
        read_training(one)
    decides = read_json(other / "config.json")["decides"]
    edit(other / "config.json", decides={**decides, "passes": 4})
    with pytest.raises(UserError, match="a/metrics.json does not belong to the config.json beside it"):
        read_training(other)
    edit(other / "config.json", decides=None)
    with pytest.raises(UserError, match="config.json.decides is None and not a mapping"):
        read_training(other)
    edit(other / "metrics.json", synthetic=True)
    with pytest.raises(UserError, match="a/metrics.json was changed after the run wrote it"):
        read_training(other)


@pytest.mark.parametrize("name", NEEDED)
def test_runs_of_older_versions_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="run was finished by another version of this program, which saved too little to pool"):
        read_training(make_training(tmp_path / "run", 42, without=[name]))


def test_metrics_of_an_older_version_are_refused(two):
    metrics = read_json(two[0] / "metrics.json")
    older = {key: value for key, value in metrics.items() if key not in ("config_identity", "checksum")}
    write_json(two[0] / "metrics.json", seal(older))
    with pytest.raises(UserError, match="finished by another version"):
        read_training(two[0])


@pytest.mark.parametrize("content", [b"", b"no numbers", b"PK\x03\x04 half a fi"])
def test_damaged_counts_are_one_line(two, content):
    (two[0] / "calibration.npz").write_bytes(content)
    with pytest.raises(UserError, match="calibration.npz does not hold the counts of a run") as caught:
        read_training(two[0])
    assert "\n" not in str(caught.value)
    (two[0] / "calibration.npz").unlink()
    with pytest.raises(UserError, match="cannot read .*calibration.npz: No such file"):
        read_training(two[0])


def test_an_array_alone_and_objects_are_no_counts(two):
    for values in (np.zeros(3), np.array([object()])):
        with open(two[0] / "calibration.npz", "wb") as stream:
            np.save(stream, values, allow_pickle=True)
        with pytest.raises(UserError, match="does not hold the counts of a run"):
            read_training(two[0])


# ---------------------------------------------------------------- belonging together


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"inputs": {"passes": 4}}, "differs from .*a in more than the seed: passes is 30 there and 4 here"),
        ({"inputs": {"passes": 4, "width": 8}}, "passes is 30 there and 4 here; width is 64 there and 8 here"),
        ({"inputs": {"data": "e"}}, "data is 'd' there and 'e' here"),
        ({"inputs": {"skipped": ["x"]}}, r"skipped is \[\] there and \['x'\] here"),
        ({"ids": "ac"}, "more than the seed: the split of the images"),
    ],
)
def test_trainings_that_differ_in_more_than_the_seed_are_refused(tmp_path, asked, other, message):
    folders = [make_training(tmp_path / "a", 42), make_training(tmp_path / "b", 43, **other)]
    for order in (folders, folders[::-1]):
        with pytest.raises(UserError, match=message):
            pool_trainings(order, tmp_path, Config())
    assert not asked


def test_images_that_are_not_those_of_the_split_are_refused(tmp_path, asked):
    folders = [make_training(tmp_path / "a", 42), make_training(tmp_path / "b", 43, ids="ac")]
    edit(folders[1] / "config.json", split=read_json(folders[0] / "config.json")["split"])
    with pytest.raises(UserError, match="b/calibration.npz does not hold the counts of a run .validation is of other images"):
        pool_trainings(folders, tmp_path, Config())


def test_two_of_one_seed_are_refused(tmp_path, asked):
    folders = [make_training(tmp_path / name, seed) for name, seed in (("a", 42), ("b", 43), ("c", 42))]
    with pytest.raises(UserError, match="a and .*c are both of seed 42; leave one out"):
        pool_trainings(folders, tmp_path, Config())
    with pytest.raises(UserError, match="a and .*a are both of seed 42"):
        pool_trainings([folders[0], folders[0]], tmp_path, Config())


def test_weights_that_were_taken_from_other_runs_may_differ(tmp_path, asked):
    folders = [make_training(tmp_path / str(seed), seed, inputs={"weights": str(seed)}) for seed in (42, 43)]
    assert len(pool_trainings(folders, tmp_path, Config()).metrics["pooled"]) == 2


# ---------------------------------------------------------------- concluding


def test_the_order_of_the_trainings_does_not_matter(two, tmp_path, asked):
    assert pool_trainings(two, tmp_path, Config()).metrics == pool_trainings(two[::-1], tmp_path, Config()).metrics
    for trainings, options in asked:
        assert [training.seed for training in trainings] == [42, 43]
        assert options == {"resamples": RESAMPLES, "seed": 42, "margins": DEFAULT_MARGINS, "permutations": PERMUTATIONS,
                           "groups": None}


def test_margins_and_resamples_are_those_that_were_asked_for(two, tmp_path, asked):
    pool_trainings(two, tmp_path, Config(resamples=200, margin={"brier": 0.5}))
    assert asked[0][1] == {"resamples": 200, "seed": 42, "margins": {**DEFAULT_MARGINS, "brier": 0.5},
                           "permutations": PERMUTATIONS,
                           "groups": None}


def test_one_training_is_concluded_like_several(two, asked):
    result = read_training(two[0]).result
    conclude_run(Config(seed=43, resamples=200, margin={"brier": 0.5}), result.fusion, result.validation, result.test)
    ((trainings, options),) = asked
    assert [(training.name, training.seed) for training in trainings] == [("seed-43", 43)]
    # the null of the error models takes time: one training has it with --study
    assert options == {"resamples": 200, "seed": 43, "margins": {**DEFAULT_MARGINS, "brier": 0.5}, "permutations": 0,
                       "groups": None}
    conclude_run(Config(seed=43, study=True), result.fusion, result.validation, result.test)
    assert asked[1][1]["permutations"] == PERMUTATIONS


def test_a_margin_of_no_endpoint_lists_the_endpoints():
    check_margins(None)
    check_margins(dict.fromkeys(ENDPOINT_NAMES, 0.1))
    with pytest.raises(UserError, match=f"--margin names no endpoint ece; there are {', '.join(ENDPOINT_NAMES)}"):
        check_margins({"brier": 0.1, "ece": 0.1})


# ---------------------------------------------------------------- the pool


def test_the_pool_says_what_it_was_made_of(two, tmp_path, asked):
    metrics, record = pool_trainings(two, tmp_path, Config(resamples=200, margin={"brier": 0.5}))
    assert set(metrics) == {
        "schema_version", "synthetic", "data_note", "verdict", "pooled", "conclusion", "test", "warnings", "checksum"}
    assert metrics["pooled"] == [
        {"name": f"seed-{seed}", "seed": seed, "identity": f"identity of seed {seed}", "dice": seed / 64, "lambda": seed / 128}
        for seed in (42, 43)]
    assert metrics["test"] == {"images": 2, "dice": (42 / 64 + 43 / 64) / 2}
    assert metrics["conclusion"] == json.loads(json.dumps(conclusion_of((42, 43), {**DEFAULT_MARGINS, "brier": 0.5})))
    assert metrics["verdict"] == metrics["conclusion"]["sentence"]
    assert (metrics["synthetic"], metrics["data_note"], metrics["schema_version"]) == (False, None, 1)
    assert record["pooled"] == [{"name": "seed-42", "folder": "a"}, {"name": "seed-43", "folder": "b"}]
    used = record["configuration"]
    assert (used["margin"], used["resamples"], used["seed"], used["trainings"]) == ({"brier": 0.5}, 200, 42, 2)
    assert record["environments"] == [{"device": "cpu", "device_name": "x", "versions": {"torch": "2"}}]
    assert record["split"]["test"] == ["a", "b"] and record["versions"]["numpy"] == np.__version__


def test_runs_from_elsewhere_are_named_from_the_root(two, tmp_path, asked):
    record = pool_trainings(two, tmp_path / "other", Config()).record
    assert [entry["folder"] for entry in record["pooled"]] == [str(folder.resolve()) for folder in two[::-1]]


def test_one_synthetic_training_and_every_note_count(tmp_path, asked):
    folders = [
        make_training(tmp_path / "a", 1, data_note="cropped"), make_training(tmp_path / "b", 2, synthetic=True),
        make_training(tmp_path / "c", 3, data_note="cropped"), make_training(tmp_path / "d", 4, data_note="old"),
    ]
    metrics = pool_trainings(folders, tmp_path, Config()).metrics
    assert metrics["synthetic"] is True and metrics["data_note"] == "cropped; old"


def test_the_metrics_are_written_last(two, tmp_path, asked):
    results = tmp_path / "pool"
    drawn = []

    def draw(run):
        assert is_pooled(results) and not (results / "metrics.json").exists()
        drawn.append(run)

    metrics = write_pool(Config(), two, results, draw)
    assert read_sealed(results / "metrics.json") == metrics
    assert load_pooled(results) == drawn[0]
    assert [path.resolve() for path in load_pooled(results).trainings()] == [folder.resolve() for folder in two[::-1]]

    def fail(run):
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        write_pool(Config(), two, results, fail)
    assert not (results / "metrics.json").exists()


# ---------------------------------------------------------------- groups, and other test sets


def with_target(folder, name, dice, fingerprint="f", groups=None):
    """Add the counts and the numbers of another test set to a finished training; returns its folder."""
    with np.load(folder / "calibration.npz") as content:
        arrays = {key: content[key] for key in content.files}
    copied = {key.replace("test/", f"target:{name}/"): values for key, values in arrays.items() if key.startswith("test/")}
    copied[f"target:{name}/ids"] = np.array(["x", "y"])
    np.savez(folder / "calibration.npz", **arrays, **copied)
    record = read_json(folder / "config.json")
    entry = {"name": name, "ids": ["x", "y"], "fingerprint": fingerprint, **({"groups": groups} if groups else {}),
             "images": "i", "masks": "m", "skipped": []}
    edit(folder / "config.json", targets=[*record.get("targets", ()), entry])
    metrics = {key: value for key, value in read_json(folder / "metrics.json").items() if key != "checksum"}
    numbers = {
        "test": {"images": 2, "dice": dice, "foreground_ece": {"fused": dice / 2, "saliency_variance": None}},
        "shift": {"dice": {"source": 0.75, "target": dice}, "probability": {"source": None, "target": None}},
    }
    write_json(folder / "metrics.json", seal({**metrics, "targets": {**metrics.get("targets", {}), name: numbers}}))
    return folder


def test_groups_are_read_from_the_record(two, tmp_path, asked):
    for folder in two:
        edit(folder / "config.json", groups={"a": "p", "b": "p"})
    assert pool_trainings(two, tmp_path, Config()).record["groups"] == {"a": "p", "b": "p"}
    assert asked[0][1]["groups"] == {"a": "p", "b": "p"}
    assert "targets" not in pool_trainings(two, tmp_path, Config()).record


def test_a_test_set_of_all_trainings_is_concluded_from_together(two, tmp_path, asked):
    for folder, dice in zip(two, (0.5, 0.25)):
        edit(folder / "config.json", groups={"a": "p"})
        with_target(folder, "far", dice, groups={"x": "q"})
    pool = pool_trainings(two, tmp_path, Config())
    own, far = asked
    assert [training.test.ids for training in far[0]] == [("x", "y")] * 2
    assert [training.validation.ids for training in far[0]] == [("a", "b")] * 2 == [one.validation.ids for one in own[0]]
    assert own[1]["groups"] == {"a": "p"} and far[1]["groups"] == {"a": "p", "x": "q"}
    found = pool.metrics["targets"]["far"]
    assert found["test"] == {"images": 2, "dice": 0.375, "foreground_ece": {"fused": 0.1875, "saliency_variance": None}}
    assert found["shift"] == {"dice": {"source": 0.75, "target": 0.375}, "probability": {"source": None, "target": None}}
    assert [one["dice"] for one in found["by_training"]] == [0.25, 0.5]  # in the order of the seeds
    assert found["conclusion"]["seeds"] == [42, 43]
    assert [entry["name"] for entry in pool.record["targets"]] == ["far"]


def test_a_test_set_that_is_not_the_same_in_all_trainings_is_left_out_and_named(two, tmp_path, asked):
    with_target(with_target(two[0], "far", 0.5), "near", 0.5)
    with_target(two[1], "far", 0.5, fingerprint="of other images")
    pool = pool_trainings(two, tmp_path, Config())
    assert "targets" not in pool.metrics and "targets" not in pool.record
    assert [entry["text"] for entry in pool.metrics["warnings"]] == [
        f"Test set {name} is left out: not every training was measured on it." for name in ("far", "near")]


def test_counts_of_a_set_that_the_last_command_did_not_name_are_not_read(two):
    folder = with_target(two[0], "far", 0.5)
    assert list(read_training(folder).targets) == ["far"]
    metrics = {key: value for key, value in read_json(folder / "metrics.json").items() if key not in ("checksum", "targets")}
    write_json(folder / "metrics.json", seal(metrics))
    assert read_training(folder).targets == {}


def test_a_pool_is_not_read_as_a_run(two, tmp_path, asked):
    write_pool(Config(), two, tmp_path, lambda run: None)
    with pytest.raises(UserError, match="pools several trainings; choose one of them: .*a, .*b$"):
        load_run(tmp_path)
    assert not is_pooled(two[0]) and not is_pooled(tmp_path / "nowhere")


def test_a_pool_replaces_a_pool_and_no_single_run(two, tmp_path):
    check_pooled_folder(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {"pooled": []})
    check_pooled_folder(tmp_path)
    with pytest.raises(UserError, match="b holds a single run; choose another --results folder"):
        check_pooled_folder(two[0])
    with pytest.raises(UserError, match="holds a single run"), pool_folder(Config(results=str(two[0]), pool=["a", "b"])):
        pass


def test_the_folder_of_a_pool_is_held(tmp_path):
    config = Config(results=str(tmp_path / "pool"), pool=["a", "b"])
    with pool_folder(config) as results:
        assert results == tmp_path / "pool"
        with pytest.raises(UserError, match="in use by another run"), FolderLock(results):
            pass
    with pytest.raises(UserError, match="no endpoint x"), pool_folder(Config(pool=["a", "b"], margin={"x": 1.0})):
        pass


def test_pooling_loads_nothing_that_trains_or_reads_images():
    code = "import experiment.pooling, reporting.pooled, sys; print(*sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(outcome.stdout.split())
    assert "evaluation.conclusion" in loaded
    assert not loaded & {"train", "dataset", "uncertainty", "albumentations", "torchvision", "sklearn", "experiment.maps"}
