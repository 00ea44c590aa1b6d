"""Opening only what can be read to an end: a pipe or a device might block for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "it is a folder"), (stat.S_ISFIFO, "it is a pipe"), (stat.S_ISSOCK, "it is a socket"),
    (stat.S_ISCHR, "it is a device"), (stat.S_ISBLK, "it is a device"),
)


def check_regular(path: Path) -> os.stat_result:
    """Refuse a path that is no regular file, without opening it; returns its status.

    Raises:
        OSError: there is nothing of this name, or it is a folder, a pipe, a socket or a device, as its message says.
    """
    status = os.stat(path)
    for is_kind, what in _KINDS:
        if is_kind(status.st_mode):
            raise OSError(errno.EINVAL, f"{what} and not a file", str(path))
    return status


def real_path(path: Path | str) -> Path:
    """The path without links; of a link that leads to itself, the path as far as it leads (``Path.resolve`` fails there)."""
    return Path(os.path.realpath(path))
