"""Training: the learning rate, one step, the loop, resuming, reproducibility."""

from __future__ import annotations

import csv
import threading
from dataclasses import replace

import pytest
import torch
from device import DEVICE
from sklearn.metrics import log_loss

from dataset import normalise, split_ids
from experiment.networks import UserNetwork
from isic.cache import decode_pairs
from isic.layout import find_pairs, isic_folders
from model import UNet
from runtime.checkpoints import load_checkpoint, load_model, save_checkpoint, state_fingerprint, weights_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.training_state import save_epoch
from train import learning_rate, train, validate

CONFIG = Config(image_size=32, width=4, epochs=3, batch_size=4, lr=1e-3, schedule="cosine", workers=0)
CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, DEVICE)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    pairs = decode_pairs(find_pairs(*isic_folders(tiny)), 32, tmp_path_factory.mktemp("cache"))
    return pairs, split_ids(pairs.ids)


def run(folder, data, config=CONFIG, report=lambda count, note: None, **options):
    pairs, split = data
    return train(config, pairs, split.train, split.validation, ALONE, folder, "identity", report, **options)


def stacked(pairs, ids):
    """Images and masks of these ids, as tensors."""
    return (torch.stack([torch.from_numpy(part(id).copy()) for id in ids]).to(DEVICE) for part in (pairs.image, pairs.mask))


def test_cosine_schedule_goes_from_the_start_to_a_hundredth():
    config = Config(lr=0.5, epochs=10, schedule="cosine")
    assert learning_rate(config, 0) == 0.5
    assert learning_rate(config, 5) == pytest.approx((0.5 + 0.005) / 2)
    assert learning_rate(config, 10) == pytest.approx(0.005)
    assert learning_rate(Config(lr=0.5), 7.3) == 0.5


def test_warm_up_rises_linearly():
    config = Config(lr=0.5, warmup=2)
    assert [learning_rate(config, epoch) for epoch in (0, 1, 2, 9)] == pytest.approx([0.00025, 0.25025, 0.5, 0.5])


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_either_precision_learns_with_clipping_and_warm_up(tmp_path, data, amp):
    result = run(tmp_path, data, replace(CONFIG, epochs=25, lr=5e-3, patience=25, amp=amp, clip=1.0, warmup=1))
    assert result.best_dice > 0.8


def test_training_learns_and_keeps_the_best_epoch(tmp_path, data):
    result = run(tmp_path, data, replace(CONFIG, epochs=25, lr=5e-3, patience=25))
    dices = [row["validation_dice"] for row in result.log]
    assert result.best_dice == max(dices) > 0.8
    best = tmp_path / "weights" / "best_model.pth"
    assert load_checkpoint(best)["epoch"] == dices.index(max(dices)) + 1
    assert weights_fingerprint(load_model(best, UNet, CPU)) == weights_fingerprint(result.model)


def test_early_stopping_counts_epochs_without_a_better_dice(tmp_path, data):
    # a learning rate this small changes nothing, so no epoch improves on the first
    result = run(tmp_path, data, replace(CONFIG, epochs=20, lr=1e-12, patience=2))
    assert len(result.log) <= 5


class Killed(Exception):
    pass


@pytest.mark.parametrize(("images", "workers"), [(1, 0), (20, 0), (40, 0), (20, 2), (40, 2)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, data, images, workers):
    whole = run(tmp_path / "whole", data)
    config = replace(CONFIG, workers=workers)
    seen = 0

    def interrupt(count, note):
        nonlocal seen
        seen += count
        if seen >= images:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "broken", data, config, report=interrupt)
    resumed = run(tmp_path / "broken", data, config)
    assert weights_fingerprint(resumed.model) == weights_fingerprint(whole.model)
    timing = ("images_per_second", "seconds_waited_for_data")
    strip = [[{k: v for k, v in row.items() if k not in timing} for row in result.log] for result in (whole, resumed)]
    assert strip[0] == strip[1]


