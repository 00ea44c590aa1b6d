"""The decoded pairs of a run, read from the cache one at a time, each checked against its checksum.

The file is not mapped: of a mapped file that is cut short the next access ends the process (SIGBUS), and of one that is
overwritten it returns other pixels without a word. A read and a CRC-32 cost a fraction of a millisecond per pair.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.records import fingerprint


class RecordFile:
    """Records of one length in one file, read by their place; opened with the first of them.

    Args:
        path: of the file.
        length: of a record in bytes.
    """

    def __init__(self, path: Path, length: int):
        self.path, self.length = Path(path), length
        self._lock, self._descriptor = threading.Lock(), -1

    def __getstate__(self) -> tuple[Path, int]:
        return self.path, self.length

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def open(self) -> None:
        """Hold the file open from now on, whatever becomes of its name.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def read(self, slot: int) -> bytes:
        """The record at a place; shorter than ``length`` where the file ends before.

        Raises:
            OSError: the file cannot be read.
        """
        self.open()
        found, place = b"", slot * self.length
        while len(found) < self.length:
            more = self._read_at(place + len(found), self.length - len(found))
            if not more:
                break
            found = found + more if found else more
        return found

    def _read_at(self, place: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, place)  # has no position that processes or threads would share
        with self._lock:
            os.lseek(self._descriptor, place, os.SEEK_SET)
            return os.read(self._descriptor, count)


@dataclass
class DecodedPairs:
    """Decoded pairs of one size, which are read from the cache whenever they are asked for.

    Attributes:
        ids: the ids asked for, sorted.
        size: height and width in pixels.
        records: the file; a record of 4 * size * size bytes is the RGB rows, then the mask.
        slots: slot of each id in it.
        checksums: id -> [SHA-256 of the image file, of the mask file].
        crcs: CRC-32 of each id's record.
    """

    ids: list[str]
    size: int
    records: RecordFile
    slots: dict[str, int]
    checksums: dict[str, list[str]]
    crcs: Mapping[str, int]

    def pair(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (size, size, 3) and mask uint8 (size, size) of 0 and 1, both read-only.

        Raises:
            UserError: the cache cannot be read, or does not hold any more what it held when the run began.
        """
        advice = "nothing was made from it; run the same command again, with --cache and another folder if this happens again"
        try:
            record = self.records.read(self.slots[id])
        except OSError as error:
            raise UserError(f"cannot read the cache {self.records.path}: {error.strerror or error}; {advice}") from error
        if zlib.crc32(record) != self.crcs[id]:
            what = "ends before" if len(record) < self.records.length else "does not hold any more"
            raise UserError(f"{self.records.path} {what} the decoded image {id}: it was changed while this run used it; {advice}")
        values, size = np.frombuffer(record, np.uint8), self.size
        return values[: 3 * size**2].reshape(size, size, 3), values[3 * size**2 :].reshape(size, size)

    def image(self, id: str) -> np.ndarray:
        """The image of :meth:`pair`."""
        return self.pair(id)[0]

    def mask(self, id: str) -> np.ndarray:
        """The mask of :meth:`pair`."""
        return self.pair(id)[1]

    def check(self) -> int:
        """Read every pair; on another machine, or under another user, the cache may not be the same. Returns their number.

        Raises:
            UserError: see :meth:`pair`.
        """
        return sum(1 for id in self.ids if self.pair(id))

    def fingerprint(self) -> str:
        """Changes when any image or mask file is changed, added or removed."""
        return fingerprint([[id, *self.checksums[id]] for id in self.ids])
