"""Files are whole or absent; leftovers go, those of living processes stay; a disk too small is told beforehand."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from runtime.errors import UserError
from runtime.files import (
    Disk,
    atomic_write,
    check_space,
    disk,
    file_checksum,
    make_folder,
    publish,
    remove,
    remove_partials,
    remove_tree,
)

# ---------------------------------------------------------------- no other module changes the disk

#: Functions and methods that change a disk. What opens a file for reading, or writes to an open one, does not.
CHANGES = {
    "unlink", "rmtree", "rename", "replace", "mkdir", "makedirs", "rmdir", "removedirs", "write_text", "write_bytes", "touch",
    "truncate", "ftruncate", "fsync", "symlink", "symlink_to", "hardlink_to", "link", "copyfile", "copy", "copy2", "copytree",
    "move", "chmod", "utime", "mkfifo", "mkstemp", "mkdtemp",
}


def disk_changes(path) -> list[str]:
    """What in a source file changes the disk without :mod:`runtime.files`: the lines, as text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = (*node.args, *(keyword.value for keyword in node.keywords))
        modes = [set(value.value) for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        writes = name == "open" and any(mode <= set("rwaxbt+") and mode & set("wax+") for mode in modes)
        if writes or name in CHANGES and owner != "disk" and _is_of_files(name, owner, node):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def _is_of_files(name: str, owner: str, node: ast.Call) -> bool:
    """Whether a name that text, arrays and dataclasses have as well is meant of files here."""
    if name in ("replace", "copy", "link"):
        return owner in ("os", "shutil") or name == "replace" and len(node.args) == 1 and not node.keywords
    return True


def test_only_one_module_changes_the_disk(tmp_path):
    (tmp_path / "x.py").write_text(
        "path.unlink()\nos.replace(a, b)\nopen(x, 'wb')\npart.replace(path)\nopen(x)\nopen(x, 'rb')\ntext.replace('a', 'b')\n"
        "replace(config, seed=1)\ndisk.unlink(x)\nvalues.copy()\nopen(x, mode='r+b')\n"
    )
    assert [int(line.split(":")[1]) for line in disk_changes(tmp_path / "x.py")] == [1, 2, 3, 4, 11]
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    assert len(files) > 60
    assert [line for path in files if path != ROOT / "runtime" / "files.py" for line in disk_changes(path)] == []


ROOMS = ("runtime", "isic", "inference", "evaluation", "experiment", "reporting")


# ---------------------------------------------------------------- folders are synced


@pytest.fixture
def calls(monkeypatch):
    """The calls to the system, in their order."""
    found = []

    class Listing(Disk):
        def __getattribute__(self, name):
            if not name.startswith("_"):
                found.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(disk, "__class__", Listing)
    return found


def test_a_new_name_is_on_the_disk_when_the_write_returns(tmp_path, calls):
    with atomic_write(tmp_path / "new" / "x") as stream:
        stream.write(b"a")
    assert calls == ["make_folder", "sync_folder", "create", "sync", "rename", "sync_folder"]


def test_deletions_are_on_the_disk_afterwards(tmp_path, calls):
    for name in "ab":
        (tmp_path / name).touch()
    remove(tmp_path / "a", tmp_path / "b", tmp_path / "nowhere")
    assert calls == ["unlink", "unlink", "unlink", "sync_folder"]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="folders are synced there alone")
def test_a_file_system_that_does_not_sync_folders_is_fine_and_one_that_fails_is_told(tmp_path, monkeypatch):
    sync = os.fsync

    def failing(code):
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            sync(descriptor)

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    with atomic_write(tmp_path / "x") as stream:
        stream.write(b"a")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(UserError, match="cannot write .*x: Input/output error"), atomic_write(tmp_path / "x") as stream:
        stream.write(b"b")
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_is_made_with_those_above_it(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError):
            make_folder(path)


def test_a_tree_goes_and_what_a_link_in_it_names_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").touch()
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "y").touch()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "nowhere"):
        remove_tree(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["kept", "link"]
    assert os.listdir(tmp_path / "kept") == ["x"]


def test_a_file_or_a_folder_is_published_whole(tmp_path, calls):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "x").write_bytes(b"a")
    publish(tmp_path / "part", tmp_path / "whole")
    assert (tmp_path / "whole" / "x").read_bytes() == b"a"
    assert calls == ["open", "sync", "sync_folder", "rename", "sync_folder"]
    publish(tmp_path / "whole" / "x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"a"


def test_a_file_is_changed_in_place(tmp_path):
    for content, expected in ((b"abc", b"\0abc"), (b"de", b"\0dec")):
        with disk.open(tmp_path / "x") as file:
            disk.write_at(file, 1, content)
        assert (tmp_path / "x").read_bytes() == expected


# ---------------------------------------------------------------- whole or absent


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
