"""The moments over the passes, and how far the passes agree: against NumPy and a loop over all pairs, in any chunks."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from inference.moments import Moments, PassDice

# ---------------------------------------------------------------- moments


def test_variance_of_a_constant_is_zero_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    constant, noisy = Moments(), Moments()
    value = torch.rand(1000, generator=generator)
    for _ in range(30):
        constant.update(value[None])
        noisy.update(1 - 1e-7 * torch.rand(1, 1000, generator=generator))
    assert not constant.variance().any() and torch.equal(constant.mean, value)
    assert (noisy.variance() >= 0).all()


def test_moments_are_numpys_in_any_chunks():
    values = torch.randn(17, 5, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for sizes in ([17], [1] * 17, [5, 12]):
        moments = Moments()
        for block in values.split(sizes):
            moments.update(block)
        results.append((moments.mean, moments.variance()))
    np.testing.assert_allclose(results[0][1], values.double().numpy().var(0), rtol=1e-5)
    np.testing.assert_allclose(results[0][0], values.double().numpy().mean(0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(m, results[0][0]) and torch.equal(v, results[0][1]) for m, v in results)


# ---------------------------------------------------------------- agreement of the passes


def agreement(predicted: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The Dice of passes (T, B, H, W) that come in chunks."""
    dice = PassDice()
    for block in predicted.split(sizes):
        dice.update(block)
    return dice.value()


def test_it_is_the_ratio_of_sums_over_all_pairs_in_any_chunks():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(7, 3, 5, 4, generator=generator) < torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)
    expected = []
    for image in predicted.unbind(1):
        pairs = list(combinations(image, 2))
        shared, size = sum(int((a & b).sum()) for a, b in pairs), sum(int(a.sum()) + int(b.sum()) for a, b in pairs)
        expected.append(2 * shared / size)
    for sizes in ([7], [1] * 7, [3, 4]):
        assert agreement(predicted, sizes).tolist() == pytest.approx(expected, abs=1e-15)


def test_equal_passes_agree_disjoint_ones_do_not_and_nothing_is_agreement():
    square = torch.zeros(2, 2, dtype=torch.bool)
    square[0, 0] = True
    disjoint = torch.stack([square, square.flip(0)])[:, None]
    assert agreement(square.expand(4, 1, 2, 2), [4]).tolist() == [1.0]
    assert agreement(disjoint, [2]).tolist() == [0.0]
    assert agreement(torch.zeros(4, 1, 2, 2, dtype=torch.bool), [4]).tolist() == [1.0]
    assert agreement(disjoint[:1], [1]).tolist() == [1.0]  # one pass agrees with itself


def test_counts_do_not_overflow_where_many_passes_predict_a_large_lesion():
    """1,000 passes over 65,536 pixels: sum n (n - 1) is 6.5e10, beyond 32 bits."""
    assert agreement(torch.ones(1000, 1, 256, 256, dtype=torch.bool), [500, 500]).tolist() == [1.0]
