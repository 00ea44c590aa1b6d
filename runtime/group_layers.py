"""Batch norm and dropout over a batch that several processes share: its statistics and its masks are the whole batch's."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.processes import ProcessGroup

M = TypeVar("M", bound=nn.Module)


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
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
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


def with_group_batch_norm(model: M, group: ProcessGroup) -> M:
    """Make every batch norm of a model use the statistics of the whole group's batch.

    Names, weights and statistics stay, so checkpoints fit with and without.
    """
    if group.world_size == 1:
        return model
    if group.device.type == "cuda":
        return cast(M, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GroupBatchNorm
    return model


class RowDropout(nn.Dropout):
    """Dropout that draws the masks of the whole group's batch and uses the rows of this process's part.

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
