"""Items computed in parallel: in order, with their share of the threads, and nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from inference.threads import _threads, in_threads


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_whichever_is_finished_first(four_threads):
    last_is_done = threading.Event()

    def make(item: int) -> int:
        if item == 3:
            last_is_done.set()
        assert last_is_done.wait(30)
        return item * item

    assert list(in_threads(make, range(4))) == [0, 1, 4, 9]


@pytest.mark.parametrize(("items", "lanes", "share"), [(1, 1, 4), (2, 2, 2), (3, 3, 1), (9, 4, 1)])
def test_the_threads_are_divided_and_the_number_is_as_before(four_threads, items, lanes, share):
    together = threading.Barrier(lanes)

    def make(item: int) -> tuple[int, int]:
        if item < lanes:
            together.wait(30)  # so many really run at once
        return torch.get_num_threads(), threading.get_ident()

    found = list(in_threads(make, range(items)))
    assert {number for number, _ in found} == {share} and len({ident for _, ident in found}) == lanes
    assert torch.get_num_threads() == 4
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


def test_no_more_is_made_ahead_than_may_wait(four_threads):
    started: list[int] = []
    results = in_threads(lambda item: started.append(item) or item, range(100))
    assert next(results) == 0
    assert len(started) <= 6
    results.close()
    assert len(started) <= 6 and torch.get_num_threads() == 4


def test_a_failure_comes_at_its_turn_and_the_number_of_threads_is_as_before(four_threads):
    def make(item: int) -> float:
        return 1 / (2 - item)

    results = in_threads(make, range(5))
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() == 4


def test_threads_are_started_once(four_threads):
    idents = [set(in_threads(lambda item: threading.get_ident(), range(40))) for _ in range(3)]
    assert len(set.union(*idents)) <= 4
    assert threading.main_thread().ident not in set.union(*idents)


def test_where_no_more_threads_can_be_started_none_is_left_waiting(four_threads, monkeypatch):
    _threads.cache_clear()
    before, start = set(threading.enumerate()), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(set(threading.enumerate()) - before) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(in_threads(lambda item: item, range(9)))
    assert set(threading.enumerate()) <= before and torch.get_num_threads() == 4
