"""One process or many: the group that ``torchrun`` starts, and batch norm over all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import resolve_device
from storage import UserError

T = TypeVar("T")


class Processes(NamedTuple):
    """This process's place in the group; alone it is rank 0 of 1.

    Attributes:
        rank: 0 to world - 1; rank 0 alone prints and writes what is shared.
        world: number of processes.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Every ``world``-th item, from the own rank on: a part of the work, of nearly equal size."""
        return list(items[self.rank :: self.world])

    def shared(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the first process and give its result (picklable) to all.

        Raises:
            UserError: in every process, when the first one raises it.
        """
        if self.world == 1:
            return work()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [(work(), None)]
            except UserError as error:
                box = [(None, str(error))]
        dist.broadcast_object_list(box, src=0)
        result, complaint = box[0]
        if complaint is not None:
            raise UserError(complaint)
        return result

    def gathered(self, part: T) -> list[T]:
        """The parts of all processes, in the order of their ranks, in every process."""
        parts: list[Any] = [None] * self.world
        if self.world == 1:
            return [part]
        dist.all_gather_object(parts, part)
        return parts

    def summed(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def is_first() -> bool:
    """Whether this process is rank 0, before there is a group."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(device: str) -> Iterator[Processes]:
    """Join the group that ``torchrun`` describes in the environment; without one, be alone.

    NCCL on CUDA devices, one a process; gloo otherwise. The group is left
    again on leaving.

    Args:
        device: as for ``--device``; where it stands for a CUDA device, whichever,
            each process gets that of its local rank.

    Raises:
        UserError: the device is absent, there are more processes than CUDA
            devices on this machine, or several were to share Metal, which gloo
            knows nothing of.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, resolve_device(device))
        return
    chosen = resolve_device(device)
    if chosen.type == "mps" and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("several processes cannot share Metal; start one, or give --device cpu")
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no CUDA device of its own: {torch.cuda.device_count()} are here; "
                "start fewer processes a machine, or give --device cpu"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    # the long time-out lets the others wait while the first process decodes or evaluates
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


class _GroupSum(torch.autograd.Function):
    """Sum over the group; as every process depends on the sum, so does the gradient sum over the group."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _GroupBatchNorm(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of the batches of all processes together.

    PyTorch's own ``SyncBatchNorm`` does this on GPUs only. Mean and variance
    come from two sums over the group (two passes: no ``E[x^2] - E[x]^2``), through
    which the gradient flows back to every process.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _GroupSum.apply(values.sum((0, 2, 3))) / count  # C
        centred = values - mean[:, None, None]
        variance = _GroupSum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def with_group_batch_norm(model: nn.Module, group: Processes) -> nn.Module:
    """Make every batch norm of a model use the statistics of the whole group's batch.

    Names, weights and statistics stay, so checkpoints fit with and without.
    """
    if group.world == 1:
        return model
    if group.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GroupBatchNorm
    return model


class RowDropout(nn.Dropout):
    """Dropout that draws the masks of the whole group's batch and uses the rows of the own part.

    With the same seed in every process, an image's mask is then the same
    however many processes share the batch.
    """

    rows: slice = slice(None)
    total: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # in the layout of x, whose outermost axis is the batch in either: rows are drawn one after the other
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        whole = torch.empty((self.total or len(x), *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)
        mask = whole.bernoulli_(1 - self.p)[self.rows]
        return x * mask * (1 / (1 - self.p))


def with_row_dropout(model: nn.Module) -> list[RowDropout]:
    """Give every dropout site of a model :class:`RowDropout`'s way of drawing, and return the sites."""
    sites = [module for module in model.modules() if type(module) is nn.Dropout]
    for site in sites:
        site.__class__ = RowDropout
    return sites  # type: ignore[return-value]
