"""How long each stage of a training took, and what of it was there already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Clock:
    """The stages since a training began.

    Attributes:
        stages: by name, "seconds" on the wall, and "reused", the number of epochs or maps that were there already, where
            that is more than none; further stages are added while they run.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages: dict[str, dict[str, Any]] = {}

    @property
    def minutes(self) -> float:
        """Since the training began."""
        return (time.perf_counter() - self.started) / 60

    def add(self, stage: str, key: str, amount: float) -> None:
        """Add to what is known of a stage."""
        entry = self.stages.setdefault(stage, {"seconds": 0.0})
        entry[key] = entry.get(key, 0) + amount


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


def start_clock() -> Clock:
    """A new clock, to which everything that follows in this context is counted."""
    clock = Clock()
    _clock.set(clock)
    return clock


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Count the time inside to a stage of the clock, if one was started; also a decorator.

    Example:
        >>> clock = start_clock()
        >>> with timed("maps"):
        ...     reused("maps", 3)
        >>> clock.stages["maps"]["reused"], clock.stages["maps"]["seconds"] >= 0.0
        (3, True)
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        clock = _clock.get()
        if clock is not None:
            clock.add(stage, "seconds", time.perf_counter() - started)


def reused(stage: str, count: int) -> None:
    """Say how many epochs or maps of a stage were there already."""
    clock = _clock.get()
    if clock is not None and count:
        clock.add(stage, "reused", count)
