"""Files that are whole or absent, and the one error a user is shown."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import time
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Callable

import numpy as np


class UserError(Exception):
    """Something the user can mend: one line with what is wrong, where, and what to do.

    Args:
        message: the line. What is not printable, as the line breaks and control
            characters that names of files may hold, is escaped.
        file: the file to blame, where it is one.
    """

    def __init__(self, message: object, file: Path | None = None):
        super().__init__(printable(str(message)))
        self.file = file


def printable(text: str) -> str:
    """The text on one line, with everything escaped that a terminal would act on or cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN: callers turn it into null), indented, ending in a newline."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as stream:
        stream.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object; NaN
            and infinity, which strict JSON lacks, count as damage.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; delete it and run again")
    return content


#: What differs between two runs of the same experiment.
WALL_CLOCK = ("minutes",)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself (the wall-clock fields apart), for :func:`read_sealed`."""
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read back
    return {**content, "checksum": fingerprint({k: v for k, v in content.items() if k not in WALL_CLOCK})}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object that :func:`seal` completed.

    Raises:
        UserError: see :func:`read_json`, or the content was changed since.
    """
    content = read_json(path)
    if content.get("checksum") != seal({k: v for k, v in content.items() if k != "checksum"})["checksum"]:
        raise UserError(f"{path} was changed after the run wrote it; delete it and run main.py again")
    return content


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the first row's keys as header; no rows leave an empty file."""
    rows = list(rows)
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(path) as stream:
        stream.write(text.getvalue().encode())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed ``.npz`` that opens with ``numpy.load`` without pickle."""
    with whole_file(path) as stream:
        np.savez(stream, **arrays)


def fingerprint(content: Any) -> str:
    """SHA-256 of the canonical JSON of ``content``: equal content, equal fingerprint."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class FolderLock:
    """Holds a folder for one process; the system lets go of it when the process dies.

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

    def __enter__(self) -> FolderLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write to {self.path.parent}: {error.strerror or error}; {self.remedy}") from error
        try:
            self._acquire()
            self.stream.truncate(0)
            self.stream.write(f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            self.stream.close()
            raise UserError(f"cannot lock {self.path.parent}: {error.strerror or error}; {self.remedy}") from error
        except BaseException:
            self.stream.close()
            raise
        if hasattr(os, "register_at_fork"):
            # a forked helper shares the lock, and would keep the folder when it outlives a killed run
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _let_go(reference))
        return self

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
        # the file stays: removing it would let two others lock two files of the same name
        if not self.stream.closed:
            with suppress(OSError):  # the name of a holder that is gone does no harm
                self.stream.truncate(0)
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


# ---------------------------------------------------------------- saved maps

#: The arrays of a map file and their types; all are (H, W).
MAP_ARRAYS = {
    "mean_prediction": np.float32,
    "pred_variance": np.float32,
    "saliency_variance": np.float32,
    "expected_entropy": np.float32,
    "fused_score": np.float32,
    "true_mask": np.uint8,
}


def write_maps(
    path: Path, maps: Mapping[str, np.ndarray], empty_cams: int, identity: str, fallbacks: int = 0
) -> None:
    """Save the maps of one image.

    Args:
        path: ``<id>.npz``.
        maps: arrays (H, W) named as in ``MAP_ARRAYS``; "fused_score" may come later.
        empty_cams: how many Grad-CAM heatmaps were zero everywhere.
        identity: fingerprint of what made the maps.
        fallbacks: 1 where the maps overflowed in half precision and were made in fp32, else 0.
    """
    numbers = {"empty_cams": np.int64(empty_cams), "fallbacks": np.int64(fallbacks), "identity": np.array(identity)}
    write_npz(path, {**maps, **numbers})


def read_maps(path: Path, need: Iterable[str] = MAP_ARRAYS) -> dict[str, Any]:
    """Read and check the maps of one image: the arrays, "empty_cams", "fallbacks" and "identity".

    Raises:
        UserError: the file is missing or broken, lacks an array of ``need``,
            or holds NaN or a shape or type that does not belong there.
    """
    remedy = "delete it and run main.py again"
    try:
        check_stored(path)
        with np.load(path, allow_pickle=False) as content:
            maps = {name: content[name] for name in content.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except Exception as error:  # zipfile and numpy raise many kinds on broken bytes
        raise UserError(f"{path} is not a map file of this program ({type(error).__name__}); {remedy}") from error
    for name in (*need, "empty_cams", "fallbacks", "identity"):
        if name not in maps:
            raise UserError(f"{path} lacks {name}; {remedy}")
    shape = maps["mean_prediction"].shape if "mean_prediction" in maps else ()
    for name, kind in MAP_ARRAYS.items():
        if name in maps:
            values = maps[name]
            if values.dtype != kind or values.ndim != 2 or values.shape != shape or values.size == 0:
                raise UserError(f"{path}: {name} is {values.dtype} {values.shape}, not {np.dtype(kind)} (H, W); {remedy}")
            if not np.isfinite(values).all():
                raise UserError(f"{path}: {name} holds NaN or infinite values; {remedy}")
    for name, kinds, plain in (("empty_cams", "iu", int), ("fallbacks", "iu", int), ("identity", "U", str)):
        if maps[name].ndim != 0 or maps[name].dtype.kind not in kinds:
            raise UserError(f"{path}: {name} is {maps[name].dtype} {maps[name].shape}; {remedy}")
        maps[name] = plain(maps[name])
    return maps


def check_stored(path: Path) -> None:
    """Refuse a zip file whose members claim to be larger than the file.

    Map files and checkpoints are never compressed, so reading one never needs
    more memory than the file has bytes.

    Raises:
        ValueError: a member is compressed, or the sizes do not add up.
        OSError, zipfile.BadZipFile: it cannot be read, or is no zip file.
    """
    with zipfile.ZipFile(path) as content:
        members = content.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a member is compressed")
    if sum(member.file_size for member in members) > os.path.getsize(path):
        raise ValueError("the members are larger than the file")
