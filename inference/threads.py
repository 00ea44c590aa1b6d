"""Independent pieces of work in threads of this process, each with its share of the CPU threads that PyTorch may use."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Callable, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``make(item)`` for each item in order, computed beside each other.

    Threads that share each operation meet at its end, thousands of times an
    image: where the operations are small, or another process holds one of the
    cores, most of the time is spent waiting there. Pieces that are computed
    beside each other meet once. So as many threads are started as there are
    items, at most as many as ``torch.get_num_threads()``, and that number is
    divided among them. No result depends on it, as none depends on the number
    of threads of an operation.

    Args:
        make: may be called from several threads at once.
        items: of the pieces of work.

    Raises:
        Exception: what ``make`` raises, at its turn; the pieces that are being computed are waited for.

    Example:
        >>> list(in_threads(lambda n: n * n, range(5)))
        [0, 1, 4, 9, 16]
    """
    items = list(items)
    allowed = torch.get_num_threads()
    lanes = min(allowed, len(items))
    if lanes <= 1:
        yield from map(make, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = _threads(os.getpid(), lanes, allowed // lanes)
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > lanes:  # one finished piece may wait for its turn, and no more: results take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for piece in waiting:
            piece.cancel()
        wait(waiting)


@functools.lru_cache(maxsize=4)
def _threads(process: int, lanes: int, share: int) -> ThreadPoolExecutor:
    """Threads that are started once: Python may wait forever for one that it starts when memory has run out.

    Args:
        process: this one; a forked process has none of the threads of the one that it came from.
        lanes: how many.
        share: threads that PyTorch may use in each.
    """
    allowed = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(share)
        torch.get_num_threads()  # the first call in a thread takes the number last set anywhere; it stays the thread's own

    pool = ThreadPoolExecutor(lanes, initializer=begin)
    all_run = threading.Barrier(lanes)
    for started in [pool.submit(all_run.wait) for _ in range(lanes)]:
        started.result()
    torch.set_num_threads(allowed)
    return pool
