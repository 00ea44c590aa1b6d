"""The saved counts: read back, and refused where they are of other images, shapes, types or values."""

from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import make_images

from evaluation.counting import count_scores
from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from evaluation.protocol import validation_edges
from experiment.saved_counts import IMAGE_ARRAYS, read_counts
from runtime.errors import UserError

FUSION = Fusion(Linear(0.0, 0.25), Linear(0.0, 1.0))


@pytest.fixture(scope="module")
def counted():
    """Real counts of two parts."""
    validation = count_scores(make_images(2, seed=1, prefix="v"), FUSION, bins=4)
    edges = validation_edges(validation)
    return {"validation": validation, "test": count_scores(make_images(3, seed=2, prefix="t"), FUSION, bins=4, edges=edges)}


@pytest.fixture(scope="module")
def ids(counted):
    return {"train": ["x"], **{part: list(counts.ids) for part, counts in counted.items()}}


@pytest.fixture
def arrays(counted):
    return {"identity": np.array("i"), **{
        f"{part}/{name}": values for part, counts in counted.items() for name, values in counts.to_arrays().items()}}


def test_real_counts_come_back(tmp_path, counted, ids, arrays):
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    found = read_counts(tmp_path / "c.npz", "i", ids)
    for part, counts in counted.items():
        assert found[part].ids == counts.ids and found[part].images.keys() == counts.images.keys()
        for name, values in counts.images.items():
            np.testing.assert_array_equal(found[part].images[name], values)
    # every array of a real run is described, none more
    assert counted["test"].images.keys() == IMAGE_ARRAYS.keys()


@pytest.mark.parametrize("edit", [
    lambda a: a.pop("test/ids"), lambda a: a.pop("identity"), lambda a: a.update({"test/bins": np.array(3)}),
    lambda a: a.update({"test/ids": np.array(["a", "b", "c"])}), lambda a: a.update({"test/ids": np.array(["a"])}),
    lambda a: a.update({"test/image_count": a["test/image_count"].astype(float)}),
    lambda a: a.update({"test/image_count": a["test/image_count"][:, :2]}),
    lambda a: a.update({"test/image_count": -a["test/image_count"]}),
    lambda a: a.update({"test/image_largest": a["test/image_largest"] * np.nan}),
    lambda a: a.update({"test/image_joint": a["test/image_joint"][..., :3]}),
    lambda a: a.update({"test/image_other": np.ones(3)}), lambda a: a.update({"far/ids": np.array(["a"])}),
    lambda a: a.update({"test/edges": np.zeros((2, 10**6), np.int8)}), lambda a: a.update({"other": np.ones(3)}),
    lambda a: a.update({"test/lambdas": np.array(["a"] * 11)}), lambda a: a.update({"test/bins": np.array([4])}),
], ids=range(16))
def test_counts_of_something_else_are_one_line(tmp_path, ids, arrays, edit):
    edit(arrays)
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    with pytest.raises(UserError, match="c.npz does not hold the counts of a run") as caught:
        read_counts(tmp_path / "c.npz", "i", ids)
    assert str(caught.value).isprintable()


def test_counts_of_another_run_are_refused(tmp_path, ids, arrays):
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    with pytest.raises(UserError, match="c.npz is not of the run that the metrics.json beside it describes"):
        read_counts(tmp_path / "c.npz", "j", ids)
