"""Training: overlap, the learning rate, checkpoints, resuming, reproducibility."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, log_loss

from checkpoints import load_checkpoint, load_model, weights_fingerprint
from config import Config
from dataset import decode_pairs, find_pairs, isic_folders, normalise, split_ids
from model import UNet
from processes import Processes
from storage import UserError
from train import EpochBatches, learning_rate, segmentation_overlap, train, training_precision

CONFIG = Config(image_size=32, width=4, epochs=3, batch_size=4, lr=1e-3, schedule="cosine")
CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))
    return pairs, split_ids(pairs.ids)


def run(folder, data, config=CONFIG, progress=lambda count, note: None):
    pairs, split = data
    return train(config, pairs, split.train, split.validation, ALONE, folder, "identity", progress)


def stacked(pairs, ids):
    """Images and masks of these ids, as tensors."""
    return (torch.stack([torch.from_numpy(part(id).copy()) for id in ids]) for part in (pairs.image, pairs.mask))


def test_overlap_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    prediction, truth = (torch.rand(5, 9, 7, generator=generator) > 0.6 for _ in range(2))
    dice, jaccard = segmentation_overlap(prediction, truth)
    for i in range(5):
        assert dice[i].item() == pytest.approx(f1_score(truth[i].flatten(), prediction[i].flatten()), abs=1e-12)
        assert jaccard[i].item() == pytest.approx(jaccard_score(truth[i].flatten(), prediction[i].flatten()), abs=1e-12)


def test_overlap_of_empty_masks_is_one_and_of_disjoint_ones_zero():
    empty, full = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    assert [float(value) for value in segmentation_overlap(empty, empty)] == [1, 1]
    assert [float(value) for value in segmentation_overlap(empty, full)] == [0, 0]


def test_cosine_schedule_goes_from_the_start_to_a_hundredth():
    config = Config(lr=0.5, epochs=10, schedule="cosine")
    assert learning_rate(config, 0) == 0.5
    assert learning_rate(config, 5) == pytest.approx((0.5 + 0.005) / 2)
    assert learning_rate(config, 10) == pytest.approx(0.005)
    assert learning_rate(Config(lr=0.5), 7.3) == 0.5


def test_warm_up_rises_linearly():
    config = Config(lr=0.5, warmup=2)
    assert [learning_rate(config, epoch) for epoch in (0, 1, 2, 9)] == pytest.approx([0.00025, 0.25025, 0.5, 0.5])


def test_precision_of_training(monkeypatch):
    assert training_precision("fp16", CPU) == torch.float16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert training_precision("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert training_precision("auto", CPU) == torch.bfloat16


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_either_precision_learns_with_clipping_and_warm_up(tmp_path, data, amp):
    result = run(tmp_path, data, replace(CONFIG, epochs=25, lr=5e-3, patience=25, amp=amp, clip=1.0, warmup=1))
    assert result.best_dice > 0.8


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
    parts = [list(EpochBatches(23, 8, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert [sum(step, []) for step in zip(*parts)] == whole


def test_a_last_batch_of_one_image_is_left_out_and_too_many_processes_are_refused():
    assert [len(batch) for batch in EpochBatches(17, 8, seed=1)] == [8, 8]
    with pytest.raises(UserError, match="2 images for 3 processes"):
        EpochBatches(18, 8, seed=1, world=3)


def test_training_learns_and_keeps_the_best_epoch(tmp_path, data):
    result = run(tmp_path, data, replace(CONFIG, epochs=25, lr=5e-3, patience=25))
    dices = [row["validation_dice"] for row in result.log]
    assert result.best_dice == max(dices) > 0.8
    saved = load_checkpoint(tmp_path / "weights" / "best_model.pth")
    assert saved["epoch"] == dices.index(max(dices)) + 1
    assert weights_fingerprint(load_model(tmp_path / "weights" / "best_model.pth", CPU)) == weights_fingerprint(result.model)


def test_early_stopping_counts_epochs_without_a_better_dice(tmp_path, data):
    # a learning rate this small changes nothing, so no epoch improves on the first
    result = run(tmp_path, data, replace(CONFIG, epochs=20, lr=1e-12, patience=2))
    assert len(result.log) <= 5


class Killed(Exception):
    pass


@pytest.mark.parametrize("images", [1, 20, 40])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, data, images):
    whole = run(tmp_path / "whole", data)
    seen = 0

    def interrupt(count, note):
        nonlocal seen
        seen += count
        if seen >= images:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "broken", data, progress=interrupt)
    resumed = run(tmp_path / "broken", data)
    assert weights_fingerprint(resumed.model) == weights_fingerprint(whole.model)
    timing = ("images_per_second", "seconds_waited_for_data")
    strip = [[{k: v for k, v in row.items() if k not in timing} for row in result.log] for result in (whole, resumed)]
    assert strip[0] == strip[1]


def test_a_finished_training_is_reused_and_another_one_is_not(tmp_path, data):
    first = run(tmp_path, data)
    stamp = (tmp_path / "weights" / "best_model.pth").stat().st_mtime_ns
    again = run(tmp_path, data)
    assert (tmp_path / "weights" / "best_model.pth").stat().st_mtime_ns == stamp
    assert weights_fingerprint(again.model) == weights_fingerprint(first.model)
    pairs, split = data
    other = train(replace(CONFIG, seed=7), pairs, split.train, split.validation, ALONE, tmp_path, "other identity")
    assert weights_fingerprint(other.model) != weights_fingerprint(first.model)


def test_a_loss_that_is_no_number_stops_with_the_epoch_named(tmp_path, data):
    with pytest.raises(UserError, match=r"training loss is (nan|inf) at step \d+ of \d+ of epoch \d.*lower --lr"):
        run(tmp_path, data, replace(CONFIG, lr=1e30, schedule="constant", epochs=6, patience=6))


# ---------------------------------------------------------------- checkpoints


class Code:
    def __reduce__(self):
        return (os.mkdir, ("must_not_exist",))


@pytest.mark.parametrize(
    "content",
    [b"", b"random bytes", random.Random(0).randbytes(5000), pickle.dumps(Code()), pickle.dumps({"model": 1})],
    ids=["empty", "short", "long", "code", "no weights"],
)
def test_checkpoints_that_are_none_are_one_line_and_run_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pth").write_bytes(content)
    with pytest.raises(UserError, match="best.pth"):
        load_model(tmp_path / "best.pth", CPU)
    assert not (tmp_path / "must_not_exist").exists()


def test_a_checkpoint_that_does_not_fit_its_options(tmp_path):
    torch.save({"model": UNet(4).state_dict(), "options": UNet(8).options}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "x.pth", CPU)
    with pytest.raises(UserError, match="run main.py first"):
        load_model(tmp_path / "none.pth", CPU)


def test_the_loss_reported_is_that_of_the_validation_pixels(tmp_path, data):
    from train import validate

    pairs, split = data
    torch.manual_seed(0)
    model = UNet(4).eval()
    by_three = validate(model, pairs, split.train, 3, 0.5, ALONE)
    at_once = validate(model, pairs, split.train, 100, 0.5, ALONE)
    for key in by_three:  # ragged batches weigh every image alike
        assert by_three[key] == pytest.approx(at_once[key], rel=1e-6)
    images, masks = stacked(pairs, split.train)
    with torch.no_grad():
        probability = torch.sigmoid(model(normalise(images)).double())
    assert by_three["loss"] == pytest.approx(log_loss(masks.flatten(), probability.flatten()), rel=1e-5)


def test_a_step_is_one_of_adam_on_cross_entropy(tmp_path, data):
    # the first step of Adam moves every weight by the learning rate against the sign of its gradient, whatever its size
    pairs, split = data
    config = replace(CONFIG, epochs=1, batch_size=len(split.train), lr=1e-4, schedule="constant", augment="none", amp="fp32")
    trained = dict(run(tmp_path, data, config).model.named_parameters())
    torch.manual_seed(config.seed)
    drawn = UNet(config.width, config.dropout).train()
    moves = torch.cat([(trained[name] - before).flatten() for name, before in drawn.named_parameters()]).detach()
    assert moves.abs().max() < 1.01e-4 and moves.abs().median() == pytest.approx(1e-4, rel=0.01)
    # the gradient of the last bias under cross-entropy: predicted less true share of lesion
    images, masks = stacked(pairs, split.train)
    with torch.no_grad():
        excess = torch.sigmoid(drawn(normalise(images))).mean() - masks.float().mean()
    assert abs(excess) > 0.01 and (trained["head.bias"] - drawn.head.bias) * excess < 0
