"""Batch norm and dropout over a batch that several processes share: its statistics and its masks are the whole batch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from runtime.errors import UserError
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


class _GroupBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of the batches of all processes together.

    PyTorch's own ``SyncBatchNorm`` does this on GPUs only. Mean and variance
    come from two sums over the group (two passes: no ``E[x^2] - E[x]^2``), through
    which the gradient flows back to every process.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes behind the channels."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, channels = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        values = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _GroupSum.apply(values.sum(axes)) / count  # C
        centred = values - mean.view(channels)
        variance = _GroupSum.apply(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                # without a momentum the statistics are the mean over all batches
                moved = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, moved)
                self.running_var.lerp_(variance * count / (count - 1), moved)
        if not self.affine:
            return (centred / torch.sqrt(variance + self.eps).view(channels)).to(x.dtype)
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale.view(channels) + self.bias.view(channels)).to(x.dtype)


def with_group_batch_norm(model: M, group: ProcessGroup) -> M:
    """Make every batch norm of a model use the statistics of the whole group's batch.

    Names, weights and statistics stay, so checkpoints fit with and without.

    Raises:
        UserError: several processes share the batch, and a layer of the model gathers statistics of its own in a way
            that is not known here.
    """
    if group.world_size == 1:
        return model
    for name, module in model.named_modules():
        own_way = isinstance(module, _BatchNorm) and type(module).forward is not _BatchNorm.forward
        if own_way or isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise UserError(
                f"{name} is a {type(module).__name__}, whose statistics would be those of each process's own images; "
                "train with one process, or with nn.BatchNorm2d in its place"
            )
    hooked = any(isinstance(module, _BatchNorm) and module._forward_hooks for module in model.modules())
    if group.device.type == "cuda" and not hooked:  # the conversion would lose the hooks
        return cast(M, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = _GroupBatchNorm
    return model


class _RowMasks(_DropoutNd):
    """Dropout that draws the masks of the whole group's batch and uses the rows of this process's part.

    With the same seed in every process, an image's mask is then the same
    however many processes share the batch.
    """

    rows: slice = slice(None)
    total: int | None = None

    def _whole(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape of the masks of a whole batch of this shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows, total = self.rows, self.total or len(x)
        mine = len(range(total)[rows])
        if len(x) != mine and len(x) % mine == 0:  # several rows per image, as of the windows of an attention
            several = len(x) // mine
            total, rows = total * several, slice(*(edge and edge * several for edge in (rows.start, rows.stop)))
        elif len(x) != mine:  # the first axis is not that of the images
            total, rows = len(x), slice(None)
        # in the layout of x, whose outermost axis is the batch in either: rows are drawn one after the other
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        whole = torch.empty(self._whole((total, *x.shape[1:])), dtype=x.dtype, device=x.device, memory_format=layout)
        mask = whole.bernoulli_(1 - self.p)[rows]
        return x * mask * (1 / (1 - self.p))


class RowDropout(_RowMasks, nn.Dropout):
    """Elements are dropped."""

    def _whole(self, shape: Sequence[int]) -> Sequence[int]:
        return shape


class RowChannelDropout(_RowMasks):
    """Whole feature maps are dropped."""

    def _whole(self, shape: Sequence[int]) -> Sequence[int]:
        return [*shape[:2], *[1] * (len(shape) - 2)]


def with_row_dropout(model: nn.Module) -> list[_RowMasks]:
    """Give the dropout modules of a model the way of drawing of :class:`RowDropout`, and return them.

    What else is random in a model in training (functional dropout, stochastic depth) draws from each process's own generator.
    """
    sites: list[_RowMasks] = []
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = RowDropout
        elif type(module) in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
            module.__class__ = RowChannelDropout
        if isinstance(module, _RowMasks):
            sites.append(module)
    return sites
