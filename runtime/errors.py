"""The one error a user is shown: a single line with what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something the user can fix: one line with what is wrong, where, and what to do.

    Args:
        message: the line. What is not printable, such as the line breaks and control
            characters that file names may hold, is escaped.
        file: the file to blame, if there is one.
    """

    def __init__(self, message: object, file: Path | None = None):
        super().__init__(printable(str(message)))
        self.file = file


class SharedError(UserError):
    """One that every process of a group raises together, so that it need not be told to the others."""


def printable(text: str) -> str:
    """The text on one line, with everything escaped that a terminal would act on or cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
