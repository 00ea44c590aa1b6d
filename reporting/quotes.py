"""Numbers quoted from the metrics: each keeps its path, so that a test can compare what is shown with what was saved.

A template is a sentence with places for numbers and words:

    "Only {test.images:count} test images"           a number by its dotted path, and how it is shown
    "{$part.images:count} of the $part images"       $part is a word that the caller gives, in paths as well

Without a format a number is shown with four decimals; :data:`WAYS_TO_SHOW` lists the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from string import Template
from typing import Any, Callable

from reporting.document import Piece, Quoted
from reporting.formats import MISSING, bounds, count, general, is_number, number, percent, signed, signed_span, span

WAYS_TO_SHOW: Mapping[str, Callable[[Any], str]] = {
    "number": number, "signed": signed, "span": span, "signed_span": signed_span, "bounds": bounds,
    "count": count, "percent": percent, "general": general, "text": str,
}
PLACE = re.compile(r"\{([^{}:]+)(?::(\w+))?\}")


class Quotes:
    """Quotes numbers from the metrics of a run by their dotted path, such as "study.rules.0.parameter"."""

    def __init__(self, metrics: Mapping[str, Any]):
        self.metrics = metrics

    def get(self, path: str) -> Any:
        """The value at a path.

        Raises:
            KeyError, IndexError, TypeError: the metrics have no such path.
        """
        return reduce(
            lambda value, key: value[int(key)] if isinstance(value, list) else value[key], path.split("."), self.metrics
        )

    def __call__(self, path: str, shown: Callable[[Any], str] = number) -> Quoted:
        """The value at a path and how it is shown."""
        value = self.get(path)
        return Quoted(path, value, shown(value))

    def estimate(self, path: str, sign: bool = False) -> list[Piece]:
        """Value and interval of an entry ``{"value": x, "interval": [low, high]}``; ``sign``: it is a difference."""
        if not is_number(self.get(f"{path}.value")):
            return [MISSING]
        interval = self(f"{path}.interval", signed_span if sign else span)
        return [self(f"{path}.value", signed if sign else number), " (", interval, ")"]

    def fill(self, template: str, **words: str) -> list[Piece]:
        """The pieces of a template.

        Args:
            template: see the head of this module; besides :data:`WAYS_TO_SHOW`, "estimate" and
                "signed_estimate" show a value with its interval.
            words: what stands for ``$name``; their own braces and dollar signs are plain text.

        Raises:
            KeyError: an unknown format or word; also what :meth:`get` raises.
        """
        pieces: list[Piece] = []
        end = 0
        for match in PLACE.finditer(template):
            pieces.append(Template(template[end:match.start()]).substitute(words))
            path, shown = Template(match[1]).substitute(words), match[2] or "number"
            if shown in ("estimate", "signed_estimate"):
                pieces += self.estimate(path, sign=shown == "signed_estimate")
            else:
                pieces.append(self(path, WAYS_TO_SHOW[shown]))
            end = match.end()
        pieces.append(Template(template[end:]).substitute(words))
        return [piece for piece in pieces if piece != ""]
