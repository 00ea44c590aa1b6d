"""Batch norm and dropout over a batch that several processes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from runtime.group_layers import RowDropout, with_group_batch_norm, with_row_dropout
from runtime.processes import ProcessGroup

CPU = torch.device("cpu")


def test_rows_of_a_shared_dropout_mask_are_those_of_the_whole():
    x = torch.ones(7, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    site = nn.Sequential(nn.Dropout(0.3)).train()
    torch.manual_seed(1)
    native = site(x)
    (row_site,) = with_row_dropout(site)
    assert isinstance(row_site, RowDropout)
    torch.manual_seed(1)
    whole = row_site(x)
    torch.testing.assert_close(whole, native)
    torch.manual_seed(1)
    row_site.rows, row_site.total = slice(2, 5), 7
    torch.testing.assert_close(row_site(x[2:5].contiguous(memory_format=torch.channels_last)), whole[2:5])
    site.eval()
    assert row_site(x) is x


def test_what_dropout_keeps_is_scaled_up():
    (site,) = with_row_dropout(nn.Sequential(nn.Dropout(0.25)).train())
    torch.manual_seed(0)
    values = site(torch.full((4, 8, 16, 16), 3.0))
    assert values.unique().tolist() == [0.0, 4.0]  # 3 / (1 - 0.25)
    assert abs((values == 0).float().mean() - 0.25) < 0.02


def test_group_batch_norm_of_one_is_pytorch_s(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        with_group_batch_norm(ours, ProcessGroup(0, 2, CPU))
        assert type(ours) is not nn.BatchNorm2d
        x = torch.randn(4, 3, 5, 6)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.randn(4, 3, 5, 6)
        for _ in range(3):
            (ours(one) * weight).sum().backward()
            (theirs(two) * weight).sum().backward()
        torch.testing.assert_close(one.grad, two.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    finally:
        dist.destroy_process_group()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))  # no group is needed where the statistics are fixed


def test_alone_batch_norm_stays_pytorch_s():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert with_group_batch_norm(model, ProcessGroup(0, 1, CPU)) is model
    assert type(model[0]) is nn.BatchNorm2d
    names = list(model.state_dict())
    assert list(with_group_batch_norm(model, ProcessGroup(0, 2, CPU)).state_dict()) == names
