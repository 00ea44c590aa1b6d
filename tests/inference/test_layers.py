"""The layers of a network in the order of a forward pass: which Grad-CAM can weigh, and after which dropout belongs."""

from __future__ import annotations

import pytest
import torch
from constructed_networks import SmallNet, block, pictures, unet
from torch import nn

from inference.layers import Call, decoder_blocks, insert_after, target_candidates, trace


def calls_of(network: nn.Module, size: int = 32) -> list[Call]:
    layers = {path: layer for path, layer in network.named_modules() if path}
    return trace(network, layers, pictures(1, size, size))


def call(path: str, channels: int, side: int, concatenates: bool = False) -> Call:
    return Call(path, (channels, side, side), "some", channels > 1 and side > 1, concatenates)


def test_calls_come_in_the_order_in_which_they_end_with_their_gradients():
    network = SmallNet().eval()
    calls = calls_of(network)
    assert [c.path for c in calls][:4] == ["down1.0", "down1.1", "down1.2", "down1"]
    by_path = {c.path: c for c in calls}
    assert by_path["bottom"].shape == (8, 8, 8) and by_path["bottom"].gradient == "some" and by_path["bottom"].is_map
    assert by_path["auxiliary"].gradient == "none" and not by_path["auxiliary"].is_map
    assert not by_path["head"].is_map  # one channel
    assert str(by_path["up2"]) == "up2 (6 x 16 x 16)"


def test_a_trace_leaves_hooks_gradients_and_images_as_they_were():
    network, images = SmallNet().eval(), pictures(1, 32, 32)
    before = images.clone()
    trace(network, dict(network.named_children()), images)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(images, before) and not images.requires_grad


def test_zero_gradients_and_layers_that_work_on_the_images_in_place():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
    nn.init.constant_(network[1].bias, -100.0)  # the ReLU behind it lets nothing through
    assert [c.gradient for c in calls_of(network)] == ["zero", "zero", "some", "some"]


def test_logits_that_are_cut_off():
    class Cut(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="cut off from the images"):
        trace(Cut(3, 1, 1), {}, pictures(1, 8, 8))


def test_a_layer_s_own_output_is_what_counts_where_something_acts_after_it():
    network = SmallNet().eval()
    insert_after(network.bottom, nn.MaxPool2d(2))
    insert_after(network.bottom, nn.Upsample(scale_factor=2))
    shapes = {c.path: c.shape for c in calls_of(network)}
    assert shapes["bottom"] == (8, 8, 8)
    assert network.bottom(torch.rand(1, 6, 8, 8)).flatten(2).unique(dim=2).shape[2] < 64  # they do act


# ---------------------------------------------------------------- where dropout belongs


def test_the_sites_of_the_u_net_are_those_it_has():
    network = unet(dropout=0.0)
    assert decoder_blocks(calls_of(network, 64), 64, 64) == ["dropout", "decoder4", "decoder3", "decoder2"]
    assert decoder_blocks(calls_of(unet(dropout=0.0, upsampling="transposed"), 64), 64, 64) == [
        "dropout", "decoder4", "decoder3", "decoder2"]


def test_a_block_that_goes_on_at_another_resolution_is_no_place_inside():
    calls = [
        call("encoder.1", 8, 8), call("encoder.2", 8, 4), call("encoder", 8, 4), call("decoder.0", 8, 4),
        call("decoder.1.convolution", 8, 4), call("decoder.1.up", 8, 8), call("decoder.1", 8, 8), call("decoder.2", 8, 16),
        call("decoder", 8, 16), call("head", 1, 16),
    ]
    assert decoder_blocks(calls, 16, 16) == ["decoder.0", "decoder.1"]


def test_concatenations_gates_and_full_resolution_are_left_out():
    calls = [
        call("down", 8, 4), call("gate", 8, 1), call("bottom", 8, 2), call("joined", 16, 2, True),
        call("up", 8, 4), call("skip", 16, 4, True), call("full", 8, 8), call("head", 1, 8),
    ]
    assert decoder_blocks(calls, 8, 8) == ["bottom", "up"]


def test_a_network_at_one_resolution_has_its_last_layer_before_the_logits():
    network = nn.Sequential(block(3, 4), block(4, 4), nn.Conv2d(4, 1, 1)).eval()
    assert decoder_blocks(calls_of(network), 32, 32) == ["1"]
    assert decoder_blocks(calls_of(nn.Sequential(nn.Conv2d(3, 1, 1))), 32, 32) == []


def test_a_site_comes_where_the_forward_pass_reaches_it():
    # the last layer at half resolution runs before the last at a quarter
    calls = [call("a", 8, 8), call("b", 8, 4), call("c", 8, 2), call("d", 8, 8), call("e", 8, 4), call("f", 1, 16)]
    assert decoder_blocks(calls, 16, 16) == ["c", "d", "e"]


# ---------------------------------------------------------------- targets


def test_candidates_are_the_last_of_each_resolution_and_part():
    calls = [
        call("encoder.0", 4, 16), call("encoder.1.grow", 8, 16), call("encoder.1", 8, 8), call("encoder.2", 8, 8),
        call("decoder.0", 8, 8), call("decoder.1", 8, 16), call("head", 1, 16),
    ]
    assert [c.path for c in target_candidates(calls)] == ["encoder.0", "encoder.2", "decoder.0", "decoder.1"]


def test_of_many_candidates_those_with_the_shortest_paths_are_kept():
    calls = [call(f"a{place}.b" if place % 2 else f"a{place}", 4, 2 + place) for place in range(40)]
    kept = target_candidates(calls, most=10)
    assert [c.path for c in kept] == [f"a{place}" for place in range(0, 20, 2)]
    assert len(target_candidates(calls)) == 15
