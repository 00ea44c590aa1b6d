"""From pairs to tensors: the split, what a run uses of its images, augmentation, batches."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from conftest import write_pairs

from dataset import (
    EpochBatches,
    Split,
    TrainingImages,
    batches,
    derived_seed,
    leave_out,
    normalise,
    prepare_data,
    split_ids,
)
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from isic.source import Source
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))

# ---------------------------------------------------------------- the split

def test_split_of_2594_sorted_names_is_the_study_s():
    ids = [f"ISIC_{i:07d}" for i in range(2594)]
    split = split_ids(ids)
    assert [len(part) for part in split] == [1815, 260, 519]
    assert sorted(sum(split, [])) == ids
    # taken once from scikit-learn, so that a change of the library would be noticed
    assert split.test[:4] == ["ISIC_0000029", "ISIC_0000030", "ISIC_0000043", "ISIC_0000044"]
    digest = [hashlib.sha256("\n".join(part).encode()).hexdigest()[:12] for part in split]
    assert digest == SPLIT_DIGESTS


SPLIT_DIGESTS = ["c290c14d948d", "6a65d8c78d2f", "d78b94bc690c"]


def test_split_does_not_depend_on_the_order_of_the_ids():
    ids = [f"case {i}" for i in range(40)]
    assert split_ids(ids) == split_ids(ids[::-1])


def test_split_of_too_few_images_is_one_line():
    with pytest.raises(UserError, match="2 images are too few to split"):
        split_ids(["a", "b"])


# ---------------------------------------------------------------- tensors

def test_normalise_is_torchvision_s():
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (2, 8, 6, 3), dtype=torch.uint8)
    reference = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
    )(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(normalise(images), reference)


def test_augmentation_depends_on_seed_epoch_and_id_alone(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    forwards = TrainingImages(pairs, pairs.ids, "full", 1)
    one = [forwards[(3, i)] for i in range(8)]
    backwards = TrainingImages(pairs, pairs.ids, "full", 1)
    other = [backwards[(3, i)] for i in reversed(range(8))][::-1]
    for (image, mask), (image2, mask2) in zip(one, other):
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(mask, mask2)
        assert set(np.unique(mask)) <= {0, 1}
    assert any((a[0] != b[0]).any() for a, b in zip(one, [forwards[(4, i)] for i in range(8)]))
    assert any((a[0] != b[0]).any() for a, b in zip(one, [TrainingImages(pairs, pairs.ids, "full", 2)[(3, i)] for i in range(8)]))


def test_a_quarter_turn_moves_image_and_mask_together(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    flips = TrainingImages(pairs, pairs.ids, "flips", 1)
    assert len(flips) == 24
    moved = 0
    for position, id in enumerate(pairs.ids):
        image, mask = flips[(0, position)]
        ways = [(np.rot90(one, k), np.rot90(two, k)) for one, two in (
            (pairs.image(id), pairs.mask(id)), (pairs.image(id)[::-1], pairs.mask(id)[::-1])) for k in range(4)]
        assert any(np.array_equal(image, one) and np.array_equal(mask, two) for one, two in ways)
        moved += not np.array_equal(image, pairs.image(id))
    assert moved > 12
    image, mask = TrainingImages(pairs, pairs.ids, "none", 1)[(0, 3)]
    np.testing.assert_array_equal(image, pairs.image(pairs.ids[3]))
    np.testing.assert_array_equal(mask, pairs.mask(pairs.ids[3]))


def test_a_seed_depends_on_all_parts_and_on_nothing_else():
    # the first four bytes of SHA-256 of '[42, "order", 0]', little-endian
    assert derived_seed(42, "order", 0) == int.from_bytes(hashlib.sha256(b'[42, "order", 0]').digest()[:4], "little")
    seeds = {derived_seed(*parts) for parts in ((1,), (2,), (1, 0), (0, 1), ("1",), (1, "a"))}
    assert len(seeds) == 6 and all(0 <= seed < 2**32 for seed in seeds)


def test_batches_hold_every_id_once_in_order(tiny, tmp_path):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path)
    parts = list(batches(pairs, pairs.ids[:7], 3, torch.device("cpu")))
    assert [names for names, _, _ in parts] == [pairs.ids[:3], pairs.ids[3:6], pairs.ids[6:7]]
    for names, images, masks in parts:
        pixels = torch.from_numpy(np.stack([pairs.image(id) for id in names]))
        assert torch.equal(images, normalise(pixels)) and masks.dtype == torch.uint8
        assert torch.equal(masks, torch.from_numpy(np.stack([pairs.mask(id) for id in names])))


# ---------------------------------------------------------------- the order of an epoch


def test_batches_are_a_permutation_that_changes_with_the_epoch():
    order = EpochBatches(20, 8, seed=1)
    first = list(order)
    assert first == list(order)
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert sorted(position for batch in first for _, position in batch) == list(range(20))
    order.epoch = 1
    assert [[position for _, position in batch] for batch in order] != [[p for _, p in batch] for batch in first]


def test_processes_share_the_same_global_batches():
    whole = list(EpochBatches(23, 8, seed=1))
    parts = [list(EpochBatches(23, 8, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [sum(step, []) for step in zip(*parts)] == whole


def test_a_last_batch_of_one_image_is_left_out_and_too_many_processes_are_refused():
    assert [len(batch) for batch in EpochBatches(17, 8, seed=1)] == [8, 8]
    with pytest.raises(UserError, match="2 images for 3 processes"):
        EpochBatches(18, 8, seed=1, world_size=3)


def test_rows_of_the_processes_are_the_batch():
    orders = [EpochBatches(23, 8, seed=1, rank=rank, world_size=3) for rank in range(3)]
    assert [order.rows(0) for order in orders] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    assert [orders[0].size(step) for step in range(len(orders[0]))] == [8, 8, 7]


# ---------------------------------------------------------------- what a run uses


def _source(root) -> Source:
    return Source("d", *isic_folders(root), False)


def test_the_data_of_a_run(tiny, tmp_path, capsys):
    data = prepare_data(Config(image_size=32, cache=str(tmp_path)), _source(tiny), ALONE)
    assert data.split == split_ids(data.pairs.ids) and data.skipped == []
    assert [len(part) for part in data.split] == [16, 3, 5]
    assert "24 images: 16 training, 3 validation, 5 test" in capsys.readouterr().out
    limited = prepare_data(Config(image_size=32, cache=str(tmp_path), limit=12), _source(tiny), ALONE)
    assert limited.pairs.ids == data.pairs.ids[::2]


def test_bad_pairs_leave_their_part_and_move_no_other(tmp_path, capsys):
    root = write_pairs(tmp_path / "d", 16)
    config = Config(image_size=32, cache=str(tmp_path / "cache"), skip_bad=True)
    whole = prepare_data(config, _source(root), ALONE)
    bad, lost = whole.split.train[2], whole.split.test[0]
    images, masks = isic_folders(root)
    (images / f"{bad}.jpg").write_bytes(b"not an image")
    (masks / f"{lost}_segmentation.png").unlink()
    capsys.readouterr()
    data = prepare_data(config, _source(root), ALONE)
    assert data.split == leave_out(whole.split, {bad, lost})
    assert [entry.id for entry in data.skipped] == sorted([bad, lost])
    assert data.pairs.ids == [id for id in whole.pairs.ids if id not in (bad, lost)]
    assert capsys.readouterr().err.splitlines()[-1].startswith("warning: 2 of 16 pairs are left out: ")
    with pytest.raises(UserError, match="has no mask"):
        prepare_data(Config(image_size=32, cache=str(tmp_path / "cache")), _source(root), ALONE)


def test_a_part_that_loses_too_many_is_an_error():
    split = Split(["a", "b", "c"], ["d"], ["e", "f"])
    assert leave_out(split, {"a", "f"}) == Split(["b", "c"], ["d"], ["e"])
    with pytest.raises(UserError, match="without the 2 bad pairs the train part has 1 images"):
        leave_out(split, {"a", "b"})
    with pytest.raises(UserError, match="the validation part has 0 images"):
        leave_out(split, {"d"})
