"""Descriptions of plain values: what fits, what does not, and where; nothing but a Mismatch comes out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.saved_schemas import METRICS, METRICS_OF_POOL, POOL, RUN, RUN_OF_MAPS, fits_record
from isic.cache import INDEX
from runtime.checkpoints import CHECKPOINT, TRAINING_STATE
from runtime.config import Config
from runtime.schemas import (
    Mismatch,
    fits,
    flag,
    identifier,
    list_of,
    mapping_of,
    nullable,
    number,
    record,
    text,
    whole,
)

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=20,
)


@pytest.mark.parametrize(("check", "fine", "wrong"), [
    (flag, [True, False], [0, 1, None, "true"]),
    (whole(0, 3), [0, 3], [-1, 4, 1.0, True, None, "1", 2**70]),
    (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf, True, "0.5", None]),
    (number(), [-1e308, 2**62], [10**400, math.inf]),
    (text(), ["", "a\nb"], [None, 1, b"a"]),
    (text(r"[a-f]+"), ["abc"], ["", "abg", "abc\n"]),
    (identifier, ["a b", "\u00e9"], ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0", None, 3]),
    (nullable(flag), [None, True], [0]),
    (list_of(whole(), 1, 2), [[1], (1, 2)], [[], [1, 2, 3], [None], "1", None, {}]),
    (list_of(text(), unique=True), [["a", "b"], []], [["a", "a"], [1]]),
    (mapping_of(whole()), [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [], None]),
    (record({"a": whole()}, {"b": flag}), [{"a": 1}, {"a": 1, "b": True, "c": None}], [{}, {"a": "1"}, {"a": 1, "b": 1}, None]),
    (record({"a": whole()}, others=False), [{"a": 1}], [{"a": 1, "c": 1}]),
])
def test_what_fits_and_what_does_not(check, fine, wrong):
    assert all(fits(check, value) for value in fine)
    assert not any(fits(check, value) for value in wrong)


def test_a_mismatch_names_the_place_on_one_short_line():
    check = record({"pairs": mapping_of(record({"slot": whole(0)}))})
    with pytest.raises(Mismatch, match=r"^index.pairs.a.slot is -1 and not a whole number from 0 to 9223372036854775807$"):
        check({"pairs": {"a": {"slot": -1}}}, "index")
    with pytest.raises(Mismatch, match="^it.pairs is a list and not a mapping$"):
        check({"pairs": [[0] * 10**6]}, "it")
    with pytest.raises(Mismatch) as caught:
        check({"pairs": {"a" * 10**6: "b" * 10**6}}, "it")
    assert len(str(caught.value)) < 300


@given(ANYTHING)
def test_nothing_but_a_mismatch_comes_out(value):
    for schema in (RUN, RUN_OF_MAPS, POOL, METRICS, METRICS_OF_POOL, INDEX, CHECKPOINT, TRAINING_STATE):
        fits(schema, value)
        for name in ("configuration", "split", "pooled", "maps", "pairs", "model", "progress", "optimizer", "test"):
            fits(schema, {"configuration": {}, "images": "i", "masks": "m", name: value})


@given(st.sampled_from(sorted(Config().to_dict())), ANYTHING)
def test_a_configuration_that_fits_makes_one_or_is_refused_in_a_line(name, value):
    """What stands in a record that fits can be handed to the configuration; it may still refuse, in a line."""
    from pathlib import Path

    from runtime.errors import UserError

    content = {"configuration": {name: value}, "images": "i", "masks": "m", "split": {"train": [], "validation": [], "test": []}}
    if fits_record(content):
        try:
            Config.from_dict({**Config().to_dict(), name: value}, Path("config.json"))
        except UserError as error:
            assert str(error).isprintable()
