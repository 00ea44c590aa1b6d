"""Files of maps from elsewhere: what is read of them, and the one line that each misfit gets."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from given_maps import arrays_of

from experiment.given_files import facts_of, read_given
from runtime.errors import UserError

SCORES = ("entropy", "variance")


def write(path: Path, **changes: object) -> Path:
    arrays = {**arrays_of(6), **changes}
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("mask", [bool, np.uint8, np.int64, np.int8])
def test_types_of_every_size_are_read(tmp_path, kind, mask):
    arrays = arrays_of(6)
    floats = {name: arrays[name].astype(kind) for name in ("mean_prediction", *SCORES)}
    maps = read_given(write(tmp_path / "a.npz", **floats, true_mask=arrays["true_mask"].astype(mask)), SCORES)
    assert {name: values.dtype for name, values in maps.items()} == {
        "mean_prediction": np.float32, "true_mask": np.uint8, "pred_variance": np.float32, "saliency_variance": np.float32}
    for name, array in (("pred_variance", "entropy"), ("saliency_variance", "variance"), ("mean_prediction", "mean_prediction")):
        np.testing.assert_array_equal(maps[name], floats[array].astype(np.float32))
    np.testing.assert_array_equal(maps["true_mask"], arrays["true_mask"])


def test_what_is_not_needed_is_read_where_it_is_there(tmp_path):
    image = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    path = write(tmp_path / "a.npz", image=image, expected_entropy=np.full((6, 6), math.log(2)), group=np.array("p 1"))
    maps = read_given(path, SCORES)
    np.testing.assert_array_equal(maps["image"], image)
    assert maps["group"] == "p 1" and maps["expected_entropy"].dtype == np.float32
    facts = facts_of(path, SCORES)
    assert (facts.group, facts.entropy, facts.image, facts.foreground) == ("p 1", True, True, True)


@pytest.mark.parametrize(
    ("value", "group"),
    [(np.array(7), "7"), (np.array([7.0]), "7"), (np.array(7.5), "7.5"), (np.array(b"x"), "x"), (np.array(" y "), "y")],
)
def test_a_group_is_a_text(tmp_path, value, group):
    assert read_given(write(tmp_path / "a.npz", group=value), SCORES)["group"] == group


def test_fingerprints_follow_the_content_alone(tmp_path):
    path = write(tmp_path / "a.npz")
    facts = facts_of(path, SCORES)
    np.savez(tmp_path / "b.npz", **{name: arrays_of(6)[name] for name in reversed(list(arrays_of(6)))}, more=np.zeros(3))
    assert facts_of(tmp_path / "b.npz", SCORES) == facts
    other = facts_of(write(tmp_path / "c.npz", variance=arrays_of(6)["variance"] + 1), SCORES)
    assert other.truth == facts.truth and other.content != facts.content
    other = facts_of(write(tmp_path / "d.npz", true_mask=~arrays_of(6)["true_mask"]), SCORES)
    assert other.truth != facts.truth and other.content == facts.content
    assert facts_of(path, ("variance", "entropy")).content != facts.content


SPOILT = {
    "no array": ({"variance": None}, r"a.npz holds no array variance; it holds entropy, mean_prediction, true_mask$"),
    "integer": ({"entropy": np.ones((6, 6), int)}, "a.npz: entropy is of type int64; it must be float16, float32 or float64"),
    "complex": ({"entropy": np.ones((6, 6), complex)}, "entropy is of type complex128"),
    "channel": ({"mean_prediction": np.ones((1, 6, 6))}, r"mean_prediction has shape \(1, 6, 6\); it must be \(H, W\)"),
    "empty": ({"mean_prediction": np.ones((0, 6))}, r"mean_prediction has shape \(0, 6\)"),
    "other shape": ({"variance": np.ones((6, 5))}, r"variance has shape \(6, 5\), mean_prediction \(6, 6\)"),
    "mask shape": ({"true_mask": np.ones((3, 3), bool)}, r"true_mask has shape \(3, 3\)"),
    "above 1": ({"mean_prediction": np.full((6, 6), 1.5)}, "mean_prediction must be a probability, from 0 to 1; found .* 1.5"),
    "below 0": ({"mean_prediction": np.full((6, 6), -0.5)}, "mean_prediction must be a probability"),
    "NaN": ({"variance": np.full((6, 6), np.nan)}, "variance holds NaN or infinite values"),
    "infinite": ({"entropy": np.full((6, 6), np.inf)}, "entropy holds NaN or infinite values"),
    "negative": ({"entropy": np.full((6, 6), -1.0)}, "entropy must be 0 or more; found values from -1 to -1"),
    "too large": ({"entropy": np.full((6, 6), 1e300)}, "entropy holds values that float32 cannot"),
    "too small": ({"variance": np.full((6, 6), 1e-300)}, "variance holds values that float32 cannot"),
    "255": ({"true_mask": np.full((6, 6), 255)}, "true_mask must hold 0 and 1; found 255"),
    "minus 1": ({"true_mask": np.full((6, 6), -1)}, "true_mask must hold 0 and 1; found -1"),
    "float mask": ({"true_mask": np.ones((6, 6))}, "true_mask is of type float64; it must be bool or an integer type"),
    "bits": ({"expected_entropy": np.ones((6, 6))}, "expected_entropy must be in nats, from 0 to ln 2"),
    "grey image": ({"image": np.ones((6, 6), np.uint8)}, r"image is uint8 \(6, 6\); it must be uint8 \(6, 6, 3\)"),
    "float image": ({"image": np.ones((6, 6, 3))}, "image is float64"),
    "objects": ({"variance": np.array([["x", None]], object)}, "variance holds Python objects, which are never loaded"),
    "group objects": ({"group": np.array({"a": 1}, object)}, "group holds Python objects"),
    "groups": ({"group": np.array(["a", "b"])}, r"group is <U1 \(2,\)"),
    "no group": ({"group": np.array("  ")}, "group is empty"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_misfit_is_one_line_with_file_and_array(tmp_path, what):
    changes, message = SPOILT[what]
    path = write(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=message) as error:
        read_given(path, SCORES)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_value_that_rounding_takes_past_one_is_a_probability(tmp_path):
    assert read_given(write(tmp_path / "a.npz", mean_prediction=np.full((6, 6), 1 + 1e-12)), SCORES)["mean_prediction"].max() == 1


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_one_line(tmp_path, kept):
    content = write(tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="a.npz is not a whole .npz file"):
        read_given(tmp_path / "a.npz", SCORES)


def test_a_damaged_member_is_one_line(tmp_path):
    content = bytearray(write(tmp_path / "a.npz").read_bytes())
    place = content.index(b"mean_prediction.npy") + 60
    content[place:place + 40] = bytes(40)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="a.npz is not a whole .npz file"):
        read_given(tmp_path / "a.npz", SCORES)


def test_an_array_that_claims_more_than_its_bytes_is_refused_before_memory_is_taken(tmp_path):
    write(tmp_path / "a.npz")
    claim = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {(1 << 40, 8)}, }}"
    head = b"\x93NUMPY\x01\x00v\x00" + claim.ljust(117).encode()
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as out, zipfile.ZipFile(tmp_path / "a.npz") as source:
        for name in source.namelist():
            out.writestr(name, head + b"\n" if name == "entropy.npy" else source.read(name))
    with pytest.raises(UserError, match="b.npz is not a whole .npz file .an array is larger than its file"):
        read_given(tmp_path / "b.npz", SCORES)


def test_a_file_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read .*a.npz: No such file"):
        read_given(tmp_path / "a.npz", SCORES)
