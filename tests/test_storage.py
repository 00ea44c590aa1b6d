"""Files are whole or absent; broken ones are named; one run holds a folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from storage import (
    MAP_ARRAYS,
    FolderLock,
    UserError,
    fingerprint,
    read_json,
    read_maps,
    whole_file,
    write_csv,
    write_json,
    write_maps,
)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with whole_file(path) as stream:
        stream.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"

    class Failure(Exception):
        pass

    with pytest.raises(Failure), whole_file(path) as stream:
        stream.write(b"half")
        raise Failure
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["x.txt"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*make room"), whole_file(tmp_path / "file" / "x"):
        pass


def test_a_limit_on_file_size_leaves_the_old_file(tmp_path):
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path\n"
        "from storage import UserError, whole_file\n"
        "try:\n"
        "    with whole_file(Path(sys.argv[1])) as stream: stream.write(b'x' * 5000)\n"
        "except UserError as error: print(error)\n"
    )
    path = tmp_path / "x"
    path.write_bytes(b"old")
    outcome = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert outcome.stdout.startswith(f"cannot write {path}: File too large"), outcome
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_json_is_strict_and_broken_json_is_named(tmp_path):
    write_json(tmp_path / "x.json", {"a": 0.1, "b": None})
    assert read_json(tmp_path / "x.json") == {"a": 0.1, "b": None}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        read_json(tmp_path / "x.json")


def test_csv(tmp_path):
    write_csv(tmp_path / "x.csv", [{"id": "a, b", "dice": 0.5}, {"id": "c", "dice": 1.0}])
    assert (tmp_path / "x.csv").read_text() == 'id,dice\n"a, b",0.5\nc,1.0\n'


def test_fingerprint_depends_on_content_and_not_on_order():
    assert fingerprint({"a": 1, "b": [2.0]}) == fingerprint(json.loads('{"b": [2.0], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


# ---------------------------------------------------------------- map files


def some_maps() -> dict[str, np.ndarray]:
    return {name: np.full((4, 6), 1, kind) for name, kind in MAP_ARRAYS.items()}


def test_maps_round_trip_without_pickle(tmp_path):
    write_maps(tmp_path / "x.npz", some_maps(), 3, "abc")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
        assert set(content.files) == {*MAP_ARRAYS, "empty_cams", "fallbacks", "identity"}
    maps = read_maps(tmp_path / "x.npz")
    assert (maps["empty_cams"], maps["identity"]) == (3, "abc")
    np.testing.assert_array_equal(maps["pred_variance"], 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"pred_variance": None}, "lacks pred_variance"),
        ({"pred_variance": np.full((4, 6), np.nan, np.float32)}, "pred_variance holds NaN"),
        ({"pred_variance": np.ones((4, 5), np.float32)}, "pred_variance is float32"),
        ({"pred_variance": np.ones((4, 6))}, "pred_variance is float64"),
        ({"true_mask": np.ones((4, 6), np.int64)}, "true_mask is int64"),
    ],
)
def test_maps_that_are_wrong_are_named(tmp_path, damage, message):
    maps = {**some_maps(), **damage}
    write_maps(tmp_path / "x.npz", {name: values for name, values in maps.items() if values is not None}, 0, "")
    with pytest.raises(UserError, match=f"x.npz.*{message}"):
        read_maps(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 broken", random.Random(0).randbytes(300)], ids=["empty", "half a zip file", "noise"]
)
def test_files_that_are_no_maps_are_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="x.npz is not a map file"):
        read_maps(tmp_path / "x.npz")


# ---------------------------------------------------------------- the lock


def test_the_second_run_is_told_who_holds_the_folder(tmp_path):
    message = f"in use by another run .process {os.getpid()} "
    with FolderLock(tmp_path), pytest.raises(UserError, match=message), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    program = (
        "import sys, time\nfrom storage import FolderLock\n"
        "with FolderLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "), FolderLock(tmp_path):
        pass
    process.kill()
    process.wait()
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
