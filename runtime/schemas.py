"""What a file may hold: descriptions of plain values (those of JSON, and of checkpoints beside their tensors).

A description is a function that is called with a value and its place, and raises :class:`Mismatch` where the value is not
what belongs there. A seal says that nothing was changed; a description says that it can be used.

Example:
    >>> person = record({"name": text(), "age": whole(0, 150)}, {"notes": list_of(text())})
    >>> fits(person, {"name": "Ada", "age": 36, "anything": None}), fits(person, {"name": "Ada", "age": True})
    (True, False)
    >>> person({"name": "Ada", "age": 200}, "person")
    Traceback (most recent call last):
    runtime.schemas.Mismatch: person.age is 200 and not a whole number from 0 to 150
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Callable

#: Raises Mismatch where a value, at a place, is not what belongs there.
Check = Callable[[Any, str], None]

LARGEST = 2**63 - 1
#: A SHA-256.
CHECKSUM = r"[0-9a-f]{64}"


class Mismatch(ValueError):
    """A value is not what belongs there; the message names its place."""


def fits(check: Check, value: Any) -> bool:
    """Whether a value is what belongs there."""
    try:
        check(value, "it")
    except Mismatch:
        return False
    return True


def _refuse(value: Any, place: str, expected: str) -> None:
    # the representation of a nested or huge value would be as long as the file
    shown = f"{value!r:.40}" if isinstance(value, (str, float, bool, type(None))) else ""
    shown = str(value) if isinstance(value, int) and abs(value) <= LARGEST else shown
    raise Mismatch(f"{place} is {shown or 'a ' + type(value).__name__} and not {expected}")


def anything(value: Any, place: str) -> None:
    """Every value is fine."""


def flag(value: Any, place: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _refuse(value, place, "true or false")


def whole(low: int = -LARGEST, high: int = LARGEST) -> Check:
    """A whole number within limits, which count as inside."""

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(value, place, f"a whole number from {low} to {high}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number within limits, which count as inside."""

    def check(value: Any, place: str) -> None:
        fine = type(value) is int and abs(value) <= LARGEST or type(value) is float and math.isfinite(value)
        if not fine or not low <= value <= high:
            _refuse(value, place, f"a finite number from {low:g} to {high:g}")

    return check


def text(pattern: str = r".*") -> Check:
    """A text, all of which matches a regular expression."""
    matcher = re.compile(pattern, re.DOTALL)

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or not matcher.fullmatch(value):
            _refuse(value, place, "a text" if pattern == r".*" else f"a text of the form {pattern}")

    return check


def identifier(value: Any, place: str) -> None:
    """A name that can stand in the name of a file, and in a line."""
    if not isinstance(value, str) or not value.isprintable() or re.search(r"[/\\]", value) or value in ("", ".", ".."):
        _refuse(value, place, "a name that a file can have")


def nullable(check: Check) -> Check:
    """Null, or what ``check`` says."""

    def either(value: Any, place: str) -> None:
        if value is not None:
            check(value, place)

    return either


def list_of(check: Check, least: int = 0, most: int = LARGEST, unique: bool = False) -> Check:
    """A list (or a tuple) of which every item is what ``check`` says; ``unique``: of texts, none of them twice."""

    def each(value: Any, place: str) -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            _refuse(value, place, "a list" if (least, most) == (0, LARGEST) else f"a list of {least} to {most} items")
        for index, item in enumerate(value):
            check(item, f"{place}[{index}]")
        if unique and len(set(value)) < len(value):
            raise Mismatch(f"{place} holds an item twice")

    return each


def mapping_of(check: Check, key: Check | None = None) -> Check:
    """A mapping of which every value is what ``check`` says, and every key what ``key`` says (a text if None)."""

    def each(value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            _refuse(value, place, "a mapping")
        for name, item in value.items():
            (key or text())(name, f"a key of {place}")
            check(item, f"{place}.{name:.40}" if isinstance(name, str) else f"{place}[{name!r:.40}]")

    return each


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, others: bool = True) -> Check:
    """A mapping with known keys.

    Args:
        required: what stands under each key that must be there.
        optional: likewise, of keys that may be there.
        others: whether there may be more, about which nothing is known.
    """
    known = {**required, **(optional or {})}

    def check(value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            _refuse(value, place, "a mapping")
        for name in required:
            if name not in value:
                raise Mismatch(f"{place} lacks {name}")
        for name, item in value.items():
            if name in known:
                known[name](item, f"{place}.{name}")
            elif not others or not isinstance(name, str):
                raise Mismatch(f"{place} holds {name!r:.40}, which does not belong there")

    return check


def both(*checks: Check) -> Check:
    """What all of them say."""

    def each(value: Any, place: str) -> None:
        for check in checks:
            check(value, place)

    return each
