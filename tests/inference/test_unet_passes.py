"""The U-Net's passes by algebra: each step against the plain computation."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from constructed_networks import HEIGHT, MAPS, WIDTH, pictures, relative_error, unet
from device import DEVICE
from torch import nn

from inference import unet_passes, upsampling
from inference.unet_passes import UNetPasses, engine_of, supports
from model import UNet
from uncertainty import uncertainty_maps


def test_border_sums_replace_the_convolution():
    torch.manual_seed(0)
    weight, g = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    expected = F.conv_transpose2d(g, weight, padding=1).sum((2, 3))
    sums = unet_passes._border_sums(g) @ unet_passes._sum_matrix(weight)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)


def test_folding_batch_norms_changes_no_output():
    """``(W x - m) / sqrt(v + eps) g + b`` in float64, for both convolutions of a block."""
    block = unet().double().encoder1
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64).to(DEVICE)
    expected, y = block(x), x
    for weight, bias in unet_passes._folded(block):
        assert weight.dtype == bias.dtype == torch.float64
        y = F.conv2d(y, weight, bias, padding=1).relu()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("upsampling_by", ["bilinear", "transposed"])
@pytest.mark.parametrize("target", ["encoder4", "bottleneck"])
def test_without_dropout_a_pass_is_the_plain_network(upsampling_by, target):
    """Logits and the spatial mean of the gradient, of two images and three passes, against autograd."""
    model, images = unet(upsampling_by, dropout=0.0), pictures()
    seen = []
    handle = getattr(model, target).register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = model(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(expected.sum(), seen[0])
    engine = UNetPasses(model, getattr(model, target))
    assert engine.rates == []
    encoded = engine.encode(images)
    torch.testing.assert_close(encoded.activations, seen[0].detach(), rtol=1e-4, atol=1e-5)
    logits, weights = engine(encoded, 3, lambda x, site, first: pytest.fail("there is no site"))
    assert relative_error(logits, expected.detach()[:, 0].repeat(3, 1, 1)) < 1e-5
    assert relative_error(weights, gradient.mean((2, 3)).repeat(3, 1)) < 1e-4


def test_drop_is_asked_for_every_site_and_row_once_there_and_once_back_at_the_target(monkeypatch):
    """Sites 0 to 3, each over all rows in pieces; at the bottleneck its mask acts on the gradient as well."""
    monkeypatch.setattr(unet_passes, "PIECE", 1)
    monkeypatch.setattr(unet_passes, "PIECE_CUDA", 1)
    model = unet()
    for target, times in ((model.encoder4, 1), (model.bottleneck, 2)):
        engine = UNetPasses(model, target)
        rows: dict[int, list[int]] = {site: [] for site in range(4)}
        engine(engine.encode(pictures()), 3, lambda x, site, first: rows[site].extend(range(first, first + len(x))))  # noqa: B023
        assert rows == {0: [*range(6)] * times, 1: [*range(6)], 2: [*range(6)], 3: [*range(6)]}


def test_a_dropout_that_drops_nothing_is_no_site():
    model = unet()
    model.dropout.p, model.decoder4.dropout.p, model.decoder3.dropout.p = 0.4, 0.0, 0.1
    engine = UNetPasses(model, model.encoder4)
    assert engine.rates == [0.4, 0.1, 0.2] and engine.sites == [0, None, 1, 2]


def test_pieces_and_bands_change_nothing_but_rounding(monkeypatch):
    model, images = unet(), pictures(1)
    maps = uncertainty_maps(model, images, target_layer=model.encoder4, passes=4)
    monkeypatch.setattr(unet_passes, "PIECE", 1 << 10)
    monkeypatch.setattr(unet_passes, "PIECE_CUDA", 1 << 10)
    monkeypatch.setattr(upsampling, "BAND", 1 << 10)
    pieces = uncertainty_maps(model, images, target_layer=model.encoder4, passes=4)
    for name in MAPS:
        assert relative_error(getattr(pieces, name), getattr(maps, name)) < 1e-5


def test_groups_and_chunks_fill_a_gpu_and_fit_a_cpu_s_cache():
    engine = UNetPasses(unet(width=64), nn.Identity())
    assert engine.group_and_chunk((256, 256), torch.device("cpu")) == (1, 8)
    # 2^27 elements are 32 maps of 64 x 256 x 256: two images, and 16 passes of each
    assert engine.group_and_chunk((256, 256), torch.device("cuda")) == (2, 16)
    assert engine.group_and_chunk((16, 16), torch.device("cuda")) == (8, 30)
    assert engine.group_and_chunk((4096, 4096), torch.device("cuda")) == (1, 1)


def test_sizes_that_cannot_be_halved_four_times():
    model = unet()
    with pytest.raises(ValueError, match=f"multiples of 16, not {HEIGHT} x {WIDTH + 8}"):
        UNetPasses(model, model.encoder4).encode(pictures(1, HEIGHT, WIDTH + 8))


def test_supported_is_the_unmodified_network_alone():
    model = unet()
    assert supports(model, model.encoder4) and supports(model, model.bottleneck)
    assert not supports(model, model.encoder3) and not supports(nn.Sequential(model), model.encoder4)
    handle = model.decoder2.register_forward_hook(lambda *_: None)
    assert not supports(model, model.encoder4)
    handle.remove()
    model.decoder2.convolutions[2] = nn.LeakyReLU()
    assert not supports(model, model.encoder4)


@pytest.mark.parametrize("change", [
    lambda model: setattr(model.head, "bias", None),
    lambda model: setattr(model.encoder1, "1", nn.BatchNorm2d(4, affine=False)),
    lambda model: model.encoder1.append(nn.Identity()),
    lambda model: model.bottleneck.register_full_backward_hook(lambda *_: None),
    lambda model: model.bottleneck.register_forward_pre_hook(lambda *_: None),
])
def test_other_modules_tensors_and_hooks_are_seen(change):
    model = unet()
    assert supports(model, model.encoder4)
    change(model)
    assert not supports(model, model.encoder4)


def test_a_subclass_is_not_supported():
    class Other(UNet):
        pass

    model = Other(width=4)
    assert not supports(model, model.encoder4)


# ---------------------------------------------------------------- from call to call


def test_an_engine_is_made_once_and_again_where_the_precision_or_the_score_is_another():
    model = unet()
    first = engine_of(model, model.encoder4, torch.float32, False)
    half = engine_of(model, model.encoder4, torch.bfloat16, False)
    assert engine_of(model, model.encoder4, torch.float32, False) is first is not half
    assert engine_of(model, model.encoder4, torch.bfloat16, False) is half
    assert engine_of(model, model.encoder4, torch.float32, True) is not first
    assert engine_of(model, model.bottleneck, torch.float32, False) is not first
    assert engine_of(unet(), model.encoder4, torch.float32, False) is not first


@pytest.mark.parametrize("change", [
    lambda model: model.decoder2.convolutions[3].weight.data.mul_(2.0),  # no version counter moves
    lambda model: model.bottleneck[1][1].running_var.mul_(2.0),
    lambda model: setattr(model.decoder3.dropout, "p", 0.5),
    lambda model: setattr(model.encoder1[1], "eps", 0.1),
    lambda model: model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}),
])
def test_maps_are_those_of_the_network_as_it_is_now(change):
    model, images = unet(), pictures(1)
    before = uncertainty_maps(model, images, target_layer=model.encoder4, passes=3)
    change(model)
    after = uncertainty_maps(model, images, target_layer=model.encoder4, passes=3)
    fresh = UNet(**model.options).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.decoder3.dropout.p, fresh.encoder1[1].eps = model.decoder3.dropout.p, model.encoder1[1].eps
    expected = uncertainty_maps(fresh, images, target_layer=fresh.encoder4, passes=3)
    assert all(torch.equal(a, b) for a, b in zip(after, expected))
    assert not torch.equal(after.mean_prediction, before.mean_prediction)


def test_engines_go_with_their_network():
    model = unet()
    engine = weakref.ref(engine_of(model, model.encoder4, torch.float32, False))
    assert engine() is not None
    del model
    gc.collect()
    assert engine() is None
