"""Whether two runs gave the same numbers: the check of a change that must not change any.

    python -m benchmarks.same_numbers RUN OTHER [RUN OTHER ...]

Compares, value for value, ``metrics.json``, ``per_image.csv``, ``training_log.csv``, ``calibration.npz`` and every array
of every map of pairs of results folders. What describes the making is left aside: times, speeds, and the fingerprints
that name a configuration. Prints a line per pair; exits with 1 where anything differs.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ASIDE = {"minutes", "identity", "checksum", "files", "images_per_second", "seconds_waited_for_data", "fusion", "seconds_by_stage"}


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The dotted paths at which two nested structures differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other} - ASIDE):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is in one of them only"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (first, second) in enumerate(zip(one, other)):
            yield from differences(first, second, f"{path}.{index}")
    elif one != other:
        yield f"{path}: {one!r} and {other!r}"


def read(path: Path) -> Any:
    """A JSON object, the rows of a CSV file, or the arrays of an archive with their types, as nested structures."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text().splitlines()))
    with np.load(path) as content:
        return {name: [str(content[name].dtype), content[name].shape, content[name].tobytes()] for name in content.files}


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """Files that both folders have to hold: their number, and what differs in them."""
    names = ["metrics.json", "per_image.csv", "training_log.csv", "calibration.npz"]
    names += sorted({str(path.relative_to(run)) for run in (one, other) for path in run.glob("uncertainty_maps/*/*.npz")})
    found: list[str] = []
    for name in names:
        missing = [str(run / name) for run in (one, other) if not (run / name).exists()]
        found += [f"{path} is missing" for path in missing]
        if not missing:
            found += [f"{name}{difference[:200]}" for difference in differences(read(one / name), read(other / name))]
    return len(names), found


def main() -> int:
    """Compare the pairs that the command line names; returns the exit code."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders or len(folders) % 2:
        print(__doc__, file=sys.stderr)
        return 2
    different = False
    for one, other in zip(folders[::2], folders[1::2]):
        files, found = compare(one, other)
        print(f"{one} and {other}: {files} files, {len(found)} differences")
        for line in found[:20]:
            print(f"  {line}")
        different = different or bool(found)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
