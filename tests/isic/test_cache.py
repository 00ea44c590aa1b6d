"""The decoded cache: each pair decoded once, changed ones again, and nothing checked twice."""

from __future__ import annotations

import os
import pickle
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_pairs
from PIL import Image

import isic.cache
from isic.cache import decode_pairs
from isic.decoding import decode_pair
from isic.layout import SkippedPair, find_pairs, isic_folders
from runtime.errors import UserError
from runtime.records import read_json, write_json


def _calls(monkeypatch) -> list[str]:
    calls: list[str] = []
    original = isic.cache.decode_pair
    monkeypatch.setattr(isic.cache, "decode_pair", lambda pair, size: (calls.append(pair.id), original(pair, size))[1])
    return calls


def test_each_pair_is_decoded_once_and_a_changed_one_again(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "d", 6)
    calls = _calls(monkeypatch)
    pairs = find_pairs(*isic_folders(root))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    assert sorted(calls) == [pair.id for pair in pairs]
    for pair in pairs:
        image, mask = decode_pair(pair, 32)
        np.testing.assert_array_equal(first.image(pair.id), image)
        np.testing.assert_array_equal(first.mask(pair.id), mask)

    calls.clear()
    assert decode_pairs(pairs, 32, tmp_path / "cache").fingerprint() == first.fingerprint()
    assert calls == []

    Image.new("RGB", (48, 40), (1, 2, 3)).save(pairs[2].image)
    changed = decode_pairs(pairs, 32, tmp_path / "cache")
    assert calls == [pairs[2].id]
    assert np.abs(changed.image(pairs[2].id).astype(int) - [1, 2, 3]).max() <= 2  # JPEG rounds
    assert changed.fingerprint() != first.fingerprint()

    calls.clear()
    fewer = decode_pairs(pairs[1:], 32, tmp_path / "cache")
    assert calls == []
    assert fewer.fingerprint() != changed.fingerprint()


def test_a_process_that_is_started_afresh_opens_the_cache_itself(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    sent = pickle.dumps(pairs)
    assert len(sent) < pairs.records.path.stat().st_size / 4
    received = pickle.loads(sent)
    for id in pairs.ids:
        assert received.records.read(received.slots[id]) == pairs.records.read(pairs.slots[id])


def test_an_interrupted_decoding_goes_on(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "d", 6)
    pairs = find_pairs(*isic_folders(root))
    good = pairs[4].image.read_bytes()
    pairs[4].image.write_bytes(b"not an image")
    with pytest.raises(UserError, match="ISIC_0000004"):
        decode_pairs(pairs, 32, tmp_path / "cache")
    pairs[4].image.write_bytes(good)
    calls = _calls(monkeypatch)
    decoded = decode_pairs(pairs, 32, tmp_path / "cache")
    assert pairs[0].id not in calls
    assert pairs[4].id in calls
    np.testing.assert_array_equal(decoded.image(pairs[4].id), decode_pair(pairs[4], 32)[0])


def test_a_second_call_checks_each_record_exactly_once(tmp_path, monkeypatch):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 6)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    checked = []
    counting = SimpleNamespace(crc32=lambda data: (checked.append(bytes(data)), zlib.crc32(data))[1])
    monkeypatch.setattr(isic.cache, "zlib", counting)  # not the module itself: Pillow uses it too
    again = decode_pairs(pairs, 32, tmp_path / "cache")
    assert sorted(checked) == sorted(first.records.read(first.slots[pair.id]) for pair in pairs)
    assert len(checked) == len(pairs) == len(again.ids)
    checked.clear()
    Image.new("RGB", (48, 40), (1, 2, 3)).save(pairs[2].image)  # one is decoded again: of that one the new record alone
    changed = decode_pairs(pairs, 32, tmp_path / "cache")
    assert sorted(checked) == sorted(changed.records.read(changed.slots[pair.id]) for pair in pairs)


def test_progress_counts_every_pair_once(tmp_path):
    root = write_pairs(tmp_path / "d", 6)
    pairs = find_pairs(*isic_folders(root))
    seen: list[int] = []
    decode_pairs(pairs[:4], 32, tmp_path / "cache", seen.append)
    assert sum(seen) == 4
    seen.clear()
    decode_pairs(pairs, 32, tmp_path / "cache", seen.append)
    assert sum(seen) == 6 and seen[0] == 4  # those that are there, at once


def test_pairs_that_are_broken_are_left_out_on_request(tmp_path):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4)))
    pairs[1].image.write_bytes(b"not an image")
    pairs[2].mask.unlink()
    skipped: list[SkippedPair] = []
    decoded = decode_pairs(pairs, 32, tmp_path / "cache", skipped=skipped)
    assert decoded.ids == [pairs[0].id, pairs[3].id]
    assert sorted((entry.id, entry.file) for entry in skipped) == [
        (pairs[1].id, str(pairs[1].image)), (pairs[2].id, str(pairs[2].mask)),
    ]
    for pair in (pairs[0], pairs[3]):
        pair.image.unlink()
    with pytest.raises(UserError, match="no pair is left"):
        decode_pairs(pairs, 32, tmp_path / "cache", skipped=[])


