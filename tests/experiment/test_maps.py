"""The saved maps of a run: made where they are missing, read once where they fit, completed with the fused score."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import experiment.maps
from dataset import batches, split_ids
from evaluation.fusion import Fusion, Linear
from experiment.map_files import MAP_ARRAYS, read_maps, write_maps
from experiment.maps import MEASURED, SavedMaps, make_maps, map_options
from experiment.run import Run
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from model import UNet
from runtime.config import Config, parse_config
from runtime.processes import ProcessGroup
from uncertainty import AUTO_PRECISION, uncertainty_maps

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
        write_maps(tmp_path / f"{id}.npz", maps, index, "identity", fallbacks=index % 2)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """How often each file was read."""
    counts: Counter[str] = Counter()
    original = experiment.maps.read_maps
    monkeypatch.setattr(
        experiment.maps, "read_maps", lambda path, need: (counts.update([path.stem]), original(path, need))[1]
    )
    return counts


def _values(saved):
    return [(id, {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in maps.items()})
            for id, maps in saved]


def test_the_default_maps_are_the_study_s():
    model = UNet(4)
    options = map_options(parse_config([], ""), model)
    assert options["target_layer"] is model.encoder4 and options["normalise_cam"] is True
    assert (options["passes"], options["seed"], options["precision"], AUTO_PRECISION) == (30, 42, "auto", "fp32")
    other = map_options(parse_config(["--cam-scale", "none", "--target-layer", "bottleneck"], ""), model)
    assert other["target_layer"] is model.bottleneck and other["normalise_cam"] is False


# ---------------------------------------------------------------- reading


def test_maps_come_as_tensors_with_their_numbers(folder):
    for index, (id, maps) in enumerate(SavedMaps(folder, IDS, CPU, 0.375)):
        assert id == IDS[index]
        assert set(maps) == {*MEASURED, "empty_cams", "threshold"}
        assert (maps["empty_cams"], maps["threshold"]) == (index, 0.375)
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
    assert _values(shares[0]) + _values(shares[1]) == [whole[0], whole[2], whole[1]]
    assert reads == {"a": 1, "b": 1, "c": 1}


def test_maps_of_another_run_and_broken_ones_are_not_current(folder):
    saved = SavedMaps(folder, [*IDS, "lost"], CPU, 0.5)
    (folder / "b.npz").write_bytes(b"half a fi")
    assert [saved.is_current(id, "identity") for id in saved.ids] == [True, False, True, False]
    assert not saved.is_current("a", "another")


# ---------------------------------------------------------------- the fused score


def test_the_fused_score_is_added_once_and_again_for_another_fusion(folder):
    before = {id: read_maps(folder / f"{id}.npz", MEASURED) for id in IDS}
    SavedMaps(folder, IDS, CPU, 0.5).add_fused_scores(FUSION, ALONE)
    for id in IDS:
        maps = read_maps(folder / f"{id}.npz")
        # lambda times the predictive variance over its range, and the rest the saliency variance over its own
        expected = 0.75 * maps["pred_variance"] / 0.25 + 0.25 * maps["saliency_variance"] / 0.5
        np.testing.assert_allclose(maps["fused_score"], expected, rtol=1e-6)
        for name in (*MEASURED, "empty_cams", "fallbacks", "identity"):
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
        assert maps["empty_cams"] == int(expected.empty_cams[0])
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
