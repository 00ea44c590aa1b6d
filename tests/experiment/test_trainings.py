"""Several trainings by one command: their folders, what is used again, what a failure and a stop leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from concluded import make_training

from dataset import Data, split_ids
from experiment.results import claim_results, held, identity_inputs
from experiment.trainings import SAID, configurations, is_finished, kept_of_trainings, train_all
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from isic.source import Source
from runtime.config import Config
from runtime.errors import UserError
from runtime.lock import FolderLock
from runtime.processes import ProcessGroup
from runtime.records import read_json, write_json

CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, CPU)
CONFIG = Config(image_size=32, width=2, amp="fp32", trainings=3, seed=5)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))
    return Data(pairs, split_ids(pairs.ids), [])


@pytest.fixture
def train(data):
    """Stands for a training: leaves a finished folder, and counts its calls."""
    seeds = []

    def run(config, folder):
        with pytest.raises(UserError, match="in use"), FolderLock(folder):
            pass
        seeds.append(config.seed)
        if config.seed in run.failing:
            raise run.failing[config.seed]
        make_training(folder, config.seed, inputs=identity_inputs(folder, config, data, CPU))
        write_json(folder / "config.json", {**read_json(folder / "config.json"), "configuration": config.to_dict()})
        return read_json(folder / "metrics.json")

    run.seeds, run.failing = seeds, {}
    return run


def test_each_training_has_its_seed_and_its_folder(tmp_path):
    found = configurations(CONFIG, tmp_path)
    assert [(one.seed, one.results, one.trainings) for one in found] == [
        (seed, str(tmp_path / f"seed-{seed}"), 1) for seed in (5, 6, 7)]
    assert all(replace(one, seed=5, results=None, trainings=3) == CONFIG for one in found)
    taken = configurations(replace(CONFIG, weights_from="there"), tmp_path)
    assert [one.weights_from for one in taken] == ["there/seed-5", "there/seed-6", "there/seed-7"]


def test_finished_trainings_are_used_again(tmp_path, data, train, capsys):
    folders = [tmp_path / f"seed-{seed}" for seed in (5, 6, 7)]
    assert train_all(CONFIG, tmp_path, data, ALONE, train) == folders
    assert train.seeds == [5, 6, 7]
    (folders[1] / "metrics.json").unlink()
    (tmp_path / "metrics.json").write_text("of the pool")
    capsys.readouterr()
    assert train_all(CONFIG, tmp_path, data, ALONE, train) == folders
    assert train.seeds == [5, 6, 7, 6]
    assert not (tmp_path / "metrics.json").exists()  # what it came from was made again
    assert capsys.readouterr().out.count("finished before, used again") == 2
    train_all(replace(CONFIG, trainings=4), tmp_path, data, ALONE, train)  # a further one is all that is trained
    assert train.seeds == [5, 6, 7, 6, 8]


def test_a_pool_whose_trainings_are_all_finished_stays_until_it_is_replaced(tmp_path, data, train):
    train_all(CONFIG, tmp_path, data, ALONE, train)
    (tmp_path / "metrics.json").write_text("of the pool")
    train_all(CONFIG, tmp_path, data, ALONE, train)
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(("name", "value"), [
    ("resamples", 200), ("study", True), ("margin", {"brier": 0.5}), ("data_note", "cropped"), ("passes", 4), ("fresh", True)])
def test_a_training_with_other_numbers_is_not_finished(tmp_path, data, train, name, value):
    (folder,) = train_all(replace(CONFIG, trainings=1), tmp_path, data, ALONE, train)
    (one,) = configurations(replace(CONFIG, trainings=1), tmp_path)
    assert is_finished(one, folder, data, ALONE)
    assert is_finished(replace(one, workers=2, quiet=True, cache="x"), folder, data, ALONE)
    assert not is_finished(replace(one, **{name: value}), folder, data, ALONE)
    assert name in (*SAID, "passes", "fresh")


def test_a_damaged_training_is_not_finished(tmp_path, data, train):
    (folder,) = train_all(replace(CONFIG, trainings=1), tmp_path, data, ALONE, train)
    (folder / "calibration.npz").write_bytes(b"half a fi")
    assert not is_finished(configurations(CONFIG, tmp_path)[0], folder, data, ALONE)


# ---------------------------------------------------------------- failing and stopping


def test_a_failure_leaves_the_others_and_nothing_is_pooled(tmp_path, data, train, capsys):
    train.failing[5] = UserError("the weights overflow")
    with pytest.raises(UserError) as caught:
        train_all(CONFIG, tmp_path, data, ALONE, train)
    assert train.seeds == [5, 6, 7]
    assert str(caught.value) == (
        "not pooled, as not every training is finished: seed-5: the weights overflow; "
        f"kept in {tmp_path}: 2 finished trainings (seed-6, seed-7)")
    assert capsys.readouterr().err == "seed-5 failed, the next training follows: the weights overflow\n"
    train.failing.clear()
    train_all(CONFIG, tmp_path, data, ALONE, train)
    assert train.seeds == [5, 6, 7, 5]


def test_several_processes_end_with_the_first_failure(tmp_path, data, train, monkeypatch):
    group = ProcessGroup(0, 2, CPU)
    monkeypatch.setattr(ProcessGroup, "shared", lambda self, work: work())
    train.failing[6] = UserError("the weights overflow")
    with pytest.raises(UserError, match=r"seed-6: the weights overflow; kept in .*: 1 finished trainings \(seed-5\)"):
        train_all(CONFIG, tmp_path, data, group, train)
    assert train.seeds == [5, 6]


def test_a_stop_says_which_trainings_are_kept(tmp_path, data, train, capsys):
    train.failing[7] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), held(tmp_path, ALONE, kept_of_trainings):
        train_all(CONFIG, tmp_path, data, ALONE, train)
    assert capsys.readouterr().err.splitlines() == [
        "", f"kept in {tmp_path / 'seed-7'}: 0 finished epochs, 0 finished maps",
        "", f"kept in {tmp_path}: 2 finished trainings (seed-5, seed-6)"]


def test_finished_trainings_are_named_in_the_order_of_their_seeds(tmp_path):
    assert kept_of_trainings(tmp_path) == "0 finished trainings"
    for seed in (100, 9, 10):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "metrics.json").touch()
    (tmp_path / "seed-11").mkdir()
    assert kept_of_trainings(tmp_path) == "3 finished trainings (seed-9, seed-10, seed-100)"


# ---------------------------------------------------------------- one run in the folder of several, and the reverse


def test_a_folder_of_a_single_run_is_refused_unless_it_is_to_be_deleted(tmp_path, data, train, tiny):
    source = Source("tiny", *isic_folders(tiny), False)
    claim_results(tmp_path, replace(CONFIG, trainings=1), source, data, ALONE)
    with pytest.raises(UserError, match="holds a single run; choose another --results folder"):
        train_all(CONFIG, tmp_path, data, ALONE, train)
    assert train.seeds == []
    train_all(replace(CONFIG, fresh=True), tmp_path, data, ALONE, train)
    assert train.seeds == [5, 6, 7] and not (tmp_path / "config.json").exists()
    write_json(tmp_path / "config.json", {"pooled": []})
    with pytest.raises(UserError, match="holds several trainings; choose another --results folder for one"):
        claim_results(tmp_path, replace(CONFIG, trainings=1), source, data, ALONE)


def test_fresh_deletes_the_pooled_files_and_trains_all_again(tmp_path, data, train):
    train_all(CONFIG, tmp_path, data, ALONE, train)
    write_json(tmp_path / "config.json", {"pooled": []})
    for name in ("metrics.json", "report.html", "report.md", "figures/endpoints.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    train_all(replace(CONFIG, fresh=True), tmp_path, data, ALONE, train)
    assert train.seeds == [5, 6, 7, 5, 6, 7]
    assert {path.name for path in tmp_path.iterdir() if path.name != ".lock"} == {"notes.txt", "seed-5", "seed-6", "seed-7"}
