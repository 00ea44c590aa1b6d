from __future__ import annotations

import pytest
import torch
from constructed_maps import constructed_images, make_images
from slow_regions import slow_outcome

from evaluation.fusion import Fusion
from evaluation.image_maps import checked_maps, pixels_in_region, wrong_pixels
from evaluation.names import PREDICTIVE, REGIONS, SALIENCY
from evaluation.normalisation import distributions, min_max
from evaluation.sampling import draw_pixels, drawn_pixels, foreground_sample


def test_drawn_pixels_depend_on_seed_and_id_alone():
    everything = torch.arange(1000)
    drawn = draw_pixels("a", everything, 50, 1)
    assert len(drawn) == len(set(drawn.tolist())) == 50
    assert torch.equal(drawn, draw_pixels("a", everything, 50, 1))
    assert not torch.equal(drawn, draw_pixels("b", everything, 50, 1))
    assert not torch.equal(drawn, draw_pixels("a", everything, 50, 2))
    assert torch.equal(draw_pixels("a", everything, 1000, 1), everything)


def test_foreground_sample_stands_for_the_whole_foreground():
    images = constructed_images(4, "informative")
    found = distributions(images)
    features, wrong, weight = foreground_sample(images, Fusion(min_max(found[PREDICTIVE]), min_max(found[SALIENCY])), 64)
    assert features.shape == (4 * 64, 2) and len(wrong) == len(weight) == 4 * 64
    assert weight.sum() == sum(int(maps["true_mask"].sum()) for _, maps in images)
    assert features.min() >= 0 and features.max() <= 1


def test_every_region_gives_its_pixels_with_their_errors():
    images = make_images(2)
    drawn = drawn_pixels(images, limit=10**6, seed=1)
    for place, (identifier, maps) in enumerate(images):
        flat = checked_maps(identifier, maps)
        outcome = torch.from_numpy(slow_outcome(maps))
        for region in REGIONS:
            inside, found = pixels_in_region(outcome, region), drawn[region][place]
            assert torch.equal(found.maps[SALIENCY], flat[SALIENCY][inside])
            assert found.wrong.tolist() == wrong_pixels(outcome)[inside].tolist()
            assert (found.weight == 1).all()


def test_a_drawn_pixel_stands_for_its_share_of_the_region():
    drawn = drawn_pixels(make_images(3), limit=20, seed=1)
    whole = [found.weight.sum() for found in drawn["whole_image"]]
    assert whole == pytest.approx([maps["true_mask"].numel() for _, maps in make_images(3)])
    assert all(len(found.wrong) == 20 for found in drawn["foreground"])
