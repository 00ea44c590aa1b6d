from __future__ import annotations

import pytest
import torch
from constructed_maps import make_images

from evaluation.image_maps import (
    check_unit_interval,
    check_variance,
    checked_maps,
    outcomes,
    pieces,
    pixels_in_region,
    wrong_pixels,
)
from evaluation.names import OUTCOMES, REGIONS


def test_outcomes():
    code = outcomes(torch.tensor([0.2, 0.8, 0.5, 0.51]), torch.tensor([0, 0, 1, 1], dtype=torch.uint8))
    assert code.tolist() == [0, 1, 2, 3]  # p = 0.5 is predicted background


def test_regions_and_errors_are_unions_of_outcomes():
    outcome = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = {"foreground": [2, 3, 4], "predicted_foreground": [1, 3, 4], "union": [1, 2, 3, 4]}
    expected["whole_image"] = [0, 1, 2, 3, 4, 5]
    assert {region: pixels_in_region(outcome, region).tolist() for region in REGIONS} == expected
    assert wrong_pixels(outcome).tolist() == [False, True, True, False, False, False]


def test_regions_are_unions_of_outcomes():
    assert set(REGIONS["union"]) == set(REGIONS["foreground"]) | set(REGIONS["predicted_foreground"])


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
