"""The figure of the endpoints: the points, lines and margins that known numbers give."""

from __future__ import annotations

import numpy as np
import pytest
from concluded import conclusion_of, make_pooled
from saved_runs import axes, texts

from reporting.formats import MISSING, SYNTHETIC_NOTE
from reporting.pooled_charts import draw_endpoint, draw_pooled_figures, endpoints_figure

ENTRY = {
    "label": "Brier score", "region": "whole image", "lower_is_better": True, "margin": 0.25, "value": 0.5,
    "interval": [0.125, 0.875], "interval_90": [0.25, 0.75], "by_training": [0.25, 0.75], "outcome": "worse",
}


def test_a_panel_shows_trainings_pooled_value_intervals_and_margin():
    _, ax = axes()
    draw_endpoint(ax, ["seed-1", "seed-2"], ENTRY)
    zero, first, second, wide, narrow, pooled = (np.asarray(line.get_xydata()).tolist() for line in ax.lines)
    assert [point[0] for point in zero] == [0, 0]
    assert (first, second) == ([[0.25, 0.0]], [[0.75, 1.0]])
    assert (wide, narrow, pooled) == ([[0.125, 2.5], [0.875, 2.5]], [[0.25, 2.5], [0.75, 2.5]], [[0.5, 2.5]])
    assert ax.lines[3].get_linewidth() < ax.lines[4].get_linewidth()
    assert [ax.lines[place].get_marker() for place in (1, 5)] == ["o", "D"]
    margin = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (margin.x0, margin.x1) == pytest.approx((-0.25, 0.25))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["seed-1", "seed-2", "pooled"]
    assert ax.get_xlim() == pytest.approx((-0.9625, 0.9625))  # 1.1 times the farthest bound
    assert ax.get_title() == "Brier score, whole image\nworse: +0.5000 (+0.1250 to +0.8750)"
    assert ax.get_xlabel() == "difference (left: better)"


def test_what_is_not_defined_is_not_drawn():
    _, ax = axes()
    entry = {**ENTRY, "value": None, "interval": [None, None], "interval_90": [None, None], "by_training": [None, 0.125],
             "lower_is_better": False, "outcome": "not defined"}
    draw_endpoint(ax, ["a", "b"], entry)
    assert [np.asarray(line.get_xydata()).tolist() for line in ax.lines[1:]] == [[[0.125, 1.0]]]
    assert ax.get_title().splitlines()[-1] == MISSING
    assert ax.get_xlabel() == "difference (right: better)"
    assert ax.get_xlim() == pytest.approx((-0.275, 0.275))  # of the margin


def test_the_figure_has_a_panel_per_endpoint_and_is_stamped(tmp_path):
    figure = endpoints_figure(make_pooled(tmp_path, range(42, 54)))
    assert len(figure.axes) == 6
    said = texts(figure)
    for part in ("seed-42", "seed-53", "one training", "pooled, 95 % interval", "90 % interval", "inside the margin",
                 SYNTHETIC_NOTE, "tiny discs"):
        assert part in said, part
    for ax, entry in zip(figure.axes, conclusion_of(range(42, 54))["endpoints"]):
        assert sum(line.get_marker() == "o" for line in ax.lines) == sum(value is not None for value in entry["by_training"])


def test_fewer_endpoints_leave_no_empty_panel(tmp_path):
    run = make_pooled(tmp_path)
    conclusion = {**run.metrics["conclusion"], "endpoints": run.metrics["conclusion"]["endpoints"][:4]}
    assert len(endpoints_figure(run._replace(metrics={**run.metrics, "conclusion": conclusion})).axes) == 4


def test_the_same_numbers_are_the_same_file(tmp_path):
    run = make_pooled(tmp_path)
    (path,) = draw_pooled_figures(run)
    before = path.read_bytes()
    assert draw_pooled_figures(run) == [path] and path.read_bytes() == before
