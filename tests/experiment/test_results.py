"""The results folder: named, held, claimed by one experiment, cleared, and what of another run it takes."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pairs
from saved_runs import METRICS, RECORD

from dataset import Data, split_ids
from experiment.results import (
    NUMBERS,
    check_weights_from,
    claim_results,
    clear_results,
    copy_weights,
    finished_weights,
    held,
    identity_inputs,
    results_folder,
    settings_inputs,
    unfinish,
    write_counts,
)
from isic.cache import decode_pairs
from isic.layout import SkippedPair, find_pairs, isic_folders
from isic.source import Source
from model import UNet
from runtime.checkpoints import save_checkpoint, weights_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.lock import FolderLock
from runtime.processes import ProcessGroup
from runtime.records import fingerprint, read_json, seal, write_json

CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, CPU)
CONFIG = Config(image_size=32, width=2, amp="fp32")


@pytest.fixture(scope="module")
def source(tiny):
    return Source("tiny", *isic_folders(tiny), False)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))
    return Data(pairs, split_ids(pairs.ids), [])


@pytest.fixture
def results(tmp_path):
    return tmp_path / "run"


def leave_files(results: Path) -> list[Path]:
    """Files as a finished run leaves them, and one of the user's."""
    made = ("config.json", "training_log.csv", "weights/best_model.pth", "uncertainty_maps/test/a.npz", "figures/a.png")
    paths = [results / name for name in (*made, "notes.txt", *NUMBERS)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return paths


def test_a_run_is_named_or_takes_the_name_of_its_data():
    source = Source("isic2018", Path("a"), Path("b"), False)
    assert results_folder(Config(), source) == Path("results/isic2018")
    assert results_folder(Config(quick=True), source) == Path("results/isic2018-quick")
    assert results_folder(Config(quick=True), source._replace(name="synthetic", synthetic=True)) == Path("results/synthetic")
    assert results_folder(Config(quick=True, results="x/y"), source) == Path("x/y")


# ---------------------------------------------------------------- holding


def test_a_folder_is_held_by_one_run_and_its_leftovers_are_removed(results):
    for folder in ("weights", "figures", "uncertainty_maps/test", "."):
        (results / folder).mkdir(parents=True, exist_ok=True)
        (results / folder / ".x.99999999999.partial").touch()  # no process has such a number
        (results / folder / ".x.4194999.partial").touch()
    with held(results, ALONE):
        with pytest.raises(UserError, match="in use by another run"), FolderLock(results):
            pass
        assert sorted(path.name for path in results.rglob("*.partial")) == [".x.99999999999.partial"] * 4
    with FolderLock(results):
        pass


@pytest.mark.parametrize("log", [None, "", "epoch,loss\n", "epoch,loss\n1,0.5\n2,0.4\n"])
def test_a_stop_says_what_is_kept(results, capsys, log):
    epochs = {None: 0, "": 0, "epoch,loss\n": 0}.get(log, 2)
    with pytest.raises(KeyboardInterrupt), held(results, ALONE):
        if log is not None:
            (results / "training_log.csv").write_text(log)
        for name in ("validation/a.npz", "test/b.npz", "test/c.npz", "test/.d.npz.1.partial"):
            (results / "uncertainty_maps" / name).parent.mkdir(parents=True, exist_ok=True)
            (results / "uncertainty_maps" / name).touch()
        raise KeyboardInterrupt
    assert capsys.readouterr().err == f"\nkept in {results}: {epochs} finished epochs, 3 finished maps\n"
    with held(results, ALONE):  # it was let go of
        pass


def test_an_error_says_nothing_of_what_is_kept(results, capsys):
    with pytest.raises(UserError), held(results, ALONE):
        raise UserError("a fault")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- claiming


def test_the_record_says_what_the_run_is(results, source, data):
    run = claim_results(results, CONFIG, source, data, ALONE)
    assert (run.config, run.group, run.results) == (CONFIG, ALONE, results)
    record = read_json(results / "config.json")
    inputs = identity_inputs(results, CONFIG, data, CPU)
    assert inputs == {**CONFIG.experiment(), "amp": "torch.float32", "data": data.pairs.fingerprint(), "skipped": []}
    assert record["decides"] == inputs and record["identity"] == run.identity == fingerprint(inputs)
    assert record["configuration"] == CONFIG.to_dict() and record["synthetic"] is False
    assert (record["images"], record["masks"]) == (str(source.images.resolve()), str(source.masks.resolve()))
    assert record["split"] == data.split._asdict() and record["data_fingerprint"] == data.pairs.fingerprint()
    assert (record["device"], record["device_name"]) == ("cpu", platform.machine())
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["versions"]["python"] == platform.python_version()
    assert record["skipped"] == record["earlier"] == []


def test_the_same_experiment_is_the_same_run_whatever_else_changes(results, source, data):
    first = claim_results(results, CONFIG, source, data, ALONE)
    (results / "metrics.json").write_text("{}")
    again = claim_results(results, replace(CONFIG, quiet=True, resamples=500, workers=1), source, data, ALONE)
    assert again.identity == first.identity and (results / "metrics.json").exists()


def test_another_experiment_is_refused_with_the_differences_named(results, source, data):
    first = claim_results(results, CONFIG, source, data, ALONE)
    message = "passes was 30 and is now 4; seed was 42 and is now 7; choose another --results folder, or give --fresh"
    with pytest.raises(UserError, match=message):
        claim_results(results, replace(CONFIG, passes=4, seed=7), source, data, ALONE)
    assert read_json(results / "config.json")["identity"] == first.identity
    bad = data._replace(skipped=[SkippedPair("x", "x.jpg", "broken")])  # it took part in the split
    with pytest.raises(UserError, match=r"skipped was \[\] and is now \['x'\]"):
        claim_results(results, CONFIG, source, bad, ALONE)
    fresh = claim_results(results, replace(CONFIG, passes=4, fresh=True), source, data, ALONE)
    assert fresh.identity != first.identity and read_json(results / "config.json")["configuration"]["passes"] == 4


def test_other_pixels_are_another_run(results, source, data, tmp_path):
    claim_results(results, CONFIG, source, data, ALONE)
    root = write_pairs(tmp_path / "other", 24, seed=1)
    pairs = decode_pairs(find_pairs(*isic_folders(root)), 32, tmp_path / "cache")
    with pytest.raises(UserError, match="data was '.*' and is now '"):
        claim_results(results, CONFIG, source, data._replace(pairs=pairs), ALONE)


def test_numbers_of_an_unknown_run_are_not_called_finished(results, source, data):
    leave_files(results)
    (results / "config.json").unlink()
    claim_results(results, CONFIG, source, data, ALONE)
    assert not any((results / name).exists() for name in NUMBERS)
    (results / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json does not say what the run in .* was; give --fresh"):
        claim_results(results, CONFIG, source, data, ALONE)


def test_the_environments_of_what_is_used_again_are_kept_once_each(results, source, data):
    path = results / "config.json"
    claim_results(results, CONFIG, source, data, ALONE)
    record = read_json(path)
    for older in ("1.0", "2.0", "1.0"):
        known = {name: value for name, value in read_json(path).items() if name != "checksum"}
        write_json(path, seal({**known, "versions": {**record["versions"], "torch": older}}))
        claim_results(results, CONFIG, source, data, ALONE)
    now = read_json(path)
    assert now["versions"] == record["versions"]
    assert [entry["versions"]["torch"] for entry in now["earlier"]] == ["1.0", "2.0"]
    assert {entry["device"] for entry in now["earlier"]} == {"cpu"}


def test_clearing_deletes_what_a_run_leaves_and_nothing_else(results):
    paths = leave_files(results)
    unfinish(results)
    assert [path for path in paths if not path.exists()] == [results / name for name in NUMBERS]
    leave_files(results)
    clear_results(results)
    assert [str(path.relative_to(results)) for path in results.rglob("*")] == ["notes.txt"]
    clear_results(results / "nowhere")


# ---------------------------------------------------------------- weights of another run


@pytest.fixture
def trained(tmp_path):
    """A finished run with weights, as far as another run looks at it."""
    folder, model = tmp_path / "trained", UNet(2)
    save_checkpoint(folder / "weights" / "best_model.pth", {"model": model.state_dict(), "options": model.options})
    (folder / "training_log.csv").write_text("epoch\n1\n")
    finish(folder, {"seed": 1, "passes": 30}, weights_fingerprint(model))
    return folder, weights_fingerprint(model)


def finish(folder, inputs, weights):
    """Write what says that a run of these inputs is finished with these weights."""
    write_json(folder / "config.json", {**RECORD, "identity": fingerprint(inputs), "decides": inputs})
    write_json(folder / "metrics.json", seal({**METRICS, "identity": fingerprint([fingerprint(inputs), weights])}))


def test_weights_are_taken_from_a_run_trained_in_the_same_way(trained):
    folder, weights = trained
    assert finished_weights(folder, {"seed": 1, "passes": 4}) == weights  # passes act after training
    with pytest.raises(UserError, match="trained otherwise: seed is 1 there and 2 here"):
        finished_weights(folder, {"seed": 2, "passes": 30})
    with pytest.raises(UserError, match="trained otherwise: dropout is None there and 0.2 here"):
        finished_weights(folder, {"seed": 1, "dropout": 0.2})


def test_weights_of_a_run_that_is_not_finished_or_not_whole_are_refused(trained):
    folder, _ = trained
    model = UNet(2)
    save_checkpoint(folder / "weights" / "best_model.pth", {"model": model.state_dict(), "options": model.options})
    with pytest.raises(UserError, match="best_model.pth does not hold the weights that .*metrics.json is about"):
        finished_weights(folder, {"seed": 1})
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"holds no finished run \(no metrics.json\)"):
        finished_weights(folder, {"seed": 1})


def test_taken_weights_are_part_of_what_a_run_is(trained, results, data):
    folder, weights = trained
    config = replace(CONFIG, weights_from=str(folder))
    inputs = identity_inputs(results, CONFIG, data, CPU)
    finish(folder, inputs, weights)
    assert identity_inputs(results, config, data, CPU) == {**inputs, "weights": weights}
    with pytest.raises(UserError, match="where this run would write; give another --results folder"):
        identity_inputs(folder, config, data, CPU)


def test_weights_and_log_are_copied(trained, results):
    folder, _ = trained
    copy_weights(folder, results)
    for name in ("weights/best_model.pth", "training_log.csv"):
        assert (results / name).read_bytes() == (folder / name).read_bytes()
    (folder / "training_log.csv").unlink()
    with pytest.raises(UserError, match="cannot read .*training_log.csv: No such file"):
        copy_weights(folder, results)


def test_a_run_that_only_measures_other_sets_is_what_the_run_of_the_weights_is(trained, results, data, source):
    folder, weights = trained
    (folder / "config.json").unlink()
    made = claim_results(folder, CONFIG, source, data, ALONE)
    write_json(folder / "metrics.json", seal({**METRICS, "identity": fingerprint([made.identity, weights])}))
    config = replace(CONFIG, weights_from=str(folder))
    target = {"name": "far", "ids": ["x"], "images": "i", "masks": "m", "fingerprint": "f", "skipped": []}
    whole = claim_results(results, config, source, data, ALONE)
    alone = claim_results(results, config, source, None, ALONE, [target])  # the same folder goes on either way
    assert alone.identity == whole.identity
    record, before = read_json(results / "config.json"), read_json(folder / "config.json")
    assert record["targets"] == [target] and record["decides"] == {**before["decides"], "weights": weights}
    for name in ("images", "masks", "split", "skipped", "fitted_on", "data_fingerprint", "synthetic"):
        assert record[name] == before[name]
    assert len(record["fitted_on"]) == 19 and all(len(mark) == 16 for mark in record["fitted_on"])


def test_what_is_known_of_taken_weights_is_checked_before_any_image_is_read(trained, data):
    folder, weights = trained
    inputs = {**identity_inputs(Path("x"), CONFIG, data, CPU), "split": "s", "groups": "g", "weights": "w"}
    finish(folder, inputs, weights)
    check_weights_from(replace(CONFIG, weights_from=str(folder), passes=9), CPU)
    check_weights_from(replace(CONFIG, weights_from=str(folder), amp="auto"), CPU)  # whatever that meant there
    with pytest.raises(UserError, match="trained otherwise: seed is 42 there and 3 here"):
        check_weights_from(replace(CONFIG, weights_from=str(folder), seed=3), CPU)
    with pytest.raises(UserError, match="x holds no finished run"):
        check_weights_from(replace(CONFIG, weights_from="x"), CPU)


def test_split_and_groups_decide_where_they_are_given(results, data):
    plain = identity_inputs(results, CONFIG, data, CPU)
    assert not {"split", "groups"} & plain.keys()
    groups = {data.pairs.ids[0]: "p"}
    grouped = identity_inputs(results, replace(CONFIG, groups="g.csv"), data._replace(groups=groups), CPU)
    split = fingerprint(data.split._asdict())
    assert grouped == {**plain, "split": split, "groups": fingerprint(groups)}
    assert identity_inputs(results, replace(CONFIG, split="s.csv"), data, CPU) == {**plain, "split": split}


def test_groups_may_differ_where_weights_are_taken(trained, results, data):
    folder, weights = trained
    inputs = identity_inputs(results, CONFIG, data, CPU)
    finish(folder, inputs, weights)
    config, groups = replace(CONFIG, weights_from=str(folder), groups="g.csv"), {data.pairs.ids[0]: "p"}
    found = identity_inputs(results, config, data._replace(groups=groups), CPU)
    assert found == {**inputs, "groups": fingerprint(groups), "weights": weights}  # the split is that of the weights


def test_a_long_fingerprint_is_shortened_in_a_message(results, source, data):
    claim_results(results, replace(CONFIG, split="s.csv"), source, data, ALONE)
    other = data._replace(split=data.split._replace(test=data.split.test[1:]))
    with pytest.raises(UserError, match=r"split was '[0-9a-f]{8}\.\.\.' and is now '[0-9a-f]{8}\.\.\.'; choose"):
        claim_results(results, replace(CONFIG, split="s.csv"), source, other, ALONE)


def test_a_run_that_takes_weights_to_other_sets_has_a_folder_of_its_own(tmp_path, source):
    for name in ("far away/images", "far away/masks"):
        (tmp_path / name).mkdir(parents=True)
    config = Config(weights_from="results/isic-quick", test_data=[str(tmp_path / "far away")])
    assert results_folder(config, source) == Path("results/isic-quick-on-far-away")
    assert results_folder(replace(config, results="x"), source) == Path("x")


# ---------------------------------------------------------------- the counts


class Counts:
    """Stands for the counts of a part: what is saved of them is arrays by name."""

    def __init__(self, value: int):
        self.value = value

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"bins": np.full(3, self.value)}


