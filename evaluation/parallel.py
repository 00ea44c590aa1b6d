"""Work of the evaluation shared by threads: the same numbers, sooner, and a caller may watch how far it is.

NumPy leaves Python's lock while it computes. Each piece of work is computed by one thread from start to end, and the
results come in the order of the pieces, so that no number depends on how many threads there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Callable, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: More threads than this wait for memory rather than compute.
MOST_THREADS = 8

#: From a number of pieces of work to a context that yields what is called with the number of newly finished ones.
Watch = Callable[[int], AbstractContextManager[Callable[[int], object]]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within, every piece of work that this thread has done in threads is reported, such as to a progress bar."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def threads() -> int:
    """How many there are: one per CPU that this process may use, at most ``MOST_THREADS``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def in_threads(work: Callable[[T], R], pieces: Iterable[T], total: int) -> list[R]:
    """The result of each piece of work, in their order.

    Args:
        work: called once with each piece, in any thread.
        pieces: what is worked on.
        total: how many there are.

    Example:
        >>> in_threads(lambda value: value + 1, range(3), total=3)
        [1, 2, 3]
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    watch, results = _watch.get(), []
    # The libraries below NumPy would start threads of their own in each of these. Those of OpenMP are limited by the thread
    # that asks for them; and sums of scikit-learn depend on how many there are.
    one = partial(threadpool_limits, 1, "openmp")
    with threadpool_limits(1), ThreadPoolExecutor(threads(), initializer=one) as pool, \
            watch(total) if watch else nullcontext(_ignore) as report:
        for result in pool.map(work, pieces):
            results.append(result)
            report(1)
    return results


def _ignore(count: int) -> None:
    """Where nobody watches."""
