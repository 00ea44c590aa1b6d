"""Every kind of file that is read, with a few damaged and odd inputs each; tests/faults/test_fuzz_everything.py has 50,000."""

from __future__ import annotations

import random

import pytest
from fuzzing import complaint, damaged_bytes, fuzz, kinds, odd_json

from runtime.errors import UserError

KINDS = (
    "image", "mask", "maps", "config of a run", "config of a training", "metrics", "metrics of a training", "table of images",
    "training log", "counts", "weights", "training state", "cache index", "cache records", "given maps", "parts", "groups",
    "weights of the user's",
)


@pytest.fixture(scope="module")
def files(finished, tiny, tmp_path_factory):
    found = kinds(finished, tiny, tmp_path_factory.mktemp("fuzz"))
    assert tuple(found) == KINDS
    return found


@pytest.mark.parametrize("name", KINDS)
def test_only_lines_come_out(files, name):
    assert fuzz(files[name], 25, name) == {}


def test_what_is_wrong_would_be_seen():
    def fail(error: BaseException):
        def read():
            raise error

        return complaint(read)

    assert fail(UserError("a line")) is None
    line = UserError("a line")
    line.__cause__ = MemoryError()
    assert "too much memory" in fail(line)
    assert fail(ValueError("x")).startswith("ValueError: x")
    assert "MemoryError" in complaint(lambda: bytearray(2 << 30))
    assert complaint(lambda: bytearray(1 << 20)) is None


def test_damage_is_the_same_for_a_seed_and_mostly_is_damage():
    content = bytes(range(256)) * 4
    found = [damaged_bytes(random.Random(seed), content) for seed in range(50)]
    assert found == [damaged_bytes(random.Random(seed), content) for seed in range(50)]
    assert sum(one != content for one in found) > 45
    assert odd_json(random.Random(1), b'{"a": [1, 2], "b": {"c": 3}}') != b'{"a": [1, 2], "b": {"c": 3}}'
