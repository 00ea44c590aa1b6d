"""Files that are whole or absent, and the one error a user is shown."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.reading import check_regular


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN: callers turn it into null), indented, ending in a newline."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as stream:
        stream.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object; NaN
            and infinity, which strict JSON lacks, count as damage.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name:.40} is no JSON number")

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            refuse(text)
        return float(text)

    try:
        check_regular(path)
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse, parse_float=finite)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; delete it and run again")
    return content


#: What differs between two runs of the same experiment.
WALL_CLOCK = ("minutes", "seconds_by_stage")


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself (the wall-clock fields apart), for :func:`read_sealed`."""
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read back
    return {**content, "checksum": fingerprint({k: v for k, v in content.items() if k not in WALL_CLOCK})}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether what was read is what :func:`seal` completed."""
    return content.get("checksum") == seal({k: v for k, v in content.items() if k != "checksum"})["checksum"]


def read_sealed(path: Path, needed: bool = True) -> dict[str, Any]:
    """Read a JSON object that :func:`seal` completed.

    Args:
        path: the file.
        needed: whether it must carry a checksum; one that is there must always be right.

    Raises:
        UserError: see :func:`read_json`, or the content was changed since.
    """
    content = read_json(path)
    if ("checksum" in content or needed) and not is_sealed(content):
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
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed ``.npz`` that opens with ``numpy.load`` without pickle."""
    with atomic_write(path) as stream:
        np.savez(stream, **dict(arrays))  # type: ignore[arg-type]


def fingerprint(content: Any) -> str:
    """SHA-256 of the canonical JSON of ``content``: equal content, equal fingerprint."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_stored(path: Path) -> None:
    """Refuse a zip file whose members claim to be larger than the file.

    Map files and checkpoints are never compressed, so reading one never needs
    more memory than the file has bytes.

    Raises:
        ValueError: a member is compressed, or the sizes do not add up.
        OSError, zipfile.BadZipFile: it cannot be read, or is no zip file.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as content:
        members = content.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a member is compressed")
    if sum(member.file_size for member in members) > os.path.getsize(path):
        raise ValueError("the members are larger than the file")
