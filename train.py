"""Training a network: set-up, one epoch, the loop."""

from __future__ import annotations

import copy
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import EpochBatches, TrainingImages, batches, derived_seed, normalise
from evaluation.overlap import segmentation_overlap
from experiment.networks import Network, build, load_network, memory_layout
from isic.decoded import DecodedPairs
from model import UNet
from runtime.background import BackgroundWriter
from runtime.checkpoints import check_resumable
from runtime.config import Config
from runtime.devices import autocast, reproducible_convolutions, training_precision
from runtime.errors import SharedError
from runtime.group_layers import with_group_batch_norm, with_row_dropout
from runtime.loading import loaded
from runtime.processes import ProcessGroup
from runtime.records import write_csv
from runtime.resources import naming_shortage
from runtime.signals import end_with_parent
from runtime.stages import reused
from runtime.training_state import BEST, STATE, Progress, resumable_state, save_epoch
from runtime.upsampling import with_reproducible_upsampling


class EpochResult(NamedTuple):
    """Mean training loss per pixel in nats, and how fast the epoch went."""

    loss: float
    images_per_second: float
    seconds_waited: float


class TrainingResult(NamedTuple):
    """The best model, its validation Dice, and one row per epoch."""

    model: Network
    best_dice: float
    log: list[dict[str, Any]]


