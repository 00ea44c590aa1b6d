"""Training the U-Net: one linear loop, and the checkpoint it leaves."""

from __future__ import annotations

import inspect
import math
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from checkpoints import load_model, resumable_state, save_best, save_checkpoint, weights_fingerprint
from config import Config
from dataset import DecodedPairs, TrainingImages, batches, derived_seed, normalise
from interruption import deaf_children, end_with_parent
from model import UNet
from processes import Processes, with_group_batch_norm, with_row_dropout
from storage import UserError, write_csv


class TrainingResult(NamedTuple):
    """The best model, its validation Dice, and one row an epoch."""

    model: UNet
    best_dice: float
    log: list[dict[str, Any]]


# ---------------------------------------------------------------- the loop


class EpochBatches(Sampler):
    """The batches of one epoch: lists of (epoch, position), of which each process takes its rows.

    Positions are shuffled by (seed, epoch) and cut into global batches of
    ``batch_size``; a process gets the contiguous part ``rows(step)`` of each, so
    that the global batches are the same for any number of processes. A last
    batch of a single image is left out: batch norm has no variance over it.

    Raises:
        UserError: a batch has fewer images than there are processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        edges = [*range(0, length, batch_size), length]
        self.batches = [(start, stop) for start, stop in zip(edges, edges[1:]) if stop - start > 1]
        smallest = min((stop - start for start, stop in self.batches), default=0)
        if smallest < world:
            raise UserError(
                f"a training batch has {smallest} images for {world} processes; "
                "choose another --batch-size, more images or fewer processes"
            )
        self.length = length

    def __len__(self) -> int:
        return len(self.batches)

    def size(self, step: int) -> int:
        """Images of the global batch of a step."""
        start, stop = self.batches[step]
        return stop - start

    def rows(self, step: int) -> slice:
        """The own part of the global batch of a step; the parts differ in size by one at most."""
        size = self.size(step)
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step, (start, stop) in enumerate(self.batches):
            yield [(self.epoch, position) for position in order[start:stop][self.rows(step)]]


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


def training_precision(name: str, device: torch.device) -> torch.dtype:
    """The type in which the network is evaluated while training; weights and loss stay float32.

    "auto" is bfloat16 where the device multiplies in it natively (CUDA from
    compute capability 8.0, CPUs with AVX-512 BF16 or AMX), float16 on older
    CUDA devices, and float32 elsewhere.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks):
        return torch.bfloat16
    return torch.float32


