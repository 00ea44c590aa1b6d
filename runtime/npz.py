"""Reading ``.npz`` files of which nothing is believed: heads are checked before any memory is taken for an array.

``numpy.load`` takes the memory that the head of an array asks for before it looks for its bytes.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple

import numpy as np

from runtime.reading import check_regular

SUFFIX = ".npy"  # of the members of an .npz


class Header(NamedTuple):
    """What the head of a member says of the array in it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_npz(
    path: Path, check: Callable[[Mapping[str, Header]], None], stored: bool = True
) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file.

    Args:
        path: the file.
        check: called with the heads of all arrays before the first of them is read; raises where they are not what they
            must be.
        stored: whether the file must not be compressed, so that its arrays are no larger than the file.

    Raises:
        ValueError: the file holds something else, or arrays that do not fit their members; what ``check`` raises.
        OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError: it cannot be read, or is no
            whole zip file.
    """
    size = check_regular(path).st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if stored and any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member is compressed")
        if stored and sum(member.file_size for member in members) > size:
            raise ValueError("the members are larger than the file")
        headers: dict[str, Header] = {}
        for member in members:
            name = member.filename[: -len(SUFFIX)]
            if not member.filename.endswith(SUFFIX) or name in headers:
                raise ValueError(f"member {member.filename!r:.60} is no array, or there twice")
            with archive.open(member) as stream:
                headers[name] = read_header(stream)
            _check_header(headers[name], member.file_size)
        check(headers)
        arrays = {}
        for name, member in zip(headers, members):
            with archive.open(member) as stream:
                arrays[name] = np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
                if stream.read(1):  # reading to the end also checks the CRC-32 of the member
                    raise ValueError(f"{name} is followed by something else")
        return arrays


def read_header(stream: IO[bytes]) -> Header:
    """The head of an array in the ``.npy`` format.

    Raises:
        ValueError: there is none.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format")
    try:
        shape, _, dtype = read(stream)
    except (AttributeError, MemoryError, RecursionError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"no head of an array: {type(error).__name__}") from error  # what literals of Python may raise
    return Header(tuple(shape), dtype)


def _check_header(header: Header, size: int) -> None:
    shape, dtype = header
    if dtype.hasobject or dtype.kind not in "biufUS" or any(side < 0 for side in shape):
        raise ValueError("an array of something else than numbers and texts")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError("an array is larger than its file")
