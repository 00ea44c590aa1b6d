"""A short version of the simulated studies: too few for a figure, enough to see an interval that is far too narrow."""

from __future__ import annotations

import pytest

from benchmarks import coverage


@pytest.fixture(scope="module")
def rows():
    """Two dozen small studies of three trainings whose saliency variance is noise."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VALIDATION", 30), ("TEST", 50), ("TRAININGS", (1, 3)), ("RESAMPLES", 80)):
            patch.setattr(coverage, name, value)
        return {
            (row["trainings"], row["endpoint"]): row
            for row in coverage.summarise([coverage.repetition(("noise", number)) for number in range(24)])
        }


def test_three_trainings_cover_the_effect_of_the_procedure(rows):
    for endpoint in coverage.MEASURED:  # of 24, 19 or more: below that a coverage of 93 % would be a chance of 1 in 200
        assert rows[3, endpoint]["coverage"] >= 19 / 24, endpoint


def test_what_the_old_intervals_held_fixed_is_most_of_the_variance(rows):
    assert rows[1, "foreground_ece"]["old_coverage"] <= 12 / 24
    assert rows[1, "brier"]["old_coverage"] < rows[1, "brier"]["coverage"]


def test_noise_is_hardly_ever_called_a_difference(rows):
    for endpoint in coverage.MEASURED:
        assert rows[3, endpoint]["false"] <= 5 / 24, endpoint
    assert abs(rows[3, "added_auroc_whole_image"]["truth"]) < 0.002
