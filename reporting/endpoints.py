"""What a run, or several pooled trainings, may conclude: the tables of the endpoints and of the controls.

Both lead every report. The words of an outcome come from the conclusion; nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reporting.document import Block, Bullets, Paragraph, Piece, Table, Text
from reporting.formats import MISSING, general, is_number, signed, signed_span
from reporting.quotes import Quotes

#: Of an estimate that no endpoint is: it carries its interval and no verdict.
EXPLORATORY = "exploratory"
HIGHER_IS_BETTER = "higher is better"

MEASURE_NAMES = {
    "foreground_ece": "foreground ECE",
    "brier": "Brier score",
    "error_auroc": "AUROC of errors",
    "image_aurc": "risk-coverage area of images",
}
PROCEDURE_NAMES = {
    "predictive_variance": "predictive variance",
    "fused": "fused score",
    "placebo_other_image": "placebo: another image's saliency",
    "placebo_shuffled": "placebo: shuffled saliency",
    "placebo_constant": "placebo: a constant",
    "tuned_scale": "predictive variance with a tuned scale",
}

HOW_TO_READ_ENDPOINTS = (
    "Differences are fused score minus predictive variance; the last two are the gain of a model of errors that knows "
    "saliency variance over one that does not. Each resample of the validation images fits the scales and λ again. Better or "
    "worse: p, corrected by Holm's method, is below 5 %. Equivalent: the 90 % interval lies inside the margin. Undecided is "
    "no null result: it says how much more data would decide if the difference stayed what it is."
)
HOW_TO_READ_CONTROLS = (
    "A placebo takes the place of saliency variance and cannot know where this image's errors are; the last row gives "
    "predictive variance one tuned number, as the fusion has. Only what the fused score gains beyond all of these is about "
    f"saliency. Intervals are 95 %; these rows are {EXPLORATORY}."
)


# ---------------------------------------------------------------- texts


def endpoint_name(entry: Mapping[str, Any]) -> str:
    """Label and region of an endpoint, and which direction is better where that is up."""
    return f"{entry['label']} ({entry['region']}{'' if entry['lower_is_better'] else f'; {HIGHER_IS_BETTER}'})"


def short_name(entry: Mapping[str, Any]) -> str:
    """:func:`endpoint_name` for the head of a narrow column."""
    name = MEASURE_NAMES.get(entry["name"], f"{entry['label']}, {entry['region']}")
    return name if entry["lower_is_better"] else f"{name} ({HIGHER_IS_BETTER})"


def p_value(value: float | None) -> str:
    """Three decimals, or that it is smaller."""
    if not is_number(value):
        return MISSING
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def needed(quote: Quotes, path: str) -> Text:
    """What would decide an undecided endpoint; empty where it is decided."""
    entry = quote.get(path)
    if entry is None:
        return ""
    ways: list[list[Piece]] = []
    if entry["trainings"] is not None:
        ways.append([quote(f"{path}.trainings", general), " trainings"])
    if entry["images_factor"] is not None:
        ways.append([quote(f"{path}.images_factor", general), " times the images"])
    if not ways:
        return "more trainings and more images"
    return ["about ", *ways[0], *(piece for way in ways[1:] for piece in (" or ", *way))]


# ---------------------------------------------------------------- blocks


def conclusion_blocks(quote: Quotes) -> list[Block]:
    """The endpoints, what must be known about them, and the controls."""
    notes = [quote(f"conclusion.notes.{index}", str) for index in range(len(quote.get("conclusion.notes")))]
    return [
        endpoints_table(quote),
        *([Bullets(notes)] if notes else []),
        Paragraph(HOW_TO_READ_ENDPOINTS, "note"),
        controls_table(quote),
        Paragraph(HOW_TO_READ_CONTROLS, "note"),
    ]


def endpoints_table(quote: Quotes) -> Table:
    """A row per endpoint: difference, both intervals, margin, corrected p, outcome, and what would decide it."""
    rows: list[Sequence[Text]] = []
    for index, entry in enumerate(quote.get("conclusion.endpoints")):
        path = f"conclusion.endpoints.{index}"
        rows.append([
            endpoint_name(entry), quote(f"{path}.value", signed), quote(f"{path}.interval", signed_span),
            quote(f"{path}.interval_90", signed_span), quote(f"{path}.margin", general), quote(f"{path}.p_holm", p_value),
            quote(f"{path}.outcome", str), needed(quote, f"{path}.needed"),
        ])
    return Table(
        "Endpoints, with margins fixed beforehand; lower is better where nothing else is said",
        ("endpoint", "difference", "95 % interval", "90 % interval", "margin", "Holm p", "outcome", "would decide"),
        rows, words=(0, 6, 7),
    )


def controls_table(quote: Quotes) -> Table:
    """A row per control, a column per measure: the fused score minus the control, with its interval."""
    controls = quote.get("conclusion.controls")
    measures = list(dict.fromkeys(entry["measure"] for entry in controls))
    rows: dict[str, list[Text]] = {}
    for index, entry in enumerate(controls):
        row = rows.setdefault(entry["name"], [entry["label"], *("" for _ in measures)])
        row[1 + measures.index(entry["measure"])] = quote.estimate(f"conclusion.controls.{index}", True)
    return Table(
        "Controls: is it saliency? Fused score minus each, with 95 % interval",
        ("difference", *(measure_name(controls, measure) for measure in measures)), list(rows.values()),
    )


def measure_name(controls: Sequence[Mapping[str, Any]], measure: str) -> str:
    """The name of a measure, and which direction is better where that is up."""
    lower = next(entry["lower_is_better"] for entry in controls if entry["measure"] == measure)
    return MEASURE_NAMES.get(measure, measure) + ("" if lower else f" ({HIGHER_IS_BETTER})")
