"""Flips at test time: the eight symmetries, each undone, against a loop in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_networks import pictures, relative_error, unet
from torch import nn

from inference import flips
from inference.flips import SYMMETRIES, flip_variance, turned, turned_back
from uncertainty import flip_variance as exported


def test_the_eight_symmetries_are_different_and_undone():
    x = torch.arange(12).view(1, 3, 4)
    seen = set()
    for symmetry in SYMMETRIES:
        assert torch.equal(turned_back(turned(x, *symmetry), *symmetry), x)
        seen.add(tuple(turned(torch.arange(9).view(3, 3), *symmetry).flatten().tolist()))
    assert len(SYMMETRIES) == len(seen) == 8


def slow_variance(model: nn.Module, image: torch.Tensor) -> np.ndarray:
    """By NumPy's own flips and turns, one forward each, in float64."""
    twin = unet(dropout=0.2).double()
    twin.load_state_dict(model.state_dict())
    probabilities = []
    for flipped in (False, True):
        for turns in range(4):
            view = image.double().numpy()[:, :, ::-1] if flipped else image.double().numpy()
            view = np.rot90(view, turns, (1, 2)).copy()
            p = torch.sigmoid(twin(torch.from_numpy(view)[None]))[0, 0].detach().numpy()
            p = np.rot90(p, -turns)
            probabilities.append(p[:, ::-1] if flipped else p)
    return np.var(np.stack(probabilities), 0)


@pytest.mark.parametrize("together", [8, 3])
def test_it_is_the_population_variance_over_the_eight_views(monkeypatch, together):
    model, images = unet(), pictures(2, 48, 48)
    monkeypatch.setattr(flips, "PIXELS", together * 48 * 48)
    found = flip_variance(model, images)
    assert found.dtype == torch.float32 and found.shape == (2, 48, 48)
    expected = torch.from_numpy(np.stack([slow_variance(model, image) for image in images]))
    assert expected.max() > 1e-3
    assert relative_error(found, expected) < 1e-5


def test_an_image_has_the_same_map_in_any_company_and_the_same_one_twice():
    model, images = unet(), pictures(2, 48, 48)
    both = flip_variance(model, images)
    assert torch.equal(both[1:], flip_variance(model, images[1:])) and torch.equal(both, flip_variance(model, images))


def test_dropout_is_off_and_the_modes_are_put_back():
    model, images = unet(), pictures(1, 48, 48)
    expected = flip_variance(unet(dropout=0.0), images)
    model.train()
    model.decoder2.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.encoder1[1].running_mean.clone()
    assert torch.equal(flip_variance(model, images), expected)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(model.encoder1[1].running_mean, statistics)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_that_commutes_with_flips_has_no_variance():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AvgPool2d(3, 1, 1))
    assert flip_variance(model, pictures(1, 16, 16)).max() < 1e-12


def test_images_that_are_not_square_or_overflow_are_an_error():
    model = unet()
    with pytest.raises(ValueError, match="square images, not 48 x 80"):
        flip_variance(model, pictures())
    model.train()
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        flip_variance(model, pictures(1, 48, 48))
    assert model.training


def test_no_image_has_no_map_and_the_function_is_exported():
    assert flip_variance(unet(), pictures(1, 48, 48)[:0]).shape == (0, 48, 48)
    assert exported is flip_variance
