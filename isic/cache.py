"""The decoded cache: every pair decoded once into one memory-mapped file."""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import PIL

from isic.decoding import decode_pair
from isic.layout import Pair, SkippedPair, skip
from runtime.errors import UserError
from runtime.files import check_space, file_checksum, remove_partials
from runtime.lock import FolderLock
from runtime.records import fingerprint, read_json, write_json


@dataclass
class DecodedPairs:
    """Decoded pairs of one size, memory-mapped.

    Attributes:
        ids: the ids asked for, sorted.
        size: height and width in pixels.
        records: uint8 memory map (slots, 4 * size * size): RGB rows, then the mask.
        slots: slot of each id.
        checksums: id -> [SHA-256 of the image file, of the mask file].
    """

    ids: list[str]
    size: int
    records: np.ndarray
    slots: dict[str, int]
    checksums: dict[str, list[str]]

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is started afresh: the name of the mapped file instead of its content."""
        records = self.records
        if not isinstance(records, np.memmap):
            return self.__dict__
        return {**self.__dict__, "records": (str(records.filename), records.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.records, tuple):
            name, shape = self.records
            self.records = np.memmap(name, np.uint8, "r", shape=shape)

    def image(self, id: str) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return self.records[self.slots[id], : 3 * self.size**2].reshape(self.size, self.size, 3)

    def mask(self, id: str) -> np.ndarray:
        """uint8 (size, size) of 0 and 1."""
        return self.records[self.slots[id], 3 * self.size**2 :].reshape(self.size, self.size)

    def fingerprint(self) -> str:
        """Changes when any image or mask file is changed, added or removed."""
        return fingerprint([[id, *self.checksums[id]] for id in self.ids])


def decode_pairs(
    pairs: Sequence[Pair],
    size: int,
    cache: Path,
    progress: Callable[[int], Any] = lambda count: None,
    skipped: list[SkippedPair] | None = None,
    waiting: Callable[[str], Any] = lambda line: None,
) -> DecodedPairs:
    """Decode every pair once into a memory-mapped cache and reuse it afterwards.

    A pair whose files kept their size and modification time is not read again;
    a changed one alone is redone. Work is saved as it goes, so an interrupted
    call continues where it stopped. Several runs may use one cache: one decodes
    at a time, and a record that was once listed is never overwritten, so that a
    run that has it mapped keeps what it started with.

    Args:
        pairs: what to decode.
        size: height and width in pixels.
        cache: folder for the cache; made when absent.
        progress: called with the number of pairs that became ready.
        skipped: if given, broken pairs are appended here and left out;
            otherwise the first of them is an error.
        waiting: called with a line when another run is decoding into the cache.

    Raises:
        UserError: a pair is broken, none is left, or the cache cannot be written.
    """
    stamps: dict[str, list[Any]] = {}
    for pair in pairs:
        try:
            stamps[pair.id] = [_stamp(pair.image), _stamp(pair.mask)]
        except UserError as error:
            skip(pair.id, pair.image, error, skipped)
    stamped = [pair for pair in pairs if pair.id in stamps]
    if not stamped:
        raise UserError("no pair is left: every one is broken; repair some of them")
    key = fingerprint([os.path.realpath(stamped[0].image.parent), os.path.realpath(stamped[0].mask.parent), size])[:16]
    folder = Path(cache) / f"{size}px-{key}"
    entries = _current_entries(folder, size, stamped, stamps)
    progress(len(entries))
    missing = [pair for pair in stamped if pair.id not in entries]
    if missing:
        with FolderLock(folder, "give --cache another folder", waiting):
            remove_partials(folder)
            by_others = _current_entries(folder, size, missing, stamps)  # what the run that was waited for has done is done
            progress(len(by_others))
            missing = [pair for pair in missing if pair.id not in by_others]
            entries.update(by_others)
            entries.update(_decode_into(folder, size, missing, stamps, progress, skipped))
    ids = [pair.id for pair in stamped if pair.id in entries]
    if not ids:
        raise UserError("no pair is left: every one is broken; repair some of them")
    return DecodedPairs(
        ids, size, _map_records(folder, size, entries),
        {id: entries[id]["slot"] for id in ids}, {id: entries[id]["checksums"] for id in ids},
    )


class _Index(NamedTuple):
    """What a cache holds: id -> slot, stamps and checksums of its files, CRC-32 of its record; the first unused slot."""

    entries: dict[str, dict[str, Any]]
    unused: int


def _read_index(folder: Path, size: int) -> _Index:
    """The index of a cache; a missing, damaged or differently made cache counts as empty."""
    try:
        content = read_json(folder / "index.json")
        if content["made_by"] != _maker(size):
            return _Index({}, 0)
        entries, unused = content["pairs"], content["unused"]
        slots = [entry["slot"] for entry in entries.values() if isinstance(entry["checksums"], list)]
        length = (folder / "pairs.uint8").stat().st_size
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return _Index({}, 0)
    whole = len(slots) == len(entries) and all(type(slot) is int and 0 <= slot < unused for slot in slots)
    if not whole or len(set(slots)) < len(slots) or (max(slots, default=-1) + 1) * 4 * size * size > length:
        return _Index({}, 0)
    return _Index(entries, unused)


def _maker(size: int) -> dict[str, Any]:
    """What decides the pixels beside the files: this program's decoding, and Pillow's."""
    return {"decoding": 3, "pillow": PIL.__version__, "size": size}


def _map_records(folder: Path, size: int, entries: dict[str, dict[str, Any]]) -> np.ndarray:
    length = 4 * size * size
    count = 1 + max((entry["slot"] for entry in entries.values()), default=-1)
    if not count:
        return np.empty((0, length), np.uint8)
    try:
        return np.memmap(folder / "pairs.uint8", np.uint8, "r", shape=(count, length))
    except OSError as error:
        raise UserError(f"cannot read the cache in {folder}: {error.strerror or error}; give --cache another folder") from error


def _current_entries(
    folder: Path, size: int, pairs: Sequence[Pair], stamps: Mapping[str, list[Any]]
) -> dict[str, dict[str, Any]]:
    """The index entries of the pairs whose record is there, undamaged, and of these very files."""
    index = _read_index(folder, size).entries
    records = _map_records(folder, size, index)

    def is_current(pair: Pair) -> bool:
        entry = index.get(pair.id, {})
        return entry.get("stamps") == stamps[pair.id] and zlib.crc32(records[entry["slot"]].data) == entry.get("crc")

    return {pair.id: index[pair.id] for pair in pairs if is_current(pair)}


def _decode_into(
    folder: Path, size: int, pairs: Sequence[Pair], stamps: Mapping[str, list[Any]], progress: Callable[[int], Any],
    skipped: list[SkippedPair] | None,
) -> dict[str, dict[str, Any]]:
    """Decode pairs into unused slots of the cache that this process has locked; returns their index entries."""
    entries, unused = _read_index(folder, size)
    decoded: dict[str, dict[str, Any]] = {}
    data_path, length, lock = folder / "pairs.uint8", 4 * size * size, threading.Lock()

    def work(pair: Pair) -> dict[str, Any] | UserError:
        nonlocal unused
        try:
            checksums = [_checksum(pair.image), _checksum(pair.mask)]
            image, mask = decode_pair(pair, size)
        except UserError as error:
            return error
        record = np.concatenate([image.ravel(), mask.ravel()])
        with lock:  # a full disk is an error to a written file; to a written memory map it is the end of the process
            slot, unused = unused, unused + 1
            stream.seek(slot * length)
            stream.write(record.data)
            stream.flush()
        return {"slot": slot, "stamps": stamps[pair.id], "checksums": checksums, "crc": zlib.crc32(record.data)}

    def save() -> None:
        os.fsync(stream.fileno())
        write_json(folder / "index.json", {"made_by": _maker(size), "unused": unused, "pairs": {**entries, **decoded}})

    try:
        if not entries:
            data_path.unlink(missing_ok=True)  # rather than overwrite what another run may have mapped
        present = data_path.stat().st_size if data_path.exists() else 0
        check_space(folder, (unused + len(pairs)) * length - present)
        # Pillow and hashlib release the interpreter lock, so threads use every core.
        with open(data_path, "r+b" if data_path.exists() else "w+b") as stream, \
                ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for count, (pair, found) in enumerate(zip(pairs, pool.map(work, pairs)), 1):
                    if isinstance(found, UserError):
                        skip(pair.id, pair.image, found, skipped)
                    else:
                        decoded[pair.id] = found
                    progress(1)
                    if count % 256 == 0:
                        save()
            finally:
                pool.shutdown(cancel_futures=True)
                save()
    except OSError as error:
        raise UserError(f"cannot write the cache in {folder}: {error.strerror or error}; give --cache another folder") from error
    return decoded


def _stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair", path) from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise UserError(f"{path} is a folder or a device and not a file; rename it or remove its pair", path)
    return [path.name, status.st_size, status.st_mtime_ns]


def _checksum(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair", path) from error
