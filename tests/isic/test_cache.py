"""The decoded cache: each pair decoded once, changed ones again, and nothing checked twice."""

from __future__ import annotations

import pickle
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


def test_a_process_that_is_started_afresh_maps_the_cache_itself(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    sent = pickle.dumps(pairs)
    assert len(sent) < pairs.records.nbytes / 4
    received = pickle.loads(sent)
    assert isinstance(received.records, np.memmap) and np.array_equal(received.records, pairs.records)


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
    assert sorted(checked) == sorted(first.records[first.slots[pair.id]].tobytes() for pair in pairs)
    assert len(checked) == len(pairs) == len(again.ids)
    checked.clear()
    Image.new("RGB", (48, 40), (1, 2, 3)).save(pairs[2].image)  # one is decoded again: of that one the new record alone
    changed = decode_pairs(pairs, 32, tmp_path / "cache")
    assert sorted(checked) == sorted(changed.records[changed.slots[pair.id]].tobytes() for pair in pairs)


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
    pairs.records = np.array(pairs.records)  # not mapped: its content goes along
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pairs)).records, pairs.records)
