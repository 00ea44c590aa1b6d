"""Maps where memory is short: the same with more room, then fewer passes at a time, then one line."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, command

import experiment.maps
from experiment.map_files import read_maps
from experiment.memory import PassMemory
from runtime.errors import UserError


def attempts(fits, capsys):
    """The numbers of passes at a time that are tried for two images where ``fits(attempt number, passes)`` says what fits."""
    tried, released = [], []
    memory = PassMemory(lambda: released.append(len(tried)))

    def make(chunk):
        tried.append(chunk)
        if not fits(len(tried), chunk):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return chunk

    made = [memory.run(make, f"maps of {id}") for id in "ab"]
    return made, tried, released, capsys.readouterr().err


def test_maps_are_tried_again_with_more_room_before_anything_changes(capsys):
    made, tried, released, err = attempts(lambda number, chunk: number > 1, capsys)
    assert made == [None, None] and tried == [None, None, None] and released == [1] and err == ""


def test_maps_are_then_made_with_fewer_passes_at_a_time_which_is_said(capsys):
    made, tried, _, err = attempts(lambda number, chunk: chunk is not None and chunk <= 2, capsys)
    assert made == [2, 2] and tried == [None, None, 4, 2, 2]
    assert err.count("\n") == 2 and "maps of a: not enough memory; from here on 2 passes are computed at a time" in err


def test_maps_that_never_fit_are_one_line(capsys):
    with pytest.raises(UserError, match="^maps of a: not enough memory .*lower --image-size.*what is finished is kept"):
        attempts(lambda number, chunk: False, capsys)


def test_the_failed_computation_is_let_go_of_before_the_next():
    alive, seen = [], []

    def make(chunk):
        seen.append([one() for one in alive if one() is not None])
        big = torch.ones(3)
        alive.append(weakref.ref(big))
        if len(alive) < 3:
            raise MemoryError
        return chunk

    PassMemory(lambda: None).run(make, "maps")
    assert seen == [[], [], []]


def test_other_failures_of_maps_pass():
    def make(chunk):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        PassMemory(lambda: None).run(make, "maps")


# ---------------------------------------------------------------- whole runs


def short_of_memory(monkeypatch, fits):
    """Let the computation of maps fail unless ``fits(call number, passes at a time)``."""
    calls = []
    original = experiment.maps.uncertainty_maps

    def limited(model, images, *, chunk, **options):
        calls.append(chunk)
        if not fits(len(calls), chunk):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return original(model, images, chunk=chunk, **options)

    monkeypatch.setattr(experiment.maps, "uncertainty_maps", limited)
    return calls


def made_again(finished, tiny, folder):
    """The outcome of a run in ``folder`` that has the weights of a finished run, and the pairs of maps (new, old)."""
    done = command(
        "--data", tiny, "--results", folder, "--weights-from", finished, "--cache", finished.parent / "cache", *TINY_FLAGS,
        cwd=folder.parent,
    )
    old = sorted((finished / "uncertainty_maps").rglob("*.npz"))
    return done, [(folder / path.relative_to(finished), path) for path in old]


def differences(pairs):
    """The largest difference of each array over all images, by name."""
    found = {}
    for new, old in pairs:
        one, two = read_maps(new), read_maps(old)
        for name in ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy", "fused_score"):
            found[name] = max(found.get(name, 0.0), float(np.abs(one[name] - two[name]).max()))
    return found


def test_a_run_with_room_at_the_second_attempt_makes_the_same_maps(finished, tiny, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, lambda number, chunk: number != 3)
    done, pairs = made_again(finished, tiny, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "not enough memory" not in done.stderr
    assert len(pairs) == 8 and set(differences(pairs).values()) == {0.0}


@pytest.mark.parametrize("first", [1, 2], ids=["at once", "while the first is made twice"])
def test_a_run_with_room_for_fewer_passes_says_so_and_is_the_same_up_to_rounding(first, finished, tiny, tmp_path, monkeypatch):
    calls = short_of_memory(monkeypatch, lambda number, chunk: number < first or chunk == 2)
    done, pairs = made_again(finished, tiny, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "from here on 2 passes are computed at a time, which changes maps by the rounding" in done.stderr
    assert set(calls[first + 4 :]) <= {None, 4, 2} and calls.count(2) >= 8
    assert max(differences(pairs).values()) < 1e-5


def test_a_run_without_room_is_one_line_and_keeps_its_weights(finished, tiny, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, lambda number, chunk: False)
    done, _ = made_again(finished, tiny, tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: maps of ISIC_") and "lower --image-size" in line
    assert (tmp_path / "run" / "weights" / "best_model.pth").is_file()
