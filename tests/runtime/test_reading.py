"""What is no file is refused before it is opened; links that lead nowhere do not fail."""

from __future__ import annotations

import os
import socket

import pytest

from runtime.errors import UserError
from runtime.files import file_checksum
from runtime.reading import check_regular, real_path
from runtime.records import read_json


def test_a_file_is_fine_by_way_of_a_link_too(tmp_path):
    (tmp_path / "a").write_text("12345")
    (tmp_path / "link").symlink_to("a")
    assert check_regular(tmp_path / "link").st_size == 5
    assert real_path(tmp_path / "link") == (tmp_path / "a").resolve()


def test_pipes_folders_sockets_and_devices_are_refused_without_opening_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("pipe")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
    for name, what in (("pipe", "a pipe"), ("folder", "a folder"), ("socket", "a socket"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"it is {what} and not a file"):
            check_regular(name)
        with pytest.raises(OSError, match=f"it is {what}"):
            file_checksum(name)
        with pytest.raises(UserError, match=f"^cannot read {name}: it is {what} and not a file"):
            read_json(name)


def test_a_link_to_itself(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop).name == "loop"
    with pytest.raises(OSError, match="symbolic links"):
        check_regular(loop)
