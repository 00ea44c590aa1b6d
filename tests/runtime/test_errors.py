"""The one error a user is shown is one printable line."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError, one_line, printable


def test_what_cannot_be_printed_is_escaped():
    assert printable("a\nb\x1b[31m é 😀") == "a\\nb\\x1b[31m é 😀"
    assert printable("plain; text") == "plain; text"
    assert printable("\udcff") == "\\udcff"  # a byte of a file name that is no text


def test_a_user_error_is_one_line_and_names_the_file():
    error = UserError("cannot read a\r\nb", Path("a"))
    assert str(error) == "cannot read a\\r\\nb" and error.file == Path("a")
    assert str(UserError(OSError("gone"))) == "gone" and UserError("x").file is None


def test_the_message_of_another_error_on_one_line():
    assert one_line(ValueError("first\n  second\tthird")) == "first second third"
    assert one_line(ValueError("x" * 300)) == "x" * 200
    assert one_line(ValueError()) == ""
