"""Tables about images that a user gives: which image is in which part, and which images belong together."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from runtime.errors import UserError
from runtime.progress import complain
from runtime.reading import check_regular

#: What a part may be called, and what it is called here.
PART_NAMES: Mapping[str, str] = MappingProxyType({
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "test": "test",
})


class Fixed(NamedTuple):
    """What is settled about the images beforehand.

    Attributes:
        parts: "train", "validation" or "test" by id.
        groups: by id; None where there are none.
    """

    parts: dict[str, str]
    groups: dict[str, str] | None


def read_groups(path: Path) -> dict[str, str]:
    """The group (patient, lesion) of each image, from a CSV file with the columns id and group.

    Args:
        path: the file, UTF-8. Further columns are left alone.

    Returns:
        Group by id, the id in Unicode's composed form. An image that the file does not list stands for itself.

    Raises:
        UserError: the file cannot be read, lacks a column or a value, or lists an id twice.
    """
    return _read_column(Path(path), "--groups", "group")


def read_parts(path: Path) -> dict[str, str]:
    """The part of each image, from a CSV file with the columns id and part.

    Args:
        path: the file, UTF-8; parts are "train" or "training", "validation" or "val", "test". Further columns are left alone.

    Returns:
        "train", "validation" or "test" by id, the id in Unicode's composed form.

    Raises:
        UserError: as :func:`read_groups`, or a part has another name.
    """
    found = _read_column(Path(path), "--split", "part")
    for id, part in found.items():
        if part.lower() not in PART_NAMES:
            raise UserError(f"--split {path}: {id} is in part {part!r}; write training, validation or test")
    return {id: PART_NAMES[part.lower()] for id, part in found.items()}


def _read_column(path: Path, flag: str, column: str) -> dict[str, str]:
    """The values of a column by the column "id"."""
    try:
        check_regular(path)
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            for wanted in ("id", column):
                if wanted not in names:
                    raise UserError(
                        f"{flag} {path} has no column {wanted}; its first line must name the columns id and {column}, "
                        f"and is {','.join(names)[:80]!r}"
                    )
            found: dict[str, str] = {}
            for row in reader:
                id, value = (unicodedata.normalize("NFC", (row[name] or "").strip()) for name in ("id", column))
                if not (id and value):
                    raise UserError(
                        f"{flag} {path}, line {reader.line_num}: the {'id' if value else column} is missing; "
                        "write one, or leave the line out"
                    )
                if id in found:
                    raise UserError(f"{flag} {path}, line {reader.line_num}: {id} is listed twice; keep one line")
                found[id] = value
    except OSError as error:
        raise UserError(f"cannot read {flag} {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag} {path} is not a CSV file in UTF-8 ({error}); save it as one") from error
    if not found:
        raise UserError(f"{flag} {path} lists no image; write a line for each, with its id and its {column}")
    return found


# ---------------------------------------------------------------- the images of a table


def listed_ids(ids: Sequence[str], listed: Collection[str], table: str, folder: Path) -> list[str]:
    """The ids that a table lists.

    Args:
        ids: of all pairs.
        listed: by the table.
        table: flag and file, for messages.
        folder: of the images, for messages.

    Raises:
        UserError: the table lists others.
    """
    unknown = sorted(set(listed) - set(ids))
    if unknown:
        raise UserError(
            f"{table} lists {len(unknown)} images that are not in {folder}, the first of them {unknown[0]}; "
            "an id is the name of the image file without its ending"
        )
    return [id for id in ids if id in listed]


def groups_of(ids: Sequence[str], table: Mapping[str, str], name: str, may_be_none: bool = False) -> dict[str, str] | None:
    """The groups of some images; says how many have none.

    Args:
        ids: of the images.
        table: group by id, of these and of others.
        name: flag and file, for messages.
        may_be_none: whether the table may be about others alone.

    Returns:
        Group by id; None where the table is about others alone.

    Raises:
        UserError: no image has a group.
    """
    found = {id: table[id] for id in ids if id in table}
    if not found and may_be_none:
        complain(f"none of {len(ids)} images is in {name}; each of them stands for itself")
        return None
    if not found:
        raise UserError(f"{name} lists none of the {len(ids)} images, but {min(table)} for example; "
                        "an id is the name of the image file without its ending")
    if len(found) < len(ids):
        complain(f"{len(ids) - len(found)} of {len(ids)} images are not in {name}; each of them stands for itself")
    return found
