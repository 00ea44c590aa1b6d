"""The tables beside the endpoints quote the numbers that are there, and are left out where there are none."""

from __future__ import annotations

import pytest
from concluded import conclusion_of

from reporting.document import Table, plain
from reporting.exploratory import DETECTOR_NAMES, beside_the_endpoints, detectors, ensemble
from reporting.quotes import Quotes

ESTIMATE = {"value": 0.25, "interval": [0.125, 0.5]}


def rows(blocks):
    return [[plain(cell) for cell in row] for block in blocks if isinstance(block, Table) for row in block.rows]


def test_what_each_variance_adds_and_its_null():
    found = rows(beside_the_endpoints(Quotes({"conclusion": conclusion_of((42, 43))})))
    assert found[0] == [
        "inside the predicted lesions", "predictive variance, to the predicted probability", "+0.0020 (+0.0000 to +0.0039)", "",
    ]
    assert found[3][1:] == ["saliency variance, to both", "+0.0059 (+0.0039 to +0.0078)", "+0.0010, at most +0.0020; p 0.048"]
    assert [row[0] for row in found[4:]] == ["foreground ECE", "Brier score, whole images", "log loss, whole images, nats"]
    assert found[5][1] == "+0.0078 (-0.0078 to +0.0234)"


def test_without_a_null_there_is_no_column_for_it_and_older_runs_have_no_recalibration():
    conclusion = conclusion_of()
    for entry in conclusion["added"].values():
        entry["permutation_null"] = None
    del conclusion["recalibrated"]
    found = rows(beside_the_endpoints(Quotes({"conclusion": conclusion})))
    assert len(found) == 4 and all(len(row) == 3 for row in found)


def test_detectors_are_shown_where_they_were_made():
    assert detectors(Quotes({})) == []
    measures = {"brier": ESTIMATE, "auroc": ESTIMATE}
    scores = {name: {"raw": measures, "isotonic": {"brier": ESTIMATE}} for name in ("temperature_scaled", "flip_variance")}
    blocks = detectors(Quotes({"detectors": {"temperature": 1.5, "flip_scale": [0, 1], "regions": {"whole_image": scores}}}))
    found = rows(blocks)
    assert found[0] == [DETECTOR_NAMES["temperature_scaled"], "0.2500 (0.1250 to 0.5000)", "", "", "0.2500 (0.1250 to 0.5000)"]
    assert found[3] == ["variance over flips, isotonic", "0.2500 (0.1250 to 0.5000)", "", "", ""]
    assert "temperature is 1.5" in plain(blocks[-1].text)


@pytest.mark.parametrize("members", (2, 5))
def test_the_ensemble_stands_beside_its_members(members):
    assert ensemble(Quotes({"ensemble": None})) == []

    def numbers(value):
        whole = {
            score: {measure: {"value": value, "interval": [0.0, 1.0]} for measure in ("brier", "auroc")}
            for score in ("one_minus_max_probability", "predictive_entropy", "mutual_information", "predictive_variance")
        }
        return {"dice": value, "dice_interval": [0.0, 1.0], "whole_image": whole}

    parts = [numbers(0.5 - index / 16) for index in range(members)]
    found = rows(ensemble(Quotes({"ensemble": {"trainings": members, **numbers(0.75), "members": parts}})))
    assert len(found) == 5 and found[0][1] == "0.7500 (0.0000 to 1.0000)"
    assert {row[2] for row in found} == {f"{0.5 - (members - 1) / 16:.4f} to 0.5000"}
