"""Files are whole or absent; leftovers go, those of living processes stay; a disk too small is told beforehand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from runtime.errors import UserError
from runtime.files import atomic_write, check_space, file_checksum, remove_partials


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with atomic_write(path) as stream:
        stream.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"

    class Failure(Exception):
        pass

    with pytest.raises(Failure), atomic_write(path) as stream:
        stream.write(b"half")
        raise Failure
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["x.txt"]


def test_a_stop_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*make room"), atomic_write(tmp_path / "file" / "x"):
        pass


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    path = tmp_path / ("é" * 127 + "x")  # 255 bytes
    with atomic_write(path) as stream:
        stream.write(b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == [path.name]


def test_a_limit_on_file_size_leaves_the_old_file(tmp_path):
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path\n"
        "from runtime.errors import UserError\n"
        "from runtime.files import atomic_write\n"
        "try:\n"
        "    with atomic_write(Path(sys.argv[1])) as stream: stream.write(b'x' * 5000)\n"
        "except UserError as error: print(error)\n"
    )
    path = tmp_path / "x"
    path.write_bytes(b"old")
    outcome = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert outcome.stdout.startswith(f"cannot write {path}: File too large"), outcome
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_leftovers_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        f".x.npz.{gone.pid}.partial": False, f".x.npz.{os.getpid()}.partial": False, f".x.npz.{os.getppid()}.partial": True,
        ".x.partial": True, "x.npz": True, ".x.npz.99999999999.partial": True, f"x.{gone.pid}.partial": True,
    }
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".folder.{gone.pid}.partial").mkdir()
    remove_partials(tmp_path, tmp_path / "nowhere")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert (tmp_path / f".folder.{gone.pid}.partial").exists()


def test_a_disk_with_too_little_room_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 << 20))
    check_space(tmp_path, 3 << 20)
    with pytest.raises(UserError, match=r"needs 5 MiB more but 3 MiB are free; clean up$"):
        check_space(tmp_path, 5 << 20, "clean up")


def test_the_checksum_of_a_file_is_sha_256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")  # the example of FIPS 180
    assert file_checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
