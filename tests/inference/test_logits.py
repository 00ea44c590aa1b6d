"""The logits of a network and their entropy."""

from __future__ import annotations

import math

import pytest
import torch

from inference.logits import binary_entropy_of_logits, binary_logits


def test_logits_come_as_they_are_or_under_out():
    logits = torch.zeros(2, 1, 4, 4)
    assert binary_logits(logits) is logits and binary_logits({"out": logits, "aux": logits[:1]}) is logits


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 2, 4, 4)])
def test_other_outputs_are_an_error(shape):
    with pytest.raises(ValueError, match=r"must return logits \(B, 1, H, W\), not .*to_logits can make them"):
        binary_logits(torch.zeros(shape))


def test_entropy_is_that_of_the_probabilities():
    z = torch.tensor([-30.0, -1.0, 0.0, 0.5, 30.0], dtype=torch.float64)
    p = torch.sigmoid(z)
    expected = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    torch.testing.assert_close(binary_entropy_of_logits(z), expected, rtol=1e-6, atol=1e-14)
    assert binary_entropy_of_logits(torch.tensor([-1e4, 0.0, 1e4])).tolist() == [0.0, pytest.approx(math.log(2)), 0.0]
