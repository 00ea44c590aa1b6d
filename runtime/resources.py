"""What the machine has too little of: memory, threads, processes, open files. One line each, with what to lower."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import UserError, one_line

#: What the libraries say when something is short, in lower case, and what that is. The first that is found counts.
_SIGNS = (
    ("too many open files", "open files"), ("ancdata", "open files"),
    ("can't start new thread", "threads"), ("thread creation failed", "threads"), ("pthread_create", "threads"),
    ("out of memory", "memory"), ("can't allocate memory", "memory"), ("cannot allocate memory", "memory"),
    ("could not create a memory", "memory"), ("could not create a primitive", "memory"), ("not enough memory", "memory"),
    ("could not execute a primitive", "memory"), ("bad_alloc", "memory"), ("alloc_failed", "memory"),
    ("unable to allocate", "memory"), ("insufficient memory", "memory"),
    ("failed to map segment", "memory"), ("no space left on device", "shared memory"),
)
#: The same of the errors of the system.
_NUMBERS = {errno.ENOMEM: "memory", errno.EMFILE: "open files", errno.ENFILE: "open files", errno.EAGAIN: "processes or threads"}


def shortage(error: BaseException) -> str | None:
    """What an error says there is too little of; None where it says something else.

    Example:
        >>> shortage(MemoryError()), shortage(RuntimeError("can't start new thread")), shortage(OSError(2, "No such file"))
        ('memory', 'threads', None)
    """
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno is not None:
        return _NUMBERS.get(error.errno)
    if not isinstance(error, (RuntimeError, OSError, ImportError)):
        return None
    text = str(error).lower()
    return next((what for sign, what in _SIGNS if sign in text), None)


@contextmanager
def naming_shortage(stage: str, remedy: str) -> Iterator[None]:
    """Turn a shortage within into one line that names the stage and what to lower; other errors pass.

    Also a decorator. An inner stage that is named wins over an outer one.

    Raises:
        UserError: the line.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        what = shortage(error)
        if what is None:
            raise
        raise UserError(shortage_line(stage, what, remedy, error)) from error


def shortage_line(stage: str, what: str, remedy: str, error: BaseException) -> str:
    """The line for the user: stage, what is short, what to lower, and what is kept."""
    more = {
        "open files": "raise the limit (ulimit -n), or lower --workers",
        "threads": "raise the limit (ulimit -u), or lower --workers",
        "processes or threads": "raise the limit (ulimit -u), or lower --workers", "shared memory": "lower --workers",
    }
    said = one_line(error)
    detail = f" ({said})" if said else ""
    return f"{stage}: not enough {what}{detail}; {more.get(what, remedy)}; what is finished is kept, and the same command goes on"
