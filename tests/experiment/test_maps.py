"""The saved maps of a run: made where they are missing, read once where they fit, completed with the fused score."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import experiment.maps
from dataset import batches, split_ids
from evaluation.fusion import Fusion, Linear
from experiment.map_files import EXTRA_ARRAYS, MAP_ARRAYS, read_maps, write_maps
from experiment.maps import MEASURED, SavedMaps, make_maps, map_options
from experiment.run import Run
from inference.precision import automatic_precision
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from model import UNet
from runtime.config import Config, parse_config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from uncertainty import CAM_SCORES, flip_variance, uncertainty_maps

CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, CPU)
IDS = ["a", "b", "c"]
BYTES = 6 * 4 * (4 * 4 + 1)  # of one image of 6 x 4 pixels: four float32 maps and the mask
FUSION = Fusion(Linear(0, 0.25), Linear(0, 0.5), "convex", 0.75)


@pytest.fixture
def folder(tmp_path):
    """Three map files without a fused score."""
    rng = np.random.default_rng(0)
    for index, id in enumerate(IDS):
        maps = {name: (rng.random((6, 4)) / 4).astype(MAP_ARRAYS[name]) for name in MEASURED}
        write_maps(tmp_path / f"{id}.npz", maps, index, "identity", fallbacks=index % 2, pass_dice=(index + 1) / 4)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """How often each file was read."""
    counts: Counter[str] = Counter()
    original = experiment.maps.read_maps

    def counted(path, *more, **options):
        counts[path.stem] += 1
        return original(path, *more, **options)

    monkeypatch.setattr(experiment.maps, "read_maps", counted)
    return counts


def _values(saved):
    return [(id, {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in maps.items()})
            for id, maps in saved]


def test_the_default_maps_are_the_study_s():
    model = UNet(4)
    options = map_options(parse_config([], ""), model)
    assert options["target_layer"] is model.encoder4 and options["normalise_cam"] is True
    assert (options["passes"], options["seed"], options["precision"]) == (30, 42, "auto")
    assert automatic_precision(CPU, fast=True) == "fp32"
    other = map_options(parse_config(["--cam-scale", "none", "--target-layer", "bottleneck"], ""), model)
    assert other["target_layer"] is model.bottleneck and other["normalise_cam"] is False


def configured(**changes):
    """The configuration of a tiny run, with fields that the command line may not have."""
    values = {**Config(image_size=32, width=4, passes=3, batch_size=4).to_dict(), "cam_score": "all", "flips": False}
    return SimpleNamespace(**{**values, **changes})


def test_the_score_of_grad_cam_is_a_setting():
    model = UNet(4)
    assert map_options(parse_config([], ""), model)["cam_score"] == "all"
    assert [map_options(configured(cam_score=score), model)["cam_score"] for score in CAM_SCORES] == ["all", "predicted"]


# ---------------------------------------------------------------- reading


def test_maps_come_as_tensors_with_their_numbers(folder):
    for index, (id, maps) in enumerate(SavedMaps(folder, IDS, CPU, 0.375)):
        assert id == IDS[index]
        assert set(maps) == {*MEASURED, "empty_cams", "pass_dice", "threshold"}
        assert (maps["empty_cams"], maps["pass_dice"], maps["threshold"]) == (index, (index + 1) / 4, 0.375)
        stored = read_maps(folder / f"{id}.npz", MEASURED)
        for name in MEASURED:
            np.testing.assert_array_equal(maps[name].numpy(), stored[name])


def test_a_file_is_read_once_where_the_maps_fit(folder, reads):
    saved = SavedMaps(folder, IDS, CPU, 0.5)
    first = _values(saved)
    assert reads == {"a": 1, "b": 1, "c": 1}
    assert _values(saved) == first and _values(saved) == first
    assert saved.read("b")["empty_cams"] == 1
    assert saved.fallbacks(ALONE) == 1
    stored = [read_maps(folder / f"{id}.npz", MEASURED)["saliency_variance"] for id in IDS]
    assert saved.ranges(ALONE)["saliency_variance"] == (float(np.min(stored)), float(np.max(stored)))
    assert reads == {"a": 1, "b": 1, "c": 1}


def test_what_does_not_fit_is_read_again_with_the_same_values(folder, reads, monkeypatch):
    plenty = _values(SavedMaps(folder, IDS, CPU, 0.5))
    reads.clear()
    monkeypatch.setattr(experiment.maps, "KEPT_BYTES", 2 * BYTES)  # two of three stay
    saved = SavedMaps(folder, IDS, CPU, 0.5)
    assert _values(saved) == _values(saved) == plenty
    assert reads == {"a": 1, "b": 1, "c": 2}
    reads.clear()
    monkeypatch.setattr(experiment.maps, "KEPT_BYTES", BYTES - 1)
    saved = SavedMaps(folder, IDS, CPU, 0.5)
    assert _values(saved) == _values(saved) == plenty
    assert reads == {"a": 2, "b": 2, "c": 2}
    assert saved.fallbacks(ALONE) == 1  # numbers stay whatever the maps do
    assert reads == {"a": 2, "b": 2, "c": 2}


def test_each_process_works_on_its_share_of_what_is_in_memory(folder, reads):
    saved = SavedMaps(folder, IDS, CPU, 0.5)
    whole = _values(saved)
    shares = [saved.shard(ProcessGroup(rank, 2, CPU)) for rank in range(2)]
    assert [share.ids for share in shares] == [["a", "c"], ["b"]]
    found = dict(_values(shares[0]) + _values(shares[1]))
    others = {id: maps.pop("other_saliency_variance") for id, maps in found.items()}
    assert [(id, found[id]) for id in IDS] == whole
    values = dict(whole)  # each image's placebo is the saliency of the image before it in the whole part
    assert others == {id: values[before]["saliency_variance"] for id, before in zip(IDS, [IDS[-1], *IDS[:-1]])}
    assert reads == {"a": 1, "b": 1, "c": 1}


def test_maps_of_another_run_and_broken_ones_are_not_current(folder):
    saved = SavedMaps(folder, [*IDS, "lost"], CPU, 0.5)
    (folder / "b.npz").write_bytes(b"half a fi")
    assert [saved.is_current(id, "identity") for id in saved.ids] == [True, False, True, False]
    assert not saved.is_current("a", "another")


def test_maps_without_pass_dice_or_without_flips_that_are_wanted_are_not_current(folder):
    maps = read_maps(folder / "a.npz", MEASURED)
    arrays = {name: maps[name] for name in MEASURED}
    assert not SavedMaps(folder, IDS, CPU, 0.5, tuple(EXTRA_ARRAYS)).is_current("a", "identity")
    write_maps(folder / "a.npz", {**arrays, "flip_variance": arrays["pred_variance"]}, 0, "identity", pass_dice=0.5)
    with_flips = SavedMaps(folder, ["a"], CPU, 0.5, tuple(EXTRA_ARRAYS))
    assert with_flips.is_current("a", "identity") and SavedMaps(folder, ["a"], CPU, 0.5).is_current("a", "identity")
    (_, found), = with_flips
    assert torch.equal(found["flip_variance"], found["pred_variance"])
    assert with_flips.ranges(ALONE)["flip_variance"] == with_flips.ranges(ALONE)["pred_variance"]
    assert "flip_variance" not in next(iter(SavedMaps(folder, ["a"], CPU, 0.5)))[1]
    write_maps(folder / "a.npz", arrays, 0, "identity")  # as an earlier version did
    assert not SavedMaps(folder, IDS, CPU, 0.5).is_current("a", "identity")


def test_nothing_stays_in_memory_where_none_is_given(folder, reads):
    saved = SavedMaps(folder, IDS, CPU, 0.5, memory=0)
    assert _values(saved) == _values(saved)
    assert saved.facts("a").identity == "identity" and saved.fallbacks(ALONE) == 1
    assert reads == {"a": 2, "b": 2, "c": 2}


# ---------------------------------------------------------------- the fused score


def test_the_fused_score_is_added_once_and_again_for_another_fusion(folder):
    before = {id: read_maps(folder / f"{id}.npz", MEASURED) for id in IDS}
    SavedMaps(folder, IDS, CPU, 0.5).add_fused_scores(FUSION, ALONE)
    for id in IDS:
        maps = read_maps(folder / f"{id}.npz")
        # lambda times the predictive variance over its range, and the rest the saliency variance over its own
        expected = 0.75 * maps["pred_variance"] / 0.25 + 0.25 * maps["saliency_variance"] / 0.5
        np.testing.assert_allclose(maps["fused_score"], expected, rtol=1e-6)
        for name in (*MEASURED, "empty_cams", "fallbacks", "identity", "pass_dice"):
            np.testing.assert_array_equal(maps[name], before[id][name])
    stamps = [(folder / f"{id}.npz").stat().st_mtime_ns for id in IDS]
    SavedMaps(folder, IDS, CPU, 0.5).add_fused_scores(FUSION, ALONE)
    assert [(folder / f"{id}.npz").stat().st_mtime_ns for id in IDS] == stamps
    only_saliency = Fusion(Linear(0, 0.25), Linear(0, 0.5), "convex", 0.0)
    SavedMaps(folder, IDS, CPU, 0.5).add_fused_scores(only_saliency, ALONE)
    maps = read_maps(folder / "a.npz")
    np.testing.assert_allclose(maps["fused_score"], maps["saliency_variance"] / 0.5, rtol=1e-6)


# ---------------------------------------------------------------- making


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    return decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(tmp_path):
    return Run(Config(image_size=32, width=4, passes=3, batch_size=4), ALONE, tmp_path, "identity")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UNet(4).eval()


def test_maps_are_those_of_the_model_and_saved_as_they_are_kept(run, model, pairs, reads):
    ids = split_ids(pairs.ids).validation
    saved = make_maps(run, model, pairs, "validation", ids)
    kept = _values(saved)
    assert not reads  # what was just made is not read back
    assert kept == _values(SavedMaps(saved.folder, ids, CPU, 0.5))
    for (names, images, masks), (id, maps) in zip(batches(pairs, ids, 1, CPU), saved):
        expected = uncertainty_maps(model, images, image_ids=names, **map_options(run.config, model))
        assert [id] == names and torch.equal(maps["true_mask"], masks[0])
        for name in ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy"):
            assert torch.equal(maps[name], getattr(expected, name)[0]), name
        assert maps["empty_cams"] == int(expected.empty_cams[0]) and maps["pass_dice"] == float(expected.pass_dice[0])
        assert not math.isnan(maps["pass_dice"])
        assert "fused_score" not in read_maps(saved.path(id), MEASURED)


def test_only_what_is_missing_is_made_and_the_run_is_unfinished_meanwhile(run, model, pairs, capsys):
    ids = split_ids(pairs.ids).test
    saved = make_maps(run, model, pairs, "test", ids, FUSION)
    paths = [saved.path(id) for id in ids]
    stamps, contents = [path.stat().st_mtime_ns for path in paths], [path.read_bytes() for path in paths]
    assert "5 test images, 5 of them made now" in capsys.readouterr().out
    numbers = run.results / "metrics.json"
    numbers.write_text("{}")
    make_maps(run, model, pairs, "test", ids, FUSION).add_fused_scores(FUSION, ALONE)
    assert [path.stat().st_mtime_ns for path in paths] == stamps and numbers.exists()
    paths[1].unlink()
    paths[3].write_bytes(b"half a fi")
    capsys.readouterr()
    make_maps(run, model, pairs, "test", ids, FUSION)
    assert "5 test images, 2 of them made now" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == contents
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(paths, stamps)] == [True, False, True, False, True]
    assert not numbers.exists()


def test_the_fused_score_is_in_the_file_where_the_fusion_is_known(run, model, pairs):
    ids = split_ids(pairs.ids).test[:2]
    saved = make_maps(run, model, pairs, "test", ids, FUSION)
    for id in ids:
        maps = read_maps(saved.path(id))
        expected = FUSION(torch.from_numpy(maps["pred_variance"]), torch.from_numpy(maps["saliency_variance"]))
        np.testing.assert_array_equal(maps["fused_score"], expected.numpy())


def test_flips_are_saved_where_they_are_asked_for(run, model, pairs):
    ids = split_ids(pairs.ids).test[:2]
    make_maps(run, model, pairs, "test", ids)
    asked = replace(run, config=configured(flips=True))
    saved = make_maps(asked, model, pairs, "test", ids, FUSION)  # what is there lacks them
    saved.add_fused_scores(Fusion(Linear(0, 0.25), Linear(0, 0.5), "convex", 0.0), ALONE)
    for (names, images, _), (_, maps) in zip(batches(pairs, ids, 1, CPU), saved):
        expected = flip_variance(model, images)[0]
        assert torch.equal(maps["flip_variance"], expected) and expected.max() > 0
        np.testing.assert_array_equal(read_maps(saved.path(names[0]))["flip_variance"], expected.numpy())
    assert saved.ranges(ALONE)["flip_variance"][1] > 0


# ---------------------------------------------------------------- never a silent null


class Random(UNet):
    """With a dropout of its own that is always on."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, training=True))


