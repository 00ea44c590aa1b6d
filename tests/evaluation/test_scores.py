from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import make_images

from evaluation.fusion import Fusion
from evaluation.names import SCORES
from evaluation.normalisation import Linear
from evaluation.scores import binary_entropy, uncertainty_scores


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
