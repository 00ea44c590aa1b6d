"""Other test sets beside the source's own: what they are, what shifted, and what came out of each endpoint.

The same of a run and of pooled trainings, whose numbers are then means over trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.names import HEADLINE
from reporting.document import Block, Bullets, Heading, Paragraph, Picture, Table, Text, plain
from reporting.endpoints import endpoint_name, short_name
from reporting.formats import (
    MISSING,
    SCORE_NAMES,
    SYNTHETIC_NOTE,
    count,
    is_number,
    number,
    percent,
    sentence_case,
    signed,
    signed_span,
)
from reporting.quotes import Quotes

FIGURE = "test_sets"
#: What the test images of the source are called beside the other sets.
SOURCE = "source"
SHIFTS = {
    "dice": "Dice, mean of the images",
    "accuracy": "accuracy of the pixels",
    "probability": "probability of the predicted label",
    **{f"confidence_{score}": f"confidence by {SCORE_NAMES[score]}" for score in HEADLINE},
    "mean_pred_variance": "predictive variance, not scaled",
    "mean_saliency_variance": "saliency variance, not scaled",
    "clipped_pred_variance": "pixels beyond the scale of predictive variance",
    "clipped_saliency_variance": "pixels beyond the scale of saliency variance",
}
CONFIDENCE = "the confidence by predictive variance"
NOTHING_FITTED = (
    "Nothing is fitted to these sets: weights, scales, λ, quantile bins and recalibration are those of the source, that is, of "
    "its training and validation images. No correction runs over the sets: Holm's correction holds within each, and of many "
    "sets some will differ by chance."
)
FROM_ELSEWHERE = (
    "The numbers of the source are those of the finished run whose weights were taken; its images were not looked at again."
)
HOW_TO_READ_FIGURE = (
    "How to read it: a panel for each endpoint, a row for each set. The mark is the difference, the thin line its 95 % interval, "
    "the thick line its 90 % interval; the grey band is the margin. The axis says which side is better. Sets whose intervals "
    "lie on different sides of zero, or of the margin, tell different stories."
)


class Set(NamedTuple):
    """A test set in the metrics.

    Attributes:
        name: as shown.
        path: of its numbers, with a dot at the end; empty for the source.
        side: under which the shift of a set holds its values, "source" or "target".
        shift: the path of that shift.
    """

    name: str
    path: str
    side: str
    shift: str


def sets_of(metrics: Mapping[str, Any]) -> list[Set]:
    """The source's test images and all other sets, in the order in which they were named; empty without others."""
    others = [Set(name, f"targets.{name}.", "target", f"targets.{name}.shift.") for name in metrics.get("targets", ())]
    return [Set(SOURCE, "", "source", others[0].shift), *others] if others else []


# ---------------------------------------------------------------- the report


def target_blocks(quote: Quotes, folder: Path) -> list[Block]:
    """The section of the other test sets; empty where there are none.

    Args:
        quote: of the metrics.
        folder: of the run; its figure is shown where it lies there.
    """
    sets = sets_of(quote.metrics)
    if not sets:
        return []
    return [
        Heading(2, "Other test sets", "targets"),
        Paragraph(NOTHING_FITTED, "note"),
        *([Paragraph(FROM_ELSEWHERE, "note")] if "numbers_from" in quote.metrics else []),
        _overview(quote, sets),
        _outcomes(quote, sets),
        *_figure(quote, sets, folder / "figures" / f"{FIGURE}.png"),
        Heading(3, "What shifted"),
        Bullets([_shifted(quote, one) for one in sets[1:]]),
        _shifts(quote, sets),
    ]


def _overview(quote: Quotes, sets: Sequence[Set]) -> Table:
    """A row per set: images, segmentation, confidence, and the three foreground errors."""
    rows: list[Sequence[Text]] = [
        [
            one.name, quote(f"{one.path}test.images", count), quote(f"{one.path}test.dice"),
            quote(f"{one.shift}accuracy.{one.side}"), quote(f"{one.shift}confidence_predictive_variance.{one.side}"),
            *(quote(f"{one.path}test.foreground_ece.{score}") for score in HEADLINE),
        ]
        for one in sets
    ]
    return Table(
        "The sets side by side; confidence is 1 minus predictive variance on its scale, the errors are foreground ECEs",
        ("test set", "images", "Dice", "accuracy", "confidence", *(SCORE_NAMES[score] for score in HEADLINE)), rows,
    )