def test_the_counts_of_other_test_sets_are_saved_under_their_names(results, source, data):
    run = claim_results(results, CONFIG, source, data, ALONE)
    write_counts(run, Counts(1), Counts(2), {"far": Counts(3)})
    with np.load(results / "calibration.npz", allow_pickle=False) as content:
        assert set(content.files) == {"identity", "validation/bins", "test/bins", "target:far/bins"}
        assert content["target:far/bins"].tolist() == [3, 3, 3]


def test_the_counts_of_both_parts_are_saved_with_the_identity(results, source, data):
    run = claim_results(results, CONFIG, source, data, ALONE)
    write_counts(run, Counts(1), Counts(2))
    with np.load(results / "calibration.npz", allow_pickle=False) as content:
        assert set(content.files) == {"identity", "validation/bins", "test/bins"}
        assert str(content["identity"]) == run.identity
        assert content["validation/bins"].tolist() == [1, 1, 1] and content["test/bins"].tolist() == [2, 2, 2]


# ---------------------------------------------------------------- the precision of the maps


def test_maps_of_a_gpu_are_not_those_of_the_cpu_and_a_run_on_the_cpu_keeps_its_identity():
    def inputs(device: str, **options: object) -> dict:
        return settings_inputs(Config(amp="fp32", **options), torch.device(device))

    cpu, cuda = inputs("cpu"), inputs("cuda")
    assert cpu["precision"] == "auto" and cuda == {**cpu, "maps_precision": "fp16"}
    other = {"model": "constructed_networks:plain", "target_layer": "bottom"}
    for options in ({"precision": "fp32"}, {"precision": "bf16"}, other):
        assert inputs("cuda", **options) == inputs("cpu", **options)
