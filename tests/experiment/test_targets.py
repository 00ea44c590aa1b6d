"""Other test sets: what they may not hold, what shifted, and that nothing is fitted to them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_pairs
from constructed_maps import Images, make_images

from dataset import Data, split_ids
from evaluation.counting import count_scores
from evaluation.protocol import count_splits, validation_edges
from evaluation.summary import summarise
from evaluation.tuning import tune
from experiment.run import Run
from experiment.targets import CountedTarget, FittedOn, prepare_targets, shift, target_numbers
from isic.cache import decode_pairs
from isic.layout import SkippedPair, find_pairs, isic_folders
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fitted_on(tiny, tmp_path_factory):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))
    return FittedOn.of_data(Data(pairs, split_ids(pairs.ids), []))


@pytest.fixture
def config(tmp_path):
    return Config(image_size=32, cache=str(tmp_path / "cache"), resamples=100)


def other_set(root, count=5, seed=9, rename="new {}"):
    """A set in images/ and masks/ with ids of its own; returns its folder."""
    source = write_pairs(root.parent / f"{root.name} of ISIC", count, seed=seed)
    for folder, name in zip(isic_folders(source), ("images", "masks")):
        (root / name).mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copy(path, root / name / rename.format(path.name))
    return root


# ---------------------------------------------------------------- images


def test_a_set_is_decoded_and_recorded(config, fitted_on, tmp_path, capsys):
    root = other_set(tmp_path / "clinic B")
    (target,) = prepare_targets(replace(config, test_data=[str(root)]), fitted_on, ALONE)
    assert target.name == "clinic-B" and target.skipped == [] and target.groups == {} and target.shared_ids == []
    record = target.record()
    assert record["ids"] == [f"new ISIC_{index:07d}" for index in range(5)] == target.pairs.ids
    assert (record["images"], record["masks"]) == (str(root / "images"), str(root / "masks"))
    assert record["fingerprint"] == target.pairs.fingerprint() and "groups" not in record
    assert "test set     clinic-B: 5 images" in capsys.readouterr().out
    assert target.pairs.image("new ISIC_0000000").shape == (32, 32, 3)


def test_images_that_the_network_was_fitted_to_are_an_error_or_left_out(config, fitted_on, tiny, tmp_path, capsys):
    root = other_set(tmp_path / "set")
    names = sorted(fitted_on.ids)[:2]
    for id, new in zip(names, ("x", "y")):  # the same files under other names
        shutil.copy(isic_folders(tiny)[0] / f"{id}.jpg", root / "images" / f"{new}.jpg")
        shutil.copy(isic_folders(tiny)[1] / f"{id}_segmentation.png", root / "masks" / f"{new}.png")
    asked = replace(config, test_data=[str(root)])
    message = "2 of 7 images of test set set .* are training or validation images of the run, the first of them x; remove them"
    with pytest.raises(UserError, match=message):
        prepare_targets(asked, fitted_on, ALONE)
    (target,) = prepare_targets(replace(asked, skip_bad=True), fitted_on, ALONE)
    assert len(target.pairs.ids) == 5 and [entry.id for entry in target.skipped] == ["x", "y"]
    assert "warning: 2 of 7 pairs of set are left out: x: is a training" in capsys.readouterr().err
    with pytest.raises(UserError, match="no image of test set tiny.* is left"):
        everything = FittedOn(frozenset(), frozenset(FittedOn.of_data(_all_of(tiny, tmp_path)).contents))
        prepare_targets(replace(config, test_data=[str(tiny)], skip_bad=True), everything, ALONE)


def _all_of(tiny, tmp_path):
    """All pairs as training images."""
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path / "cache")
    return Data(pairs, split_ids(pairs.ids)._replace(train=pairs.ids), [])


def test_a_finished_run_knows_what_it_was_fitted_to(fitted_on):
    split = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    assert FittedOn.of_record({"split": split, "fitted_on": ["1"]}) == FittedOn(frozenset("abc"), frozenset("1"))
    assert FittedOn.of_record({"split": split}).contents == frozenset()  # of an earlier version
    assert len(fitted_on.ids) == len(fitted_on.contents) == 19


def test_ids_of_training_images_are_a_warning_and_not_an_error(config, fitted_on, tmp_path):
    root = other_set(tmp_path / "set", 24, rename="{}")  # other pictures under the ids of the source
    (target,) = prepare_targets(replace(config, test_data=[str(root)]), fitted_on, ALONE)
    assert target.shared_ids == sorted(fitted_on.ids)


def test_a_broken_pair_is_an_error_or_left_out(config, fitted_on, tmp_path):
    root = other_set(tmp_path / "set")
    (root / "masks" / "new ISIC_0000003_segmentation.png").unlink()
    (root / "images" / "new ISIC_0000004.jpg").write_bytes(b"no picture")
    asked = replace(config, test_data=[str(root)])
    with pytest.raises(UserError, match="has no mask"):
        prepare_targets(asked, fitted_on, ALONE)
    (target,) = prepare_targets(replace(asked, skip_bad=True), fitted_on, ALONE)
    assert [entry.id for entry in target.skipped] == ["new ISIC_0000003", "new ISIC_0000004"] and len(target.pairs.ids) == 3


def test_a_set_has_the_groups_that_the_table_lists(config, fitted_on, tmp_path, capsys):
    root = other_set(tmp_path / "set")
    (tmp_path / "groups.csv").write_text("id,group\nnew ISIC_0000000,p\nnew ISIC_0000002,p\nISIC_0000000,q\n")
    asked = replace(config, test_data=[str(root)], groups=str(tmp_path / "groups.csv"))
    (target,) = prepare_targets(asked, fitted_on, ALONE)
    assert target.groups == {"new ISIC_0000000": "p", "new ISIC_0000002": "p"} == target.record()["groups"]
    assert "3 of 5 images of set are in no group; each stands for itself" in capsys.readouterr().err


# ---------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def counted():
    validation, test = make_images(6, seed=1, prefix="v"), make_images(8, seed=2, prefix="t")
    tuned = tune(validation)
    return tuned, count_splits(tuned, validation, test), test


def counted_target(tuned, validation, images, target=None):
    counters = count_scores(images, tuned.fusion, tuned.lambdas, tuned.bins, validation_edges(validation))
    return CountedTarget(target, counters, 0, {"pred_variance": (0.0, 1.0), "saliency_variance": (0.0, 1.0)})


def test_what_shifted_from_the_pixels(counted):
    tuned, (validation, test), images = counted
    far = Images([(id, {**maps, "pred_variance": 3 * maps["pred_variance"]}) for id, maps in make_images(5, seed=5)])
    found = shift(test, counted_target(tuned, validation, far).counters)
    for side, part in (("source", images), ("target", far)):
        flat = {name: np.concatenate([maps[name].numpy().ravel().astype(float) for _, maps in part]) for name in part.items[0][1]}
        p, scale = flat["mean_prediction"], tuned.fusion.predictive
        right = (p > 0.5) == (flat["true_mask"] == 1)
        u = np.clip((flat["pred_variance"] - scale.low) / (scale.high - scale.low), 0, 1)
        expected = {
            "accuracy": right.mean(), "probability": np.maximum(p, 1 - p).mean(), "confidence_predictive_variance": 1 - u.mean(),
            "mean_pred_variance": flat["pred_variance"].mean(), "mean_saliency_variance": flat["saliency_variance"].mean(),
            "clipped_pred_variance": ((flat["pred_variance"] > scale.high) | (flat["pred_variance"] < scale.low)).mean(),
            "dice": np.mean([2 * ((m["mean_prediction"] > 0.5) & (m["true_mask"] == 1)).sum().item() / (
                (m["mean_prediction"] > 0.5).sum().item() + m["true_mask"].sum().item()) for _, m in part]),
        }
        for name, value in expected.items():
            assert found[name][side] == pytest.approx(value, abs=1e-6), (name, side)
    assert found["clipped_pred_variance"]["target"] > 0.05 > found["clipped_pred_variance"]["source"]


class Named:
    """Stands for a test set: its name, groups, and what was noticed of it."""

    def __init__(self, groups=None, shared=(), skipped=()):
        self.name, self.groups, self.shared_ids, self.skipped = "far", groups or {}, list(shared), list(skipped)


def test_the_source_s_own_test_images_as_another_set_have_the_source_s_numbers(counted, tmp_path):
    tuned, (validation, test), images = counted
    run = Run(Config(resamples=100), ALONE, tmp_path, "i")
    found = target_numbers(run, tuned.fusion, (validation, test), None, counted_target(tuned, validation, images, Named()))
    expected = summarise(validation, test, tuned.fusion, resamples=100, seed=42)["test"]
    assert {**expected, "precision_fallbacks": 0} == found["test"]
    assert all(pair["source"] == pair["target"] for pair in found["shift"].values())
    assert found["bootstrap"]["unit"] == "image" and found["conclusion"]["trainings"] == 1 and found["warnings"] == []
    assert len((tmp_path / "per_image_far.csv").read_text().splitlines()) == 1 + 8


def test_groups_of_a_set_are_what_is_drawn(counted, tmp_path):
    tuned, (validation, test), images = counted
    run = Run(Config(resamples=100), ALONE, tmp_path, "i")
    target = Named({id: "one" if place < 4 else "two" for place, (id, _) in enumerate(images)})
    found = target_numbers(run, tuned.fusion, (validation, test), None, counted_target(tuned, validation, images, target))
    assert found["bootstrap"]["unit"] == "group"
    # two groups: a resample is one of them twice, or both
    dice = np.array([float(row.split(",")[1]) for row in (tmp_path / "per_image_far.csv").read_text().splitlines()[1:]])
    assert found["test"]["dice_interval"] == pytest.approx(sorted([dice[:4].mean(), dice[4:].mean()]))


def test_what_was_noticed_of_a_set_is_a_warning_with_its_name(counted, tmp_path):
    tuned, (validation, test), images = counted
    target = Named(shared=["a", "b"], skipped=[SkippedPair("c", "f", "broken")])
    found = counted_target(tuned, validation, images, target)._replace(ranges={"saliency_variance": (0.0, 0.0)})
    warnings = target_numbers(Run(Config(resamples=100), ALONE, tmp_path, "i"), tuned.fusion, (validation, test), None, found)
    texts = {entry["code"]: entry["text"] for entry in warnings["warnings"]}
    assert set(texts) == {"shared_ids", "constant_saliency_variance", "left_out"}
    assert texts["shared_ids"].startswith("far: 2 of 8 images have the ids of training or validation images, such as a;")
    assert texts["left_out"] == "far: 1 pairs are left out: c: broken"
