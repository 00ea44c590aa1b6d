from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import Images, make_images
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.normalisation import NORMALISATIONS, Linear, distributions, rank, robust_quantile


def test_min_max_of_known_numbers():
    normalise = Linear(2.0, 6.0)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 7.0])
    assert normalise(values).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert normalise.outside(values) == 2
    assert values.tolist() == [1.0, 2.0, 3.0, 6.0, 7.0]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 0.25, width=32), st.floats(0, 0.25, width=32), st.floats(0, 0.25, width=32))
def test_ends_of_the_range_are_exact_and_nothing_leaves_it(first, second, value):
    low, high = sorted((first, second))
    found = Linear(low, high)(torch.tensor([low, high, value]))
    assert found[0] == 0 and found[1] == (1 if high > low else 0)
    assert 0 <= found[2] <= 1


def test_a_constant_variance_is_normalised_to_zero():
    assert Linear(0.1, 0.1)(torch.full((3,), 0.1)).tolist() == [0, 0, 0]


def test_constants_come_from_all_validation_pixels():
    images = make_images(5)
    found = distributions(images)
    for name in (PREDICTIVE, SALIENCY):
        everything = torch.cat([maps[name].flatten() for _, maps in images])
        assert (found[name].low, found[name].high) == (float(everything.min()), float(everything.max()))
        assert found[name].histogram.sum() == len(everything)
        assert not found[name].flat


def test_one_value_everywhere_is_flat():
    images = make_images(2)
    for _, maps in images:
        maps[SALIENCY].fill_(0.25)
    assert distributions(images)[SALIENCY].flat and not distributions(images)[PREDICTIVE].flat


def test_robust_quantiles():
    images = make_images(5)
    found = distributions(images)[SALIENCY]
    everything = torch.cat([maps[SALIENCY].flatten() for _, maps in images]).numpy()
    robust = NORMALISATIONS["robust_quantile"](found)
    assert robust.low == pytest.approx(np.quantile(everything, 0.01), abs=1e-9)
    assert robust.high == pytest.approx(np.quantile(everything, 0.99), rel=0.01)


def test_rank_is_uniform_on_validation_and_keeps_order():
    images = make_images(5)
    normalise = NORMALISATIONS["rank"](distributions(images)[SALIENCY])
    values = torch.cat([maps[SALIENCY].flatten() for _, maps in images]).sort().values
    ranks = normalise(values)
    assert (ranks.diff() >= 0).all()
    assert np.abs(ranks.numpy() - (np.arange(len(values)) + 0.5) / len(values)).max() < 2e-3
    assert normalise(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize("bad, message", [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1e-6, "negative")])
def test_bad_variances_are_named(bad, message):
    images = make_images(2)
    images.items[1][1][SALIENCY][0, 0] = bad
    with pytest.raises(ValueError, match=f"image_0001: saliency_variance .*{message}"):
        distributions(images)


def test_no_validation_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        distributions(Images([]))


def test_normalisations_by_histogram_see_values_above_one_as_they_see_those_below():
    generator = torch.Generator().manual_seed(0)
    maps = [("a", {name: torch.rand(64, 64, generator=generator) for name in ("pred_variance", "saliency_variance")})]
    scaled = [(id, {name: 1024 * values for name, values in one.items()}) for id, one in maps]
    assert distributions(scaled)["pred_variance"].unit == 1024.0 and distributions(maps)["pred_variance"].unit == 1.0
    for normalisation in (rank, robust_quantile):
        one, other = (normalisation(distributions(split)["pred_variance"]) for split in (maps, scaled))
        assert torch.equal(other(scaled[0][1]["pred_variance"]), one(maps[0][1]["pred_variance"]))
