"""One process or many: the group that ``torchrun`` starts, and what its members do together."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.devices import resolve_device
from runtime.errors import SharedError, UserError
from runtime.watch import watch_from_environment

T = TypeVar("T")


class ProcessGroup(NamedTuple):
    """This process's place in the group; alone it is rank 0 of 1.

    Attributes:
        rank: 0 to world_size - 1; the main process, rank 0, alone prints and writes what is shared.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's share of the work: every ``world_size``-th item, starting at its own rank."""
        return list(items[self.rank :: self.world_size])

    def shared(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the main process and give its result (picklable) to all.

        Raises:
            UserError: in every process, when the main one raises it.
        """
        if self.world_size == 1:
            return work()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [(work(), None)]
            except UserError as error:
                box = [(None, str(error))]
        dist.broadcast_object_list(box, src=0)
        result, complaint = box[0]
        if complaint is not None:
            raise SharedError(complaint)
        return result  # type: ignore[no-any-return]

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` in every process and give all results (picklable) to all.

        Raises:
            UserError: in every process, when one raises it; the line names the first that does.
        """
        if self.world_size == 1:
            return [work()]
        found: tuple[T | None, str | None]
        try:
            found = work(), None
        except UserError as error:
            found = None, str(error)
        every = self.gathered(found)
        for rank, (_, complaint) in enumerate(every):
            if complaint is not None:
                raise SharedError(f"process {rank}: {complaint}")
        return [result for result, _ in every]  # type: ignore[misc]

    def gathered(self, part: T) -> list[T]:
        """The parts of all processes, in the order of their ranks, in every process."""
        parts: list[Any] = [None] * self.world_size
        if self.world_size == 1:
            return [part]
        dist.all_gather_object(parts, part)
        return parts

    def summed(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def parallel(self, network: Any, every_weight_used: bool) -> Any:
        """The network as all processes train it together, gradients averaged over them; alone, the network itself.

        Args:
            network: on this process's device.
            every_weight_used: whether each weight takes part in every step; otherwise the idle ones are looked for.
        """
        if self.world_size == 1:
            return network
        parallel = torch.nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel).parameters  # PyTorch 2.13 renamed the option
        every_forward = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # the buffers are those of the global batch already
        options: dict[str, Any] = {"find_unused_parameters": not every_weight_used, every_forward: False}
        return parallel(network, **options)

    def wait_for_all(self) -> None:
        """Return when every process of the group has come here."""
        self.gathered(None)


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the group that ``torchrun`` describes in the environment; without one, be alone.

    NCCL on CUDA devices, one for each process; gloo otherwise. The group is left
    again on leaving. What ends one process meanwhile ends all: see :mod:`runtime.watch`.

    Args:
        device: as for ``--device``; where it stands for a CUDA device, whichever,
            each process gets that of its local rank.

    Raises:
        UserError: the device is absent, there are more processes than CUDA
            devices on this machine, or several were to share Metal, which gloo
            knows nothing of.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ProcessGroup(0, 1, resolve_device(device))
        return
    with watch_from_environment() as watch:
        chosen = _own_device(device)
        # the long time-out lets the others wait while the main process decodes or evaluates
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", store=watch.store,
            rank=watch.rank, world_size=watch.world_size, timeout=timedelta(hours=6),
        )
        try:
            yield ProcessGroup(dist.get_rank(), dist.get_world_size(), chosen)
        finally:
            dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    """The device of this process of a group; errors as of :func:`process_group`."""
    chosen = resolve_device(device)
    if chosen.type == "mps" and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("several processes cannot share Metal; start one, or give --device cpu")
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no CUDA device of its own: {torch.cuda.device_count()} are here; "
                "start fewer processes per machine, or give --device cpu"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    return chosen