def test_a_state_of_a_fused_optimiser_is_gone_on_from_as_the_device_computes(tmp_path, data):
    """The state is that of this very device, but for the word; so must be what follows."""
    whole, path = run(tmp_path / "whole", data), tmp_path / "broken" / "weights" / "training_state.pth"

    def interrupt(count, note):
        if note.startswith("epoch 2/"):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "broken", data, report=interrupt)
    state = load_checkpoint(path)
    own = state["optimizer"]["param_groups"][0]["fused"]
    state["optimizer"]["param_groups"][0]["fused"] = None if own else True
    save_checkpoint(path, state)
    resumed = run(tmp_path / "broken", data)
    assert weights_fingerprint(resumed.model) == weights_fingerprint(whole.model)
    assert load_checkpoint(path)["optimizer"]["param_groups"][0]["fused"] == own


def test_best_weights_that_a_power_loss_took_are_made_again_byte_for_byte(tmp_path, data):
    pairs, split = data

    def once():
        # an identity that is no word of the program, which Python would hold only once
        arguments = replace(CONFIG, epochs=1), pairs, split.train, split.validation, ALONE, tmp_path, "ab" * 32
        train(*arguments)
        return (tmp_path / "weights" / "best_model.pth").read_bytes()

    before = once()
    (tmp_path / "weights" / "best_model.pth").unlink()
    assert once() == before


def test_an_epoch_is_written_as_it_was_while_the_next_one_is_trained(tmp_path, data, monkeypatch):
    changed, held = threading.Event(), []

    def held_back(results, state):
        assert changed.wait(60)  # until a step of the second epoch has changed the weights
        held.append((state_fingerprint(state["model"]), state["progress"]["best_weights"], threading.current_thread()))
        save_epoch(results, state)

    def report(count, note):
        if count and note.startswith("epoch 2/"):
            changed.set()

    monkeypatch.setattr("train.save_epoch", held_back)
    run(tmp_path, data, replace(CONFIG, epochs=2), report)
    found, expected, thread = held[0]
    assert found == expected
    assert thread is not threading.main_thread()
    assert load_checkpoint(tmp_path / "weights" / "training_state.pth")["progress"]["epoch"] == 2


def test_an_epoch_that_cannot_be_written_ends_the_training(tmp_path, data, monkeypatch):
    notes = []

    def no_room(results, state):
        raise UserError("cannot write: no room")

    monkeypatch.setattr("train.save_epoch", no_room)
    with pytest.raises(UserError, match="no room"):
        run(tmp_path, data, report=lambda count, note: notes.append(note[:7]))
    assert "epoch 1" in notes and "epoch 3" not in notes


def test_helpers_that_load_data_change_no_number(tmp_path, data):
    alone, helped = (run(tmp_path / str(workers), data, replace(CONFIG, workers=workers)) for workers in (0, 2))
    # each epoch, not the best one's weights alone: its dropout must not depend on what the loader draws
    assert [row["train_loss"] for row in alone.log] == [row["train_loss"] for row in helped.log]
    assert weights_fingerprint(alone.model) == weights_fingerprint(helped.model)


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


def test_the_loss_reported_is_that_of_the_validation_pixels(tmp_path, data):
    pairs, split = data
    torch.manual_seed(0)
    model = UNet(4).eval().to(DEVICE)
    by_three = validate(model, pairs, split.train, 3, 0.5, ALONE)
    at_once = validate(model, pairs, split.train, 100, 0.5, ALONE)
    for key in by_three:  # ragged batches weigh every image alike
        assert by_three[key] == pytest.approx(at_once[key], rel=1e-6)
    images, masks = stacked(pairs, split.train)
    with torch.no_grad():
        probability = torch.sigmoid(model(normalise(images)).double())
    assert by_three["loss"] == pytest.approx(log_loss(masks.flatten().cpu(), probability.flatten().cpu()), rel=1e-5)


