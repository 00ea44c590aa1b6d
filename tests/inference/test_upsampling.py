"""Upsampling followed by a convolution: every form is the plain one, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inference import upsampling
from inference.upsampling import Composed, Direct, Exchanged, ExchangedRows, adjoint_kernel, bilinear_form, repeat


@pytest.mark.parametrize("form", [Direct, ExchangedRows, Exchanged])
@pytest.mark.parametrize("height,width", [(1, 1), (1, 5), (2, 2), (3, 1), (5, 7), (16, 3)])
def test_upsampling_and_convolution_exchanged(form, height, width, monkeypatch):
    """Each form of upsample-then-convolve and its adjoint, in float64, whole and in bands of rows."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(1, 4, 2 * height, 2 * width, dtype=torch.float64)
    up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    y = F.conv2d(up, weight, padding=1) + skip
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    cast = lambda w: w.contiguous(memory_format=torch.channels_last)  # noqa: E731
    for band in (1 << 20, 1):
        monkeypatch.setattr(upsampling, "BAND", band)
        chosen = form(weight, cast)
        forward = chosen.forward_add(cast(x.detach()), cast(skip))
        torch.testing.assert_close(forward, y.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(chosen.backward(cast(g)), expected, rtol=1e-12, atol=1e-12)


def test_learnt_upsampling_and_convolution_composed():
    torch.manual_seed(0)
    weight, up = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3, 3, 3), (6, 3, 2, 2)))
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(1, 4, 6, 10, dtype=torch.float64)
    y = F.conv2d(F.conv_transpose2d(x, up, stride=2), weight, padding=1) + skip
    g = torch.randn_like(y)
    composed = Composed(weight, up, lambda w: w)
    torch.testing.assert_close(composed.forward_add(x.detach(), skip), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(composed.backward(g), torch.autograd.grad(y, x, g)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [Direct, ExchangedRows, Exchanged])
def test_every_pass_gets_the_skip_half_of_its_own_image(form):
    """Rows are pass-major: with B = 2 images, row r gets skip[r % 2]."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    x, skip = torch.randn(6, 3, 5, 7, dtype=torch.float64), torch.randn(2, 4, 10, 14, dtype=torch.float64)
    up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.conv2d(up, weight, padding=1) + torch.cat([skip, skip, skip])
    cast = lambda w: w.contiguous(memory_format=torch.channels_last)  # noqa: E731
    torch.testing.assert_close(form(weight, cast).forward_add(cast(x), cast(skip)), expected, rtol=1e-12, atol=1e-12)


def test_the_form_follows_channels_and_precision():
    def form(channels: int, dtype: torch.dtype) -> type:
        weight = torch.zeros(2, channels, 3, 3, dtype=torch.float64)
        return type(bilinear_form(weight, 1.0, dtype, lambda w: w))

    assert [form(c, torch.float32) for c in (8, 16, 127, 128)] == [Direct, ExchangedRows, ExchangedRows, Exchanged]
    assert [form(c, torch.bfloat16) for c in (16, 127, 128)] == [Direct, Direct, Exchanged]


def test_the_form_scales_its_weight():
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    x, nothing = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    plain, scaled = (bilinear_form(weight, s, torch.float32, lambda w: w) for s in (1.0, 1.25))
    torch.testing.assert_close(scaled.forward_add(x, nothing), 1.25 * plain.forward_add(x, nothing))


@pytest.mark.parametrize("shape", [(3, 3), (1, 3), (1, 1)])
def test_adjoint_kernel(shape):
    """<conv(x, W), g> = <x, conv(g, W*)>, the definition of the adjoint."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, *shape, dtype=torch.float64)
    x, g = torch.randn(1, 3, 5, 6, dtype=torch.float64), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    padding = (shape[0] // 2, shape[1] // 2)
    forward = (F.conv2d(x, weight, padding=padding) * g).sum()
    backward = (x * F.conv2d(g, adjoint_kernel(weight), padding=padding)).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


def test_repeating_copies_the_whole_batch():
    x = torch.randn(2, 3, 4, 5)
    y = repeat(x, 3)
    assert torch.equal(y, torch.cat([x, x, x])) and y.is_contiguous(memory_format=torch.channels_last)
    y.zero_()
    assert x.any()
