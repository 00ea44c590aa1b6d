"""The clock of a training: seconds by stage, and what was reused."""

from __future__ import annotations

import time

import pytest

from runtime.stages import Clock, reused, start_clock, timed


@pytest.fixture
def seconds(monkeypatch):
    """Time that passes only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(duration: float) -> None:
        now[0] += duration

    return wait


def test_the_seconds_of_a_stage_are_added_up_and_nothing_between_is_counted(seconds):
    clock = start_clock()
    for duration in (2.0, 3.0):
        with timed("maps"):
            seconds(duration)
        seconds(60.0)
    assert clock.stages == {"maps": {"seconds": 5.0}} and clock.minutes == 125 / 60


def test_what_was_there_already_is_counted_where_there_was_any(seconds):
    clock = start_clock()
    reused("training", 0)
    assert clock.stages == {}
    for count in (4, 2):
        reused("maps", count)
    assert clock.stages == {"maps": {"seconds": 0.0, "reused": 6}}


def test_a_stage_that_fails_is_timed_and_the_error_goes_on(seconds):
    clock = start_clock()

    @timed("verdict")
    def fail() -> None:
        seconds(1.0)
        raise ValueError("no verdict")

    with pytest.raises(ValueError, match="no verdict"):
        fail()
    assert clock.stages["verdict"]["seconds"] == 1.0


def test_a_new_clock_starts_at_nothing_and_leaves_the_old_one_alone(seconds):
    first, second = start_clock(), start_clock()
    with timed("counting"):
        seconds(1.0)
    assert first.stages == {} and second.stages == {"counting": {"seconds": 1.0}} and isinstance(first, Clock)
