"""The decoded cache: every pair decoded once into one file."""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import PIL

from isic.decoded import DecodedPairs, RecordFile
from isic.decoding import decode_pair
from isic.layout import Pair, SkippedPair, skip
from runtime.errors import UserError
from runtime.files import check_space, disk, file_checksum, remove, remove_partials
from runtime.lock import FolderLock
from runtime.records import fingerprint, read_json, write_json
from runtime.schemas import CHECKSUM, anything, fits, list_of, mapping_of, record, text, whole


def decode_pairs(
    pairs: Sequence[Pair],
    size: int,
    cache: Path,
    progress: Callable[[int], Any] = lambda count: None,
    skipped: list[SkippedPair] | None = None,
    waiting: Callable[[str], Any] = lambda line: None,
) -> DecodedPairs:
    """Decode every pair once into a cache and reuse it afterwards.

    A pair whose files kept their size, their times and their place on the disk
    is not read again; of one that did not the checksums are compared, and it is
    decoded again only where its content is another, and no cache in the same
    folder holds that. Work is saved as it goes, so an interrupted
    call continues where it stopped. Several runs may use one cache: one decodes
    at a time, and a record that was once listed is never overwritten, so that a
    run that reads it keeps what it started with.

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
    folder = _folder(stamped, size, Path(cache))
    entries, renewed = _current_entries(folder, size, stamped, stamps)
    progress(len(entries))
    missing = [pair for pair in stamped if pair.id not in entries]
    if missing:
        with FolderLock(folder, "give --cache another folder", waiting):
            remove_partials(folder)
            by_others, again = _current_entries(folder, size, missing, stamps)  # what the run that was waited for did is done
            progress(len(by_others))
            missing = [pair for pair in missing if pair.id not in by_others]
            entries.update(by_others)
            renewed.update(again)
            entries.update(_decode_into(folder, size, missing, stamps, progress, skipped, renewed))
    elif renewed:
        with suppress(UserError), FolderLock(folder, "", waiting):  # a cache that cannot be written is compared again next time
            current = _read_index(folder, size)
            _write_index(folder, size, _with_stamps(current.entries, renewed), current.unused)
    ids = [pair.id for pair in stamped if pair.id in entries]
    if not ids:
        raise UserError("no pair is left: every one is broken; repair some of them")
    return DecodedPairs(
        ids, size, _open_records(folder, size),
        *({id: entries[id][name] for id in ids} for name in ("slot", "checksums", "crc")),  # type: ignore[arg-type]
    )


def _folder(pairs: Sequence[Pair], size: int, cache: Path) -> Path:
    """Where in a cache the pairs of two folders lie."""
    key = fingerprint([os.path.realpath(pairs[0].image.parent), os.path.realpath(pairs[0].mask.parent), size])[:16]
    return cache / f"{size}px-{key}"


#: What ``index.json`` of a cache may hold. The stamps of an earlier version are shorter, and never current.
INDEX = record({
    "made_by": mapping_of(anything), "unused": whole(0),
    "pairs": mapping_of(record({
        "slot": whole(0), "crc": whole(0, 2**32 - 1), "checksums": list_of(text(CHECKSUM), 2, 2),
        "stamps": list_of(list_of(anything), 2, 2),
    })),
})


class _Index(NamedTuple):
    """What a cache holds: id -> slot, stamps and checksums of its files, CRC-32 of its record; the first unused slot."""

    entries: dict[str, dict[str, Any]]
    unused: int


def _read_index(folder: Path, size: int) -> _Index:
    """The index of a cache; a missing, damaged or differently made cache counts as empty."""
    try:
        content = read_json(folder / "index.json")
        length = (folder / "pairs.uint8").stat().st_size
    except (UserError, OSError):
        return _Index({}, 0)
    if not fits(INDEX, content) or content["made_by"] != _maker(size):
        return _Index({}, 0)
    entries, unused = content["pairs"], content["unused"]
    slots = {entry["slot"] for entry in entries.values()}
    there = length // (4 * size * size)  # a write that failed may have left the last slots empty
    if len(slots) < len(entries) or max(slots, default=-1) >= min(unused, there) or unused > there + 1024:
        return _Index({}, 0)
    return _Index(entries, unused)


def _write_index(folder: Path, size: int, entries: Mapping[str, Any], unused: int) -> None:
    write_json(folder / "index.json", {"made_by": _maker(size), "unused": unused, "pairs": entries})


def _maker(size: int) -> dict[str, Any]:
    """What decides the pixels beside the files: this program's decoding, and Pillow's."""
    return {"decoding": 3, "pillow": PIL.__version__, "size": size}


def _open_records(folder: Path, size: int) -> RecordFile:
    records = RecordFile(folder / "pairs.uint8", 4 * size * size)
    try:
        records.open()  # what another run may put in its place is not this run's
    except OSError as error:
        raise UserError(f"cannot read the cache in {folder}: {error.strerror or error}; give --cache another folder") from error
    return records


def _current_entries(
    folder: Path, size: int, pairs: Sequence[Pair], stamps: Mapping[str, list[Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The index entries of the pairs whose record is there, undamaged, and of these very files.

    Returns:
        All of them, and those among them whose stamps are not in the index: files that were copied, restored or touched,
        and have the content that they had.
    """
    index = _read_index(folder, size).entries
    if not index:
        return {}, {}
    records = _open_records(folder, size)

    def current(pair: Pair) -> dict[str, Any] | None:
        entry = index.get(pair.id)
        if entry is not None and entry["stamps"] != stamps[pair.id]:
            try:
                same = [_checksum(pair.image), _checksum(pair.mask)] == entry["checksums"]
            except UserError:  # said when it is to be decoded
                return None
            entry = {**entry, "stamps": stamps[pair.id]} if same else None
        return None if entry is None or zlib.crc32(records.read(entry["slot"])) != entry["crc"] else entry

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {pair.id: entry for pair, entry in zip(pairs, pool.map(current, pairs)) if entry is not None}
    return found, {id: entry for id, entry in found.items() if entry is not index[id]}


