"""Work of the evaluation shared by threads: the same numbers, sooner.

NumPy leaves Python's lock while it computes. Each piece of work is computed by one thread from start to end, and the
results come in the order of the pieces, so that no number depends on how many threads there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: More threads than this wait for memory rather than compute.
MOST_THREADS = 8


def threads() -> int:
    """How many there are: one per CPU that this process may use, at most ``MOST_THREADS``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def in_threads(work: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """The result of each piece of work, in their order.

    Example:
        >>> in_threads(lambda value: value + 1, range(3))
        [1, 2, 3]
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    # the libraries below NumPy would start threads of their own in each of these
    with threadpool_limits(1), ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(work, pieces))
