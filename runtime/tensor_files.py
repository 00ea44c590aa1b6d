"""Reading files of ``torch.save`` of which nothing is believed: plain values and dense tensors, and no other objects.

``torch.load`` runs no foreign code with ``weights_only``, but still makes whatever tensors a file asks for: sparse, quantised
or conjugate ones, views that repeat one number 10^12 times, and storages that end after their bytes do. Here every tensor
is checked against the bytes that are there before it is made.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.records import check_stored

#: Types of tensors, by the names that files have for their storages.
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}
#: More dimensions than this has no tensor of a network.
DIMENSIONS = 8
#: Mappings and lists within each other at most.
DEPTH = 16


class _Storage(NamedTuple):
    """The numbers of one tensor or of several, one after the other."""

    values: Tensor


def read_tensors(path: Path) -> Any:
    """What a file of ``torch.save`` holds: numbers, texts and dense tensors on the CPU, in mappings, lists and tuples.

    Raises:
        ValueError: it holds something else, a tensor larger than its bytes, or the same parts again and again.
        OSError, zipfile.BadZipFile, pickle.UnpicklingError, and what a broken pickle raises: it cannot be read.
    """
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("no archive of torch.save")
        folder = programs[0][: -len("data.pkl")]
        order = members.get(f"{folder}byteorder")
        if order is not None and archive.read(order).decode() != sys.byteorder:
            raise ValueError("written on a machine with another order of bytes")
        content = _Reader(archive, members, folder).load()
    check_plain(content, 4 * path.stat().st_size)
    return content


class _Reader(pickle._Unpickler):
    """Python's unpickler in Python, whose memo cannot be made to take memory, with the few names that a checkpoint needs."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str) -> None:
        program = archive.read(members[f"{folder}data.pkl"])
        super().__init__(io.BytesIO(program))
        self.left = len(program)  # entries of attributes that may be looked at; one set of them may be named many times
        self.archive, self.members, self.folder = archive, members, folder
        self.storages: dict[tuple[str, str], _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in STORAGES:
            return name
        raise ValueError(f"{module}.{name} does not belong there")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, count = pid
        if kind != "storage" or name not in STORAGES or not isinstance(key, str) or type(count) is not int:
            raise ValueError("a storage of another kind")
        dtype = STORAGES[name]
        member = self.members[f"{self.folder}data/{key}"]
        if count < 0 or member.file_size != count * dtype.itemsize:
            raise ValueError("a storage of another size than its bytes")
        if (key, name) not in self.storages:
            if any(other == key for other, _ in self.storages):
                raise ValueError("a storage of two types")
            values = torch.empty(count, dtype=dtype)
            with self.archive.open(member) as stream:
                content = values.view(torch.uint8).numpy()
                for start in range(0, len(content), 1 << 20):
                    piece = stream.read(min(1 << 20, len(content) - start))  # at the end the CRC-32 is checked
                    content[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
            self.storages[key, name] = _Storage(values)
        return self.storages[key, name]

    def load_attributes(self) -> None:
        """Keep the versions that ``state_dict`` notes at a mapping, so that it is written again as it was; drop the rest."""
        found, holder = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if type(holder) is not OrderedDict:
            raise ValueError("an object with attributes")
        noted = found.get("_metadata") if isinstance(found, dict) else None
        self.left -= len(noted) if isinstance(noted, dict) else 0
        if self.left < 0:
            raise ValueError("the same parts again and again")
        if type(noted) is OrderedDict and all(type(name) is str and _is_version(entry) for name, entry in noted.items()):
            holder._metadata = noted  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_attributes  # type: ignore[index, assignment]


def _is_version(entry: Any) -> bool:
    return type(entry) is dict and entry.keys() == {"version"} and type(entry["version"]) is int


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None) -> Tensor:
    """A view of a storage, which must not be larger than it, and neither overlap with itself nor be anything but dense."""
    if not isinstance(storage, _Storage) or metadata or hooks:
        raise ValueError("a tensor of another kind")
    for values in (size, stride):
        if not isinstance(values, tuple) or len(values) > DIMENSIONS or any(type(v) is not int or v < 0 for v in values):
            raise ValueError("a tensor of no shape")
    count, there = math.prod(size), len(storage.values)
    last = sum((side - 1) * step for side, step in zip(size, stride)) if count else -1
    if len(size) != len(stride) or type(offset) is not int or offset < 0 or offset + last >= there or count > there:
        raise ValueError("a tensor larger than its storage")
    return torch.as_strided(storage.values, size, stride, offset)


def check_plain(content: Any, budget: int) -> None:
    """Refuse anything but plain values and dense tensors in trees of mappings, lists and tuples.

    A small file may refer to the same part again and again, so that whoever walks through it never ends: all that is
    met on the way may together have ``budget`` bytes.

    Raises:
        ValueError: says what does not belong there.
    """
    left, waiting = max(budget, 1 << 16), [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if isinstance(value, Tensor):
            check_dense(value)
            left -= value.numel() * value.element_size()
        elif isinstance(value, str):
            left -= len(value)
        elif type(value) in (dict, OrderedDict, list, tuple):
            if depth == DEPTH:
                raise ValueError("parts within parts within parts")
            attributes = [value.__dict__] if isinstance(value, OrderedDict) and value.__dict__ else []
            parts = [*value.keys(), *value.values(), *attributes] if isinstance(value, dict) else value
            left -= len(parts)
            if left >= 0:
                waiting.extend((part, depth + 1) for part in parts)
        elif type(value) is int:
            left -= value.bit_length() // 8
        elif value is not None and type(value) not in (bool, float):
            raise ValueError(f"a {type(value).__name__} does not belong there")
        if left < 0:
            raise ValueError("the same parts again and again")


def check_dense(tensor: Tensor) -> None:
    """Refuse tensors that are not plain numbers in the memory of this machine.

    Raises:
        ValueError: it is sparse, quantised, conjugate, without content, expanded, or of another type.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in STORAGES.values() or tensor.is_conj() or tensor.is_neg():
        raise ValueError("a tensor that is not dense")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor larger than its storage")