def _with_stamps(entries: Mapping[str, dict[str, Any]], renewed: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of an index with new stamps, where they still are of the records that were looked at."""
    return {
        id: {**entry, "stamps": renewed[id]["stamps"]}
        if id in renewed and all(entry[name] == renewed[id][name] for name in ("slot", "crc", "checksums")) else entry
        for id, entry in entries.items()
    }


def _elsewhere(folder: Path, size: int) -> Callable[[list[str]], np.ndarray | None]:
    """Looks for the record of two files, by their checksums, in the other caches beside one: of a dataset that was copied."""
    known: dict[tuple[str, ...], tuple[RecordFile, dict[str, Any]]] = {}
    for other in sorted(folder.parent.glob(f"{size}px-*")):
        index = {} if other == folder else _read_index(other, size).entries
        if index:
            records = RecordFile(other / "pairs.uint8", 4 * size * size)
            known.update({tuple(entry["checksums"]): (records, entry) for entry in index.values()})

    def find(checksums: list[str]) -> np.ndarray | None:
        if tuple(checksums) not in known:
            return None
        records, entry = known[tuple(checksums)]
        try:
            content = records.read(entry["slot"])
        except OSError:  # a cache that goes away meanwhile is no loss
            return None
        return np.frombuffer(content, np.uint8) if zlib.crc32(content) == entry["crc"] else None

    return find


def _decode_into(
    folder: Path, size: int, pairs: Sequence[Pair], stamps: Mapping[str, list[Any]], progress: Callable[[int], Any],
    skipped: list[SkippedPair] | None, renewed: Mapping[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Decode pairs into unused slots of the cache that this process has locked; returns their index entries.

    Those of ``renewed`` are written into the index as well.
    """
    entries, unused = _read_index(folder, size)
    entries, copied = _with_stamps(entries, renewed), _elsewhere(folder, size)
    decoded: dict[str, dict[str, Any]] = {}
    data_path, length, lock = folder / "pairs.uint8", 4 * size * size, threading.Lock()

    def work(pair: Pair) -> dict[str, Any] | UserError:
        nonlocal unused
        try:
            checksums = [_checksum(pair.image), _checksum(pair.mask)]
            content = copied(checksums)
            if content is None:
                content = np.concatenate([part.ravel() for part in decode_pair(pair, size)])
        except UserError as error:
            return error
        with lock:  # a full disk is an error to a written file; to a written memory map it is the end of the process
            slot, unused = unused, unused + 1
            disk.write_at(stream, slot * length, content.data)
        return {"slot": slot, "stamps": stamps[pair.id], "checksums": checksums, "crc": zlib.crc32(content.data)}

    def save() -> None:
        disk.sync(stream)
        _write_index(folder, size, {**entries, **decoded}, unused)

    try:
        if not entries:
            remove(data_path)  # rather than overwrite what another run may have open
        present = data_path.stat().st_size if data_path.exists() else 0
        check_space(folder, (unused + len(pairs)) * length - present)
        # Pillow and hashlib release the interpreter lock, so threads use every core.
        with disk.open(data_path) as stream, ThreadPoolExecutor(os.cpu_count()) as pool:
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
    if not status.st_size:  # among them those of the system that are no files, and are never read to an end
        raise UserError(f"{path} is empty (0 bytes); restore it or remove its pair", path)
    # the last two tell a file from one of the same size and time that was put in its place
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _checksum(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair", path) from error


# ---------------------------------------------------------------- looking at a cache without changing it


class KeptRecord(NamedTuple):
    """What a cache holds of a pair.

    Attributes:
        path: of its file of records.
        checksums: of the files that were decoded.
        mask: uint8 (size, size); None where the record is damaged.
    """

    path: Path
    checksums: list[str]
    mask: np.ndarray | None


def kept_records(pairs: Sequence[Pair], size: int, cache: Path) -> dict[str, KeptRecord]:
    """What a cache holds of these pairs, by id, whatever became of their files; nothing where there is no cache of them."""
    if not pairs or size < 1:
        return {}
    folder = _folder(pairs, size, cache)
    index, records = _read_index(folder, size).entries, RecordFile(folder / "pairs.uint8", 4 * size * size)
    found = {}
    for pair in pairs:
        if pair.id in index:
            entry = index[pair.id]
            content = records.read(entry["slot"])
            mask = np.frombuffer(content, np.uint8)[3 * size**2 :].reshape(size, size) if len(content) == 4 * size**2 else None
            whole = zlib.crc32(content) == entry["crc"]
            found[pair.id] = KeptRecord(records.path, entry["checksums"], mask if whole else None)
    return found


def source_checksums(pair: Pair) -> list[str]:
    """SHA-256 of the image file and of the mask file.

    Raises:
        UserError: one of them cannot be read.
    """
    for path in (pair.image, pair.mask):
        _stamp(path)  # is it a file?
    return [_checksum(pair.image), _checksum(pair.mask)]
