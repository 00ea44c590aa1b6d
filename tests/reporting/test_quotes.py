"""Numbers quoted by their path, alone and in templates."""

from __future__ import annotations

import pytest

from reporting.document import Quoted, plain
from reporting.formats import MISSING, percent
from reporting.quotes import Quotes

METRICS = {
    "lambda": 0.3, "note": "a {lambda} $x",
    "test": {"images": 1234, "dice": 0.875, "range": [0, 2e-5]},
    "rules": [{"ece": {"value": 0.5, "interval": [0.25, 0.75]}}, {"ece": {"value": None, "interval": [None, None]}}],
}


@pytest.fixture
def quote():
    return Quotes(METRICS)


def test_a_quote_keeps_path_value_and_text(quote):
    assert quote("test.dice") == Quoted("test.dice", 0.875, "0.8750")
    assert quote("test.dice", percent) == Quoted("test.dice", 0.875, "87.5 %")
    assert quote.get("rules.0.ece.interval") == [0.25, 0.75]


@pytest.mark.parametrize(("path", "error"), [("test.jaccard", KeyError), ("rules.2", IndexError), ("lambda.x", TypeError)])
def test_a_path_that_is_not_there_is_an_error(quote, path, error):
    with pytest.raises(error):
        quote(path)


def test_an_estimate_has_its_interval_or_is_not_defined(quote):
    assert plain(quote.estimate("rules.0.ece")) == "0.5000 (0.2500 to 0.7500)"
    assert plain(quote.estimate("rules.0.ece", sign=True)) == "+0.5000 (+0.2500 to +0.7500)"
    assert quote.estimate("rules.1.ece") == [MISSING]


def test_a_template_has_places_for_numbers_and_words(quote):
    pieces = quote.fill("{$part.images:count} images of $part: λ = {lambda:general}, Dice {test.dice}.", part="test")
    assert pieces == [
        Quoted("test.images", 1234, "1,234"), " images of test: λ = ", Quoted("lambda", 0.3, "0.3"), ", Dice ",
        Quoted("test.dice", 0.875, "0.8750"), ".",
    ]
    assert plain(quote.fill("{rules.0.ece:signed_estimate}; {test.range:bounds}")) == "+0.5000 (+0.2500 to +0.7500); 0 to 2e-05"
    assert quote.fill("no number") == ["no number"]


def test_braces_and_dollar_signs_of_words_and_values_are_text(quote):
    assert plain(quote.fill("$word; {note:text}", word="{test.dice} $other")) == "{test.dice} $other; a {lambda} $x"


@pytest.mark.parametrize("template", ["{test.dice:hexadecimal}", "$unknown", "{$unknown.dice}"])
def test_a_template_with_an_unknown_format_or_word_is_an_error(quote, template):
    with pytest.raises(KeyError):
        quote.fill(template)
