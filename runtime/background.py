"""One thread that writes what is finished while the next is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable


class BackgroundWriter:
    """Does one piece of work at a time in its thread, in the order of handing in.

    What is handed in must be a copy of its own: the caller goes on at once.
    Leaving waits for the work under way, also where an error or a signal ends
    the block, so that all that was handed in is done or has raised.

    Example:
        >>> done = []
        >>> with BackgroundWriter() as writer:
        ...     writer.submit(lambda: done.append("written"))
        >>> done
        ['written']
    """

    def __enter__(self) -> BackgroundWriter:
        self._pool = ThreadPoolExecutor(1)
        # started now: Python may wait forever for a thread that it starts when memory has run out
        self._under_way: Future[object] = self._pool.submit(int)
        self._under_way.result()
        return self

    def submit(self, work: Callable[[], object]) -> None:
        """Hand in the next piece of work; waits for the one before, of which there is thus one at most.

        Raises:
            Exception: what the piece before raised.
        """
        self._under_way.result()
        self._under_way = self._pool.submit(work)

    def check(self) -> None:
        """Raise what the work under way has raised, without waiting for it."""
        if self._under_way.done():
            self._under_way.result()

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        self._under_way.result()  # its error comes before the one that ended the block, which Python shows as its context
