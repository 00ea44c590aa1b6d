"""The section of other test sets: what each table says, word for word where it matters, in a run and in a pool."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from concluded import conclusion_of, make_pooled
from saved_runs import Page, axes, changed, make_run, texts

from experiment.saved_run import load_run
from reporting import console
from reporting.document import Bullets, Heading, Paragraph, Picture, Table, plain
from reporting.formats import SYNTHETIC_NOTE
from reporting.pooled import draw_pooled
from reporting.quotes import Quotes
from reporting.run_pictures import draw_run
from reporting.target_charts import draw_sets, draw_targets, targets_figure
from reporting.targets import SHIFTS, sets_of, small, target_blocks, target_rows

ERRORS = {"predictive_variance": 0.125, "saliency_variance": None, "fused": 0.25}


def numbers_of(seeds=(42,), **shift):
    """The numbers of another test set, in the shape that a run saves."""
    pairs = {name: {"source": 0.5 + place / 64, "target": 0.25 + place / 64} for place, name in enumerate(SHIFTS)}
    return {
        "test": {"images": 12, "dice": 0.625, "foreground_ece": ERRORS}, "conclusion": conclusion_of(seeds),
        "shift": {**pairs, **shift}, "warnings": [],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = load_run(make_run(tmp_path_factory.mktemp("run"), synthetic=True))
    targets = {
        "far": numbers_of(), "near": numbers_of(
            dice={"source": 0.5, "target": 0.75}, clipped_pred_variance={"source": 0.0, "target": 0.0},
            probability={"source": None, "target": None}),
    }
    return changed(made, targets=targets)


def blocks_of(run, kind):
    return [block for block in target_blocks(Quotes(run.metrics), run.folder) if isinstance(block, kind)]


# ---------------------------------------------------------------- the section


def test_without_other_sets_there_is_nothing(run):
    alone = run._replace(metrics={name: value for name, value in run.metrics.items() if name != "targets"})
    assert sets_of(alone.metrics) == [] and target_blocks(Quotes(alone.metrics), run.folder) == []
    assert list(target_rows(alone.metrics)) == []


def test_the_sets_stand_side_by_side(run):
    overview, outcomes, shifts = blocks_of(run, Table)
    assert [plain(cell) for cell in overview.rows[1]] == [
        "far", "12", "0.6250", "0.2656", "0.2969", "0.1250", "not defined", "0.2500"]
    source = overview.rows[0]
    assert plain(source[0]) == "source" and source[2].value == run.metrics["test"]["dice"]
    assert plain(source[3]) == "0.5156"  # of the source, in the shift of any set
    assert [plain(row[0]) for row in outcomes.rows] == ["source", "far", "near"]
    assert plain(outcomes.rows[1][1]) == "better: +0.0020 (-0.0137 to +0.0176)"
    assert plain(outcomes.rows[1][6]) == "not defined"
    assert len(outcomes.header) == 7 and tuple(outcomes.words) == tuple(range(7))
    labels = [plain(row[0]) for row in shifts.rows]
    assert labels == list(SHIFTS.values()) and shifts.header == ("quantity", "source", "far", "near")
    assert plain(shifts.rows[-2][1]) == "62.5 %"  # a share of the pixels
    assert plain(shifts.rows[2][3]) == "not defined"


def test_it_is_said_what_shifted_and_that_nothing_was_fitted(run):
    (bullets,) = blocks_of(run, Bullets)
    assert plain(bullets.items[0]) == (
        "far: Dice falls from 0.5000 to 0.2500; accuracy falls from 0.5156 to 0.2656; the confidence by predictive variance "
        "falls from 0.5469 to 0.2969; 37.5 % of the pixels lie beyond the scale of predictive variance.")
    assert plain(bullets.items[1]).startswith("near: Dice rises from 0.5000 to 0.7500;") and "lie beyond" not in plain(
        bullets.items[1])
    (note,) = blocks_of(run, Paragraph)
    assert "Nothing is fitted to these sets" in plain(note.text) and "No correction runs over the sets" in plain(note.text)
    taken = changed(run, numbers_from="elsewhere")
    assert "its images were not looked at again" in plain(blocks_of(taken, Paragraph)[1].text)


def test_numbers_are_shown_as_they_need():
    assert (small(0.0000487), small(0.25), small(None)) == ("4.87e-05", "0.25", "not defined")


def test_every_number_is_quoted_from_the_metrics(run):
    paths = draw_run(run)
    page, markdown = (path.read_text() for path in paths[-2:])
    quoted = [entry for entry in Page(page).quoted if entry[0].startswith("targets.")]
    assert len(quoted) > 60
    for path, value, text in quoted:
        found = reduce(lambda content, key: content[int(key)] if isinstance(content, list) else content[key],
                       path.split("."), run.metrics)
        assert value == str(found) and text in markdown
    assert 'href="#targets">Other test sets</a>' in page


def test_the_figure_lies_in_the_report_and_goes_with_the_sets(run):
    assert [path.name for path in draw_targets(run)] == ["test_sets.png"]
    (picture,) = blocks_of(run, Picture)
    assert "Foreground ECE" not in picture.alt.split(".")[0]
    assert "source better, far better, near better" in picture.alt and SYNTHETIC_NOTE.capitalize() in picture.alt
    assert [block.text for block in blocks_of(run, Heading)] == ["Other test sets", "Endpoints by test set", "What shifted"]
    assert draw_targets(changed(run, targets={})) == [] and not (run.folder / "figures" / "test_sets.png").exists()
    assert blocks_of(run, Picture) == []


# ---------------------------------------------------------------- the figure


def test_a_panel_shows_every_set_with_its_intervals():
    entry = {"label": "Brier score", "region": "whole image", "lower_is_better": True, "margin": 0.25, "value": 0.5,
             "interval": [0.125, 0.875], "interval_90": [0.25, 0.75], "outcome": "worse"}
    missing = {**entry, "value": None, "interval": [None, None], "outcome": "not defined"}
    figure, ax = axes()
    draw_sets(ax, ["source", "far", "a name that is longer than the room"], [entry, {**entry, "value": -0.5}, missing])
    lines = [np.asarray(line.get_xydata()).tolist() for line in ax.lines[1:]]
    assert lines[:3] == [[[0.125, 0], [0.875, 0]], [[0.25, 0], [0.75, 0]], [[0.5, 0]]]
    assert lines[5] == [[-0.5, 1]] and len(lines) == 6
    assert [ax.lines[place].get_marker() for place in (3, 6)] == ["D", "o"]
    assert ax.lines[1].get_color() != ax.lines[4].get_color()
    assert ax.get_xlim() == pytest.approx((-0.98, 0.98)) and ax.get_xlabel() == "difference (left: better)"
    said = texts(figure)
    assert said.count("worse") == 2 and "not defined" in said and "a name that is longer than the room" not in said


def test_a_panel_per_endpoint_and_the_stamp(run):
    figure = targets_figure(run.metrics)
    assert len(figure.axes) == 6 and SYNTHETIC_NOTE in texts(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["source", "far", "near"]


# ---------------------------------------------------------------- a pool, the console


def test_a_pool_shows_them_as_a_run_does(tmp_path):
    test = {"images": 60, "dice": 0.75, "foreground_ece": ERRORS}
    pool = make_pooled(tmp_path, targets={"far": numbers_of((42, 43, 44))}, test=test)
    paths = draw_pooled(pool)
    assert (tmp_path / "figures" / "test_sets.png") in paths
    markdown = (tmp_path / "report.md").read_text()
    assert "## Other test sets" in markdown and "| far | 12 | 0.6250 |" in markdown and "| source | 60 | 0.7500 |" in markdown


def test_the_console_says_them_in_a_table(run, capsys):
    console.show_result(run.metrics, run.folder, "tiny", 1.0)
    lines = capsys.readouterr().out.splitlines()
    header = next(place for place, line in enumerate(lines) if line.startswith("test set "))
    assert [line.split()[0] for line in lines[header + 1:header + 4]] == ["source", "far", "near"]
    assert lines[header + 2].split() == [
        "far", "12", "0.6250", "0.2656", "0.1250", "0.2500", "+0.0020", "-0.0137", "to", "+0.0176", "better"]