def _outcomes(quote: Quotes, sets: Sequence[Set]) -> Table:
    """A row per set, a column per endpoint: outcome, difference, interval."""
    names = [short_name(entry) for entry in quote.get("conclusion.endpoints")]
    rows = [
        [one.name, *(_outcome(quote, f"{one.path}conclusion.endpoints.{place}") for place in range(len(names)))] for one in sets
    ]
    every = range(len(names) + 1)
    return Table("What came out of each endpoint: difference with 95 % interval", ("test set", *names), rows, every)


def _outcome(quote: Quotes, path: str) -> Text:
    outcome = quote(f"{path}.outcome", str)
    if not is_number(quote.get(f"{path}.value")):
        return outcome
    return [outcome, ": ", quote(f"{path}.value", signed), " (", quote(f"{path}.interval", signed_span), ")"]


def _figure(quote: Quotes, sets: Sequence[Set], path: Path) -> list[Block]:
    if not path.is_file():
        return []
    said = "; ".join(
        f"{endpoint_name(entry)}: " + ", ".join(
            f"{one.name} {quote.get(f'{one.path}conclusion.endpoints.{place}.outcome')}" for one in sets
        ) for place, entry in enumerate(quote.get("conclusion.endpoints"))
    )
    alt = f"A panel for each endpoint with the difference of every test set and its intervals. {sentence_case(said)}."
    if quote.metrics["synthetic"]:
        alt += f" {SYNTHETIC_NOTE.capitalize()}."
    return [Heading(3, "Endpoints by test set"), Picture(path, plain(alt), HOW_TO_READ_FIGURE)]


def _shifted(quote: Quotes, one: Set) -> Text:
    """In a sentence, what differs between the source's test images and another set."""
    shift, changes = quote.get(one.shift[:-1]), []
    for name, label in (("dice", "Dice"), ("accuracy", "accuracy"), ("confidence_predictive_variance", CONFIDENCE)):
        before, after = (shift[name][side] for side in ("source", "target"))
        verb = "falls" if after < before else "rises" if after > before else "stays"
        changes.append(f"{label} {verb} from {{$at.{name}.source}} to {{$at.{name}.target}}")
    if shift["clipped_pred_variance"]["target"]:
        changes.append("{$at.clipped_pred_variance.target:percent} of the pixels lie beyond the scale of predictive variance")
    return quote.fill(f"$name: {'; '.join(changes)}.", name=one.name, at=one.shift[:-1])


def _shifts(quote: Quotes, sets: Sequence[Set]) -> Table:
    """A row per quantity, a column per set."""
    known = quote.get(sets[1].shift[:-1])
    rows: list[Sequence[Text]] = []
    for name, label in SHIFTS.items():
        if name in known and any(is_number(value) for value in known[name].values()):
            shown = percent if name.startswith("clipped") else small if name.startswith("mean") else number
            rows.append([label, *(quote(f"{one.shift}{name}.{one.side}", shown) for one in sets)])
    return Table("Means over all pixels, where nothing else is said", ("quantity", *(one.name for one in sets)), rows)


def small(value: float | None) -> str:
    """Three significant digits: most variances are zeros in four decimals."""
    return f"{value:.3g}" if is_number(value) else MISSING


# ---------------------------------------------------------------- the console

TARGET_HEADER = (
    "test set", "images", "Dice", "accuracy", "ECE predictive", "ECE fused", "difference", "95 % interval", "outcome",
)


def target_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The sets for the console, the source first: images, segmentation, foreground ECE, and its endpoint."""
    quote = Quotes(metrics)
    for one in sets_of(metrics):
        errors = quote.get(f"{one.path}test.foreground_ece")
        endpoint = quote.get(f"{one.path}conclusion.endpoints.0")
        yield (
            one.name, count(quote.get(f"{one.path}test.images")), number(quote.get(f"{one.path}test.dice")),
            number(quote.get(f"{one.shift}accuracy.{one.side}")), number(errors["predictive_variance"]), number(errors["fused"]),
            signed(endpoint["value"]), signed_span(endpoint["interval"]), endpoint["outcome"],
        )
