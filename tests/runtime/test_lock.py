"""One process holds a folder; the lock of a dead one is free."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from runtime.errors import UserError
from runtime.lock import FolderLock


def test_the_second_run_is_told_who_holds_the_folder(tmp_path):
    message = f"in use by another run .process {os.getpid()} "
    with FolderLock(tmp_path), pytest.raises(UserError, match=message), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


def test_who_waits_says_so_once_and_then_gets_the_folder(tmp_path):
    lines = []
    first = FolderLock(tmp_path)
    first.__enter__()

    def waiting(line):
        lines.append(line)
        first.__exit__()

    with FolderLock(tmp_path, waiting=waiting), pytest.raises(UserError, match="clean up"), FolderLock(tmp_path, "clean up"):
        pass
    (line,) = lines
    assert line.startswith(f"{tmp_path} is in use by another run (process {os.getpid()} on ")
    assert line.endswith("; waiting for it")


def test_a_folder_is_made_and_the_name_of_the_holder_taken_out_again(tmp_path):
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        (tmp_path / "a" / "b" / "work").touch()
    assert (tmp_path / "a" / "b" / ".lock").read_text() == ""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file.*; choose another"), FolderLock(tmp_path / "file"):
        pass


def test_a_folder_that_was_made_in_vain_is_gone_again(tmp_path):
    with pytest.raises(UserError), FolderLock(tmp_path / "a" / "b"):
        raise UserError("nothing was written")
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    with FolderLock(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept" / ".lock").exists()  # somebody else's folder
    (tmp_path / "a").mkdir()
    with FolderLock(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a").exists() and not (tmp_path / "a" / "b").exists()


def test_who_waits_for_a_folder_that_is_removed_holds_the_new_one(tmp_path):
    first = FolderLock(tmp_path / "a")
    first.__enter__()
    with FolderLock(tmp_path / "a", waiting=lambda line: first.__exit__()):
        assert (tmp_path / "a" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match="in use"), FolderLock(tmp_path / "a"):
            pass
    assert not (tmp_path / "a").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    program = (
        "import sys, time\nfrom runtime.lock import FolderLock\n"
        "with FolderLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "), FolderLock(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            with FolderLock(tmp_path):
                break
        except UserError:
            assert time.monotonic() < deadline


def test_windows_locks_the_same_byte_whatever_the_file_holds(tmp_path, monkeypatch):
    # msvcrt.locking locks from the position of the file on, which appending moves
    locked = []

    def locking(descriptor, mode, size):
        locked.append(os.lseek(descriptor, 0, os.SEEK_CUR))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    with FolderLock(tmp_path), FolderLock(tmp_path):
        holder = (tmp_path / ".lock").read_bytes()
    assert len(set(locked)) == 1 and locked[0] > len(holder) > 0