class Unreached(UNet):
    """Whose dropout has no way to the logits."""

    def forward(self, x):
        skip = self.encoder1(x)
        deep = self.encoder4(self.encoder3(self.encoder2(skip)))
        self.dropout(deep)
        return self.head(skip) + F.interpolate(deep.mean(1, keepdim=True), x.shape[-2:])


@pytest.mark.parametrize(("kind", "message"), [
    (Random, "maps differ when made twice: the model draws random numbers of its own .functional dropout"),
    (Unreached, "all passes are identical.*the dropout of the model does not reach its logits"),
])
def test_a_model_that_is_random_by_itself_or_not_at_all_is_refused(run, pairs, kind, message):
    torch.manual_seed(0)
    ids = split_ids(pairs.ids).test
    with pytest.raises(UserError, match=f"^{ids[0]}: {message}"):
        make_maps(run, kind(4).eval(), pairs, "test", ids)
    assert not list(run.results.rglob("*.npz"))


def test_a_network_whose_last_weights_are_dead_is_refused(run, model, pairs):
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    with pytest.raises(UserError, match="predicts 0.5 in every pixel of every pass.*train longer"):
        make_maps(run, model, pairs, "test", split_ids(pairs.ids).test)


def test_the_fast_path_is_checked_alike(run, model, pairs, monkeypatch):
    calls = []

    def drifting(*arguments, **options):
        maps = uncertainty_maps(*arguments, **options)
        calls.append(options["image_ids"])
        return maps._replace(saliency_variance=maps.saliency_variance + 1e-7 * len(calls))

    monkeypatch.setattr(experiment.maps, "uncertainty_maps", drifting)
    ids = split_ids(pairs.ids).test
    with pytest.raises(UserError, match="maps differ when made twice"):
        make_maps(run, model, pairs, "test", ids)
    assert calls == [ids[:1], ids[:1]]


def test_only_the_first_missing_image_is_made_twice(run, model, pairs, monkeypatch):
    made = []
    monkeypatch.setattr(
        experiment.maps, "uncertainty_maps", lambda *a, **o: (made.extend(o["image_ids"]), uncertainty_maps(*a, **o))[1]
    )
    ids = split_ids(pairs.ids).test
    saved = make_maps(run, model, pairs, "test", ids)
    assert made == [ids[0], *ids]
    saved.path(ids[2]).unlink()
    made.clear()
    make_maps(run, model, pairs, "test", ids)
    assert made == [ids[2], ids[2]]


def test_a_whole_part_without_predictive_variance_is_refused(run, model, pairs):
    ids = split_ids(pairs.ids).test
    saved = make_maps(run, model, pairs, "test", ids)
    for id in ids:
        maps = saved.read(id)
        saved.write(id, {**maps, "pred_variance": np.full_like(maps["pred_variance"], 0.125)})
    with pytest.raises(UserError, match="the predictive variance is 0.125 in every pixel of the test images"):
        make_maps(run, model, pairs, "test", ids)