def test_pairs_sent_to_another_process_are_the_same(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    received = pickle.loads(pickle.dumps(pairs))
    assert (received.ids, received.size, received.slots, received.checksums) == (
        pairs.ids, pairs.size, pairs.slots, pairs.checksums)
    assert received.fingerprint() == pairs.fingerprint()
    for id in pairs.ids:
        np.testing.assert_array_equal(received.image(id), pairs.image(id))
        np.testing.assert_array_equal(received.mask(id), pairs.mask(id))


# ---------------------------------------------------------------- files that were exchanged, copied or restored


def _exchange(path, other) -> None:
    """Put another file of the same size under a name, with the time of modification that it had."""
    before = path.stat()
    content = other.read_bytes()
    path.write_bytes(content + b"\0" * (before.st_size - len(content)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_picture_exchanged_for_one_of_the_same_size_and_time_is_noticed(tmp_path):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    small = min(pairs[1:], key=lambda pair: pair.image.stat().st_size)
    if pairs[0].image.stat().st_size < small.image.stat().st_size:
        pairs[0].image.write_bytes(pairs[0].image.read_bytes() + b"\0" * 4096)  # a JPEG may be longer than its picture
        first = decode_pairs(pairs, 32, tmp_path / "cache")
    _exchange(pairs[0].image, small.image)
    second = decode_pairs(pairs, 32, tmp_path / "cache")
    assert second.fingerprint() != first.fingerprint()
    np.testing.assert_array_equal(second.image(pairs[0].id), second.image(small.id))


def test_files_that_were_touched_or_restored_cost_a_checksum_and_no_decoding(tmp_path, monkeypatch):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    calls, hashed = _calls(monkeypatch), []
    original = isic.cache.file_checksum
    monkeypatch.setattr(isic.cache, "file_checksum", lambda path: (hashed.append(path), original(path))[1])
    for pair in pairs:
        content = pair.image.read_bytes()
        pair.image.unlink()
        pair.image.write_bytes(content)
    for hashes in (2 * len(pairs), 0):  # the new stamps are kept
        hashed.clear()
        again = decode_pairs(pairs, 32, tmp_path / "cache")
        assert (calls, len(hashed), again.fingerprint(), again.slots) == ([], hashes, first.fingerprint(), first.slots)


def test_an_index_of_an_earlier_version_costs_a_checksum_and_no_decoding(tmp_path, monkeypatch):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("*/index.json")
    content = read_json(index)
    for entry in content["pairs"].values():
        entry["stamps"] = [stamp[:3] for stamp in entry["stamps"]]
    write_json(index, content)
    calls = _calls(monkeypatch)
    assert decode_pairs(pairs, 32, tmp_path / "cache").fingerprint() == first.fingerprint() and calls == []
    assert all(len(stamp) == 5 for entry in read_json(index)["pairs"].values() for stamp in entry["stamps"])


def test_a_dataset_that_was_copied_elsewhere_is_not_decoded_again(tmp_path, monkeypatch):
    root = write_pairs(tmp_path / "d", 4)
    first = decode_pairs(find_pairs(*isic_folders(root)), 32, tmp_path / "cache")
    calls = _calls(monkeypatch)
    shutil.copytree(root, tmp_path / "copy")
    pairs = find_pairs(*isic_folders(tmp_path / "copy"))
    copied = decode_pairs(pairs, 32, tmp_path / "cache")
    assert copied.fingerprint() == first.fingerprint() and calls == []
    for pair in pairs:
        np.testing.assert_array_equal(copied.image(pair.id), first.image(pair.id))
        np.testing.assert_array_equal(copied.mask(pair.id), first.mask(pair.id))
    decode_pairs(pairs, 48, tmp_path / "cache")  # at another size everything is
    assert len(calls) == len(pairs)


def test_a_cache_that_cannot_be_written_serves_files_that_were_touched(tmp_path, monkeypatch):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 4)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")

    def refuse(*arguments):
        raise UserError("read-only")

    monkeypatch.setattr(isic.cache, "write_json", refuse)
    os.utime(pairs[0].image)
    assert decode_pairs(pairs, 32, tmp_path / "cache").fingerprint() == first.fingerprint()


ODD = [None, [], {}, "x", -1, 2.5, 2**70, True, [[]], {"slot": 0}]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("place", ["made_by", "unused", "pairs", "slot", "crc", "checksums", "stamps"])
def test_an_index_with_odd_values_counts_as_empty(tmp_path, place, value):
    pairs = find_pairs(*isic_folders(write_pairs(tmp_path / "d", 3)))
    first = decode_pairs(pairs, 32, tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("*/index.json")
    content = read_json(index)
    (content if place in content else content["pairs"][pairs[1].id])[place] = value
    write_json(index, content)
    again = decode_pairs(pairs, 32, tmp_path / "cache")
    assert again.fingerprint() == first.fingerprint()
    for pair in pairs:
        np.testing.assert_array_equal(again.image(pair.id), first.image(pair.id))
