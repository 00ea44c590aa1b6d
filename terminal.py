"""What a run says while it works: progress bars, a line a stage, and the table at the end.

How much is said belongs to the command, not to the functions in between: :func:`console` sets it for
everything that is called inside.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm as _bar

from formats import MISSING, SYNTHETIC_NOTE, duration, number, signed, signed_span, span
from processes import is_first

GREEN, ORANGE, BOLD, PLAIN = "\033[32m", "\033[33m", "\033[1m", "\033[0m"
VERDICT_COLOURS = {"improves": GREEN, "degrades": ORANGE}


@dataclass
class Console:
    """How much is said, and where: ``quiet`` leaves out progress bars and stage lines; ``answer`` takes the JSON, if any."""

    quiet: bool = False
    answer: TextIO | None = None
    since: float = field(default_factory=time.perf_counter)


_console: ContextVar[Console | None] = ContextVar("console", default=None)


def _current() -> Console:
    return _console.get() or Console()


@contextmanager
def console(quiet: bool = False, as_json: bool = False) -> Iterator[Console]:
    """Say less inside (``quiet``), and keep standard output for JSON alone (``as_json``: all the rest goes to standard error)."""
    settings = Console(quiet, sys.stdout if as_json else None)
    token = _console.set(settings)
    try:
        if as_json:
            with redirect_stdout(sys.stderr):
                yield settings
        else:
            yield settings
    finally:
        _console.reset(token)


def tqdm(*arguments: Any, **options: Any) -> _bar:
    """A progress bar on standard error, in the first process only, and absent where the console is quiet."""
    return _bar(*arguments, **{**options, "disable": _current().quiet or not is_first()})


def stage(name: str, made: str) -> None:
    """One line that a stage is finished: its name, what it made, and the time since the line before."""
    settings = _current()
    now = time.perf_counter()
    if not settings.quiet and is_first():
        print(f"{name:<12} {made}  ({duration(now - settings.since)})")
    settings.since = now


def colours_wanted(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not refused them (``NO_COLOR``)."""
    return bool(getattr(stream, "isatty", lambda: False)()) and not os.environ.get("NO_COLOR") \
        and os.environ.get("TERM") != "dumb"


def result_table(metrics: Mapping[str, Any], colour: bool = False) -> str:
    """The three scores with intervals and paired differences, aligned; ASCII alone, for every terminal."""
    test = metrics["test"]
    labels = {
        "predictive_variance": "predictive variance alone (lambda = 1)",
        "saliency_variance": "saliency variance alone (lambda = 0)",
        "fused": f"fused score (lambda = {metrics['lambda']:g})",
    }
    rows = [("score", "foreground ECE", "95 % interval", "minus predictive", "95 % interval", "")]
    for key, label in labels.items():
        ece = test["foreground_ece"][key]
        difference = test["foreground_ece_difference"].get(f"{key}_minus_predictive_variance")
        if ece is None:
            rows.append((label, MISSING, "no foreground pixel", "", "", ""))
        elif difference is None:
            rows.append((label, number(ece), span(test["foreground_ece_interval"][key]), "", "", ""))
        else:
            rows.append((
                label, number(ece), span(test["foreground_ece_interval"][key]), signed(difference["value"]),
                signed_span(difference["interval"]), difference["verdict"],
            ))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for index, row in enumerate(rows):
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:5], widths[1:5]))]
        verdict = row[5]
        if colour and verdict in VERDICT_COLOURS:
            verdict = f"{VERDICT_COLOURS[verdict]}{verdict}{PLAIN}"
        line = "  ".join([*cells, verdict]).rstrip()
        lines.append(f"{BOLD}{line}{PLAIN}" if colour and index == 0 else line)
    return "\n".join(lines)


def show_result(metrics: Mapping[str, Any], results: Path, source: str, seconds: float) -> None:
    """Print the end of a run: segmentation, table, verdict, the synthetic warning, and the paths to open.

    With JSON wanted, standard output receives the content of ``metrics.json`` and nothing else; the table
    goes to standard error, unless the console is quiet.
    """
    settings, test = _current(), metrics["test"]
    if settings.answer is not None:
        try:
            print(json.dumps(metrics, indent=2, allow_nan=False), file=settings.answer, flush=True)
        except BrokenPipeError:  # the reader, head for example, has seen enough; Python would complain again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), settings.answer.fileno())
        if settings.quiet:
            return
    colour = colours_wanted(sys.stdout)
    strong = (BOLD, PLAIN) if colour else ("", "")
    print(
        f"\nTest set of {source}: {test['images']} images, "
        f"Dice {number(test['dice'])} ({span(test['dice_interval'])}), "
        f"Jaccard {number(test['jaccard'])} ({span(test['jaccard_interval'])})\n"
    )
    print(result_table(metrics, colour))
    print(f"\n{strong[0]}{metrics['verdict']}{strong[1]}")
    if metrics["synthetic"]:
        print(f"{SYNTHETIC_NOTE}. The verdict describes made-up images.")
    if metrics.get("data_note"):
        print(f"Data: {metrics['data_note']}")
    print()
    for name, path in (
        ("report", "report.html"), ("figures", "figures"), ("metrics", "metrics.json"), ("maps", "uncertainty_maps"),
    ):
        print(f"{name:<12} {results / path}")
    print(f"{'any case':<12} python visualize.py --run {results}")
    if "study" in metrics:
        print(f"{'study':<12} every rule and normalisation: report.html, 'Beyond the paper's fusion'")
    print(f"{'time':<12} {duration(seconds)}")