@reproducible_convolutions()
@naming_shortage("training", "lower --batch-size, --image-size or --width")
def train(
    config: Config,
    pairs: DecodedPairs,
    train_ids: Sequence[str],
    validation_ids: Sequence[str],
    group: ProcessGroup,
    results: Path,
    identity: str,
    report: Callable[[int, str], None] = lambda count, note: None,
    before_epoch: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train with Adam on binary cross-entropy; keep the weights of the best validation Dice.

    After each epoch a thread writes ``weights/training_state.pth`` (all that the
    next epoch needs), ``weights/best_model.pth`` and ``training_log.csv`` into the
    folder ``results``, while the next one is trained. On return, and where an
    error or a signal ends the training, they are written. A later call with the
    same ``identity`` goes on after the last finished epoch; since the order, the
    augmentation and the dropout of an epoch are seeded by (seed, epoch), the
    outcome is that of a run that was never interrupted.

    Several processes share each global batch of ``batch_size`` images: the
    gradient, the statistics of batch norm and the dropout masks are those of
    the whole batch, so their number changes the result by the order of
    summation alone.

    Args:
        config: batch size, learning rate, epochs and so on.
        pairs: the decoded images and masks.
        train_ids, validation_ids: the two parts.
        group: this process's place among all, and its device.
        results: folder of the run; the main process writes.
        identity: fingerprint of the configuration and data.
        report: called with newly finished images and a note.
        before_epoch: called before anything is trained; not at all where training is finished.

    Raises:
        UserError: the loss is no longer finite (the line names the first such
            step), the weights are not those this run wrote, or a file cannot be
            read or written.
    """
    best_path = results / BEST
    training = Training(config, pairs, train_ids, group)
    progress = Progress()
    saved = group.shared(lambda: resumable_state(results, identity))
    if saved is not None:
        training.load_state(saved, results / STATE)
        progress = Progress(**saved["progress"])
        reused("training", progress.epoch)
        if group.is_main:  # a run may have died just before it wrote this
            write_csv(results / "training_log.csv", progress.log)
    report(progress.epoch * len(train_ids), f"epoch {progress.epoch}/{config.epochs}")
    with BackgroundWriter() as writer:

        def step_done(count: int, note: str) -> None:
            writer.check()  # what cannot be written ends the training now, not an epoch later
            report(count, note)

        while progress.epoch < config.epochs and progress.epochs_without_improvement < config.patience:
            before_epoch()
            note = f"epoch {progress.epoch + 1}/{config.epochs}, best Dice {max(progress.best_dice, 0):.4f}"
            kept = f"the best weights so far are kept in {best_path}" if progress.best_epoch else "no epoch was finished"
            advice = f"{kept}; lower --lr and give another --results folder, or --fresh, which starts this one over"
            trained = training.run_epoch(progress.epoch, step_done, note, advice)
            scores = validate(
                training.model, pairs, validation_ids, config.batch_size, config.threshold, group, training.precision
            )
            if not math.isfinite(scores["loss"]):
                where = f"after step {len(training.order)} of epoch {progress.epoch + 1}"
                raise SharedError(f"the validation loss is {scores['loss']} {where}; {advice}")
            row = {
                "epoch": progress.epoch + 1, "train_loss": trained.loss, "validation_loss": scores["loss"],
                "validation_dice": scores["dice"], "validation_jaccard": scores["jaccard"],
                "learning_rate": learning_rate(config, progress.epoch),
                "images_per_second": trained.images_per_second, "seconds_waited_for_data": trained.seconds_waited,
            }
            progress = progress.after_epoch(row, training.model)
            if group.is_main:
                state = {**training.state(), "identity": identity, "progress": asdict(progress)}
                # a copy, since the next epoch changes the weights while this one's are written
                writer.submit(partial(save_epoch, results, copy.deepcopy(state)))
    return TrainingResult(load_network(best_path, config, group), progress.best_dice, progress.log)


# ---------------------------------------------------------------- set-up and one epoch


class Training:
    """A network with its optimiser and its batches, ready to be trained epoch by epoch.

    Attributes:
        model: the network in training.
        precision: the type in which it is evaluated.
        order: the batches of an epoch.
    """

    def __init__(self, config: Config, pairs: DecodedPairs, ids: Sequence[str], group: ProcessGroup):
        self.config, self.group, device = config, group, group.device
        self.model = build(config).to(device)
        self.model = self.model.to(memory_format=memory_layout(self.model))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True if device.type == "cuda" else None)
        self.precision = training_precision(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.dropout_sites = with_row_dropout(self.model)
        with_reproducible_upsampling(self.model, device)
        self.model = with_group_batch_norm(self.model, group)
        network: Any = torch.compile(self.model) if config.compile else self.model
        self.network = group.parallel(network, every_weight_used=isinstance(self.model, UNet))
        self.order = EpochBatches(len(ids), config.batch_size, config.seed, group.rank, group.world_size)
        workers = config.workers if config.workers >= 0 else (0 if device.type == "cpu" else 8)
        self.loader = DataLoader(
            TrainingImages(pairs, ids, config.augment, config.seed), batch_sampler=self.order, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda", worker_init_fn=end_with_parent,
            generator=torch.Generator(),  # its draws, one per epoch or one per start of helpers, are none of the dropout's
        )

    def state(self) -> dict[str, Any]:
        """All that the next epoch needs."""
        return {
            "model": self.model.state_dict(), "options": self.model.options,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Go on from what :meth:`state` returned; the errors of :func:`runtime.checkpoints.check_resumable` name the path."""
        optimizer = check_resumable(state, path, self.model, self.optimizer, self.scaler.state_dict())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])

    def run_epoch(self, epoch: int, report: Callable[[int, str], None], note: str, advice: str) -> EpochResult:
        """Train for one epoch, counted from 0, reporting each step's images with the note.

        Raises:
            UserError: the loss of a step is not finite; the line ends in ``advice``.
        """
        device = self.group.device
        self.order.epoch = epoch
        torch.manual_seed(derived_seed(self.config.seed, "dropout", epoch))
        torch.empty((), dtype=torch.int64).random_()  # as ever: earlier runs are resumed with the same masks
        self.model.train()
        losses = []  # of each step, left on the device: a look at one would wait for it
        started, waited = time.perf_counter(), 0.0
        asked = started
        for step, (images, masks) in enumerate(loaded(self.loader)):
            waited += time.perf_counter() - asked
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            losses.append(self._step(epoch, step, images, masks))
            report(self.order.size(step), note)
            asked = time.perf_counter()
        by_step = self.group.summed(torch.stack(losses)).tolist()
        seconds = time.perf_counter() - started
        bad = next((step for step, value in enumerate(by_step) if not math.isfinite(value)), None)
        if bad is not None:
            where = f"at step {bad + 1} of {len(self.order)} of epoch {epoch + 1}"
            raise SharedError(f"the training loss is {by_step[bad]} {where}; {advice}")
        sizes = [self.order.size(step) for step in range(len(self.order))]
        return EpochResult(sum(map(operator.mul, by_step, sizes)) / sum(sizes), sum(sizes) / seconds, waited)

    def _step(self, epoch: int, step: int, images: Tensor, masks: Tensor) -> Tensor:
        """One step of the optimiser on this process's rows of a global batch; returns their share of its mean loss."""
        total = self.order.size(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.config, epoch + step / len(self.order))
        for site in self.dropout_sites:
            site.rows, site.total = self.order.rows(step), total
        with autocast(images.device, self.precision):
            logits = self.network(normalise(images).contiguous(memory_format=memory_layout(self.model)))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits.float(), masks.float()) * (len(images) / total)
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages the gradients over the processes, hence ``world_size``
        self.scaler.scale(loss * self.group.world_size).backward()
        if self.config.clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def learning_rate(config: Config, epoch: float) -> float:
    """The learning rate at a fractional epoch.

    Constant, or half a cosine from ``lr`` down to 1 % of it over ``epochs``;
    both after a linear rise over the first ``warmup`` epochs.
    """
    rise = min(1.0, (epoch + 1e-3) / config.warmup) if config.warmup > 0 else 1.0
    if config.schedule == "constant":
        return config.lr * rise
    low = 0.01 * config.lr
    return rise * (low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * epoch / config.epochs)))


@torch.no_grad()
def validate(
    model: nn.Module, pairs: DecodedPairs, ids: Sequence[str], batch_size: int, threshold: float, group: ProcessGroup,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Mean loss per pixel, and mean Dice and Jaccard per image, without dropout; the images are shared by the group."""
    model.eval()
    device = group.device
    # sums, reduced once and divided once: the last batch may be smaller
    sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    level = math.log(threshold / (1 - threshold))
    for _, images, masks in batches(pairs, group.shard(ids), batch_size, device):
        with autocast(device, precision):
            logits = model(images.contiguous(memory_format=memory_layout(model)))[:, 0].float()
        loss = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none").mean((1, 2))
        dice, jaccard = segmentation_overlap(logits > level, masks)
        sums += torch.stack([loss.sum().to(sums.dtype), dice.sum(), jaccard.sum()])
    loss_mean, dice_mean, jaccard_mean = (group.summed(sums) / len(ids)).tolist()
    return {"loss": loss_mean, "dice": dice_mean, "jaccard": jaccard_mean}
