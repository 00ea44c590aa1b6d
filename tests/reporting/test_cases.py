"""Pictures of cases: the artists, limits and texts that known arrays give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, to_rgb
from saved_runs import axes, disc, maps_of, texts

from reporting import cases
from reporting.cases import Case, case_figure, case_title, colour_scale, enlarged, overlay_figure
from reporting.formats import MISSING, SYNTHETIC_NOTE
from reporting.style import DPI, save_figure

SCALES = {"pred_variance": [0.0, 0.01], "saliency_variance": [0.0, 0.2]}


def image(size: int) -> np.ndarray:
    return np.zeros((size, size, 3), np.uint8)


# ---------------------------------------------------------------- parts of a case


def test_the_error_map_has_four_colours_for_four_outcomes():
    _, ax = axes()
    cases.draw_error(ax, np.array([[False, True], [False, True]]), np.array([[0, 0], [1, 1]]))
    shown = ax.images[0].get_array()
    expected = [[cases.BACKGROUND, cases.FALSE_POSITIVE], [cases.FALSE_NEGATIVE, cases.TRUE_POSITIVE]]
    np.testing.assert_allclose(shown, [[to_rgb(colour) for colour in row] for row in expected])


def test_without_a_mask_there_is_no_error_map():
    _, ax = axes()
    cases.draw_error(ax, np.zeros((2, 2), bool), None)
    assert not ax.images
    assert "error unknown" in ax.texts[0].get_text()


def test_outlines_of_truth_and_prediction_differ_in_colour_and_in_dashes():
    _, ax = axes()
    cases.draw_outlines(ax, image(9), disc(9, 2) > 0, disc(9, 3))
    looks = {(tuple(lines.get_edgecolor()[0][:3]), lines.get_linestyle()[0][1] is None) for lines in ax.collections[1::2]}
    assert looks == {(to_rgb(cases.TRUTH), True), (to_rgb(cases.PREDICTION), False)}


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_without_an_outline_draws_none(full):
    _, ax = axes()
    cases.draw_outlines(ax, image(4), np.full((4, 4), full), np.full((4, 4), full, np.uint8))
    assert not ax.collections


def test_colour_scales_span_three_decades_below_what_is_normalised_to_1():
    for key, low, high in (("mean_prediction", 0, 1), ("pred_variance", 1e-5, 0.01), ("saliency_variance", 2e-4, 0.2),
                           ("fused_score", 1e-3, 1)):
        scale = colour_scale(key, SCALES)
        assert (scale.vmin, scale.vmax) == pytest.approx((low, high))
        assert isinstance(scale, LogNorm) is (key != "mean_prediction")
    assert colour_scale("pred_variance", {"pred_variance": [0.0, 0.0]}).vmax == 1  # no variance anywhere


def test_a_colour_bar_names_decades_and_unit():
    figure, ax = axes()
    picture = cases.draw_map(ax, np.full((2, 2), 0.01), colour_scale("saliency_variance", SCALES), "magma").images[0]
    bar = cases.draw_colour_bar(figure.add_axes((0, 0, 1, 0.1)), picture, "variance of Grad-CAM")
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0.0002", "0.002", "0.02", "0.2"]
    assert bar.get_xlabel() == "variance of Grad-CAM"


def test_the_title_shows_what_is_known():
    case = Case("x", image(2), maps_of((2, 2), fused_score=0.25), disc(2, 1), 1.0, 0.5)
    assert case_title(case) == "x   Dice 1.0000   Jaccard 0.5000   mean fused score 0.2500"
    assert case_title(case._replace(dice=None, jaccard=None, detail="training image")) == (
        "x   mean fused score 0.2500   training image")
    assert f"Jaccard {MISSING}" in case_title(case._replace(jaccard=math.nan))


# ---------------------------------------------------------------- the figure of cases


def test_every_row_has_the_same_colour_scale_for_a_quantity():
    shown_cases = [Case(str(level), image(8), maps_of((8, 8), pred_variance=level), disc(8, 3), 0.0, 0.0)
                   for level in (0.0, 0.001, 0.5)]
    figure = case_figure(shown_cases, SCALES)
    panels = [ax.images[0] for ax in figure.axes if ax.images]
    for column, (low, high) in {1: (0, 1), 2: (1e-5, 0.01), 3: (2e-4, 0.2), 4: (1e-3, 1)}.items():
        for row in range(3):
            norm = panels[6 * row + column].norm
            assert (norm.vmin, norm.vmax) == pytest.approx((low, high))
            assert isinstance(norm, LogNorm) is (column > 1)
    # the ends of the scale hold what lies beyond: 0 is the lowest colour, 0.5 the highest
    shown = [float(panels[6 * row + 2].norm(shown_cases[row].maps["pred_variance"])[0, 0]) for row in range(3)]
    assert shown == pytest.approx([0, 2 / 3, 1], abs=1e-6)


def test_a_case_figure_says_id_numbers_units_rule_and_what_the_images_are():
    # 9 of 16 pixels predicted, 9 true, 6 in common: Dice 12 / 18, Jaccard 6 / 12
    prediction, truth = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8)
    prediction[:3, :3], truth[:3, 1:] = 1, 1
    maps = {**maps_of((4, 4), fused_score=0.25), "mean_prediction": prediction}
    case = Case("lesion $a_b$", image(4), maps, truth, 12 / 18, 6 / 12, "boundary complexity 2")
    figure = case_figure([case], SCALES, note="seed 7", synthetic=True, data_note="cropped")
    said = texts(figure)
    assert "lesion $a_b$   Dice 0.6667   Jaccard 0.5000   mean fused score 0.2500   boundary complexity 2" in said
    for part in ("seed 7", f"{SYNTHETIC_NOTE}; cropped", "truth", "prediction", "false positive", "false negative",
                 "probability of lesion", "variance of probability", "variance of Grad-CAM"):
        assert part in said
    assert "Dice" not in case_title(case._replace(truth=None, dice=None, jaccard=None))
    real = case_figure([case], SCALES, data_note="cropped")
    assert "cropped" in texts(real)
    assert SYNTHETIC_NOTE not in texts(real)


def test_the_threshold_decides_the_predicted_lesion():
    maps = {**maps_of((4, 4)), "mean_prediction": np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)}
    case = Case("x", image(4), maps, np.ones((4, 4), np.uint8), 0.5, 0.4)
    for threshold, predicted in ((0.5, 8), (0.9, 2)):
        error = case_figure([case], SCALES, threshold=threshold).axes[5].images[0].get_array()
        assert (error == np.array(to_rgb(cases.TRUE_POSITIVE))).all(-1).sum() == predicted


def test_maps_without_any_variance_can_be_drawn(tmp_path):
    case = Case("flat", image(4), maps_of((4, 4)), np.zeros((4, 4), np.uint8), 1.0, 1.0)
    flat = {"pred_variance": [0.0, 0.0], "saliency_variance": [0.0, 0.0]}
    assert save_figure(case_figure([case], flat), tmp_path / "flat.png").stat().st_size > 0


# ---------------------------------------------------------------- the overlay


def test_an_overlay_has_the_pixels_of_the_image():
    original = np.random.default_rng(0).integers(0, 255, (100, 1000, 3), dtype=np.uint8)
    maps = {**maps_of((8, 8), fused_score=0.5), "mean_prediction": disc(8, 3).astype(np.float32)}
    figure = overlay_figure(Case("x", original[:8, :8], maps, disc(8, 3)), original, None, "fused_score", SCALES)
    left, right = figure.axes[:2]
    assert left.get_window_extent().size * DPI / figure.dpi == pytest.approx([1000, 100])
    np.testing.assert_array_equal(left.images[0].get_array(), original)
    assert right.images[1].get_array().shape == (100, 1000)
    # 0.5 lies at 1 - log10(2) / 3 of the three decades
    assert right.images[1].get_alpha() == pytest.approx(0.75 * (1 - math.log10(2) / 3) * np.ones((100, 1000)))
    assert "truth" not in texts(figure)


def test_enlarging_uses_half_pixel_centres():
    np.testing.assert_allclose(enlarged(np.array([[0.0, 1.0]]), (1, 4)), [[0, 0.25, 0.75, 1]])


@pytest.mark.parametrize("shape", [(8, 9), (20, 20), (23, 61), (256, 9), (767, 1022)])
def test_enlarging_is_the_bilinear_upsampling_of_torch(shape):
    values = np.random.default_rng(1).random((8, 9)).astype(np.float32)
    before = values.copy()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    found = enlarged(values, shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(values, before)


def test_reducing_gives_every_pixel_a_share():
    # four pixels share, 1 : 3 : 3 : 1 over 8; at the edge three, 3 : 3 : 1 over 7
    np.testing.assert_allclose(enlarged(np.array([[0, 0, 8, 0, 0, 0, 0, 0]]), (1, 4))[0], [8 / 7, 3, 0, 0], atol=1e-6)
