"""Map files: read back as they were written, without pickle; what is wrong with one is named."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from experiment.map_files import EXTRA_ARRAYS, MAP_ARRAYS, read_maps, write_maps
from runtime.errors import UserError


def some_maps() -> dict[str, np.ndarray]:
    return {name: np.full((4, 6), 0.5 if name == "expected_entropy" else 1, kind) for name, kind in MAP_ARRAYS.items()}


def test_maps_round_trip_without_pickle(tmp_path):
    write_maps(tmp_path / "x.npz", some_maps(), 3, "abc")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
        assert set(content.files) == {*MAP_ARRAYS, "empty_cams", "fallbacks", "identity", "checksum"}
    maps = read_maps(tmp_path / "x.npz")
    assert (maps["empty_cams"], maps["identity"]) == (3, "abc")
    np.testing.assert_array_equal(maps["pred_variance"], 1)


def test_the_numbers_beside_the_maps_come_back_as_plain_ones(tmp_path):
    values = {name: (np.arange(24).reshape(4, 6) / 64).astype(kind) for name, kind in MAP_ARRAYS.items()}
    values["true_mask"] = (np.arange(24).reshape(4, 6) % 2).astype(np.uint8)
    write_maps(tmp_path / "x.npz", values, 3, "abc", fallbacks=1, fusion="f", pass_dice=1 / 3)
    maps = read_maps(tmp_path / "x.npz")
    assert {name: maps[name] for name in maps if name not in MAP_ARRAYS} == {
        "empty_cams": 3, "fallbacks": 1, "identity": "abc", "fusion": "f", "pass_dice": 1 / 3}
    names = ("empty_cams", "fallbacks", "identity", "fusion", "pass_dice")
    assert [type(maps[name]) for name in names] == [int, int, str, str, float]
    with np.load(tmp_path / "x.npz") as content:
        assert content["pass_dice"].dtype == np.float64
    for name, expected in values.items():
        assert maps[name].dtype == MAP_ARRAYS[name]
        np.testing.assert_array_equal(maps[name], expected)


def test_the_fused_score_may_come_later(tmp_path):
    maps = {name: values for name, values in some_maps().items() if name != "fused_score"}
    write_maps(tmp_path / "x.npz", maps, 0, "")
    assert "fused_score" not in read_maps(tmp_path / "x.npz", maps)
    with pytest.raises(UserError, match="x.npz lacks fused_score; delete it and run main.py again"):
        read_maps(tmp_path / "x.npz")


def test_a_file_of_an_earlier_version_has_no_pass_dice(tmp_path):
    write_maps(tmp_path / "x.npz", some_maps(), 0, "")
    assert math.isnan(read_maps(tmp_path / "x.npz")["pass_dice"])


@pytest.mark.parametrize("value", [-0.1, 1.1, np.inf, np.nan])
def test_a_pass_dice_outside_its_range_is_named(tmp_path, value):
    arrays = {"empty_cams": np.array(0), "fallbacks": np.array(0), "identity": np.array("a"), "pass_dice": np.array(value)}
    np.savez(tmp_path / "x.npz", **some_maps(), **arrays)
    with pytest.raises(UserError, match="x.npz: pass_dice is .*, outside 0 to 1; delete it"):
        read_maps(tmp_path / "x.npz")


def test_the_variance_over_flips_is_there_where_it_was_written_and_checked(tmp_path):
    flips = {name: np.full((4, 6), 0.5, kind) for name, kind in EXTRA_ARRAYS.items()}
    write_maps(tmp_path / "x.npz", {**some_maps(), **flips}, 0, "")
    np.testing.assert_array_equal(read_maps(tmp_path / "x.npz")["flip_variance"], flips["flip_variance"])
    write_maps(tmp_path / "x.npz", some_maps(), 0, "")
    assert "flip_variance" not in read_maps(tmp_path / "x.npz")
    with pytest.raises(UserError, match="x.npz lacks flip_variance"):
        read_maps(tmp_path / "x.npz", (*MAP_ARRAYS, "flip_variance"))
    for bad in (np.ones((4, 6)), np.full((4, 6), np.nan, np.float32)):
        write_maps(tmp_path / "x.npz", {**some_maps(), "flip_variance": bad}, 0, "")
        with pytest.raises(UserError, match="x.npz: flip_variance"):
            read_maps(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"pred_variance": None}, "lacks pred_variance"),
        ({"pred_variance": np.full((4, 6), np.nan, np.float32)}, "pred_variance holds NaN"),
        ({"pred_variance": np.ones((4, 5), np.float32)}, "pred_variance is float32"),
        ({"pred_variance": np.ones((4, 6))}, "pred_variance is float64"),
        ({"true_mask": np.ones((4, 6), np.int64)}, "true_mask is int64"),
    ],
)
def test_maps_that_are_wrong_are_named(tmp_path, damage, message):
    maps = {**some_maps(), **damage}
    write_maps(tmp_path / "x.npz", {name: values for name, values in maps.items() if values is not None}, 0, "")
    with pytest.raises(UserError, match=f"x.npz.*{message}"):
        read_maps(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("name", "value"), [
        ("empty_cams", np.ones(2, int)), ("identity", np.array(3)), ("fallbacks", np.array(0.5)), ("pass_dice", np.array(1)),
    ],
)
def test_numbers_of_another_kind_are_named(tmp_path, name, value):
    arrays = {"empty_cams": np.array(0), "fallbacks": np.array(0), "identity": np.array("a"), "pass_dice": np.array(0.5)}
    arrays[name] = value
    np.savez(tmp_path / "x.npz", **some_maps(), **arrays)
    with pytest.raises(UserError, match=f"x.npz: {name} is {value.dtype}"):
        read_maps(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 broken", random.Random(0).randbytes(300)], ids=["empty", "half a zip file", "noise"]
)
def test_files_that_are_no_maps_are_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="x.npz is not a map file"):
        read_maps(tmp_path / "x.npz")
