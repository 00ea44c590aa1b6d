"""What a run prints at its end: the table of the three scores, the verdict, and the paths to open."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from evaluation.names import HEADLINE
from reporting.formats import MISSING, SYNTHETIC_NOTE, general, number, signed, signed_span, span
from runtime.progress import current_console, duration

GREEN, ORANGE, BOLD, PLAIN = "\033[32m", "\033[33m", "\033[1m", "\033[0m"
VERDICT_COLOURS = {"improves": GREEN, "degrades": ORANGE}

HEADER = ("score", "foreground ECE", "95 % interval", "minus predictive", "95 % interval", "")
#: What each score is, for the table; ``{}`` stands for lambda.
LABELS = {
    "predictive_variance": "predictive variance alone (lambda = 1)",
    "saliency_variance": "saliency variance alone (lambda = 0)",
    "fused": "fused score (lambda = {})",
}
OUTPUTS = {"report": "report.html", "figures": "figures", "metrics": "metrics.json", "maps": "uncertainty_maps"}


def colours_wanted(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not refused them (``NO_COLOR``)."""
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ---------------------------------------------------------------- the table


def result_table(metrics: Mapping[str, Any], colour: bool = False) -> str:
    """The three scores with intervals and paired differences, aligned; ASCII alone, for every terminal.

    Args:
        metrics: as in ``metrics.json``.
        colour: adds the control codes of a terminal: a bold header, verdicts in colour.
    """
    rows = [HEADER, *(_row(metrics, score) for score in HEADLINE)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *numbers, verdict in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:]))]
        if colour and verdict in VERDICT_COLOURS:
            verdict = f"{VERDICT_COLOURS[verdict]}{verdict}{PLAIN}"
        lines.append("  ".join([*cells, verdict]).rstrip())
    if colour:
        lines[0] = f"{BOLD}{lines[0]}{PLAIN}"
    return "\n".join(lines)


def _row(metrics: Mapping[str, Any], score: str) -> tuple[str, ...]:
    """Label, ECE, its interval, difference, its interval and verdict of a score, as texts."""
    test = metrics["test"]
    label, error = LABELS[score].format(general(metrics["lambda"])), test["foreground_ece"][score]
    difference = test["foreground_ece_difference"].get(f"{score}_minus_predictive_variance")
    if error is None:
        return label, MISSING, "no foreground pixel", "", "", ""
    own = label, number(error), span(test["foreground_ece_interval"][score])
    if difference is None:
        return (*own, "", "", "")
    return (*own, signed(difference["value"]), signed_span(difference["interval"]), difference["verdict"])


# ---------------------------------------------------------------- the end of a run


def show_result(metrics: Mapping[str, Any], results: Path, source: str, seconds: float) -> None:
    """Print the end of a run: segmentation, table, verdict, the synthetic warning, and the paths to open.

    With JSON wanted, standard output receives the content of ``metrics.json`` and nothing else; the table
    goes to standard error, unless the console is quiet.

    Args:
        metrics: what ``metrics.json`` holds.
        results: the results folder.
        source: the name of the data.
        seconds: how long the run took.
    """
    settings = current_console()
    if settings.answer is not None:
        _print_json(metrics, settings.answer)
        if settings.quiet:
            return
    colour = colours_wanted(sys.stdout)
    test, verdict = metrics["test"], metrics["verdict"]
    print(
        f"\nTest set of {source}: {test['images']} images, "
        f"Dice {number(test['dice'])} ({span(test['dice_interval'])}), "
        f"Jaccard {number(test['jaccard'])} ({span(test['jaccard_interval'])})\n"
    )
    print(result_table(metrics, colour))
    print(f"\n{BOLD}{verdict}{PLAIN}" if colour else f"\n{verdict}")
    if metrics["synthetic"]:
        print(f"{SYNTHETIC_NOTE}. The verdict describes made-up images.")
    if metrics.get("data_note"):
        print(f"Data: {metrics['data_note']}")
    print()
    last = {name: str(results / path) for name, path in OUTPUTS.items()}
    last["any case"] = f"python visualize.py --run {results}"
    if "study" in metrics:
        last["study"] = "every rule and normalisation: report.html, 'Beyond the paper's fusion'"
    last["time"] = duration(seconds)
    for name, text in last.items():
        print(f"{name:<12} {text}")


def _print_json(metrics: Mapping[str, Any], stream: TextIO) -> None:
    """Print the metrics; a reader that has seen enough and is gone (``head``) is no error."""
    try:
        print(json.dumps(metrics, indent=2, allow_nan=False), file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python would complain again at its end
