from __future__ import annotations

import copy

import pytest
from constructed_maps import make_images

from evaluation import evaluate
from evaluation.names import CONDITIONS_ON_TRUTH, REGIONS
from reporting.document import Heading, Table, plain
from reporting.formats import AGGREGATE_NAMES, REGION_NAMES, sentence_case
from reporting.quotes import Quotes
from reporting.sections import all_measures


@pytest.fixture(scope="module")
def metrics():
    images = make_images(6, seed=2)
    for index, (_, maps) in enumerate(images):
        maps["pass_dice"] = 0.9 - 0.02 * index
    return evaluate(make_images(4, seed=1), images, resamples=50).metrics


def shown(metrics):
    """Tables of the section by the heading above them, each a list of rows of texts."""
    found, heading = {}, ""
    for block in all_measures(Quotes(metrics)):
        if isinstance(block, Heading):
            heading = block.text if isinstance(block.text, str) else plain(block.text)
        elif isinstance(block, Table):
            found[heading] = [[cell if isinstance(cell, str) else plain(cell) for cell in row] for row in block.rows]
    return found


def test_every_region_has_a_table_and_says_whether_it_needs_the_truth(metrics):
    tables = shown(metrics)
    assert set(REGION_NAMES) == set(REGIONS)
    for region, words in REGION_NAMES.items():
        heading = sentence_case(words) + (" (conditions on the truth)" if CONDITIONS_ON_TRUTH[region] else "")
        assert heading in tables
    assert sum("conditions on the truth" in heading for heading in tables) == 2


def test_proper_scores_stand_first_and_the_largest_gap_has_no_interval(metrics):
    rows = shown(metrics)["Along the predicted boundaries"]
    assert [row[0].split()[0] for row in rows[:6]] == ["Brier", "its", "its", "log", "expected", "the"]
    table = metrics["test"]["regions"]["boundary_band"]["scores"]["fused"]
    found = {row[0]: row[3] for row in rows}
    assert found["largest gap of a bin"] == f"{table['mce']['value']:.4f}"
    low, high = table["brier"]["interval"]
    assert found["Brier score"] == f"{table['brier']['value']:.4f} ({low:.4f} to {high:.4f})"


def test_rankings_of_images_by_every_aggregate(metrics):
    rows = shown(metrics)["Images ranked by their uncertainty"]
    assert len(rows) == 3 * len(AGGREGATE_NAMES) + 1 and rows[-1][0] == "disagreement of the passes"
    ranking = metrics["test"]["ranking_of_images"]
    entry = ranking["aggregates"]["largest_patch"]["saliency_variance"]
    row = next(row for row in rows if row[:2] == ["largest mean of a patch", "saliency variance"])
    shown_value = f"{entry['minus_predictive_variance']['aurc']['value']:+.4f}"
    assert row[-1].startswith(shown_value) and row[2].startswith(f"{entry['spearman_with_dice']['value']:+.4f}")
    assert [row[-1] for row in rows if row[1] == "predictive variance"] == ["reference"] * len(AGGREGATE_NAMES)


def test_a_run_of_before_has_the_tables_that_it_can_have(metrics):
    older = copy.deepcopy(metrics)
    for region in ("predicted_background", "boundary_band"):
        del older["test"]["regions"][region]
    for name in ("aggregates", "baselines"):
        del older["test"]["ranking_of_images"][name]
    assert len(shown(older)) == 4
