from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import make_images
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from evaluation.image_ranking import rank_statistics
from evaluation.protocol import evaluate


def test_rank_statistics_of_weighted_images_are_those_of_repeated_ones():
    rng = np.random.default_rng(0)
    uncertainty, dice = np.round(rng.random(40), 1), np.round(rng.random(40), 2)  # with ties
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    for weight, (correlation, area) in zip(weights, rank_statistics(uncertainty, dice, weights)):
        images = np.repeat(np.arange(40), weight.astype(int))
        assert correlation == pytest.approx(spearmanr(uncertainty[images], dice[images])[0])
        assert area == pytest.approx(roc_auc_score(dice[images] < 0.8, uncertainty[images]))


def test_ranking_of_images_uses_the_rows():
    found = evaluate(make_images(8, seed=1), make_images(12, seed=2), resamples=100)
    ranking = found.metrics["test"]["ranking_of_images"]
    dice = [row["dice"] for row in found.rows]
    mean = [row["mean_fused"] for row in found.rows]
    expected = spearmanr(mean, dice)[0]
    assert ranking["whole_image"]["fused"]["spearman_with_dice"]["value"] == pytest.approx(expected)
    assert ranking["bad_images"] == sum(value < 0.8 for value in dice)


def test_no_image_has_no_rank():
    assert np.isnan(rank_statistics(np.zeros(0), np.zeros(0), np.ones((3, 0)))).all()
