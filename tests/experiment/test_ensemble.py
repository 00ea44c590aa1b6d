"""The ensemble of several trainings: its maps by their formulas, its numbers by the real harness, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from constructed_maps import make_images
from saved_runs import RECORD

from evaluation import evaluate
from experiment.ensemble import HEADLINES, EnsembleMaps, ensemble_numbers, ensemble_of, headline
from experiment.map_files import write_maps
from experiment.maps import MEASURED, SavedMaps
from runtime.errors import UserError
from runtime.records import seal, write_json

CPU = torch.device("cpu")
PARTS = {"validation": 3, "test": 5}


def make_training(folder, seed, threshold=0.5, identity=None, drop=0):
    """A results folder with the maps of one of several trainings: of the same masks, with other predictions."""
    generator = torch.Generator().manual_seed(seed)
    splits, split = {}, {}
    for part, count in PARTS.items():
        images = make_images(count, seed=len(part), prefix=part)
        images.items = [(id, {name: values[:24].clone() for name, values in maps.items()}) for id, maps in images.items]
        for index, (_, maps) in enumerate(images):
            noise = torch.randn(24, 24, generator=generator)
            maps["mean_prediction"] = torch.sigmoid(torch.logit(maps["mean_prediction"].clamp(0.01, 0.99)) + noise)
            maps["saliency_variance"] = 0.1 * torch.rand(24, 24, generator=generator)
            maps["empty_cams"], maps["pass_dice"] = index + seed, 0.5
        images.items = images.items[drop:]
        splits[part], split[part] = images, [id for id, _ in images]
    identity = identity or f"identity-{seed}"
    for part, images in splits.items():
        for id, maps in images:
            arrays = {name: maps[name].numpy() for name in MEASURED}
            write_maps(folder / "uncertainty_maps" / part / f"{id}.npz", arrays, maps["empty_cams"], f"identity-{seed}",
                       pass_dice=maps["pass_dice"])
    metrics = evaluate(splits["validation"], splits["test"], resamples=100).metrics
    write_json(folder / "metrics.json", seal({**metrics, "identity": identity, "synthetic": False}))
    split["train"] = []
    write_json(folder / "config.json", {**RECORD, "split": split, "configuration": {"threshold": threshold}})
    return folder


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    root = tmp_path_factory.mktemp("trainings")
    return [make_training(root / f"seed-{seed}", seed) for seed in (1, 2, 3)]


def test_maps_are_combined_by_their_formulas(trainings):
    found = ensemble_of(trainings)
    for part, count in PARTS.items():
        ids = found[part].members[0].ids
        members = [list(SavedMaps(folder / "uncertainty_maps" / part, ids, CPU, 0.5)) for folder in trainings]
        assert len(found[part]) == len(members[0]) == count
        for (id, maps), *rows in zip(found[part], *members):
            assert all(row[0] == id for row in rows)
            p = np.stack([one["mean_prediction"].double().numpy() for _, one in rows])
            entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
            np.testing.assert_allclose(maps["mean_prediction"], p.mean(0), rtol=1e-5)
            np.testing.assert_allclose(maps["pred_variance"], p.var(0), rtol=1e-4, atol=1e-8)
            np.testing.assert_allclose(maps["expected_entropy"], entropy.mean(0), rtol=1e-4, atol=1e-6)
            saliency = np.stack([one["saliency_variance"].double().numpy() for _, one in rows])
            np.testing.assert_allclose(maps["saliency_variance"], saliency.mean(0), rtol=1e-5)
            assert torch.equal(maps["true_mask"], rows[0][1]["true_mask"])
            assert maps["empty_cams"] == sum(one["empty_cams"] for _, one in rows)
            lesions = p > 0.5
            shared = sum(2 * (a & b).sum() for a, b in combinations(lesions, 2))
            assert maps["pass_dice"] == pytest.approx(shared / sum(a.sum() + b.sum() for a, b in combinations(lesions, 2)))
            assert {name: maps[name].dtype for name in MEASURED} == {name: rows[0][1][name].dtype for name in MEASURED}


def test_it_can_be_read_again_and_is_what_the_evaluation_accepts(trainings):
    parts = ensemble_of(trainings)
    first, again = list(parts["test"]), list(parts["test"])
    assert all(torch.equal(a["pred_variance"], b["pred_variance"]) for (_, a), (_, b) in zip(first, again))
    result = evaluate(parts["validation"], parts["test"], resamples=100)
    assert "mutual_information" in result.test.scores and len(result.rows) == PARTS["test"]


def test_numbers_are_those_of_the_harness(trainings):
    numbers = ensemble_numbers(trainings, resamples=100)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    parts = ensemble_of(trainings)
    metrics = evaluate(parts["validation"], parts["test"], resamples=100).metrics
    assert {**headline(metrics), "trainings": 3} == {name: value for name, value in numbers.items() if name != "members"}
    whole = metrics["test"]["regions"]["whole_image"]["scores"]
    for score, measure in HEADLINES:
        assert numbers["whole_image"][score][measure]["value"] == whole[score][measure]["value"]
    members = [json.loads((folder / "metrics.json").read_text()) for folder in trainings]
    assert [member["dice"] for member in numbers["members"]] == [member["test"]["dice"] for member in members]
    # independent noise in each training averages out
    assert numbers["dice"] > max(member["dice"] for member in numbers["members"])
    brier = [entry["whole_image"]["one_minus_max_probability"]["brier"]["value"] for entry in (numbers, *numbers["members"])]
    assert brier[0] < min(brier[1:])


def test_equal_trainings_disagree_about_nothing(trainings):
    parts = {}
    for part in PARTS:
        (ids,) = {tuple(member.ids) for member in ensemble_of(trainings)[part].members}
        one = SavedMaps(trainings[0] / "uncertainty_maps" / part, ids, CPU, 0.5)
        parts[part] = EnsembleMaps([one, one], ["identity-1", "identity-1"])
    for _, maps in parts["test"]:
        assert not maps["pred_variance"].any() and maps["pass_dice"] == 1.0
    with pytest.raises(UserError, match="the predictive variance is 0 in every validation pixel"):
        evaluate(parts["validation"], parts["test"])


def test_a_single_training_other_images_and_another_threshold_are_refused(trainings, tmp_path):
    with pytest.raises(UserError, match="at least two trainings, not 1"):
        ensemble_of(trainings[:1])
    for options in ({"drop": 1}, {"threshold": 0.25}):
        other = make_training(tmp_path / "-".join(options), 4, **options)
        with pytest.raises(UserError, match="are not of the same images and threshold"):
            ensemble_of([trainings[0], other])


def test_maps_of_another_run_another_mask_and_missing_files_are_refused(trainings, tmp_path):
    other = make_training(tmp_path / "a", 4, identity="another")
    with pytest.raises(UserError, match="validation_0000.npz was not made by the run that is in its folder"):
        list(ensemble_of([trainings[0], other])["validation"])
    other = make_training(tmp_path / "b", 4)
    folder = other / "uncertainty_maps" / "test"
    maps = SavedMaps(folder, ["test_0000"], CPU, 0.5)
    mask = 1 - maps.read("test_0000")["true_mask"]
    maps.write("test_0000", {**maps.read("test_0000"), "true_mask": mask})
    with pytest.raises(UserError, match="test_0000.npz have different masks"):
        list(ensemble_of([trainings[0], other])["test"])
    (folder / "test_0000.npz").unlink()
    with pytest.raises(UserError, match="cannot read .*test_0000.npz"):
        list(ensemble_of([trainings[0], other])["test"])
    (other / "metrics.json").unlink()
    with pytest.raises(UserError, match="cannot read .*metrics.json"):
        ensemble_of([trainings[0], other])


def test_members_do_not_fill_the_memory(trainings):
    parts = ensemble_of(trainings)
    list(parts["test"])
    assert all(not member._kept for member in parts["test"].members)
    assert not math.isnan(next(iter(parts["test"]))[1]["pass_dice"])