def test_a_step_is_one_of_adam_on_cross_entropy(tmp_path, data):
    # the first step of Adam moves every weight by the learning rate against the sign of its gradient, whatever its size
    pairs, split = data
    config = replace(CONFIG, epochs=1, batch_size=len(split.train), lr=1e-4, schedule="constant", augment="none", amp="fp32")
    trained = dict(run(tmp_path, data, config).model.named_parameters())
    torch.manual_seed(config.seed)
    drawn = UNet(config.width, config.dropout).to(DEVICE).train()
    moves = torch.cat([(trained[name] - before).flatten() for name, before in drawn.named_parameters()]).detach()
    assert moves.abs().max() < 1.01e-4 and moves.abs().median() == pytest.approx(1e-4, rel=0.01)
    # the gradient of the last bias under cross-entropy: predicted less true share of lesion
    images, masks = stacked(pairs, split.train)
    with torch.no_grad():
        excess = torch.sigmoid(drawn(normalise(images))).mean() - masks.float().mean()
    assert abs(excess) > 0.01 and (trained["head.bias"] - drawn.head.bias) * excess < 0


def test_training_is_reproducible_on_cuda_too_and_leaves_the_switch_as_it_was(tmp_path, data):
    seen, before = [], torch.backends.cudnn.deterministic
    run(tmp_path, data, replace(CONFIG, epochs=1), lambda count, note: seen.append(torch.backends.cudnn.deterministic))
    assert all(seen) and len(seen) > 1 and torch.backends.cudnn.deterministic == before


def test_each_epoch_is_announced_and_reported(tmp_path, data):
    epochs, seen = [], []

    def go(config=CONFIG):
        epochs.clear()
        seen.clear()
        run(tmp_path, data, config, lambda count, note: seen.append((count, note)), before_epoch=lambda: epochs.append(len(seen)))

    go()
    images = len(data[1].train)
    assert len(epochs) == 3 and epochs[0] == 1  # before anything is trained, and after the state was looked at
    assert seen[0] == (0, "epoch 0/3") and seen[1][1] == "epoch 1/3, best Dice 0.0000"
    assert sum(count for count, _ in seen) == 3 * images
    go()  # finished: nothing is trained, and all of it counts as done
    assert epochs == [] and seen == [(3 * images, "epoch 3/3")]


def test_the_log_is_a_table_with_a_row_per_epoch(tmp_path, data):
    result = run(tmp_path, data)
    with open(tmp_path / "training_log.csv", newline="") as stream:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    assert rows == result.log
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == [learning_rate(CONFIG, epoch) for epoch in range(3)]
    (tmp_path / "training_log.csv").unlink()  # a run may have died just before it wrote this
    run(tmp_path, data)
    assert (tmp_path / "training_log.csv").is_file()


# ---------------------------------------------------------------- a network of the user's

MODEL = "constructed_networks"
NETWORKS = [
    {"model": f"{MODEL}:with_dropout", "target_layer": "bottom"},
    {"model": f"{MODEL}:plain", "insert_dropout": 0.25, "target_layer": "bottom"},
    {"model": f"{MODEL}:in_a_tuple", "output": "1", "target_layer": "inner.bottom"},
]


@pytest.mark.parametrize("options", NETWORKS)
def test_another_network_resumes_as_the_u_net_does(tmp_path, data, options):
    config = replace(CONFIG, **options)
    whole = run(tmp_path / "whole", data, config)
    seen = 0

    def interrupt(count, note):
        nonlocal seen
        seen += count
        if seen >= 20:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "broken", data, config, report=interrupt)
    resumed = run(tmp_path / "broken", data, config)
    assert isinstance(resumed.model, UserNetwork) and not resumed.model.training
    assert weights_fingerprint(resumed.model) == weights_fingerprint(whole.model)
    assert resumed.model.sites == whole.model.sites == (["dropout", "up2"] if "insert_dropout" in options else [])
    stored = load_checkpoint(tmp_path / "broken" / "weights" / "best_model.pth")
    assert stored["options"] == {} and "head.weight" in {name.removeprefix("inner.") for name in stored["model"]}


def test_inserted_dropout_acts_in_training(tmp_path, data):
    losses = []
    for p in (0.25, 0.5):
        config = replace(CONFIG, epochs=1, **{**NETWORKS[1], "insert_dropout": p})
        losses.append(run(tmp_path / str(p), data, config).log[0]["train_loss"])
    assert losses[0] != losses[1]


def test_another_network_learns(tmp_path, data):
    config = replace(CONFIG, **NETWORKS[1], epochs=40, lr=1e-2, patience=40)
    assert run(tmp_path, data, config).best_dice > 0.7
