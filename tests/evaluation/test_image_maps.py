from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import make_images
from slow_regions import slow_band

from evaluation.image_maps import (
    band_reach,
    boundary_band,
    check_unit_interval,
    check_variance,
    checked_maps,
    outcomes,
    pieces,
    pixels_in_region,
    wrong_pixels,
)
from evaluation.names import CONDITIONS_ON_TRUTH, OUTCOMES, REGIONS


def test_outcomes():
    code = outcomes(torch.tensor([0.2, 0.8, 0.5, 0.51]), torch.tensor([0, 0, 1, 1], dtype=torch.uint8))
    assert code.tolist() == [0, 1, 2, 3]  # p = 0.5 is predicted background


def test_regions_and_errors_are_unions_of_outcomes():
    outcome = torch.tensor([0, 1, 2, 3, 7, 4, 6])
    expected = {"foreground": [2, 3, 4, 6], "predicted_foreground": [1, 3, 4], "union": [1, 2, 3, 4, 6]}
    expected.update(whole_image=[0, 1, 2, 3, 4, 5, 6], predicted_background=[0, 2, 5, 6], boundary_band=[4, 5, 6])
    assert {region: pixels_in_region(outcome, region).tolist() for region in REGIONS} == expected
    assert wrong_pixels(outcome).tolist() == [False, True, True, False, False, False, True]


def test_regions_are_unions_of_outcomes():
    assert set(REGIONS["union"]) == set(REGIONS["foreground"]) | set(REGIONS["predicted_foreground"])
    assert set(REGIONS["predicted_background"]) == set(REGIONS["whole_image"]) - set(REGIONS["predicted_foreground"])
    assert set(REGIONS["whole_image"]) == set(range(len(OUTCOMES)))


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_that_conditions_on_the_truth_is_one_that_changes_with_it(region):
    changes = any(
        (2 * 0 + predicted + 4 * band in REGIONS[region]) != (2 * 1 + predicted + 4 * band in REGIONS[region])
        for predicted in (0, 1) for band in (0, 1)
    )
    assert CONDITIONS_ON_TRUTH[region] == changes


@pytest.mark.parametrize("shape", [(128, 128), (24, 40), (1, 9), (60, 7), (256, 300), (3, 3)])
def test_the_band_is_that_of_a_loop_over_pixels(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    reach = max(1, round(min(shape) * 3 / 128))
    coarse = torch.rand(1, 1, -(-shape[0] // 16), -(-shape[1] // 16), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape, mode="bicubic")[0, 0]
    for label in (smooth > 0.5, torch.rand(shape, generator=generator) > 0.97, torch.zeros(shape) > 0, torch.ones(shape) > 0):
        found = boundary_band(label.to(torch.uint8))
        assert np.array_equal(found.numpy(), slow_band(label.numpy(), reach))
    assert band_reach(*shape) == reach


def test_the_band_follows_the_threshold_and_needs_an_image():
    (_, maps), = make_images(1)
    for threshold in (0.5, 0.25):
        band = slow_band(maps["mean_prediction"].numpy() > threshold, 1).ravel()
        assert np.array_equal(checked_maps("a", {**maps, "threshold": threshold})["outcome"].numpy() >= 4, band) and band.any()
    line = checked_maps("a", {name: values.flatten() for name, values in maps.items()})["outcome"]
    assert line.max() == 3 and torch.equal(line, checked_maps("a", maps)["outcome"] % 4)


def test_checked_maps_are_flat_and_say_what_was_predicted():
    (_, maps), = make_images(1)
    flat = checked_maps("a", {**maps, "threshold": 0.25})
    assert torch.equal(flat["predicted"], (maps["mean_prediction"] > 0.25).flatten().to(torch.uint8))
    for name in maps:
        assert torch.equal(flat[name], maps[name].flatten())


@pytest.mark.parametrize("pixels", [0, 1, 15_360, 15_361, 40_000])
def test_pieces_cover_every_pixel_once(pixels):
    parts = [torch.arange(pixels)[piece] for piece in pieces(pixels, torch.device("cpu"))]
    assert torch.equal(torch.cat(parts) if parts else torch.arange(0), torch.arange(pixels))
    assert all(len(part) < 2**14 for part in parts)  # what the counting needs


def test_no_pixel_passes_every_check():
    check_unit_interval(torch.zeros(0), "a map")
    check_variance(torch.zeros(0), "a map")


def test_an_outcome_has_a_name():
    truth, predicted = torch.tensor([0, 1]), torch.tensor([1.0, 1.0])
    assert [OUTCOMES[code] for code in outcomes(predicted, truth)] == ["false_positive", "true_positive"]
