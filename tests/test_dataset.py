"""From pairs to tensors: the split, what a run uses of its images, augmentation, batches."""

from __future__ import annotations

import hashlib
from dataclasses import replace

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
    split_by_parts,
    split_ids,
)
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from isic.source import Source
from isic.tables import Fixed
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


def test_groups_are_not_split_and_their_number_is_what_the_fractions_are_of():
    ids = [f"image {i:03d}" for i in range(120)]
    groups = {id: f"patient {place // 3}" for place, id in enumerate(ids)}  # 40 patients of three images
    split = split_ids(ids, groups=groups)
    assert [len(part) for part in split] == [84, 12, 24]  # 8 patients for testing, 4 of the other 32 for validation
    assert sorted(sum(split, [])) == ids and all(part == sorted(part) for part in split)
    owners = [{groups[id] for id in part} for part in split]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert split == split_ids(ids[::-1], groups=groups) and split != split_ids(ids, seed=1, groups=groups)


def test_images_without_a_group_are_split_like_groups_of_one():
    ids = [f"image {i:02d}" for i in range(40)]
    alone = {id: f"patient of {id}" for id in ids}
    assert split_ids(ids, groups={ids[0]: ids[0]}) == split_ids(ids, groups=alone)
    assert split_ids(ids, groups=alone).test == split_ids(ids).test  # the same draw


def test_too_few_groups_are_one_line():
    with pytest.raises(UserError, match="9 images in 1 groups are too few to split"):
        split_ids([str(i) for i in range(9)], groups={str(i): "p" for i in range(9)})


def test_a_table_says_the_split():
    parts = {"a": "test", "b": "train", "c": "validation", "d": "train"}
    assert split_by_parts(["a", "b", "c", "d"], parts, {}, "--split x") == Split(["b", "d"], ["c"], ["a"])
    assert split_by_parts(["a", "b", "c", "d"], parts, {"b": "p", "d": "p", "a": "q"}, "--split x").test == ["a"]
    with pytest.raises(UserError, match="--split x leaves 1 images for training; give it at least 2"):
        split_by_parts(["a", "b", "c"], parts, {}, "--split x")
    with pytest.raises(UserError, match="--split x leaves 0 images for test; give it at least 1"):
        split_by_parts(["b", "c", "d"], parts, {}, "--split x")
    message = "--split x: group p is in two parts: a is in test, d in training; put all images of a group into one part"
    with pytest.raises(UserError, match=message):
        split_by_parts(["a", "b", "c", "d"], parts, {"a": "p", "d": "p"}, "--split x")


@pytest.fixture
def tables(tmp_path):
    def write(name: str, column: str, rows: dict[str, str]) -> str:
        path = tmp_path / name
        path.write_text(f"id,{column}\n" + "".join(f"{id},{value}\n" for id, value in rows.items()))
        return str(path)

    return write


def ids_of(numbers):
    return [f"ISIC_{number:07d}" for number in numbers]


def test_a_run_is_split_by_a_table_and_says_what_it_leaves_out(tiny, tmp_path, tables, capsys):
    rows = {id: ("train", "validation", "test")[number % 3] for number, id in enumerate(ids_of(range(18)))}
    config = Config(image_size=32, cache=str(tmp_path / "cache"), split=tables("split.csv", "part", rows))
    source = Source("tiny", *isic_folders(tiny), False)
    data = prepare_data(config, source, ALONE)
    assert data.split == Split(ids_of(range(0, 18, 3)), ids_of(range(1, 18, 3)), ids_of(range(2, 18, 3)))
    assert data.pairs.ids == ids_of(range(18)) and data.groups is None
    assert "6 of 24 images are not in --split" in capsys.readouterr().err
    shortened = prepare_data(replace(config, limit=9), source, ALONE)  # evenly spaced over those that the table lists
    assert shortened.pairs.ids == ids_of(range(0, 18, 2))
    assert shortened.split == Split(ids_of([0, 6, 12]), ids_of([4, 10, 16]), ids_of([2, 8, 14]))
    wrong = replace(config, split=tables("wrong.csv", "part", {**rows, "ISIC_9": "test"}))
    with pytest.raises(UserError, match="lists 1 images that are not in .*, the first of them ISIC_9"):
        prepare_data(wrong, source, ALONE)


def test_a_run_knows_the_groups_of_its_images(tiny, tmp_path, tables, capsys):
    groups = {id: f"p{number // 2}" for number, id in enumerate(ids_of(range(22)))}
    config = Config(image_size=32, cache=str(tmp_path / "cache"), groups=tables("groups.csv", "group", {**groups, "other": "p"}))
    source = Source("tiny", *isic_folders(tiny), False)
    data = prepare_data(config, source, ALONE)
    assert data.groups == groups
    assert data.split == split_ids(data.pairs.ids, groups=groups) != split_ids(data.pairs.ids)
    assert "2 of 24 images are not in --groups" in capsys.readouterr().err
    part = {id: ("train", "validation", "test")[number % 3] for number, id in enumerate(ids_of(range(24)))}
    with pytest.raises(UserError, match="group p0 is in two parts: ISIC_0000000 is in training, ISIC_0000001 in validation"):
        prepare_data(replace(config, split=tables("split.csv", "part", part)), source, ALONE)


def test_what_another_run_fixed_holds_where_no_flag_says_otherwise(tiny, tmp_path, tables, capsys):
    fixed = Fixed({id: ("train", "validation", "test")[number % 3] for number, id in enumerate(ids_of(range(12)))}, {"x": "y"})
    config = Config(image_size=32, cache=str(tmp_path / "cache"), weights_from="run", groups=tables("g.csv", "group", {
        ids_of([0])[0]: "p"}))
    data = prepare_data(config, Source("tiny", *isic_folders(tiny), False), ALONE, fixed)
    assert data.split.test == ids_of([2, 5, 8, 11]) and len(data.pairs.ids) == 12 and data.groups == {ids_of([0])[0]: "p"}
    assert "left out" not in capsys.readouterr().err  # nobody asked for the others
    with pytest.raises(UserError, match="the split of run lists 1 images that are not in"):
        prepare_data(config, Source("tiny", *isic_folders(tiny), False), ALONE, Fixed({**fixed.parts, "z": "test"}, None))


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
