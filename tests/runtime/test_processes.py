"""One process or many: shares of the work, what the main one does for all, and who may join."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from runtime.errors import SharedError, UserError
from runtime.processes import ProcessGroup, process_group

CPU = torch.device("cpu")


@pytest.fixture
def gloo_of_one(tmp_path):
    """A real process group with this process alone in it, so that the collective calls run."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu") as group:
        assert (group.rank, group.world_size, group.device) == (0, 1, CPU)
        assert group.is_main
        assert group.shard([1, 2, 3]) == [1, 2, 3]
        assert group.shared(lambda: 5) == 5
        assert group.gathered("x") == ["x"]
        assert group.summed(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
        group.wait_for_all()
        assert not dist.is_initialized()
    assert ProcessGroup(1, 3, CPU).shard(list(range(8))) == [1, 4, 7]


def test_the_shares_of_a_group_are_all_of_the_work_once():
    items = list("abcdefgh")
    shares = [ProcessGroup(rank, 3, CPU).shard(items) for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]
    assert [ProcessGroup(rank, 3, CPU).is_main for rank in range(3)] == [True, False, False]


def test_what_the_main_process_raises_is_raised_in_all(gloo_of_one):
    group = ProcessGroup(0, 2, CPU)
    assert group.shared(lambda: {"a": [1, 2]}) == {"a": [1, 2]}

    def fail():
        raise UserError("no such file; name another")

    with pytest.raises(UserError, match="^no such file; name another$"):
        group.shared(fail)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is no line for all
        group.shared(lambda: 1 / 0)
    assert group.summed(torch.tensor([3.0])).tolist() == [3]


def test_what_one_raises_is_raised_in_all_with_its_number(monkeypatch):
    assert ProcessGroup(0, 1, CPU).each(lambda: 5) == [5]
    others = (7, None), (None, "no such file"), (None, "nor this")

    def gather(parts, part):
        parts[:] = [part, *others[: len(parts) - 1]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert ProcessGroup(0, 2, CPU).each(lambda: 5) == [5, 7]
    with pytest.raises(SharedError, match="^process 2: no such file$"):
        ProcessGroup(0, 4, CPU).each(lambda: 5)

    def fail():
        raise UserError("not mine")

    with pytest.raises(SharedError, match="^process 0: not mine$"):
        ProcessGroup(0, 2, CPU).each(fail)


def test_the_others_are_told_what_the_main_process_found_or_complained_of(monkeypatch):
    sent = []

    def broadcast(box, src):
        assert src == 0
        if sending:
            sent.append(list(box))
        else:
            box[:] = sent.pop(0)

    def fail():
        raise UserError("no such file; name another")

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    sending = True
    assert ProcessGroup(0, 2, CPU).shared(lambda: 5) == 5
    with pytest.raises(UserError, match="^no such file; name another$"):
        ProcessGroup(0, 2, CPU).shared(fail)
    sending = False
    other = ProcessGroup(1, 2, CPU)
    assert other.shared(lambda: 1 / 0) == 5  # the work is done by the main process alone
    with pytest.raises(UserError, match="^no such file; name another$"):
        other.shared(lambda: 1 / 0)


@pytest.fixture
def watched(monkeypatch):
    """A group of two, of which this process is the second; nobody watches it."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    watch = nullcontext(SimpleNamespace(rank=1, world_size=2, store="the store"))
    monkeypatch.setattr("runtime.processes.watch_from_environment", lambda: watch)


def test_torchrun_s_group_is_joined_and_left(monkeypatch, watched):
    joined = []

    def join(backend, store, rank, world_size, timeout):
        assert (store, rank, world_size) == ("the store", 1, 2)
        joined.append((backend, timeout.seconds))

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: joined.append("left"))
    with pytest.raises(KeyboardInterrupt), process_group("cpu") as group:
        assert group == ProcessGroup(1, 2, CPU) and not group.is_main
        raise KeyboardInterrupt
    assert joined == [("gloo", 6 * 3600), "left"]


def test_several_processes_do_not_share_metal(monkeypatch, watched):
    monkeypatch.setattr("runtime.processes.resolve_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="cannot share Metal"), process_group("auto"):
        pass


def test_every_process_needs_a_cuda_device_of_its_own(monkeypatch, watched):
    monkeypatch.setattr("runtime.processes.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 has no CUDA device of its own: 1 are here"), process_group("auto"):
        pass
