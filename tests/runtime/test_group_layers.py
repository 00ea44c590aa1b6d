"""Batch norm and dropout over a batch that several processes share."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime.errors import UserError
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


# ---------------------------------------------------------------- other networks than the U-Net


@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_whole_feature_maps_are_dropped_for_the_whole_batch(kind):
    x = torch.ones(7, 50, *[2] * int(kind.__name__[-2]))
    (site,) = with_row_dropout(nn.Sequential(kind(0.3)).train())
    torch.manual_seed(1)
    whole = site(x)
    kept = whole.flatten(2).amax(2)
    torch.testing.assert_close(whole.flatten(2).amin(2), kept)  # all of a map or nothing
    assert 0.15 < (kept == 0).float().mean() < 0.45
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.7]))
    torch.manual_seed(1)
    site.rows, site.total = slice(2, 5), 7
    torch.testing.assert_close(site(x[2:5]), whole[2:5])


def test_rows_of_windows_are_those_of_their_images():
    x = torch.ones(6 * 4, 3, 5)  # four windows of each of six images
    (site,) = with_row_dropout(nn.Sequential(nn.Dropout(0.5)).train())
    torch.manual_seed(1)
    site.rows, site.total = slice(0, 6), 6
    whole = site(x)
    torch.manual_seed(1)
    site.rows, site.total = slice(2, 4), 6
    torch.testing.assert_close(site(x[8:16]), whole[8:16])
    site.rows, site.total = slice(0, 6), 6
    assert site(torch.ones(7, 3)).shape == (7, 3)  # its first axis is not that of the images


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(3), (4, 3)),
        (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
        (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
        (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
        (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    ],
)
def test_other_batch_norms_are_pytorch_s_too(tmp_path, make, shape):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = nn.Sequential(make()), make()
        with_group_batch_norm(ours, ProcessGroup(0, 2, CPU))
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + seed
            torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours[0].state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    finally:
        dist.destroy_process_group()


def test_statistics_of_another_kind_are_refused_for_several_processes():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    for module, name in ((Own(3), "Own"), (nn.InstanceNorm2d(3, track_running_stats=True), "InstanceNorm2d")):
        model = nn.Sequential(nn.Sequential(module))
        with pytest.raises(UserError, match=f"0.0 is a {name}, whose statistics .*; train with one process"):
            with_group_batch_norm(model, ProcessGroup(0, 2, CPU))
        assert with_group_batch_norm(model, ProcessGroup(0, 1, CPU)) is model
    with_group_batch_norm(nn.Sequential(nn.InstanceNorm2d(3)), ProcessGroup(0, 2, CPU))
