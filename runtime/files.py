"""Every change a run makes to the disk: files that are whole or absent, in a folder that is synced; disk space, checksums.

No other module of the program creates, writes, renames or deletes a file. What may be left after a power loss
follows from the order of the calls in this file alone, and tests/faults tries it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from runtime.errors import UserError
from runtime.reading import check_regular

# ---------------------------------------------------------------- the calls to the system


class Disk:
    """The calls that change a disk, one method each; tests record them.

    A change of a file's content is certain after :meth:`sync`, one of a folder's
    entries (a file created, renamed or deleted) after :meth:`sync_folder`.
    """

    def create(self, path: Path) -> BinaryIO:
        """Open a new, empty file, or an old one emptied."""
        return open(path, "wb")

    def open(self, path: Path) -> io.FileIO:
        """Open a file to be read and changed in place, unbuffered; made when absent."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return io.FileIO(os.open(path, flags, 0o666), "r+b")

    def write_at(self, file: io.FileIO, offset: int, content: bytes | memoryview) -> None:
        """Write all of ``content`` at a place of a file of :meth:`open`."""
        file.seek(offset)
        left = memoryview(content).cast("B")
        while len(left):  # a write may take a part of it, as where the disk is nearly full
            left = left[file.write(left):]

    def truncate(self, file: io.FileIO, size: int) -> None:
        """Cut a file of :meth:`open`, or fill it up with zeros."""
        file.truncate(size)

    def sync(self, file: IO[bytes]) -> None:
        """Return when the content of an open file is on the disk."""
        file.flush()
        os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or a folder another name, in one step; a file of that name is replaced."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """Make one folder; one that is there is fine."""
        path.mkdir(exist_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Delete an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Return when the entries of a folder are on the disk, on systems that sync folders."""
        if os.name != "posix":
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:  # one may write into a folder that one may not read
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):  # no sync of folders here
                raise
        finally:
            os.close(descriptor)


#: What every function below calls.
disk = Disk()

# ---------------------------------------------------------------- writing


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under ``path`` only when it is complete.

    The bytes go to a hidden neighbour, are flushed to the disk, and take the
    name in one step, so a reader finds the old file or the new one and never
    half of either. On return the new name is on the disk too: what is written
    afterwards never outlives a power loss without it. On any failure the
    neighbour is removed.

    Raises:
        UserError: the file cannot be written (no space, no permission, a quota).
    """
    path = Path(path)
    partial = _partial(path)
    try:
        make_folder(path.parent)
        with disk.create(partial) as stream:
            yield stream
            disk.sync(stream)
        disk.rename(partial, path)
        disk.sync_folder(path.parent)
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


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it, each on the disk before it is used; returns those made, the innermost first."""
    path = Path(path)
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    if not missing:
        disk.make_folder(path)  # fails where it is no folder
    for folder in reversed(missing):
        disk.make_folder(folder)
        disk.sync_folder(folder.parent)
    return missing


def publish(source: Path, target: Path) -> None:
    """Give a finished file or folder its name, when all of its content is on the disk."""
    for folder, _, names in os.walk(source):
        for name in names:
            _sync_path(Path(folder) / name)
        disk.sync_folder(Path(folder))
    if source.is_file():
        _sync_path(source)
    disk.rename(source, target)
    disk.sync_folder(target.parent)


def _sync_path(path: Path) -> None:
    with disk.open(path) as file:
        disk.sync(file)


# ---------------------------------------------------------------- deleting


def remove(*paths: Path) -> None:
    """Delete files; those that are not there are fine. On return they are gone from the disk."""
    folders = {}
    for path in paths:
        with suppress(FileNotFoundError):
            disk.unlink(Path(path))
            folders[Path(path).parent] = True
    for folder in folders:
        disk.sync_folder(folder)


def remove_tree(root: Path) -> None:
    """Delete a folder with everything in it; what cannot be deleted stays. A link to a folder is left alone."""
    root = Path(root)
    if root.is_symlink() or not root.is_dir():
        return
    for folder, folders, names in os.walk(root, topdown=False):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*names, *links):
            with suppress(OSError):
                disk.unlink(Path(folder) / name)
        with suppress(OSError):
            disk.remove_folder(Path(folder))
    disk.sync_folder(root.parent)


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
        disk.unlink(path)


# ---------------------------------------------------------------- space and content


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
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