def segmentation_overlap(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and Jaccard of each image; 1 where both masks are empty.

    Args:
        prediction, truth: bool or 0/1 (B, H, W).

    Returns:
        float64 (B,) twice: ``2 |P and T| / (|P| + |T|)`` and ``|P and T| / |P or T|``;
        float32 on devices without double precision.
    """
    kind = torch.float32 if prediction.device.type == "mps" else torch.float64
    prediction, truth = prediction.bool().flatten(1), truth.bool().flatten(1)
    both = (prediction & truth).sum(1).to(kind)
    total = prediction.sum(1).to(kind) + truth.sum(1).to(kind)
    one = torch.ones_like(both)
    dice = torch.where(total > 0, 2 * both / total, one)
    jaccard = torch.where(total > 0, both / (total - both), one)
    return dice, jaccard


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of that type; nothing for float32, about which some devices would warn."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


@torch.no_grad()
def validate(
    model: nn.Module, pairs: DecodedPairs, ids: Sequence[str], batch_size: int, threshold: float, group: Processes,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Loss a pixel, and mean Dice and Jaccard an image, without dropout; the images are shared by the group."""
    model.eval()
    device = group.device
    # sums, reduced once and divided once: the last batch may be smaller
    sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    level = math.log(threshold / (1 - threshold))
    for _, images, masks in batches(pairs, group.shard(ids), batch_size, device):
        with autocast(device, precision):
            logits = model(images.contiguous(memory_format=torch.channels_last))[:, 0]
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none").mean((1, 2))
        dice, jaccard = segmentation_overlap(logits > level, masks)
        sums += torch.stack([loss.sum().to(sums.dtype), dice.sum(), jaccard.sum()])
    loss_mean, dice_mean, jaccard_mean = (group.summed(sums) / len(ids)).tolist()
    return {"loss": loss_mean, "dice": dice_mean, "jaccard": jaccard_mean}


def _loaded(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader; the death of one of its processes is one line."""
    try:
        with deaf_children():
            iterator = iter(loader)
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data-loading process died ({str(error).splitlines()[0]}); finished epochs are kept; "
            "run the same command again, with --workers 0 or fewer if memory is short"
        ) from error


def train(
    config: Config,
    pairs: DecodedPairs,
    train_ids: Sequence[str],
    validation_ids: Sequence[str],
    group: Processes,
    results: Path,
    identity: str,
    progress: Callable[[int, str], None] = lambda count, note: None,
    before_epoch: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train with Adam on binary cross-entropy; keep the weights of the best validation Dice.

    After each epoch the folder ``results`` holds ``weights/best_model.pth``,
    ``weights/training_state.pth`` (all that the next epoch needs) and
    ``training_log.csv``. A later call with the same ``identity`` goes on after
    the last finished epoch; since the order, the augmentation and the dropout
    of an epoch are seeded by (seed, epoch), the outcome is that of a run that
    was never interrupted.

    Several processes share each global batch of ``batch_size`` images: the
    gradient, the statistics of batch norm and the dropout masks are those of
    the whole batch, so their number changes the result by the order of
    summation alone.

    Args:
        config: batch size, learning rate, epochs and so on.
        pairs: the decoded images and masks.
        train_ids, validation_ids: the two parts.
        group: this process's place among all, and its device.
        results: folder of the run; rank 0 writes.
        identity: fingerprint of the configuration and data.
        progress: called with finished images and a note.
        before_epoch: called before anything is trained; not at all where training is finished.

    Raises:
        UserError: the loss is no longer finite (the line names the first such
            step), the weights are not those this run wrote, or a file cannot be
            read or written.
    """
    device = group.device
    best_path, state_path = results / "weights" / "best_model.pth", results / "weights" / "training_state.pth"
    torch.manual_seed(config.seed)
    model = UNet(config.width, config.dropout, config.upsampling).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    precision = training_precision(config.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    done = {"epoch": 0, "best": -1.0, "best_epoch": 0, "best_weights": "", "waited": 0, "log": []}
    saved = group.shared(lambda: resumable_state(state_path, best_path, identity))
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        done = saved["done"]
        if group.first:  # a run may have died just before it wrote this
            write_csv(results / "training_log.csv", done["log"])
    sites = with_row_dropout(model)
    model = with_group_batch_norm(model, group)
    network: nn.Module = torch.compile(model) if config.compile else model
    if group.world > 1:
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel).parameters  # PyTorch 2.13 renamed the option
        every_forward = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        network = parallel(network, **{every_forward: False})  # the buffers are those of the global batch already
    progress(done["epoch"] * len(train_ids), f"epoch {done['epoch']}/{config.epochs}")
    order = EpochBatches(len(train_ids), config.batch_size, config.seed, group.rank, group.world)
    sizes = [order.size(step) for step in range(len(order))]
    workers = config.workers if config.workers >= 0 else (0 if device.type == "cpu" else 8)
    loader = DataLoader(
        TrainingImages(pairs, train_ids, config.augment, config.seed), batch_sampler=order, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda", worker_init_fn=end_with_parent,
    )
    while done["epoch"] < config.epochs and done["waited"] < config.patience:
        before_epoch()
        epoch, started, waited = done["epoch"], time.perf_counter(), 0.0
        order.epoch = epoch
        torch.manual_seed(derived_seed(config.seed, "dropout", epoch))
        model.train()
        losses = []  # of each step, left on the device: a look at one would wait for it
        asked = time.perf_counter()
        for step, (images, masks) in enumerate(_loaded(loader)):
            waited += time.perf_counter() - asked
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, epoch + step / len(order))
            for site in sites:
                site.rows, site.total = order.rows(step), sizes[step]
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with autocast(device, precision):
                logits = network(normalise(images).contiguous(memory_format=torch.channels_last))[:, 0]
            # the own share of the global batch's mean; the gradients are averaged over processes, hence ``world``
            loss = F.binary_cross_entropy_with_logits(logits.float(), masks.float()) * (len(images) / sizes[step])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss * group.world).backward()
            if config.clip > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            progress(sizes[step], f"epoch {epoch + 1}/{config.epochs}, best Dice {max(done['best'], 0):.4f}")
            asked = time.perf_counter()
        by_step = group.summed(torch.stack(losses)).tolist()
        seconds = time.perf_counter() - started
        kept = f"the best weights so far are kept in {best_path}" if best_path.exists() else "no epoch was finished"
        advice = f"{kept}; lower --lr and give another --results folder, or --fresh, which starts this one over"
        bad = next((step for step, value in enumerate(by_step) if not math.isfinite(value)), None)
        if bad is not None:
            where = f"at step {bad + 1} of {len(order)} of epoch {epoch + 1}"
            raise UserError(f"the training loss is {by_step[bad]} {where}; {advice}")
        scores = validate(model, pairs, validation_ids, config.batch_size, config.threshold, group, precision)
        if not math.isfinite(scores["loss"]):
            where = f"after step {len(order)} of epoch {epoch + 1}"
            raise UserError(f"the validation loss is {scores['loss']} {where}; {advice}")
        improved = scores["dice"] > done["best"]
        row = {
            "epoch": epoch + 1, "train_loss": sum(map(operator.mul, by_step, sizes)) / sum(sizes),
            "validation_loss": scores["loss"], "validation_dice": scores["dice"],
            "validation_jaccard": scores["jaccard"], "learning_rate": learning_rate(config, epoch),
            "images_per_second": sum(sizes) / seconds, "seconds_waited_for_data": waited,
        }
        done = {
            "epoch": epoch + 1, "best": max(done["best"], scores["dice"]),
            "best_epoch": epoch + 1 if improved else done["best_epoch"],
            "best_weights": weights_fingerprint(model) if improved else done["best_weights"],
            "waited": 0 if improved else done["waited"] + 1, "log": [*done["log"], row],
        }
        if group.first:
            content = {"model": model.state_dict(), "options": model.options, "identity": identity}
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "done": done}
            # the state first: from it a lost or older best_model.pth can be made again, not the other way round
            save_checkpoint(state_path, {**content, **state})
            if improved:
                save_best(best_path, content, done)
            write_csv(results / "training_log.csv", done["log"])
    best_model = group.shared(lambda: load_model(best_path, torch.device("cpu")))
    return TrainingResult(best_model.to(device), done["best"], done["log"])
