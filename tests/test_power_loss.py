"""A run that lost power at any moment ends, when it is started again, like one that did not.

The model is tested first, then some states of each kind of run; ``python -m pytest -n 0 tests/faults`` tries all.
"""

from __future__ import annotations

import random

import pytest
from conftest import write_pairs
from crash_model import crash_states, read_tree, recorded, tree_hash, write_tree
from power_loss import SCENARIOS, check_states, record

import runtime.files
from runtime.files import atomic_write, make_folder, publish, remove, remove_tree

# ---------------------------------------------------------------- the model


def states(root, log=None, before=None):
    """The trees after the log of a recorder as sorted tuples of (path, content)."""
    return {tuple(sorted(state.tree.items())) for state in crash_states(before or {}, log)}


def test_a_write_without_a_sync_may_be_lost_or_torn_after_its_rename(tmp_path):
    log = [("create", "x.part"), ("write", "x.part", 0, b"ab" * 3000), ("rename", "x.part", "x"), ("sync_folder", ".")]
    last = {state.tree["x"] for state in crash_states({}, log) if state.point == 4}
    assert {b"", b"ab" * 3000, b"ab" * 1500, bytes(6000)} <= last
    assert len(last) == 6  # and a block of something else, and one of zeros


def test_a_rename_without_a_sync_of_the_folder_may_be_undone(tmp_path):
    log = [("create", "p"), ("write", "p", 0, b"new"), ("sync", "p"), ("rename", "p", "x")]
    last = states(tmp_path, log, {"x": b"old"})
    assert {(("x", b"old"),), (("x", b"new"),), (("p", b"new"), ("x", b"old"))} <= last
    certain = crash_states({"x": b"old"}, [*log, ("sync_folder", ".")])
    assert [state.tree for state in certain if state.point == 5] == [{"x": b"new"}]


def test_a_deletion_may_be_undone_and_a_new_folder_may_be_lost_with_what_is_in_it(tmp_path):
    assert states(tmp_path, [("unlink", "x")], {"x": b"old"}) == {(("x", b"old"),), ()}
    log = [("make_folder", "f"), ("create", "f/x"), ("write", "f/x", 0, b"a"), ("sync", "f/x"), ("sync_folder", "f")]
    assert states(tmp_path, log) >= {(), (("f", None),), (("f", None), ("f/x", b"a"))}


def test_writes_in_place_may_arrive_in_any_order():
    log = [("write", "x", 0, b"11"), ("write", "x", 2, b"22")]
    found = {state.tree["x"] for state in crash_states({"x": b"0000"}, log)}
    assert found == {b"0000", b"1100", b"0022", b"1122"}


def test_the_recorder_sees_every_call_and_the_last_state_is_what_lies_there(tmp_path):
    with recorded(tmp_path) as recorder:
        for text in (b"one", b"two"):
            with atomic_write(tmp_path / "a" / "b" / "x") as stream:
                stream.write(text)
        file = runtime.files.disk.open(tmp_path / "a" / "y")
        runtime.files.disk.write_at(file, 3, b"abc")
        runtime.files.disk.truncate(file, 5)
        runtime.files.disk.sync(file)
        file.close()
        make_folder(tmp_path / "new" / "inner")
        (tmp_path / "outside").touch()  # behind its back, as what unpacks an archive does
        with atomic_write(tmp_path / "new" / "inner" / "z") as stream:
            stream.write(b"z")
        publish(tmp_path / "new" / "inner", tmp_path / "a" / "moved")
        remove(tmp_path / "a" / "y", tmp_path / "nowhere")
        remove_tree(tmp_path / "new")
    (tmp_path / "outside").unlink()
    last = crash_states(recorder.before, recorder.log)[-1]
    assert last.point == len(recorder.log)
    assert last.tree == read_tree(tmp_path) == {
        "a": None, "a/b": None, "a/b/x": b"two", "a/moved": None, "a/moved/z": b"z",
    }
    with recorded(tmp_path) as recorder:
        pass
    assert recorder.log == []
    write_tree(tmp_path, {"f": None, "f/x": b"1"})
    assert read_tree(tmp_path) == {"f": None, "f/x": b"1"}
    assert tree_hash({".lock": b"1"}) == tree_hash({".lock": b"2"}) != tree_hash({"lock": b"2"})


def test_a_finished_file_is_whole_or_as_before_at_every_point(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with recorded(tmp_path) as recorder, atomic_write(tmp_path / "x") as stream:
        stream.write(b"new" * 5000)
    found = crash_states(recorder.before, recorder.log)
    assert {state.tree.get("x") for state in found} == {b"old", b"new" * 5000}
    assert {state.tree["x"] for state in found if state.point == len(recorder.log)} == {b"new" * 5000}


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("name", SCENARIOS)
def test_some_states_of_every_kind_of_run(name, tmp_path):
    data = write_pairs(tmp_path / "data", 12)
    recording = record(SCENARIOS[name], data, tmp_path / "disk")
    chosen = random.Random(name).sample(recording.states, 4)
    check_states(SCENARIOS[name], data, tmp_path / "disk", recording, chosen)


def test_a_program_that_did_not_sync_its_training_state_would_be_found_out(tmp_path):
    data, scenario = write_pairs(tmp_path / "data", 12), SCENARIOS["first run"]
    recording = record(scenario, data, tmp_path / "disk")
    # its other files stay whole, so that it is this one by which the run fails
    careless = [change for change in recording.log if change[0] != "sync" or "training_state.pth" not in change[1]]
    state, whole = "run/weights/training_state.pth", recording.states[-1].tree["run/weights/training_state.pth"]
    torn = [
        found for found in crash_states({}, careless, limit=4)
        if found.tree.get(state) not in (None, whole) and found.tree.get("run/metrics.json") is None
    ]
    with pytest.raises(AssertionError, match="1 of 1 states: after .* changes: .*training_state.pth"):
        check_states(scenario, data, tmp_path / "disk", recording, torn[-1:])
