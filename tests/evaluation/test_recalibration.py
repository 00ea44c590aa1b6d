from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.ranking import bin_values, histogram_bin
from evaluation.recalibration import isotonic, log_odds, mean_uncertainty, platt

UNCERTAINTY = np.array([0.01, 0.1, 0.3, 0.6])


def test_isotonic_pools_violators():
    # Accuracies 0.9, 0.5, 0.7, 0.2 with 10, 10, 30, 10 pixels: the middle two pool to (5 + 21) / 40.
    correct, wrong = np.array([9.0, 5, 21, 2]), np.array([1.0, 5, 9, 8])
    assert isotonic(correct, wrong, UNCERTAINTY) == pytest.approx([0.9, 26 / 40, 26 / 40, 0.2])


def test_isotonic_fills_empty_bins_from_their_neighbours():
    found = isotonic(np.array([0.0, 9, 0, 2]), np.array([0.0, 1, 0, 8]), UNCERTAINTY)
    assert found == pytest.approx([0.9, 0.9, (0.9 + 0.2) / 2, 0.2])


def test_platt_recovers_the_logistic_law():
    logit = log_odds(UNCERTAINTY)
    chance = 1 / (1 + np.exp(-(0.5 * logit - 0.3)))
    assert platt(1e6 * chance, 1e6 * (1 - chance), UNCERTAINTY) == pytest.approx(chance, abs=1e-4)


def test_platt_may_reverse_a_score():
    found = platt(np.array([10.0, 20, 30, 40]), np.array([40.0, 30, 20, 10]), UNCERTAINTY)
    assert (np.diff(found) > 0).all()


def test_one_class_gives_a_constant_and_no_pixels_nothing():
    some, none = np.array([3.0, 4, 5, 6]), np.zeros(4)
    for fit in (isotonic, platt):
        assert fit(some, none, UNCERTAINTY) == pytest.approx(np.ones(4))
        assert fit(none, some, UNCERTAINTY) == pytest.approx(np.zeros(4))
        assert np.isnan(fit(none, none, UNCERTAINTY)).all()


def test_log_odds_stay_finite():
    assert np.isfinite(log_odds(np.array([0.0, 1e-30, 0.5, 1.0]))).all()
    assert log_odds(np.array([0.2])) == pytest.approx(np.log(4))


def test_mean_uncertainty_of_quantile_bins():
    values = bin_values()
    first, second, third = (int(place) for place in histogram_bin(torch.tensor([0.125, 0.25, 0.5])))
    histogram = np.zeros(len(values), dtype=int)
    histogram[[first, second, third]] = 3, 1, 2
    found = mean_uncertainty(histogram, np.array([second, second]), values)  # the middle bin is empty
    assert found == pytest.approx([(3 * 0.125 + 0.25) / 4, 0.25, 0.5], rel=1e-3)
