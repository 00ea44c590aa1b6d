"""The tables of endpoints and controls: every number with its path, and words for what would decide."""

from __future__ import annotations

import pytest
from concluded import conclusion_of

from reporting.document import Bullets, Quoted, plain
from reporting.endpoints import (
    EXPLORATORY,
    HOW_TO_READ_CONTROLS,
    conclusion_blocks,
    controls_table,
    endpoint_name,
    endpoints_table,
    needed,
    p_value,
    short_name,
)
from reporting.formats import MISSING
from reporting.quotes import Quotes

QUOTE = Quotes({"conclusion": conclusion_of((42, 43))})


def test_a_row_per_endpoint():
    rows = [[plain(cell) for cell in row] for row in endpoints_table(QUOTE).rows]
    assert rows[0] == [
        "foreground ECE, as the paper has it (true lesions)", "+0.0020", "-0.0137 to +0.0176", "-0.0059 to +0.0098", "0.005",
        "< 0.001", "better", ""]
    assert rows[4][-2:] == ["undecided", "about 12 trainings or 3.5 times the images"]
    assert rows[5] == [
        "AUROC of errors that saliency adds (whole image; higher is better)", *[MISSING] * 3, "0.005", MISSING, "not defined", ""]
    assert [row[6] for row in rows] == [entry["outcome"] for entry in QUOTE.get("conclusion.endpoints")]


def test_numbers_keep_their_paths():
    for table in (endpoints_table(QUOTE), controls_table(QUOTE)):
        for row in table.rows:
            for cell in row[1:]:
                for piece in [cell] if isinstance(cell, Quoted) else [part for part in cell if isinstance(part, Quoted)]:
                    assert piece.value == QUOTE.get(piece.path)


def test_a_row_per_control_and_a_column_per_measure():
    table = controls_table(QUOTE)
    assert table.header == ("difference", "foreground ECE", "Brier score", "AUROC of errors (higher is better)",
                            "risk-coverage area of images")
    assert [row[0] for row in table.rows] == [
        "fused minus the same with another image's saliency", "fused minus the same with shuffled saliency",
        "fused minus the same with a constant for saliency", "fused minus predictive variance with a tuned scale"]
    # (row - column) / 256, plus and minus 1 / 32
    assert plain(table.rows[1][1]) == "+0.0039 (-0.0273 to +0.0352)"
    assert plain(table.rows[3][4]) == "+0.0000 (-0.0312 to +0.0312)"
    assert EXPLORATORY in HOW_TO_READ_CONTROLS


def test_a_control_that_lacks_a_measure_leaves_its_cell_empty():
    conclusion = conclusion_of()
    del conclusion["controls"][5]  # the second measure of the second control
    rows = controls_table(Quotes({"conclusion": conclusion})).rows
    assert [plain(cell) == "" for cell in rows[0]] == [False] * 5
    assert [plain(cell) == "" for cell in rows[1]] == [False, False, True, False, False]


@pytest.mark.parametrize(("entry", "said"), [
    (None, ""),
    ({"trainings": 12, "images_factor": None}, "about 12 trainings"),
    ({"trainings": None, "images_factor": 2.4}, "about 2.4 times the images"),
    ({"trainings": 12, "images_factor": 2.4}, "about 12 trainings or 2.4 times the images"),
    ({"trainings": None, "images_factor": None}, "more trainings and more images"),
])
def test_what_would_decide(entry, said):
    assert plain(needed(Quotes({"needed": entry}), "needed")) == said


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (1.0, "1.000"), (None, MISSING)])
def test_p_values(value, text):
    assert p_value(value) == text


def test_names_say_the_region_and_which_direction_is_better():
    first, auroc, added = (QUOTE.get(f"conclusion.endpoints.{index}") for index in (0, 2, 4))
    assert endpoint_name(auroc) == "AUROC of errors (whole image; higher is better)"
    assert [short_name(entry) for entry in (first, auroc, added)] == [
        "foreground ECE", "AUROC of errors (higher is better)",
        "AUROC of errors that saliency adds, predicted lesion (higher is better)"]


@pytest.mark.parametrize("seeds", [(42,), (42, 43)])
def test_notes_stand_between_the_endpoints_and_the_controls(seeds):
    blocks = conclusion_blocks(Quotes({"conclusion": conclusion_of(seeds)}))
    notes = [block for block in blocks if isinstance(block, Bullets)]
    assert [plain(item) for block in notes for item in block.items] == (["One training: made up."] if len(seeds) == 1 else [])
