"""Galleries: which images the rules choose, and that their figures show the saved maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from saved_runs import disc, maps_of, texts

from reporting.galleries import RULES, Candidates, boundary_complexity, choose, gallery_figure
from runtime.errors import UserError

SCALES = {"pred_variance": [0.0, 0.01], "saliency_variance": [0.0, 0.2]}


def images_with(tmp_path, dice, fused=None, masks=None, variances=None, scales=SCALES):
    """Test images with these numbers in the table and these maps on disk."""
    ids = [f"image_{index}" for index in range(len(dice))]
    rows = [{"id": id, "dice": value, "jaccard": value / 2, "mean_fused": (fused or dice)[index]}
            for index, (id, value) in enumerate(zip(ids, dice))]
    for index, id in enumerate(ids):
        predictive, saliency = (variances or [(0.0, 0.0)] * len(ids))[index]
        mask = (masks or [disc(16, 4)] * len(ids))[index]
        maps = maps_of(mask.shape, pred_variance=predictive, saliency_variance=saliency)
        np.savez(tmp_path / f"{id}.npz", **maps, true_mask=mask, empty_cams=0, fallbacks=0, identity="")
    return Candidates(rows, tmp_path, scales, seed=5)


def chosen(name, images, n):
    return [choice.id for choice in choose(name, images, n)]


# ---------------------------------------------------------------- rules


def test_best_and_worst_dice_leave_out_undefined_and_break_ties_by_id(tmp_path):
    images = images_with(tmp_path, [0.5, 0.9, math.nan, 0.9, 0.1])
    assert chosen("best", images, 3) == ["image_1", "image_3", "image_0"]
    assert chosen("worst", images, 2) == ["image_4", "image_0"]
    assert len(chosen("best", images, 99)) == 4


def test_most_uncertain_is_the_largest_mean_fused_score(tmp_path):
    assert chosen("uncertain", images_with(tmp_path, [1, 1, 1], fused=[0.1, 0.3, 0.2]), 2) == ["image_1", "image_2"]


def test_most_complex_is_neither_the_largest_nor_the_empty(tmp_path):
    comb = np.zeros((16, 16), np.uint8)
    comb[::2, 2:14] = 1
    comb[:, 2] = 1
    images = images_with(tmp_path, [1] * 4, masks=[disc(16, 7), comb, 0 * comb, disc(16, 3)])
    assert chosen("complex", images, 4)[0] == "image_1"
    assert "image_2" not in chosen("complex", images, 4)


def test_disagreement_is_of_the_normalised_variances(tmp_path):
    # normalised: (0.5, 0.5), (1, 0.1), (0.2, 0.9), and (3, 1) clipped to (1, 1)
    images = images_with(tmp_path, [1] * 4, variances=[(0.005, 0.1), (0.01, 0.02), (0.002, 0.18), (0.03, 0.2)])
    found = choose("disagreement", images, 4)
    assert [choice.id for choice in found] == ["image_1", "image_2", "image_0", "image_3"]
    assert [choice.value for choice in found] == pytest.approx([0.9, 0.7, 0, 0], abs=1e-6)


def test_disagreement_with_a_scale_that_does_not_start_at_0_or_has_no_width(tmp_path):
    # (0.3 - 0.1) / 0.4 = 0.5 and below the scale 0; a scale without width makes every value 0
    scales = {"pred_variance": [0.1, 0.5], "saliency_variance": [0.2, 0.2]}
    images = images_with(tmp_path, [1] * 2, variances=[(0.05, 0.7), (0.3, 0.1)], scales=scales)
    assert dict(choose("disagreement", images, 2)) == pytest.approx({"image_0": 0, "image_1": 0.5}, abs=1e-6)


def test_random_depends_on_the_seed_alone(tmp_path):
    images = images_with(tmp_path, [0.5] * 20)
    assert chosen("random", images, 5) == chosen("random", images, 5)
    assert chosen("random", images, 5) != chosen("random", images._replace(seed=6), 5)
    picked = {id for seed in range(60) for id in chosen("random", images._replace(seed=seed), 1)}
    assert len(picked) > 15


def test_an_unknown_rule_is_an_error(tmp_path):
    with pytest.raises(UserError, match="choose one of random, best"):
        choose("favourites", images_with(tmp_path, [1.0]), 1)


def test_boundary_complexity():
    assert boundary_complexity(disc(200, 80)) == pytest.approx(1, abs=0.02)
    # (a + 2a / sqrt 2) * 4 * pi / 8 = 0.948 * 4a: a square along the axes is 5 % short of 4a, so 10 % short of 4 / pi
    assert boundary_complexity(np.ones((200, 200))) == pytest.approx(0.948**2 * 4 / math.pi, rel=0.01)
    two = np.concatenate([disc(100, 40), disc(100, 40)])
    assert boundary_complexity(two) == pytest.approx(2, abs=0.05)  # (2P)^2 / (4 pi 2A)
    mask = disc(60, 20)
    mask[::4] = 0
    assert boundary_complexity(mask) == pytest.approx(boundary_complexity(mask[::-1].T))
    assert boundary_complexity(mask) > 10
    assert math.isnan(boundary_complexity(np.zeros((5, 5))))


# ---------------------------------------------------------------- figures


def test_the_numbers_of_a_row_are_those_of_the_table(tmp_path):
    images = images_with(tmp_path, [0.25, 0.75, 0.5])
    said = texts(gallery_figure("best", images, 2, lambda id: np.zeros((16, 16, 3), np.uint8), note="T = 30"))
    assert "image_1   Dice 0.7500   Jaccard 0.3750" in said
    assert "image_2   Dice 0.5000   Jaccard 0.2500" in said
    assert "image_0" not in said
    assert "test images, highest Dice; T = 30" in said


def test_the_seed_is_named_where_it_chose_and_the_number_where_the_title_lacks_it(tmp_path):
    images = images_with(tmp_path, [0.5] * 3, variances=[(0.005, 0.2)] * 3)
    for name in RULES:
        said = texts(gallery_figure(name, images, 3, lambda id: np.zeros((16, 16, 3), np.uint8)))
        assert f"test images, {RULES[name].title}" in said
        assert ("seed 5" in said) is (name == "random")
        assert said.count("disagreement 0.5000") == (3 if name == "disagreement" else 0)


def test_no_choice_gives_no_figure(tmp_path):
    images = images_with(tmp_path, [0.5] * 2, masks=[np.zeros((4, 4), np.uint8)] * 2)
    assert gallery_figure("complex", images, 2, lambda id: pytest.fail("no image is needed")) is None
