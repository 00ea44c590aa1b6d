"""A lock on a folder that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import platform
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Callable

from runtime.errors import UserError
from runtime.files import disk, make_folder


class FolderLock:
    """Holds a folder for one process; the system lets go of it when the process dies.

    A folder that was made for this and holds nothing else when it is let go of is removed again.

    Args:
        folder: made when absent.
        remedy: what the user can do about a folder that is taken or cannot be written.
        waiting: None refuses a folder that is taken; a function is called once
            with a line that says who is waited for, and then it is waited for.

    Raises:
        UserError: on entering, when another living process holds it, or the
            folder cannot be written.
    """

    def __init__(
        self, folder: Path, remedy: str = "choose another --results folder", waiting: Callable[[str], None] | None = None
    ):
        self.path, self.remedy, self.waiting = Path(folder) / ".lock", remedy, waiting
        self.made: list[Path] = []  # folders that were not there, the innermost first

    def __enter__(self) -> FolderLock:
        try:
            while not self._take():  # the holder before removed the folder
                self.stream.close()
        except OSError as error:
            raise UserError(f"cannot write to {self.path.parent}: {error.strerror or error}; {self.remedy}") from error
        if hasattr(os, "register_at_fork"):
            # a forked helper shares the lock, and would keep the folder when it outlives a killed run
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _let_go(reference))
        return self

    def _take(self) -> bool:
        """Open the file and lock it; whether that is still the file of this name."""
        self.made += [folder for folder in self.path.parents if not folder.exists() and folder not in self.made]
        make_folder(self.path.parent)
        self.stream = disk.open(self.path)  # as long as it is held
        try:
            self._acquire()
            disk.truncate(self.stream, 0)
            disk.write_at(self.stream, 0, f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            self.stream.close()
            raise UserError(f"cannot lock {self.path.parent}: {error.strerror or error}; {self.remedy}") from error
        except BaseException:
            self.stream.close()
            raise
        return os.path.exists(self.path) and os.path.samestat(os.stat(self.path), os.fstat(self.stream.fileno()))

    def _acquire(self) -> None:
        told = False
        while True:
            try:
                _lock(self.stream.fileno())
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):  # a file system without locks
                    raise
            self.stream.seek(0)
            holder = self.stream.read().decode(errors="replace").strip() or "unknown"
            if self.waiting is None:
                raise UserError(f"{self.path.parent} is in use by another run ({holder}); wait for it or {self.remedy}")
            if not told:
                self.waiting(f"{self.path.parent} is in use by another run ({holder}); waiting for it")
                told = True
            time.sleep(0.1)

    def __exit__(self, *exception: object) -> None:
        if self.stream.closed:
            return
        with suppress(OSError):  # the name of a holder that is gone does no harm
            disk.truncate(self.stream, 0)
        # else the file stays; whoever waits for a file that is removed notices, and opens the one that took its name
        with suppress(OSError):
            if self.made and os.listdir(self.path.parent) == [self.path.name]:
                disk.unlink(self.path)
                for folder in self.made:
                    disk.remove_folder(folder)
        self.stream.close()


def _let_go(reference: weakref.ReferenceType[FolderLock]) -> None:
    lock = reference()
    if lock is not None:
        lock.stream.close()


def _lock(descriptor: int) -> None:
    """Take an exclusive lock that ends with the process, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        # Windows locks bytes, from the position of the file on, and lets nobody else read them: one far behind the
        # holder's name, the same for all
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
