"""The U-Net: its shapes, its dropout sites, its errors."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from torch import nn

from model import UPSAMPLINGS, UNet
from runtime import config


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_widths_sites_and_shapes(upsampling):
    model = UNet(8, 0.2, upsampling).eval().to(DEVICE)
    shapes = {}
    for name in ("encoder1", "encoder2", "encoder3", "encoder4", "bottleneck", "decoder4", "decoder3", "decoder2", "decoder1"):
        getattr(model, name).register_forward_hook(lambda m, i, o, name=name: shapes.update({name: tuple(o.shape[1:])}))
    logits = model(torch.zeros(2, 3, 32, 48, device=DEVICE))
    assert logits.shape == (2, 1, 32, 48)
    assert [shapes[f"encoder{i}"] for i in (1, 2, 3, 4)] == [(8, 32, 48), (16, 16, 24), (32, 8, 12), (64, 4, 6)]
    assert shapes["bottleneck"] == (64 if upsampling == "bilinear" else 128, 2, 3)
    assert [shapes[f"decoder{i}"][1:] for i in (4, 3, 2, 1)] == [(4, 6), (8, 12), (16, 24), (32, 48)]
    # after the bottleneck and after every decoder block but the last
    sites = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert sites == ["dropout", "decoder4.dropout", "decoder3.dropout", "decoder2.dropout"]
    assert all(module.p == 0.2 for module in model.modules() if isinstance(module, nn.Dropout))


def test_the_paper_s_widths():
    model = UNet()
    assert [model.encoder1[0].out_channels] + [getattr(model, f"encoder{i}")[1][0].out_channels for i in (2, 3, 4)] == [
        64, 128, 256, 512,
    ]


def test_options_rebuild_the_model():
    model = UNet(4, 0.3, "transposed")
    UNet(**model.options).load_state_dict(model.state_dict())


@pytest.mark.parametrize("options", [{"width": 3}, {"dropout": 1.0}, {"dropout": -0.1}, {"upsampling": "nearest"}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        UNet(**options)


def test_sizes_that_cannot_be_halved_four_times():
    with pytest.raises(ValueError, match="multiples of 16"):
        UNet(4)(torch.zeros(1, 3, 40, 32))


def test_the_command_line_offers_the_same_upsamplings():
    assert UPSAMPLINGS == config.UPSAMPLINGS
