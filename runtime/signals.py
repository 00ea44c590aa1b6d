"""Stopping from outside: Ctrl-C and SIGTERM, in the process that runs and in its helpers."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop.

    Not an ``Exception``: code that turns every failure of a decoder into a
    message must not take a stop for one.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StopSignals:
    """While entered, SIGINT and SIGTERM raise :class:`Stopped` in the main thread, once.

    Signals that follow within ``patience`` seconds change nothing, so a second
    Ctrl-C does not disturb the cleaning up that the first began. A later one
    ends the process on the spot, which loses nothing: every file is whole or
    absent. After a stop, a signal whose default is to kill stays caught: while
    the interpreter shuts down, a second Ctrl-C must not change the exit code.

    Attributes:
        signum: the signal that arrived first, or None.
    """

    def __init__(self, patience: float = 5.0):
        self.patience = patience
        self.signum: int | None = None

    def __enter__(self) -> StopSignals:
        self.process, self.before = os.getpid(), {}
        if threading.current_thread() is threading.main_thread():  # nowhere else may handlers be set
            self.before = {signum: signal.signal(signum, self._receive) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            if self.signum is None or handler != signal.SIG_DFL:
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if os.getpid() != self.process:
            return  # a forked helper: the process that started it ends it
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            raise Stopped(signum)
        if time.monotonic() - self.since > self.patience:
            os.write(2, b"\nstopped at once; the same command goes on from the last finished epoch or map\n")
            os._exit(128 + signum)


@contextmanager
def block_sigint_in_children() -> Iterator[None]:
    """Processes started inside never see SIGINT; this one still gets it, at the latest at the end.

    A Ctrl-C reaches the helpers too, which would print a traceback each. A
    blocked signal stays blocked in a process started meanwhile. SIGTERM is left
    to them: it is how their pool ends them when one of them has crashed.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def end_with_parent(*_: Any) -> None:
    """Make this helper process end when the one that started it is gone, even by ``kill -9``.

    Without it, the processes of a pool wait for work for ever. A run that is stopped while it fetches a
    batch hangs up on the helper's thread that hands it over: that is no error to be shown.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sys.excepthook = _unless_hung_up

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
