"""Pictures: the artists, limits and texts that known arrays give, and what the rules of the galleries choose."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from conftest import command
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from saved_runs import changed, disc, make_run, many, maps_of

import charts
import figures
import gallery
import visualize
from figures import Case
from formats import MISSING, SYNTHETIC_NOTE, duration, number, percent, signed, signed_span, span
from storage import UserError

SCALES = {"pred_variance": [0.0, 0.01], "saliency_variance": [0.0, 0.2]}


@pytest.fixture(scope="module")
def run(saved):
    return charts.load_run(saved)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def axes() -> tuple[Figure, object]:
    figure = Figure()
    return figure, figure.subplots()


# ---------------------------------------------------------------- numbers


def test_numbers_have_one_rounding_and_undefined_ones_a_word():
    assert (number(0.12345), signed(0.00004), signed(0.0), signed(-0.5), number(None), number(math.nan)) == (
        "0.1235", "+4e-05", "+0.0000", "-0.5000", MISSING, MISSING)
    assert (span([0.1, 0.25]), signed_span([-0.1, 0.25]), span([None, 1])) == ("0.1000 to 0.2500", "-0.1000 to +0.2500", MISSING)
    assert (percent(0.7391), duration(119.96), duration(120)) == ("73.9 %", "120.0 s", "2.0 min")


# ---------------------------------------------------------------- a case


def test_the_error_map_has_four_colours_for_four_outcomes():
    _, ax = axes()
    figures.draw_error(ax, np.array([[False, True], [False, True]]), np.array([[0, 0], [1, 1]]))
    shown = ax.images[0].get_array()
    expected = [[figures.BACKGROUND, figures.FALSE_POSITIVE], [figures.FALSE_NEGATIVE, figures.TRUE_POSITIVE]]
    np.testing.assert_allclose(shown, [[to_rgb(colour) for colour in row] for row in expected])


def test_without_a_mask_there_is_no_error_map():
    _, ax = axes()
    figures.draw_error(ax, np.zeros((2, 2), bool), None)
    assert not ax.images
    assert "error unknown" in ax.texts[0].get_text()


def test_outlines_of_truth_and_prediction_differ_in_colour_and_in_dashes():
    _, ax = axes()
    figures.draw_outlines(ax, np.zeros((9, 9, 3), np.uint8), disc(9, 2) > 0, disc(9, 3))
    looks = {(tuple(lines.get_edgecolor()[0][:3]), lines.get_linestyle()[0][1] is None) for lines in ax.collections[1::2]}
    assert looks == {(to_rgb(figures.TRUTH), True), (to_rgb(figures.PREDICTION), False)}


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_without_an_outline_draws_none(full):
    _, ax = axes()
    figures.draw_outlines(ax, np.zeros((4, 4, 3), np.uint8), np.full((4, 4), full), np.full((4, 4), full, np.uint8))
    assert not ax.collections


def test_every_row_has_the_same_colour_scale_for_a_quantity():
    cases = [Case(str(level), np.zeros((8, 8, 3), np.uint8), maps_of((8, 8), pred_variance=level), disc(8, 3))
             for level in (0.0, 0.001, 0.5)]
    figure = figures.case_figure(cases, SCALES)
    panels = [ax.images[0] for ax in figure.axes if ax.images]
    for column, (low, high) in {1: (0, 1), 2: (1e-5, 0.01), 3: (2e-4, 0.2), 4: (1e-3, 1)}.items():
        for row in range(3):
            norm = panels[6 * row + column].norm
            assert (norm.vmin, norm.vmax) == pytest.approx((low, high))
            assert isinstance(norm, LogNorm) is (column > 1)
    # the ends of the scale hold what lies beyond: 0 is the lowest colour, 0.5 the highest
    shown = [float(panels[6 * row + 2].norm(cases[row].maps["pred_variance"])[0, 0]) for row in range(3)]
    assert shown == pytest.approx([0, 2 / 3, 1], abs=1e-6)


def test_a_case_figure_says_id_numbers_units_rule_and_what_the_images_are():
    # 9 of 16 pixels predicted, 9 true, 6 in common: Dice 12 / 18, Jaccard 6 / 12
    prediction, truth = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8)
    prediction[:3, :3], truth[:3, 1:] = 1, 1
    maps = {**maps_of((4, 4), fused_score=0.25), "mean_prediction": prediction}
    case = Case("lesion $a_b$", np.zeros((4, 4, 3), np.uint8), maps, truth, "boundary complexity 2")
    figure = figures.case_figure([case], SCALES, note="seed 7", synthetic=True, data_note="cropped")
    said = texts(figure)
    assert "lesion $a_b$   Dice 0.6667   Jaccard 0.5000   mean uncertainty 0.2500   boundary complexity 2" in said
    for part in ("seed 7", f"{SYNTHETIC_NOTE}; cropped", "truth", "prediction", "false positive", "false negative",
                 "probability of lesion", "variance of probability", "variance of Grad-CAM"):
        assert part in said
    assert "Dice" not in figures.case_title(case._replace(truth=None))
    real = figures.case_figure([case], SCALES, data_note="cropped")
    assert "cropped" in texts(real)
    assert SYNTHETIC_NOTE not in texts(real)


def test_maps_without_any_variance_can_be_drawn(tmp_path):
    case = Case("flat", np.zeros((4, 4, 3), np.uint8), maps_of((4, 4)), np.zeros((4, 4), np.uint8))
    flat = {"pred_variance": [0.0, 0.0], "saliency_variance": [0.0, 0.0]}
    figures.save_figure(figures.case_figure([case], flat), tmp_path / "flat.png")


def test_a_saved_picture_has_160_dots_an_inch_and_text_stays_text(tmp_path):
    figure, ax = axes()
    ax.set_title("lesion 0.1235")
    assert Image.open(figures.save_figure(figure, tmp_path / "a.png")).info["dpi"] == pytest.approx((160, 160), abs=0.1)
    assert "lesion 0.1235" in figures.save_figure(figure, tmp_path / "a.svg").read_text()
    pdf = figures.save_figure(figure, tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # a TrueType font, not outlines
    for name in ("a.svg", "a.pdf"):
        figures.save_figure(figure, tmp_path / f"again.{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again.{name}").read_bytes()


def test_an_overlay_has_the_pixels_of_the_image(tmp_path):
    original = np.random.default_rng(0).integers(0, 255, (100, 1000, 3), dtype=np.uint8)
    maps = {**maps_of((8, 8), fused_score=0.5), "mean_prediction": disc(8, 3).astype(np.float32)}
    figure = figures.overlay_figure(Case("x", original[:8, :8], maps, disc(8, 3)), original, None, "fused_score", SCALES)
    left, right = figure.axes[:2]
    assert left.get_window_extent().size * figures.DPI / figure.dpi == pytest.approx([1000, 100])
    np.testing.assert_array_equal(left.images[0].get_array(), original)
    assert right.images[1].get_array().shape == (100, 1000)
    # 0.5 lies at 1 - log10(2) / 3 of the three decades
    assert right.images[1].get_alpha() == pytest.approx(0.75 * (1 - math.log10(2) / 3) * np.ones((100, 1000)))
    assert "truth" not in texts(figure)


def test_enlarging_uses_half_pixel_centres():
    np.testing.assert_allclose(figures.enlarged(np.array([[0.0, 1.0]]), (1, 4)), [[0, 0.25, 0.75, 1]])


# ---------------------------------------------------------------- galleries


def images_with(tmp_path, dice, fused=None, masks=None, variances=None):
    """Test images with these numbers in the table and these maps on disk."""
    ids = [f"image_{index}" for index in range(len(dice))]
    rows = [{"id": id, "dice": value, "mean_fused": (fused or dice)[index]} for index, (id, value) in enumerate(zip(ids, dice))]
    for index, id in enumerate(ids):
        predictive, saliency = (variances or [(0.0, 0.0)] * len(ids))[index]
        mask = (masks or [disc(16, 4)] * len(ids))[index]
        maps = maps_of(mask.shape, pred_variance=predictive, saliency_variance=saliency)
        np.savez(tmp_path / f"{id}.npz", **maps, true_mask=mask, empty_cams=0, fallbacks=0, identity="")
    return gallery.TestImages(rows, tmp_path, SCALES, seed=5)


def chosen(name, images, n):
    return [choice.id for choice in gallery.choose(name, images, n)]


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
    found = gallery.choose("disagreement", images, 4)
    assert [choice.id for choice in found] == ["image_1", "image_2", "image_0", "image_3"]
    assert [choice.value for choice in found] == pytest.approx([0.9, 0.7, 0, 0], abs=1e-6)


def test_random_depends_on_the_seed_alone(tmp_path):
    images = images_with(tmp_path, [0.5] * 20)
    assert chosen("random", images, 5) == chosen("random", images, 5)
    assert chosen("random", images, 5) != chosen("random", images._replace(seed=6), 5)
    picked = {id for seed in range(60) for id in chosen("random", images._replace(seed=seed), 1)}
    assert len(picked) > 15


def test_an_unknown_rule_is_an_error(tmp_path):
    with pytest.raises(UserError, match="choose one of random, best"):
        gallery.choose("favourites", images_with(tmp_path, [1.0]), 1)


def test_boundary_complexity():
    assert gallery.boundary_complexity(disc(200, 80)) == pytest.approx(1, abs=0.02)
    # (a + 2a / sqrt 2) * 4 * pi / 8 = 0.948 * 4a: a square along the axes is 5 % short of 4a, so 10 % short of 4 / pi
    assert gallery.boundary_complexity(np.ones((200, 200))) == pytest.approx(0.948**2 * 4 / math.pi, rel=0.01)
    two = np.concatenate([disc(100, 40), disc(100, 40)])
    assert gallery.boundary_complexity(two) == pytest.approx(2, abs=0.05)  # (2P)^2 / (4 pi 2A)
    mask = disc(60, 20)
    mask[::4] = 0
    assert gallery.boundary_complexity(mask) == pytest.approx(gallery.boundary_complexity(mask[::-1].T))
    assert gallery.boundary_complexity(mask) > 10
    assert math.isnan(gallery.boundary_complexity(np.zeros((5, 5))))


def test_a_gallery_says_its_rule_and_shows_the_saved_maps(saved, run):
    figure = visualize.draw_gallery(run, "complex", 2, 0, visualize.image_reader(run))
    said = texts(figure)
    assert "most complex boundary" in said
    assert said.count("boundary complexity ") == 2
    id = chosen("complex", visualize.test_images(run, 0), 1)[0]
    with np.load(saved / "uncertainty_maps" / "test" / f"{id}.npz") as maps:
        np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), maps["mean_prediction"])
    assert "random, seed 9" in texts(visualize.draw_gallery(run, "random", 1, 9, visualize.image_reader(run)))


def test_a_rule_that_is_defined_for_no_image_gives_no_gallery(tmp_path):
    empty = make_run(tmp_path, images=2, foreground=False)
    run = charts.load_run(empty)
    assert visualize.draw_gallery(run, "complex", 2, 0, visualize.image_reader(run)) is None
    outcome = command("--run", empty, "--gallery", "complex", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "defined for no test image" in outcome.stderr


# ---------------------------------------------------------------- figures of a run


def test_reliability_points_gaps_and_the_error_in_the_corner(run):
    table = {"count": [0, 10, 30], "lower": [0, 1 / 3, 2 / 3], "upper": [1 / 3, 2 / 3, 1], "confidence": [None, 0.5, 0.9],
             "accuracy": [None, 0.25, 1.0]}
    _, ax = axes()
    charts.draw_reliability(ax, table, "red")
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5, 0.25], [0.9, 1.0]])
    _, counts = axes()
    charts.draw_counts(counts, table, "red")
    assert [bar.get_height() for bar in counts.patches] == [0, 10, 30]
    figure = charts.reliability_figure(run)
    for score, ax in zip(charts.HEADLINE, figure.axes):
        test = run.metrics["test"]
        expected = f"ECE {test['foreground_ece'][score]:.4f}\n95 %: {span(test['foreground_ece_interval'][score])}"
        assert [text.get_text() for text in ax.texts] == [expected]
        assert ax.get_xlim() == (0, 1)
    assert SYNTHETIC_NOTE in texts(figure)
    assert "tiny discs" in texts(figure)


@pytest.mark.parametrize(("accuracy", "corner"), [([0.1, 0.2, 0.1], ("left", "top")), ([1.0, 0.9, 0.9], ("right", "bottom"))])
def test_the_error_stands_where_no_point_is(run, accuracy, corner):
    metrics = json.loads(json.dumps(run.metrics))
    for score in charts.HEADLINE:
        metrics["test"]["regions"]["foreground"]["scores"][score]["reliability"] = {
            "count": [5, 5, 5], "lower": [0, 1 / 3, 2 / 3], "upper": [1 / 3, 2 / 3, 1], "confidence": [0.3, 0.5, 0.9],
            "accuracy": accuracy}
    for ax in charts.reliability_figure(run._replace(metrics=metrics)).axes[:3]:
        (text,) = ax.texts
        assert (text.get_ha(), text.get_va()) == corner


def test_the_lambda_curve_shows_both_parts_their_bands_and_the_choice(run):
    figure = charts.lambda_figure(run)
    top, bottom = figure.axes
    for line, part in zip(top.lines, ("validation", "test")):
        np.testing.assert_allclose(line.get_ydata(), run.metrics[part]["foreground_ece_by_lambda"])
    assert len(top.collections) == 2
    assert top.lines[2].get_xdata()[0] == run.metrics["lambda"]
    np.testing.assert_allclose([bar.get_height() for bar in bottom.patches],
                               100 * np.array(run.metrics["validation"]["lambda_selection"]["share"]))


def test_risk_and_coverage_with_the_ideal(run):
    figure = charts.risk_coverage_figure(run)
    for ax, region in zip(figure.axes, ("foreground", "whole_image")):
        curves = run.metrics["test"]["regions"][region]
        for line, score in zip(ax.lines, charts.HEADLINE):
            np.testing.assert_allclose(line.get_ydata(), curves["scores"][score]["risk"])
        np.testing.assert_allclose(ax.lines[3].get_ydata(), curves["risk_coverage"]["ideal_risk"])
        assert f"area {number(curves['scores']['fused']['aurc']['value'])}" in texts(figure)


def test_dice_against_uncertainty_has_a_point_an_image(run):
    figure = charts.dice_figure(run)
    points = figure.axes[2].collections[0].get_offsets()
    np.testing.assert_allclose(points, [[row["mean_fused"], row["dice"]] for row in run.rows])
    value = run.metrics["test"]["ranking_of_images"]["whole_image"]["fused"]["spearman_with_dice"]["value"]
    assert f"Spearman {value:+.4f}" in texts(figure)


def test_the_forest_plot_has_every_score_and_rule_around_zero(run):
    rows = charts.differences(run.metrics)
    assert len(rows) == 5 + len(run.metrics["study"]["rules"]) - 1  # without the reference itself
    _, ax = axes()
    charts.draw_forest(ax, rows[:2])
    marks = [line.get_xdata()[0] for line in ax.lines[1:] if len(line.get_xdata()) == 1]
    assert marks == [rows[0].value, rows[1].value]
    low, high = ax.get_xlim()
    assert low == -high
    without = {key: value for key, value in run.metrics.items() if key != "study"}
    assert len(charts.differences(without)) == 5
    said = texts(charts.forest_figure(run))
    for row in rows:
        assert f"{signed(row.value)}  ({signed_span(row.interval)})" in said


def test_training_marks_the_best_epoch(run):
    figure = charts.training_figure(run)
    assert "kept: epoch 2, Dice 0.7500" in texts(figure)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xydata(), [[1, 0.6], [2, 0.55], [3, 0.56]])


@pytest.mark.parametrize("foreground", [True, False])
def test_run_figures_of_one_image(tmp_path, foreground):
    one = charts.load_run(make_run(tmp_path, images=1, foreground=foreground))
    paths = charts.draw_run_figures(one)
    assert [path.stem for path in paths] == list(charts.RUN_FIGURES)
    if not foreground:
        assert f"ECE {MISSING}" in texts(charts.reliability_figure(one))


def test_run_figures_of_600_images(saved):
    run = many(saved, 600)
    assert len(charts.dice_figure(run).axes[0].collections[0].get_offsets()) == 600


def test_metrics_of_another_version_are_an_error(run):
    with pytest.raises(UserError, match="reliability"):
        charts.draw_run_figures(changed(run, test={}))


# ---------------------------------------------------------------- the command


def test_summary_draws_everything_without_weights(saved):
    assert not (saved / "weights").exists()
    expected = {*charts.RUN_FIGURES, *(f"gallery_{name}" for name in gallery.RULES)}
    assert {path.stem for path in (saved / "figures").iterdir()} == expected
    assert (saved / "report.html").is_file()
    assert (saved / "report.md").is_file()


def test_summary_goes_on_without_the_dataset_and_says_so(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("figures"))
    text = (copy / "config.json").read_text().replace(str(saved.parent), "/nowhere")
    (copy / "config.json").write_text(text)
    outcome = command("--run", copy, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "galleries not redrawn" in outcome.stdout
    assert {path.stem for path in (copy / "figures").iterdir()} == set(charts.RUN_FIGURES)


def test_a_gallery_by_command_prints_its_choice_and_its_seed(saved, tmp_path):
    outcome = command("--run", saved, "--gallery", "worst", "--n", "2", "--output", "w.png", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    images = visualize.test_images(charts.load_run(saved), 0)
    assert [line.split()[0] for line in outcome.stdout.splitlines()[:2]] == chosen("worst", images, 2)
    first = command("--run", saved, "--gallery", "random", "--n", "2", "--output", "r.png", script="visualize.py", cwd=tmp_path)
    seed = first.stdout.split("--seed ")[1].split()[0]
    again = command("--run", saved, "--gallery", "random", "--n", "2", "--seed", seed, "--output", "s.png",
                    script="visualize.py", cwd=tmp_path)
    assert first.stdout.splitlines()[:2] == again.stdout.splitlines()[:2]
    assert (tmp_path / "r.png").read_bytes() == (tmp_path / "s.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gallery", "nicest"), "there is no gallery nicest"),
        (("--n", "3"), "--n says how many"),
        (("--gallery", "best", "--n", "0"), "--n must be at least 1"),
        (("--gallery", "best", "--summary"), "do not go together"),
        (("--gallery", "best", "--id", "a"), "leave --id and --image out"),
        (("--summary", "--output", "a.png"), "leave --output out"),
        (("--overlay", "beauty"), "there is no map beauty"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(saved, tmp_path, flags, message):
    outcome = command("--run", saved, *flags, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_training_image_is_called_one(finished, tmp_path):
    split = json.loads((finished / "config.json").read_text())["split"]
    said = {}
    for part in ("train", "validation", "test"):
        outcome = command("--run", finished, "--id", split[part][0], "--output", "c.png", script="visualize.py", cwd=tmp_path)
        assert outcome.returncode == 0, outcome.stderr
        said[part] = outcome.stdout.splitlines()[0]
    assert said["train"].endswith("training image")
    assert said["validation"].endswith("validation image")
    assert not said["test"].endswith("image")


def test_the_overlay_command(finished, tmp_path):
    picture = tmp_path / "big picture.png"
    Image.new("RGB", (1000, 90), (200, 150, 140)).save(picture)
    outcome = command("--run", finished, "--image", picture, "--overlay", "pred_variance", "--output", "o.png",
                      script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert Image.open(tmp_path / "o.png").width == 2000
