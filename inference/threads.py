"""Independent items of work computed in parallel, each by its share of the CPU threads that PyTorch may use."""

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
    """Yield ``make(item)`` for each item, in order; several items are computed in parallel.

    PyTorch's threads share each operation and wait for each other at its end,
    thousands of times per image. Where operations are small, or another
    process keeps a core busy, most of the time is spent waiting. Here each
    thread computes whole items. There are ``torch.get_num_threads()`` of them,
    or as many as there are items if that is less, and each operation uses its
    share of that number. The results are the same, bit for bit, as far as
    those of the operations do not depend on the number of threads.

    Args:
        make: may be called from several threads at once.
        items: arguments of ``make``.

    Raises:
        Exception: what ``make`` raises, when it is the turn of that item; running items are waited for.

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
            if len(waiting) > lanes:  # at most one finished result waits for its turn, since results take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


@functools.lru_cache(maxsize=4)
def _threads(process: int, lanes: int, share: int) -> ThreadPoolExecutor:
    """Threads that are started once: Python may wait forever for one that it starts when memory has run out.

    Args:
        process: this one; a forked process has none of the threads of the one that it came from.
        lanes: how many.
        share: threads that PyTorch may use in each.

    Raises:
        RuntimeError: the system starts no more threads.
    """
    allowed = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(share)
        torch.get_num_threads()  # the first call in a thread takes the number last set anywhere; it stays the thread's own

    pool = ThreadPoolExecutor(lanes, initializer=begin)
    all_run = threading.Barrier(lanes)
    try:
        for started in [pool.submit(all_run.wait) for _ in range(lanes)]:
            started.result()
    except BaseException:
        all_run.abort()  # else those that did start would wait for the others, and the interpreter for them
        pool.shutdown()
        raise
    finally:
        torch.set_num_threads(allowed)
    return pool
