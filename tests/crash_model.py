"""What a power loss may leave of the files of a run, by the rules of POSIX; see :mod:`runtime.files` for the calls.

A :class:`Recorder` logs every change that a run makes below a folder. :func:`crash_states` goes through the log: at
each point, every change of a folder's entries since its last sync may be there or not, each name for itself, and every
write to a file since its last sync may be there, be lost, or be torn. That allows more than file systems do (ext4, XFS
and APFS keep the order of renames), so what survives it survives them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import runtime.files
from runtime.files import Disk

#: A change: its name, then what it is about. Files and folders are numbers, paths are relative to the root.
Change = tuple[Any, ...]
#: What lies below the root: relative path -> content; None for a folder.
Tree = dict[str, "bytes | None"]


# ---------------------------------------------------------------- recording


class Recorder:
    """The log of all changes below a folder, in an order in which they may have happened.

    Attributes:
        root: the folder.
        before: what lay below it at the beginning, taken to be on the disk.
        log: the changes.
    """

    def __init__(self, root: Path):
        self.root, self.before, self.log = root, read_tree(root), []
        self.lock, self.open = threading.RLock(), {}

    def name(self, path: object) -> str | None:
        """The path below the root; None for one elsewhere."""
        relative = os.path.relpath(os.path.abspath(os.fspath(path)), self.root)
        return None if relative.split(os.sep)[0] == ".." else relative

    def add(self, kind: str, *paths: object, **facts: Any) -> None:
        names = [self.name(path) for path in paths]
        if None not in names:
            self.log.append((kind, *names, *facts.values()))


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """Log what the code inside changes below a folder."""
    recorder = Recorder(root)

    class Recording(Disk):
        def create(self, path: Path) -> BinaryIO:
            with recorder.lock:
                stream = super().create(path)
                recorder.add("create", path)
                recorder.open[id(stream)] = path
                return stream

        def open(self, path: Path) -> io.FileIO:
            with recorder.lock:
                new = not os.path.exists(path)
                file = super().open(path)
                if new:
                    recorder.add("create", path)
                recorder.open[id(file)] = path
                return file

        def write_at(self, file: io.FileIO, offset: int, content: Any) -> None:
            with recorder.lock:
                super().write_at(file, offset, content)
                recorder.add("write", recorder.open[id(file)], offset=offset, content=bytes(content))

        def truncate(self, file: io.FileIO, size: int) -> None:
            with recorder.lock:
                super().truncate(file, size)
                recorder.add("truncate", recorder.open[id(file)], size=size)

        def sync(self, file: Any) -> None:
            with recorder.lock:
                path = recorder.open[id(file)]
                if not isinstance(file, io.FileIO):  # a new file, written by whatever made it
                    file.flush()
                    recorder.add("write", path, offset=0, content=Path(path).read_bytes())
                super().sync(file)
                recorder.add("sync", path)

        def rename(self, source: Path, target: Path) -> None:
            with recorder.lock:
                super().rename(source, target)
                recorder.add("rename", source, target)

        def unlink(self, path: Path) -> None:
            with recorder.lock:
                super().unlink(path)
                recorder.add("unlink", path)

        def make_folder(self, path: Path) -> None:
            with recorder.lock:
                new = not path.exists()
                super().make_folder(path)
                if new:
                    recorder.add("make_folder", path)

        def remove_folder(self, path: Path) -> None:
            with recorder.lock:
                super().remove_folder(path)
                recorder.add("unlink", path)

        def sync_folder(self, path: Path) -> None:
            with recorder.lock:
                super().sync_folder(path)
                recorder.add("sync_folder", path)

    before, runtime.files.disk.__class__ = runtime.files.disk.__class__, Recording
    try:
        yield recorder
    finally:
        runtime.files.disk.__class__ = before


# ---------------------------------------------------------------- the disk


@dataclass
class _File:
    """What is certain of a file, and the writes (offset, content) and truncations (size, None) since."""

    content: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    known: list[bytes] = field(default_factory=list)  # the variants, as long as nothing changes

    def with_writes(self, writes: list[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.content)
        for offset, written in writes:
            end = offset if written is None else offset + len(written)
            if len(content) < end:
                content.extend(bytes(end - len(content)))
            if written is None:
                del content[offset:]
            else:
                content[offset:end] = written
        return bytes(content)

    def variants(self) -> list[bytes]:
        """The contents that a power loss may leave, the one without and the one with every write first."""
        if not self.known:
            self.known = self._variants() if self.pending else [self.content]
        return self.known

    def _variants(self) -> list[bytes]:
        whole = self.with_writes(self.pending)
        found = [self.content, whole]
        found += [self.with_writes(self.pending[:count]) for count in range(1, len(self.pending))]  # in order
        if len(self.pending) > 1:  # and out of it
            found += [self.with_writes(self.pending[:place] + self.pending[place + 1:]) for place in range(len(self.pending))]
        if self.pending[-1][1] and len(whole) > len(self.content):
            old = len(self.content)
            found.append(whole[: old + (len(whole) - old) // 2])  # a part
            found.append(self.content + bytes(len(whole) - old))  # the length but not the content
            middle = old + (len(whole) - old) // 2
            block = random.Random(len(whole)).randbytes(min(4096, len(whole) - middle))
            found.append(whole[:middle] + block + whole[middle + len(block):])  # a block of something else
            found.append(whole[:middle] + bytes(len(block)) + whole[middle + len(block):])  # a block never written
        return list(dict.fromkeys(found))


class _Disk:
    """Files and folders by number; of each entry of a folder, what it was since the last sync, the certain one first."""

    def __init__(self, tree: Tree):
        self.files: dict[int, _File] = {}
        self.folders: dict[int, dict[str, list[int | None]]] = {0: {}}
        self.numbers = itertools.count(1)
        for path, content in sorted(tree.items()):
            folder, name = self._place(path)
            self.folders[folder][name] = [self._new(content)]

    def _new(self, content: bytes | None) -> int:
        number = next(self.numbers)
        if content is None:
            self.folders[number] = {}
        else:
            self.files[number] = _File(content)
        return number

    def find(self, path: str) -> int:
        number = 0
        for part in Path(path).parts:
            found = self.folders[number][part][-1]
            assert found is not None, path
            number = found
        return number

    def _place(self, path: str) -> tuple[int, str]:
        return self.find(os.path.dirname(path)), os.path.basename(path)

    def _set(self, path: str, number: int | None) -> None:
        folder, name = self._place(path)
        self.folders[folder].setdefault(name, [None]).append(number)

    def change(self, kind: str, path: str, *facts: Any) -> None:
        """Do one change of a log."""
        if kind == "sync_folder":
            entries = self.folders[self.find(path)]
            for name, values in list(entries.items()):
                entries[name] = values[-1:]
        elif kind == "sync":
            file = self.files[self.find(path)]
            file.content, file.pending, file.known = file.with_writes(file.pending), [], []
        elif kind in ("write", "truncate"):
            file = self.files[self.find(path)]
            file.pending.append(facts if kind == "write" else (facts[0], None))
            file.known = []
        elif kind in ("create", "make_folder"):
            self._set(path, self._new(b"" if kind == "create" else None))
        elif kind == "unlink":
            self._set(path, None)
        else:
            assert kind == "rename", kind
            number = self.find(path)
            self._set(facts[0], number)
            self._set(path, None)

    def states(self, rng: random.Random, limit: int) -> Iterator[Tree]:
        """What may be left now: every combination where those are at most ``limit``, else the extremes and some others."""
        entries = {(folder, name): values for folder, names in self.folders.items() for name, values in names.items()}
        unsure = [entry for entry, values in entries.items() if len(values) > 1]
        options = [list(dict.fromkeys(entries[entry])) for entry in unsure]
        for values in _combinations(options, rng, limit):
            chosen = dict(zip(unsure, values))
            reached = self._reached(chosen)
            files = sorted(number for number in set(reached.values()) if number in self.files)
            variants = [self.files[number].variants() for number in files]
            for contents in _combinations(variants, rng, limit):
                of_file = dict(zip(files, contents))
                yield {path: of_file.get(number) for path, number in reached.items()}

    def _reached(self, chosen: dict[tuple[int, str], int | None]) -> dict[str, int]:
        found: dict[str, int] = {}

        def walk(folder: int, path: str) -> None:
            for name, values in self.folders[folder].items():
                number = chosen.get((folder, name), values[-1])
                if number is not None:
                    found[path + name] = number
                    if number in self.folders:
                        walk(number, f"{path}{name}/")

        walk(0, "")
        return found


def _combinations(options: list[list[Any]], rng: random.Random, limit: int) -> Iterator[tuple[Any, ...]]:
    total = 1
    for some in options:
        total *= len(some)
    if total <= limit:
        yield from itertools.product(*options)
        return
    yield tuple(some[0] for some in options)
    yield tuple(some[-1] for some in options)
    for _ in range(limit - 2):
        yield tuple(rng.choice(some) for some in options)


class State(NamedTuple):
    """What a power loss may leave: the files, and the number of changes before it."""

    tree: Tree
    point: int

    def __repr__(self) -> str:  # with the contents it would take gigabytes where pytest shows a failure
        return f"State of {len(self.tree)} files after {self.point} changes"


def crash_states(before: Tree, log: list[Change], limit: int = 64, seed: int = 0) -> list[State]:
    """The states that a power loss at any point of a log may leave, each once; of equal ones the last point.

    Args:
        before: what lay there, certain.
        log: of a :class:`Recorder`.
        limit: of the combinations at one point that are tried.
        seed: of those that are drawn where there are more.
    """
    disk, rng, found = _Disk(before), random.Random(seed), {}
    for point, change in enumerate([None, *log]):
        if change is not None:
            disk.change(*change)
        for tree in disk.states(rng, limit):
            found[tree_hash(tree)] = State(tree, point)
    _hashes.clear()
    return list(found.values())


# ---------------------------------------------------------------- trees


def tree_hash(tree: Tree) -> str:
    """Equal trees, equal hash; what a lock file says of its holder does not count."""
    digest = hashlib.sha256()
    for path, content in sorted(tree.items()):
        said = b"" if path.endswith(".lock") else content
        digest.update(repr((path, None if said is None else _hash(said))).encode())
    return digest.hexdigest()


_hashes: dict[int, tuple[bytes, bytes]] = {}


def _hash(content: bytes) -> bytes:
    """SHA-256; that of one object is computed once."""
    if id(content) not in _hashes:
        _hashes[id(content)] = content, hashlib.sha256(content).digest()  # held, so that its id stays its own
    return _hashes[id(content)][1]


def read_tree(root: Path) -> Tree:
    """Everything below a folder."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    """Make a folder hold a tree and nothing else."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
