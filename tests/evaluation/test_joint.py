import numpy as np
import pytest
import torch
from constructed_maps import make_images

from evaluation.fusion import Fusion
from evaluation.image_maps import checked_maps
from evaluation.joint import CELLS, joint_of_image, shuffled, variance_cell, with_other_saliency
from evaluation.normalisation import Linear

FUSION = Fusion(Linear(0.0, 0.05), Linear(0.0, 0.1))


def test_edges_are_fourth_powers():
    scale = Linear(1.0, 3.0)
    edges = 1.0 + 2.0 * (torch.arange(CELLS) / CELLS) ** 4
    inside = variance_cell(edges + 1e-4 * (edges - 1.0) + 1e-6, scale)
    assert torch.equal(inside[8:], torch.arange(CELLS)[8:])
    assert variance_cell(torch.tensor([0.0, 3.0, 99.0]), scale).tolist() == [0, CELLS - 1, CELLS - 1]


def test_counts_against_a_loop_over_pixels():
    identifier, maps = next(iter(make_images(1)))
    other = torch.flip(maps["saliency_variance"], (0,))
    row = joint_of_image(identifier, checked_maps(identifier, maps), other.reshape(-1), FUSION, cells=6)
    expected = np.zeros((3, 4, 6, 6), int)
    mixed = shuffled(variance_cell(maps["saliency_variance"].reshape(-1), FUSION.saliency, 6), identifier)
    for index in range(maps["true_mask"].numel()):
        truth = int(maps["true_mask"].reshape(-1)[index])
        outcome = 2 * truth + int(maps["mean_prediction"].reshape(-1)[index] > 0.5)
        first = int(variance_cell(maps["pred_variance"].reshape(-1)[index : index + 1], FUSION.predictive, 6))
        for variant, values in enumerate((maps["saliency_variance"], other)):
            expected[variant, outcome, first, int(variance_cell(values.reshape(-1)[index : index + 1], FUSION.saliency, 6))] += 1
        expected[2, outcome, first, int(mixed[index])] += 1
    np.testing.assert_array_equal(row["joint"], expected)
    assert row["cell_sums"].sum(1) == pytest.approx(
        [float(maps[name].double().sum()) for name in ("pred_variance", "saliency_variance")]
    )


def test_every_image_gets_the_saliency_of_another():
    images = list(make_images(3))
    found = {identifier: other for identifier, _, other in with_other_saliency(images)}
    before = {"image_0000": "image_0002", "image_0001": "image_0000", "image_0002": "image_0001"}
    for identifier, other in found.items():
        source = dict(images)[before[identifier]]["saliency_variance"]
        if source.shape == other.shape:
            assert torch.equal(source, other)
        assert other.shape == dict(images)[identifier]["saliency_variance"].shape
        assert set(other.reshape(-1).tolist()) <= set(source.reshape(-1).tolist())


def test_what_the_maps_bring_along_wins():
    identifier, maps = next(iter(make_images(1)))
    given = torch.zeros_like(maps["saliency_variance"])
    ((_, _, other),) = with_other_saliency([(identifier, {**maps, "other_saliency_variance": given})])
    assert torch.equal(other, given)


def test_shuffling_keeps_the_values_and_depends_on_the_id_alone():
    values = torch.arange(100.0).view(10, 10)
    mixed = shuffled(values, "a")
    assert torch.equal(mixed.reshape(-1).sort().values, values.reshape(-1)) and not torch.equal(mixed, values)
    assert torch.equal(mixed, shuffled(values, "a")) and not torch.equal(mixed, shuffled(values, "b"))
