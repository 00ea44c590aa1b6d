"""The adjoint of upsampling and convolution as one convolution of phases: the plain one, borders included."""

from __future__ import annotations

import pytest
import torch
from constructed_networks import relative_error
from device import DEVICE

from inference.strided import StridedAdjoint, phases
from inference.upsampling import Cast, Direct

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 1), (5, 7), (16, 3), (32, 32)]


def cast(dtype: torch.dtype) -> Cast:
    return lambda x: x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-14), (torch.float32, 3e-6)])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_plain_adjoint(size, dtype, bound):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    g = torch.randn(3, 6, 2 * size[0], 2 * size[1], dtype=torch.float64)
    expected = Direct(weight, cast(torch.float64)).backward(g.to(DEVICE))
    found = StridedAdjoint(weight, cast(dtype)).backward(cast(dtype)(g))
    assert found.dtype == dtype and found.shape == expected.shape == (3, 5, *size)
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_adjoint_of_its_own_forward(size):
    """<forward(x), g> = <x, backward(g)>, which defines it."""
    torch.manual_seed(1)
    form = StridedAdjoint(torch.randn(4, 3, 3, 3, dtype=torch.float64), cast(torch.float64))
    shape = 1, 4, 2 * size[0], 2 * size[1]
    x, g = (torch.randn(shape, dtype=torch.float64).to(DEVICE) for shape in ((1, 3, *size), shape))
    forward = (form.forward_add(x, torch.zeros_like(g)) * g).sum()
    torch.testing.assert_close(forward, (x * form.backward(cast(torch.float64)(g))).sum(), rtol=1e-12, atol=1e-12)


def test_half_precision_is_as_close_as_the_plain_form():
    torch.manual_seed(2)
    weight, g = torch.randn(16, 32, 3, 3, dtype=torch.float64) / 20, torch.randn(2, 16, 16, 16, dtype=torch.float64)
    exact = Direct(weight, cast(torch.float64)).backward(g.to(DEVICE))
    errors = [
        relative_error(form(weight, cast(torch.float16)).backward(cast(torch.float16)(g)).double(), exact)
        for form in (Direct, StridedAdjoint)
    ]
    assert 0 < errors[1] < 2 * errors[0]


def test_phases_are_rows_and_columns_even_and_odd():
    g = torch.arange(16.0).view(1, 1, 4, 4)
    assert phases(g)[0].flatten(1).tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
