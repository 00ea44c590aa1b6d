"""What a command says while it works: progress bars with the time left, and a line per finished stage.

How much is said belongs to the command, not to the functions in between: :func:`console` sets it for
everything that is called inside.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable, TextIO, TypeVar

from tqdm import tqdm

from runtime.resources import naming_shortage

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that speaks: rank 0 of those that ``torchrun`` started, or alone."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Console:
    """How much is said, and where.

    Attributes:
        quiet: leaves out progress bars and stage lines.
        answer: the stream that receives the JSON of the result, if it is wanted.
        since: when the stage that is now under way began.
    """

    quiet: bool = False
    answer: TextIO | None = None
    since: float = field(default_factory=time.perf_counter)


_console: ContextVar[Console | None] = ContextVar("console", default=None)


def current_console() -> Console:
    """The settings of the enclosing :func:`console`, or the defaults."""
    return _console.get() or Console()


@contextmanager
def console(quiet: bool = False, as_json: bool = False) -> Iterator[Console]:
    """Say less inside (``quiet``), or keep standard output for JSON alone (``as_json``: the rest goes to standard error)."""
    settings = Console(quiet, sys.stdout if as_json else None)
    token = _console.set(settings)
    try:
        # what is short in a stage that does not name itself
        with naming_shortage("this command", "lower --batch-size, --image-size or --resamples, or close other programs"):
            if as_json:
                with redirect_stdout(sys.stderr):
                    yield settings
            else:
                yield settings
    finally:
        _console.reset(token)


class _Bar(tqdm):
    """A bar that a stop may hit while it is made: then Python deletes what has not got all attributes yet."""

    pos, start_t = 0, 0.0


def progress_bar(description: str, total: int | None, unit: str, **options: Any) -> tqdm[Any]:
    """A progress bar on standard error, in the main process only, and absent where the console is quiet."""
    disable = current_console().quiet or not is_main_process()
    return _Bar(desc=description, total=total, unit=unit, smoothing=0.05, disable=disable, **options)


def with_progress(items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
    """The items, one by one, under a progress bar that appears with the first and goes with the last."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update(1)


class Reported(Iterable[T]):
    """Items that may be gone through several times, each time under the same progress bar."""

    def __init__(self, items: Iterable[T], bar: tqdm[Any]):
        self.items, self.bar = items, bar

    def __iter__(self) -> Iterator[T]:
        for item in self.items:
            yield item
            self.bar.update(1)


def resampling_bar(total: int) -> AbstractContextManager[Callable[[int], object]]:
    """A progress bar for pieces of resampling, shown where they take more than two seconds and gone when they are done."""
    return _updates(progress_bar("resampling", total, "piece", delay=2.0, leave=False))


@contextmanager
def _updates(bar: tqdm[Any]) -> Iterator[Callable[[int], object]]:
    with bar:
        yield bar.update


def stage(name: str, made: str) -> None:
    """Print one line that a stage is finished: its name, what it made, and the time since the line before."""
    settings = current_console()
    now = time.perf_counter()
    if not settings.quiet and is_main_process():
        print(f"{name:<12} {made}  ({duration(now - settings.since)})")
    settings.since = now


def say(text: str) -> None:
    """Print, in the main process only."""
    if is_main_process():
        print(text)


def complain(line: str) -> None:
    """Print a line on standard error, in the main process only; a terminal that is gone is no further error."""
    try:
        if is_main_process():
            print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


def duration(seconds: float) -> str:
    """Elapsed time: in seconds below two minutes, then in minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
