"""What a command prints at its end: the three scores, the endpoints, the verdict, and the paths to open."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from evaluation.names import HEADLINE
from experiment.terms import STANDARD, Terms, terms_of_metrics
from reporting.endpoints import EXPLORATORY
from reporting.formats import MISSING, SYNTHETIC_NOTE, general, number, signed, signed_span, span
from reporting.targets import TARGET_HEADER, target_rows
from runtime.progress import complain, current_console, duration

BOLD, ALARM, PLAIN = "\033[1m", "\033[1;31m", "\033[0m"

HEADER = ("score", "foreground ECE", "95 % interval", "minus predictive", "95 % interval", "")
ENDPOINT_HEADER = ("endpoint", "region", "difference", "95 % interval", "margin", "outcome")
HOLD_FIXED = "Intervals of these three hold the training, the scales and lambda fixed; those of the endpoints do not."
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
        colour: adds the control codes of a terminal: a bold header.
    """
    return _aligned([HEADER, *(_row(metrics, score) for score in HEADLINE)], (0, 5), colour, terms_of_metrics(metrics))


def endpoint_table(metrics: Mapping[str, Any], colour: bool = False) -> str:
    """What came out of each endpoint, aligned; arguments as of :func:`result_table`."""
    rows = [
        (entry["label"], entry["region"], signed(entry["value"]), signed_span(entry["interval"]), general(entry["margin"]),
         entry["outcome"])
        for entry in metrics["conclusion"]["endpoints"]
    ]
    return _aligned([ENDPOINT_HEADER, *rows], (0, 1, 5), colour, terms_of_metrics(metrics))


def _aligned(rows: Sequence[Sequence[str]], words: Sequence[int], colour: bool, terms: Terms = STANDARD) -> str:
    """Rows as lines, the columns of words flush left and all others flush right; a bold first line, if in colour."""
    rows = [[terms(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if place in words else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    if colour:
        lines[0] = f"{BOLD}{lines[0]}{PLAIN}"
    return "\n".join(lines)


def _row(metrics: Mapping[str, Any], score: str) -> tuple[str, ...]:
    """Label, ECE, its interval, difference, its interval and what kind of number that is, as texts."""
    test = metrics["test"]
    label, error = LABELS[score].format(general(metrics["lambda"])), test["foreground_ece"][score]
    difference = test["foreground_ece_difference"].get(f"{score}_minus_predictive_variance")
    if error is None:
        return label, MISSING, "no foreground pixel", "", "", ""
    own = label, number(error), span(test["foreground_ece_interval"][score])
    if difference is None:
        return (*own, "", "", "")
    kind = "endpoint" if score == "fused" else EXPLORATORY
    return (*own, signed(difference["value"]), signed_span(difference["interval"]), kind)


# ---------------------------------------------------------------- the end of a run


def show_result(metrics: Mapping[str, Any], results: Path, source: str, seconds: float) -> None:
    """Print the end of a run: segmentation, scores, endpoints, verdict, the synthetic warning, and the paths to open.

    With JSON wanted, standard output receives the content of ``metrics.json`` and nothing else; the tables
    go to standard error, unless the console is quiet.

    Args:
        metrics: what ``metrics.json`` holds.
        results: the results folder.
        source: the name of the data.
        seconds: how long the run took.
    """
    if not _answered(metrics):
        test = metrics["test"]
        print(
            f"\nTest set of {source}: {test['images']} images, "
            f"Dice {number(test['dice'])} ({span(test['dice_interval'])}), "
            f"Jaccard {number(test['jaccard'])} ({span(test['jaccard_interval'])})\n"
        )
        print(f"{result_table(metrics, colours_wanted(sys.stdout))}\n{HOLD_FIXED}\n")
        last = {name: str(results / path) for name, path in OUTPUTS.items()}
        last["any case"] = f"python visualize.py --run {results}"
        if "study" in metrics:
            last["study"] = "every rule and normalisation: report.html, 'Beyond the paper's fusion'"
        _conclude(metrics, last, seconds)


def show_pooled(metrics: Mapping[str, Any], results: Path, seconds: float) -> None:
    """Print what several trainings show together: each, the endpoints, the verdict, and the paths to open.

    Args:
        metrics: what ``metrics.json`` of the pool holds.
        results: its folder.
        seconds: how long the command took.
    """
    if not _answered(metrics):
        pooled, test = metrics["pooled"], metrics["test"]
        print(f"\n{len(pooled)} trainings, {test['images']} test images, mean Dice {number(test['dice'])}\n")
        rows = [(entry["name"], number(entry["dice"]), general(entry["lambda"])) for entry in pooled]
        print(_aligned([("training", "Dice", "lambda"), *rows], words=(0,), colour=colours_wanted(sys.stdout)) + "\n")
        _conclude(metrics, {name: str(results / OUTPUTS[name]) for name in ("report", "figures", "metrics")}, seconds)


def _answered(metrics: Mapping[str, Any]) -> bool:
    """Whether the metrics went to standard output as JSON and no more is to be said."""
    settings = current_console()
    if settings.answer is not None:
        _print_json(metrics, settings.answer)
    return settings.answer is not None and settings.quiet


def _conclude(metrics: Mapping[str, Any], last: Mapping[str, str], seconds: float) -> None:
    """Print the endpoints, the verdict, what must be known about both, and the last lines, each with its name."""
    colour = colours_wanted(sys.stdout)
    print(f"{endpoint_table(metrics, colour)}\n")
    print(f"{BOLD}{metrics['verdict']}{PLAIN}" if colour else metrics["verdict"])
    for note in metrics["conclusion"]["notes"]:
        print(note)
    if metrics.get("targets"):
        rows = [TARGET_HEADER, *target_rows(metrics)]
        print(f"\n{_aligned(rows, (0, len(TARGET_HEADER) - 1), colour, terms_of_metrics(metrics))}")
    if metrics["synthetic"]:
        print(f"{SYNTHETIC_NOTE}. The verdict describes made-up images.")
    if metrics.get("data_note"):
        print(f"Data: {metrics['data_note']}")
    print()
    for name, text in {**last, "time": duration(seconds)}.items():
        print(f"{name:<12} {text}")


def _print_json(metrics: Mapping[str, Any], stream: TextIO) -> None:
    """Print the metrics; a reader that has seen enough and is gone (``head``) is no error."""
    try:
        print(json.dumps(metrics, indent=2, allow_nan=False), file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python would complain again at its end


def show_warnings(metrics: Mapping[str, Any]) -> None:
    """Say every warning of a run, loudly, on standard error; a quiet console does not silence them."""
    for warning in metrics["warnings"]:
        line = f"WARNING: {warning['text']}"
        complain(f"{ALARM}{line}{PLAIN}" if colours_wanted(sys.stderr) else line)
