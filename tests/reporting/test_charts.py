"""The figures of a run: the points, bars and texts that known numbers give."""

from __future__ import annotations

import json

import numpy as np
import pytest
from saved_runs import axes, changed, make_run, many, texts

from evaluation.names import HEADLINE
from experiment.saved_run import load_run
from reporting import charts
from reporting.formats import MISSING, SYNTHETIC_NOTE, number, signed, signed_span, span
from runtime.errors import UserError

TABLE = {"count": [0, 10, 30], "lower": [0, 1 / 3, 2 / 3], "upper": [1 / 3, 2 / 3, 1], "confidence": [None, 0.5, 0.9],
         "accuracy": [None, 0.25, 1.0]}


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


# ---------------------------------------------------------------- reliability


def test_reliability_points_gaps_and_the_error_in_the_corner(run):
    _, ax = axes()
    charts.draw_reliability(ax, TABLE, "red")
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5, 0.25], [0.9, 1.0]])
    gaps = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert gaps == [[0.25, 0.5], [1.0, 0.9]]  # from accuracy to confidence
    _, counts = axes()
    charts.draw_counts(counts, TABLE, "red")
    assert [bar.get_height() for bar in counts.patches] == [0, 10, 30]
    figure = charts.reliability_figure(run)
    for score, ax in zip(HEADLINE, figure.axes):
        test = run.metrics["test"]
        expected = f"ECE {test['foreground_ece'][score]:.4f}\n95 %: {span(test['foreground_ece_interval'][score])}"
        assert [text.get_text() for text in ax.texts] == [expected]
        assert ax.get_xlim() == (0, 1)
    assert SYNTHETIC_NOTE in texts(figure)
    assert "tiny discs" in texts(figure)


@pytest.mark.parametrize(("accuracy", "corner"), [([0.1, 0.2, 0.1], ("left", "top")), ([1.0, 0.9, 0.9], ("right", "bottom"))])
def test_the_error_stands_where_no_point_is(run, accuracy, corner):
    metrics = json.loads(json.dumps(run.metrics))
    for score in HEADLINE:
        metrics["test"]["regions"]["foreground"]["scores"][score]["reliability"] = {
            "count": [5, 5, 5], "lower": [0, 1 / 3, 2 / 3], "upper": [1 / 3, 2 / 3, 1], "confidence": [0.3, 0.5, 0.9],
            "accuracy": accuracy}
    for ax in charts.reliability_figure(run._replace(metrics=metrics)).axes[:3]:
        (text,) = ax.texts
        assert (text.get_ha(), text.get_va()) == corner


# ---------------------------------------------------------------- lambda, risk, Dice


def test_the_lambda_curve_shows_both_parts_their_bands_and_the_choice(run):
    figure = charts.lambda_figure(run)
    top, bottom = figure.axes
    for line, part in zip(top.lines, ("validation", "test")):
        np.testing.assert_allclose(line.get_ydata(), run.metrics[part]["foreground_ece_by_lambda"])
    assert len(top.collections) == 2
    assert top.lines[2].get_xdata()[0] == run.metrics["lambda"]
    np.testing.assert_allclose([bar.get_height() for bar in bottom.patches],
                               100 * np.array(run.metrics["validation"]["lambda_selection"]["share"]))


def test_what_is_not_defined_is_not_drawn():
    _, ax = axes()
    charts.draw_lambda_curve(ax, [0, 0.5, 1], [0.25, None, 0.5], [[0.125, 0.375], [None, None], [0.25, 0.75]], "test")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.25, np.nan, 0.5])
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (low, high) == pytest.approx((0.125, 0.75))


def test_risk_and_coverage_with_the_ideal(run):
    figure = charts.risk_coverage_figure(run)
    for ax, region in zip(figure.axes, ("foreground", "whole_image")):
        curves = run.metrics["test"]["regions"][region]
        for line, score in zip(ax.lines, HEADLINE):
            np.testing.assert_allclose(line.get_ydata(), curves["scores"][score]["risk"])
        np.testing.assert_allclose(ax.lines[3].get_ydata(), curves["risk_coverage"]["ideal_risk"])
        assert f"area {number(curves['scores']['fused']['aurc']['value'])}" in texts(figure)


def test_dice_against_uncertainty_has_one_point_per_image(run):
    figure = charts.dice_figure(run)
    points = figure.axes[2].collections[0].get_offsets()
    np.testing.assert_allclose(points, [[row["mean_fused"], row["dice"]] for row in run.rows])
    value = run.metrics["test"]["ranking_of_images"]["whole_image"]["fused"]["spearman_with_dice"]["value"]
    assert f"Spearman {value:+.4f}" in texts(figure)


# ---------------------------------------------------------------- forest plot


def test_the_forest_plot_has_every_score_and_rule_around_zero(run):
    rows = charts.differences(run.metrics)
    assert len(rows) == 5 + len(run.metrics["study"]["rules"]) - 1  # without the reference itself
    assert [row.path.split(".")[-3] for row in rows if row.status == "endpoint"] == ["fused"]
    assert {row.status for row in rows} == {"endpoint", "exploratory"}
    _, ax = axes()
    charts.draw_forest(ax, rows[:2])
    marks = [line.get_xdata()[0] for line in ax.lines[1:] if len(line.get_xdata()) == 1]
    assert marks == [rows[0].value, rows[1].value]
    low, high = ax.get_xlim()
    assert low == -high
    without = {key: value for key, value in run.metrics.items() if key != "study"}
    assert len(charts.differences(without)) == 5
    said = texts(charts.forest_figure(run))
    assert "exploratory" in said and not {"improves", "degrades"} & set(said.split())
    for row in rows:
        assert f"{signed(row.value)}  ({signed_span(row.interval)})" in said


def test_rows_of_the_forest_plot_stand_below_their_group_and_say_what_is_missing():
    _, ax = axes()
    charts.draw_forest(ax, [
        charts.Difference("scores", "a", 0.25, [0.125, 0.5], "endpoint", ""),
        charts.Difference("scores", "b", None, [None, None], "exploratory", ""),
        charts.Difference("rules", "c", -0.125, [None, None], "whatever", ""),
    ])
    # the group stands at 0, its rows at 1 and 2; after half a row of space the next group at 3.5, its row at 4.5
    assert ax.get_yticks().tolist() == [1, 2, 4.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in ax.texts] == [
        "scores", "+0.2500  (+0.1250 to +0.5000)", MISSING, "rules", "-0.1250"]
    drawn = [line.get_xdata() for line in ax.lines[1:]]
    assert [list(values) for values in drawn] == [[0.25], [0.125, 0.5], [-0.125]]
    assert (ax.lines[1].get_marker(), ax.lines[3].get_marker()) == ("D", "o")  # the endpoint; what is exploratory
    assert ax.get_xlim() == pytest.approx((-0.575, 0.575))  # 1.15 times the farthest bound


# ---------------------------------------------------------------- training, and all figures


def test_training_marks_the_best_epoch(run):
    figure = charts.training_figure(run)
    assert "kept: epoch 2, Dice 0.7500" in texts(figure)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xydata(), [[1, 0.6], [2, 0.55], [3, 0.56]])
    assert figure.axes[0].get_ylabel() == "binary cross-entropy, nats per pixel"


@pytest.mark.parametrize("foreground", [True, False])
def test_run_figures_of_one_image(tmp_path, foreground):
    one = load_run(make_run(tmp_path, images=1, foreground=foreground))
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
