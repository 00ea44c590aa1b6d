"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from reporting.formats import (
    MISSING,
    bounds,
    count,
    general,
    is_number,
    number,
    percent,
    sentence_case,
    signed,
    signed_span,
    spaced,
    span,
)
from runtime.progress import duration


def test_numbers_have_one_rounding_and_undefined_ones_a_word():
    assert (number(0.12345), signed(0.00004), signed(0.0), signed(-0.5), number(None), number(math.nan)) == (
        "0.1235", "+4e-05", "+0.0000", "-0.5000", MISSING, MISSING)
    assert (span([0.1, 0.25]), signed_span([-0.1, 0.25]), span([None, 1])) == ("0.1000 to 0.2500", "-0.1000 to +0.2500", MISSING)
    assert (percent(0.7391), duration(119.96), duration(120)) == ("73.9 %", "120.0 s", "2.0 min")


@pytest.mark.parametrize(("value", "known"), [(0, True), (-1.5, True), (None, False), (math.nan, False), (math.inf, False)])
def test_only_finite_values_are_numbers(value, known):
    assert is_number(value) is known
    for shown in (number, signed, count, percent):
        assert (shown(value) == MISSING) is not known
    assert (span([value, 0.5]) == MISSING) is not known
    assert (signed_span([0.5, value]) == MISSING) is not known


def test_an_interval_that_is_not_there_is_not_defined():
    assert span(None) == signed_span(None) == MISSING


def test_a_small_difference_keeps_its_sign_and_its_size():
    # four decimals show 0.00005 as 0.0001 and less as 0.0000
    assert [signed(value) for value in (5e-5, 4.9e-5, -4.9e-5, 2e-9)] == ["+0.0001", "+5e-05", "-5e-05", "+2e-09"]


def test_counts_and_shares():
    assert [count(value) for value in (0, 999, 1000, 1234567.0)] == ["0", "999", "1,000", "1,234,567"]
    assert [percent(share) for share in (0, 0.125, 1)] == ["0.0 %", "12.5 %", "100.0 %"]


def test_settings_and_ranges_keep_the_digits_that_matter():
    assert [general(value) for value in (1.0, 0.30000000000000004, 0.8)] == ["1", "0.3", "0.8"]
    assert bounds([0, 2.3456789e-05]) == "0 to 2.34568e-05"


def test_names_become_words():
    assert spaced("image_size") == "image size"
    assert [sentence_case(text) for text in ("highest Dice", "AUROC", "")] == ["Highest Dice", "AUROC", ""]
