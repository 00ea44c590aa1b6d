"""Never a silent null: each way to a void result is an error, each doubtful one a warning, and a good run has none."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from constructed_maps import make_images

from evaluation import evaluate
from experiment.checks import agree, check_first_image, check_predictive_range, warnings_of
from runtime.errors import UserError
from uncertainty import UncertaintyMaps

PASSES = 30


def maps(**changes: torch.Tensor) -> UncertaintyMaps:
    """Maps of one image of 2 x 2 pixels with nothing wrong about them."""
    one = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    whole = UncertaintyMaps(one, one / 4, one / 8, one, torch.tensor([1]), torch.tensor([0]), torch.tensor([0.9]).double())
    return whole._replace(**changes)


# ---------------------------------------------------------------- the first image


def test_maps_that_are_made_twice_alike_are_fine():
    check_first_image(maps(), maps(), "a")
    both = UncertaintyMaps(*(torch.cat([value, value.flip(-1)]) for value in maps()))
    check_first_image(both, maps(), "a")  # of a batch the first image is looked at


@pytest.mark.parametrize("name", UncertaintyMaps._fields)
def test_a_difference_in_anything_is_seen(name):
    value = getattr(maps(), name)
    other = value + 1 if value.dtype == torch.int64 else value * (1 + 1e-6)
    with pytest.raises(UserError, match="^a: maps differ when made twice: the model draws random numbers of its own"):
        check_first_image(maps(), maps(**{name: other}), "a")


def test_beyond_the_cpu_rounding_is_allowed_and_randomness_is_not():
    values = torch.tensor([0.5, 0.001])
    assert agree(values, values + 4e-4, exact=False) and not agree(values, values + 6e-4, exact=False)
    assert not agree(torch.tensor([3]), torch.tensor([4]), exact=False)
    assert agree(torch.zeros(2), torch.zeros(2), exact=False)
    assert not agree(values, torch.tensor([float("nan"), 0.001]), exact=False)


def test_passes_that_are_all_the_same_are_named_by_their_cause():
    none = torch.zeros(1, 2, 2)
    for changes, message in (
        ({}, "all passes are identical, so that every variance is zero: the dropout of the model does not reach its logits"),
        ({"mean_prediction": none + 0.25}, "the network predicts 0.25 in every pixel of every pass"),
    ):
        broken = maps(pred_variance=none, **changes)
        with pytest.raises(UserError, match=f"^ISIC_1: {message}"):
            check_first_image(broken, broken, "ISIC_1")
    one = none.clone()
    one[0, 1, 1] = 1e-12  # one pixel of one pass is enough
    check_first_image(maps(pred_variance=one), maps(pred_variance=one), "a")


@pytest.mark.parametrize("value", [0.0, 0.125])
def test_a_part_with_one_predictive_variance_is_refused(value):
    with pytest.raises(UserError, match=f"the predictive variance is {value:g} in every pixel of the validation images"):
        check_predictive_range("validation", {"pred_variance": (value, value), "saliency_variance": (0.0, 1.0)})
    check_predictive_range("validation", {"pred_variance": (value, 0.25), "saliency_variance": (0.0, 0.0)})


# ---------------------------------------------------------------- warnings


@pytest.fixture(scope="module")
def good():
    """Metrics and rows of constructed maps that the real code evaluated, and the ranges of their variances."""
    parts = {"validation": make_images(4, seed=1), "test": make_images(6, seed=2)}
    for images in parts.values():
        images.items = [(id, {k: v[:24] for k, v in one.items()} | {"empty_cams": 1}) for id, one in images.items]
    result = evaluate(parts["validation"], parts["test"], resamples=100)
    ranges = {
        part: {
            name: (min(float(one[name].min()) for _, one in images), max(float(one[name].max()) for _, one in images))
            for name in ("pred_variance", "saliency_variance")
        }
        for part, images in parts.items()
    }
    return result.metrics, result.rows, ranges


def codes(good, passes=PASSES, metrics=None, rows=None, ranges=None):
    """The codes of the warnings of a good run with some things changed."""
    found = warnings_of(metrics or good[0], rows or good[1], passes, ranges or good[2])
    assert json.loads(json.dumps(found)) == found  # goes into metrics.json as it is
    assert all(set(entry) == {"code", "text"} and entry["text"].endswith(".") for entry in found)
    return [entry["code"] for entry in found]


def test_a_good_run_is_quiet(good):
    assert good[0]["test"]["dice"] > 0.5 and good[0]["test"]["empty_cams"] == 6
    assert codes(good) == []


def changed(good, part, **values):
    metrics = deepcopy(good[0])
    metrics[part].update(values)
    return metrics


def test_a_low_dice_is_said(good):
    assert codes(good, metrics=changed(good, "test", dice=0.4999)) == ["low_dice"]
    assert codes(good, metrics=changed(good, "test", dice=0.5)) == []
    assert codes(good, metrics=changed(good, "test", dice=None)) == []  # not a number
    assert codes(good, metrics=changed(good, "validation", dice=0.1)) == []


@pytest.mark.parametrize("part", ["validation", "test"])
def test_mostly_empty_heatmaps_are_said(good, part):
    images = good[0][part]["images"]
    assert codes(good, metrics=changed(good, part, empty_cams=images * PASSES // 2)) == []
    assert codes(good, metrics=changed(good, part, empty_cams=images * PASSES // 2 + 1)) == ["empty_heatmaps"]
    assert codes(good, metrics=changed(good, part, empty_cams=None)) == []  # nobody counted


@pytest.mark.parametrize(("code", "pixels", "what"), [("no_lesion", 0, "no lesion"), ("all_lesion", 576, "nothing but lesion")])
def test_a_network_that_predicts_the_same_everywhere_is_named(good, code, pixels, what):
    assert good[0]["test"]["pixels"] == 6 * 576
    for count, expected in ((3, []), (4, [code])):
        rows = [{**row, "predicted_pixels": pixels} if index < count else row for index, row in enumerate(good[1])]
        assert codes(good, rows=rows) == expected
    (found,) = warnings_of(good[0], rows, PASSES, good[2])
    assert found["text"] == f"The network predicts {what} in 4 of 6 test images."


@pytest.mark.parametrize(("part", "text"), [
    ("validation", "Only lambda = 1 says anything"), ("test", "the fused score knows nothing of saliency, whatever lambda is"),
])
def test_a_constant_saliency_variance_is_said(good, part, text):
    ranges = {**good[2], part: {**good[2][part], "saliency_variance": (0.0, 0.0)}}
    assert codes(good, ranges=ranges) == ["constant_saliency_variance"]
    assert text in warnings_of(good[0], good[1], PASSES, ranges)[0]["text"]


def test_constant_flips_and_several_things_at_once(good):
    ranges = {part: {**found, "flip_variance": (0.0, 0.0)} for part, found in good[2].items()}
    metrics = changed(good, "test", dice=0.1, empty_cams=6 * PASSES)
    rows = [{**row, "predicted_pixels": 0} for row in good[1]]
    assert codes(good, metrics=metrics, rows=rows, ranges=ranges) == [
        "low_dice", "no_lesion", "constant_flip_variance", "constant_flip_variance", "empty_heatmaps"
    ]
