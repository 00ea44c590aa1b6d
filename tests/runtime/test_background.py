"""One piece of work at a time, beside the caller; nothing that was handed in is lost, no error is silent."""

from __future__ import annotations

import threading

import pytest

from runtime.background import BackgroundWriter


def test_work_is_done_in_its_order_in_another_thread_while_the_caller_goes_on():
    go_on, done = threading.Event(), []

    def first():
        assert go_on.wait(60)  # never, if the caller waited for it
        done.append(("first", threading.current_thread() is threading.main_thread()))

    with BackgroundWriter() as writer:
        writer.submit(first)
        assert done == []
        go_on.set()
        writer.submit(lambda: done.append(("second", threading.current_thread() is threading.main_thread())))
        assert done[0] == ("first", False)  # one at a time: the second waited for the first
    assert done == [("first", False), ("second", False)]


def test_what_fails_is_raised_at_the_next_submission_at_a_check_and_on_leaving():
    def fail():
        raise ValueError("no room")

    done = []
    with pytest.raises(ValueError, match="no room"), BackgroundWriter() as writer:
        writer.submit(fail)
        with pytest.raises(ValueError, match="no room"):
            writer.submit(lambda: done.append("never"))
        with pytest.raises(ValueError, match="no room"):
            writer.check()
    assert done == []


def test_a_check_waits_for_nothing():
    go_on = threading.Event()
    with BackgroundWriter() as writer:
        writer.check()
        writer.submit(lambda: go_on.wait(60))
        writer.check()
        go_on.set()


def test_an_interruption_waits_for_the_work_and_passes_on():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        assert go_on.wait(60)
        done.append("written")

    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.submit(work)
        assert begun.wait(60)
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt
    assert done == ["written"]
