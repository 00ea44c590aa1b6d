"""Dropout masks: the generator as described, independence, the rate, and how sites are handed their masks."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from constructed_networks import numpy_mask
from device import DEVICE
from torch import nn

from inference import masks as masks_module
from inference.masks import InPlaceDropout, MaskSource, dropout_masks, mask_key, mask_noise, zero_dropped


def test_masks_are_independent_and_have_the_right_rate():
    p, n = 0.2, 200_000
    noise = mask_noise((n,), torch.device("cpu"))
    keys = [mask_key(42, "x", t, s) for t in range(6) for s in range(2)] + [mask_key(43, "x", 0, 0), mask_key(42, "y", 0, 0)]
    masks = dropout_masks(torch.tensor(keys, dtype=torch.int32), noise, p).double()
    deviation = math.sqrt(p * (1 - p) / n)  # of a mean; five of them are exceeded once in two million
    assert ((masks.mean(1) - (1 - p)).abs() < 5 * deviation).all()
    centred = (masks - (1 - p)) / math.sqrt(p * (1 - p))
    correlation = centred @ centred.T / n - torch.eye(len(keys), dtype=torch.float64)
    between = correlation.masked_fill(torch.eye(len(keys), dtype=torch.bool), 0)
    assert between.abs().max() < 5 / math.sqrt(n)  # passes, sites, seeds and images
    for lag in (1, 2, 3, 8, 64, 80, 256, 4096):  # neighbours along rows, columns and channels
        neighbours = (centred[:, lag:] * centred[:, :-lag]).mean(1)
        assert neighbours.abs().max() < 5 / math.sqrt(n - lag)
    agreement = (masks[0] == masks[1]).double().mean()
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 5 / math.sqrt(n)


def test_masks_are_the_ones_described():
    key = mask_key(7, "ISIC_0000000", 3, 1)
    masks = dropout_masks(torch.tensor([key], dtype=torch.int32, device=DEVICE), mask_noise((4, 6, 5), DEVICE), 0.3)
    assert torch.equal(masks[0], numpy_mask(7, "ISIC_0000000", 3, 1, (4, 6, 5), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1e-12, 0.2, 0.5, 0.999])
def test_dropping_in_place_is_multiplying_by_the_mask(dtype, p):
    x = torch.randn(3, 4, 6, 10).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = -0.0
    keys = torch.tensor([mask_key(1, "a", t, 0) for t in range(3)], dtype=torch.int32, device=DEVICE)
    noise = mask_noise(x.shape[1:], x.device)
    expected = x * dropout_masks(keys, noise, p)
    zero_dropped(x, keys, noise[None].contiguous(memory_format=torch.channels_last), p)
    assert torch.equal(x, expected)


def test_zeroing_works_in_place():
    x = torch.ones(2, 3, 4, 5)
    keys = torch.tensor([1, 2], dtype=torch.int32)
    assert zero_dropped(x, keys, mask_noise((3, 4, 5), x.device)[None], 0.5) is x
    assert 0 < x.sum() < x.numel()


# ---------------------------------------------------------------- masks at the dropout sites


def test_a_source_counts_the_sites_of_each_forward():
    source, x = MaskSource(7), torch.ones(2, 3, 4, 5, device=DEVICE)
    first, second = nn.Dropout(0.25), nn.Dropout(0.5)
    for image_id in ("a", "b"):
        source.start(image_id, range(3, 5))  # passes 3 and 4, and sites from 0 again
        for site, module in enumerate((first, second)):
            expected = torch.stack([numpy_mask(7, image_id, t, site, (3, 4, 5), module.p) / (1 - module.p) for t in (3, 4)])
            torch.testing.assert_close(source.apply(module, x), expected.float())


@pytest.mark.parametrize("module,shape", [(nn.Dropout1d(0.5), (2, 64, 5)), (nn.Dropout2d(0.5), (2, 64, 4, 5)),
                                          (nn.Dropout3d(0.5), (2, 64, 2, 4, 5))])
def test_channel_wise_dropout_drops_whole_channels(module, shape):
    source = MaskSource(7)
    source.start("a", range(2))
    y = source.apply(module, torch.ones(shape, device=DEVICE)).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y))
    expected = torch.stack([numpy_mask(7, "a", t, 0, (64,), 0.5) * 2.0 for t in range(2)])
    assert torch.equal(y[..., 0], expected)
    assert expected.unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("passes", [range(0, 4), range(1, 3)])
def test_rows_in_place_are_pass_major(passes):
    """Row r of the batch is pass r // B of the block, image r % B; a piece of the rows has the same masks."""
    ids, rates, shape = ["a", "b", "c"], [0.25, 0.5], (2, 4, 5)
    drop = InPlaceDropout(7, ids, 4, rates, DEVICE)
    for site, rate in enumerate(rates):
        expected = torch.stack([numpy_mask(7, i, t, site, shape, rate) for t in passes for i in ids]).float()
        x = torch.ones(len(passes) * 3, *shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
        drop(passes, x, site, 0)
        assert torch.equal(x, expected)
        piece = torch.ones(2, *shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
        drop(passes, piece, site, 3)
        assert torch.equal(piece, expected[3:5])


def test_both_ways_to_hand_out_masks_agree():
    source, drop = MaskSource(7), InPlaceDropout(7, ["a"], 3, [0.5], torch.device("cpu"))
    source.start("a", range(3))
    x = torch.randn(3, 2, 4, 5)
    y = x.clone(memory_format=torch.channels_last)
    drop(range(3), y, 0, 0)
    assert torch.equal(source.apply(nn.Dropout(0.5), x), 2 * y)


def test_rows_of_several_windows_per_pass_have_masks_of_their_own():
    source = MaskSource(3)
    source.start("a", range(2))
    whole = source.apply(nn.Dropout(0.5), torch.ones(2, 4, 3, 5))
    source.start("a", range(2))
    windows = source.apply(nn.Dropout(0.5), torch.ones(8, 3, 5))  # four windows of each pass
    assert torch.equal(windows, whole.flatten(0, 1))
    with pytest.raises(ValueError, match=r"dropout on \(5, 3\) in a batch of 2: its first axis is not that of the images"):
        source.apply(nn.Dropout(0.5), torch.ones(5, 3))


# ---------------------------------------------------------------- drawn once, and applied in one sweep


def test_keys_are_drawn_once_an_image_and_are_those_of_each_forward_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(masks_module, "sent", lambda tensor, device: drawn.append(tensor.shape) or tensor)
    ahead, alone, x = MaskSource(7), MaskSource(7), torch.ones(2, 3, 4, 5)
    layers = nn.Dropout(0.25), nn.Dropout2d(0.5)
    for image_id in ("a", "b"):
        for block in (range(0, 2), range(2, 4)):
            ahead.start(image_id, block, 4)
            found = [ahead.apply(layer, x) for layer in layers]
            alone.start(image_id, block)
            sent, drawn[:] = list(drawn), []
            assert all(torch.equal(alone.apply(layer, x), y) for layer, y in zip(layers, found))
            # of the first image each site when it is reached, of the next both together; with the first forward, all passes
            expected = [(1, 4), (1, 4)] if image_id == "a" else [(2, 4)]
            assert sent == (expected if block.start == 0 else [])
            drawn.clear()


ONE_SWEEP = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from inference.fused_masks import zero_dropped_fused
from inference.masks import _bound, mask_key, mask_noise, zero_dropped
keys = torch.tensor([mask_key(1, "a", t, 0) for t in range(3)], dtype=torch.int32)
for dtype in (torch.float32, torch.float16):
    for p in (1e-12, 0.2, 0.999):
        for shape in ((4, 6, 10), (3, 25, 21)):
            x = torch.randn(3, *shape).to(dtype).contiguous(memory_format=torch.channels_last)
            noise = mask_noise(shape, x.device)[None].contiguous(memory_format=torch.channels_last)
            y = zero_dropped(x.clone(memory_format=torch.channels_last), keys, noise, p)
            zero_dropped_fused(x, keys, noise, _bound(p))
            assert torch.equal(x, y) and (p < 0.1 or not x.all())
print("the same")
"""


def test_one_sweep_zeroes_what_the_plain_operators_zero():
    """In Triton's interpreter, which needs no GPU; where Triton is missing, the plain operators are what is used."""
    if importlib.util.find_spec("triton") is None:
        assert masks_module._fused() is None
        return
    command = [sys.executable, "-c", ONE_SWEEP, str(Path(__file__).resolve().parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and done.stdout.strip() == "the same", done.stderr


def test_without_a_compiler_the_plain_operators_are_used(monkeypatch):
    monkeypatch.setattr(masks_module.shutil, "which", lambda name: None)
    assert masks_module._fused.__wrapped__() is None


def test_a_kernel_that_fails_on_the_card_is_not_used(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no kernel for this card")

    def drops_nothing(*arguments):
        pass

    arange, ones = torch.arange, torch.ones
    on_cpu = lambda make: lambda *sizes, device=None, **options: make(*sizes, **options)  # noqa: E731 - as if it were a card
    monkeypatch.setattr(torch, "arange", on_cpu(arange))
    monkeypatch.setattr(torch, "ones", on_cpu(ones))
    assert not masks_module._agrees(fails)
    assert not masks_module._agrees(drops_nothing)
    assert masks_module._agrees(lambda x, keys, noise, bound: x.mul_(masks_module.dropout_masks(keys, noise[0], 0.5)))
