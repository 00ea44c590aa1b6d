"""Bilinear upsampling whose gradient adds nothing atomically: the gradient of PyTorch, and where it is used."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from torch import nn

from model import UNet
from runtime import upsampling
from runtime.upsampling import ReproducibleUpsample, upsample_adjoint, with_reproducible_upsampling

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 1), (5, 7), (16, 3)])
def test_the_adjoint_is_the_gradient_of_interpolation(size, dtype, bound):
    torch.manual_seed(0)
    x = torch.zeros(2, 3, *size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    g = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64).to(DEVICE)
    (expected,) = torch.autograd.grad(F.interpolate(x, scale_factor=2, mode="bilinear"), x, g)
    assert (upsample_adjoint(g.to(dtype)) - expected).abs().max() < bound * expected.abs().max()


def test_it_may_follow_and_precede_anything():
    """Finite differences through a convolution on either side."""
    torch.manual_seed(0)
    upsample = ReproducibleUpsample(scale_factor=2, mode="bilinear")
    network = nn.Sequential(nn.Conv2d(2, 3, 1), upsample, nn.Conv2d(3, 1, 3)).double()
    assert torch.autograd.gradcheck(network, torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True))


def test_a_step_is_that_of_the_plain_network_up_to_rounding():
    torch.manual_seed(0)
    plain, other = UNet(4).to(DEVICE), UNet(4).to(DEVICE)
    other.load_state_dict(plain.state_dict())
    with_reproducible_upsampling(other, CUDA)
    assert sum(isinstance(module, ReproducibleUpsample) for module in other.modules()) == 4
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in other.named_modules()]
    images = torch.randn(2, 3, 32, 32).to(DEVICE)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for network in (plain.eval(), other.eval()):
            network(images).square().mean().backward()
    for one, two in zip(plain.parameters(), other.parameters()):
        assert (one.grad - two.grad).abs().max() <= 1e-5 * one.grad.abs().max()


def test_only_what_it_computes_is_exchanged_and_on_cuda_alone():
    layers = [
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False),
        nn.Upsample(scale_factor=(2.0, 2.0), mode="bilinear"), nn.Upsample(scale_factor=3, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="nearest"), nn.Upsample(size=(4, 4), mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    ]
    network = nn.Sequential(*layers)
    with_reproducible_upsampling(network, torch.device("cpu"))
    assert not any(isinstance(layer, ReproducibleUpsample) for layer in network)
    with_reproducible_upsampling(network, CUDA)
    assert [isinstance(layer, ReproducibleUpsample) for layer in network] == [True] * 3 + [False] * 4


def test_the_example_in_the_docstring_holds():
    failed, attempted = doctest.testmod(upsampling)
    assert failed == 0 and attempted > 0
