from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import make_images

from evaluation.fusion import Fusion
from evaluation.names import SCORES
from evaluation.normalisation import Linear
from evaluation.scores import binary_entropy, largest_uncertainties, uncertainty_scores, window_sums


def test_scores_of_known_numbers():
    maps = {
        "mean_prediction": torch.tensor([0.5, 1.0, 0.0, 0.25]),
        "pred_variance": torch.tensor([0.1, 0.2, 0.0, 0.3]),
        "saliency_variance": torch.tensor([0.0, 0.4, 0.2, 0.2]),
        "expected_entropy": torch.tensor([0.0, 0.0, 0.1, 0.5]),
    }
    found = uncertainty_scores(maps, Fusion(Linear(0.0, 0.2), Linear(0.0, 0.4), "convex", 0.5))
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    expected = {
        "predictive_variance": [0.5, 1, 0, 1],
        "saliency_variance": [0, 1, 0.5, 0.5],
        "fused": [0.25, 1, 0.25, 0.75],
        "predictive_entropy": [1, 0, 0, entropy / np.log(2)],
        "mutual_information": [1, 0, 0, (entropy - 0.5) / np.log(2)],  # -0.1 becomes 0
        "one_minus_max_probability": [0.5, 0, 0, 0.25],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-6)


def test_entropy_at_the_ends():
    assert binary_entropy(torch.tensor([0.0, 1.0, 0.5])).tolist() == pytest.approx([0, 0, np.log(2)])


def test_scores_have_the_order_of_their_names_and_leave_the_maps_alone():
    (_, maps), = make_images(1)
    copies = {name: value.clone() for name, value in maps.items()}
    assert tuple(uncertainty_scores(maps, Fusion(Linear(0.0, 0.1), Linear(0.0, 0.1)))) == SCORES
    assert all(torch.equal(maps[name], copy) for name, copy in copies.items())


# ---------------------------------------------------------------- the most uncertain part of an image


@pytest.mark.parametrize("pixels", [1, 19, 20, 21, 40, 57, 400])
def test_the_quantile_is_a_value_that_95_percent_do_not_exceed(pixels):
    scores = torch.rand(2, pixels, generator=torch.Generator().manual_seed(pixels)).round(decimals=1)
    found = largest_uncertainties(scores, (pixels,))
    for row, quantile, largest in zip(scores.numpy(), found["quantile95"], found["largest_patch"]):
        lower = row[row < quantile]
        assert quantile in row and 20 * (row <= quantile).sum() >= 19 * pixels > 20 * len(lower)
        assert largest == row.max()


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 16, 23])
def test_window_sums_are_those_of_a_loop(length):
    values = torch.rand(3, 23, 25, generator=torch.Generator().manual_seed(length))
    for axis in (1, 2):
        assert torch.allclose(window_sums(values, length, axis), values.unfold(axis, length, 1).sum(-1), rtol=1e-5)


def test_the_largest_patch_may_lie_anywhere():
    scores = torch.zeros(2, 40, 64)
    scores[0, 7:12, 30:35] = 1.0  # 40 // 8 = 5 pixels
    scores[1, 35:, 59:] = 0.5  # in the last corner
    found = largest_uncertainties(scores.view(2, -1), (40, 64))
    assert found["largest_patch"] == pytest.approx([1.0, 0.5]) and found["quantile95"].tolist() == [0.0, 0.0]
