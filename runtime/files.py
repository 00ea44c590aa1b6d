"""Files that are whole or absent: atomic writes, leftovers of killed processes, disk space, checksums."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under ``path`` only when it is complete.

    The bytes go to a hidden neighbour, are flushed to the disk, and take the
    name in one step, so a reader finds the old file or the new one and never
    half of either. On any failure the neighbour is removed.

    Raises:
        UserError: the file cannot be written (no space, no permission, a quota).
    """
    path = Path(path)
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was finished before is kept; "
            "make room or choose another folder (--results, --cache, --output), then run the same command again"
        ) from error
    except BaseException:
        _remove(partial)
        raise


def _partial(path: Path) -> Path:
    name = f".{path.name}.{os.getpid()}.partial"
    if len(os.fsencode(name)) > 255:  # no file system takes more, and the name itself may be that long
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{os.getpid()}.partial"
    return path.with_name(name)


def remove_partials(*folders: Path) -> None:
    """Delete the half-written files that killed processes left directly in ``folders``.

    Those of processes that are alive on this machine stay. One with the number
    of this very process is a leftover too: in a container every run may have
    the same number.
    """
    for folder in folders:
        for path in Path(folder).glob(".*.partial"):
            match = re.fullmatch(r"\..*\.(\d{1,10})\.partial", path.name, re.DOTALL)
            if match and path.is_file() and not _is_another_alive(int(match[1])):
                _remove(path)


def _is_another_alive(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":  # Windows keeps an open file from being deleted
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):  # the failure that led here is the one to report
        path.unlink()


def check_space(folder: Path, needed: int, remedy: str = "make room, or give --cache another folder") -> None:
    """Fail before any work where the disk of a folder has less than ``needed`` bytes free.

    Raises:
        UserError: how much is missing, and ``remedy``.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**20:.0f} MiB more but {free / 2**20:.0f} MiB are free; {remedy}"
        )


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
