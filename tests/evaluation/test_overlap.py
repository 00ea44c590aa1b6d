from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score

from evaluation.overlap import dice_and_jaccard, overlap_of_outcomes, segmentation_overlap


def test_overlap_of_outcomes():
    pixels = np.array([[5, 1, 2, 3], [9, 0, 0, 0], [8, 1, 0, 0], [0, 0, 0, 9]])
    dice, jaccard = overlap_of_outcomes(pixels)
    assert dice.tolist() == [2 * 3 / (2 * 3 + 1 + 2), 1, 0, 1]
    assert jaccard.tolist() == [3 / 6, 1, 0, 1]


def test_overlap_of_masks_is_that_of_their_outcomes():
    generator = torch.Generator().manual_seed(0)
    prediction, truth = (torch.rand(7, 9, 5, generator=generator) > 0.6 for _ in range(2))
    prediction[0], truth[0] = False, False
    prediction[1], truth[2] = False, False
    code = 2 * truth.long() + prediction.long()
    pixels = np.stack([(code == outcome).flatten(1).sum(1).numpy() for outcome in range(4)], 1)
    for masks, counts in zip(segmentation_overlap(prediction, truth), overlap_of_outcomes(pixels)):
        assert masks.dtype == torch.float64 and masks.tolist() == counts.tolist()
    dice, jaccard = segmentation_overlap(prediction, truth)
    assert dice[:3].tolist() == jaccard[:3].tolist() == [1, 0, 0]
    both, either = (prediction & truth).flatten(1).sum(1), (prediction | truth).flatten(1).sum(1)
    assert jaccard[3:].tolist() == (both.double() / either)[3:].tolist()
    assert torch.allclose(dice, 2 * jaccard / (1 + jaccard), rtol=0, atol=1e-15)


def test_overlap_keeps_the_type_of_the_counts():
    dice, jaccard = dice_and_jaccard(*(torch.tensor([value], dtype=torch.float32) for value in (2, 1, 1)))
    assert dice.dtype == jaccard.dtype == torch.float32 and dice.item() == torch.tensor(4 / 6).item() and jaccard.item() == 0.5


def test_overlap_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    prediction, truth = (torch.rand(5, 9, 7, generator=generator) > 0.6 for _ in range(2))
    dice, jaccard = segmentation_overlap(prediction, truth)
    for i in range(5):
        assert dice[i].item() == pytest.approx(f1_score(truth[i].flatten(), prediction[i].flatten()), abs=1e-12)
        assert jaccard[i].item() == pytest.approx(jaccard_score(truth[i].flatten(), prediction[i].flatten()), abs=1e-12)


def test_overlap_of_empty_masks_is_one_and_of_disjoint_ones_zero():
    empty, full = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    assert [float(value) for value in segmentation_overlap(empty, empty)] == [1, 1]
    assert [float(value) for value in segmentation_overlap(empty, full)] == [0, 0]
