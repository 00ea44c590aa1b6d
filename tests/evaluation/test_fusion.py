from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from evaluation import fusion
from evaluation.fusion import RULES, Fusion, best_lambda, convex_curve, fit_logistic, fuse, lambda_grid
from evaluation.normalisation import Linear

PARAMETERS = {"convex": 0.3, "logistic_predictive": (-1.0, 2.0), "logistic": (-1.0, 2.0, -3.0)}


def both(count=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator) ** 3, torch.rand(count, generator=generator) ** 5


# ---------------------------------------------------------------- lambda


def test_lambda_grid():
    assert lambda_grid() == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert lambda_grid(2) == (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        lambda_grid(0)


def test_best_lambda_takes_the_larger_of_equals():
    assert best_lambda((0.0, 0.5, 1.0), np.array([0.2, 0.1, 0.1])) == 1.0
    assert best_lambda((0.0, 0.5, 1.0), np.array([0.1, 0.3, 0.2])) == 0.0
    assert best_lambda((0.0, 0.5, 1.0), np.array([np.nan, 0.3, 0.2])) == 1.0
    with pytest.raises(ValueError, match="no foreground"):
        best_lambda((0.0, 1.0), np.array([np.nan, np.nan]))


# ---------------------------------------------------------------- rules


def test_convex_formula_and_exact_ends():
    first, second = both()
    assert torch.equal(fuse(first, second, "convex", 1.0), first)
    assert torch.equal(fuse(first, second, "convex", 0.0), second)
    for lam in lambda_grid():
        expected = lam * first.double() + (1 - lam) * second.double()
        assert torch.allclose(fuse(first, second, "convex", lam).double(), expected, rtol=0, atol=1.2e-7)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.integers(0, 10))
def test_convex_lies_between_its_parts(first, second, step):
    found = float(RULES["convex"](torch.tensor(first), torch.tensor(second), step / 10))
    assert min(first, second) - 6e-8 <= found <= max(first, second) + 6e-8
    assert 0 <= found <= 1


def test_equal_variances_fuse_to_themselves_at_every_lambda():
    first, _ = both()
    curve = convex_curve(first, first, lambda_grid())
    assert all(torch.equal(row, first) for row in curve)


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_the_curve_is_the_rule_at_every_lambda_bit_by_bit(steps):
    first, second = both()
    grid = lambda_grid(steps)
    for lam, row in zip(grid, convex_curve(first, second, grid)):
        assert torch.equal(row, fuse(first, second, "convex", lam))


@pytest.mark.parametrize("name", list(RULES))
def test_rules_stay_in_range_and_leave_their_input_alone(name):
    first, second = both()
    first[:2], second[:2] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    copies = first.clone(), second.clone()
    found = fuse(first, second, name, PARAMETERS.get(name))
    assert found.shape == first.shape and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(first, copies[0]) and torch.equal(second, copies[1])


def test_rules_of_known_numbers():
    first, second = torch.tensor([0.25]), torch.tensor([0.5])
    expected = {
        "predictive": 0.25,
        "saliency": 0.5,
        "convex": 0.3 * 0.25 + 0.7 * 0.5,
        "product": (0.25 * 0.5) ** 0.5,
        "maximum": 0.5,
        "minimum": 0.25,
        "noisy_or": 1 - 0.75 * 0.5,
        "contrast": 0.25 * 0.5,
        "logistic_predictive": 1 / (1 + np.exp(1 - 0.5)),
        "logistic": 1 / (1 + np.exp(1 - 0.5 + 1.5)),
    }
    assert set(expected) == set(RULES)
    for name, value in expected.items():
        assert float(fuse(first, second, name, PARAMETERS.get(name))) == pytest.approx(value, abs=1e-7)


def test_a_new_rule_is_three_lines(monkeypatch):
    monkeypatch.setattr(fusion, "RULES", dict(RULES))

    @fusion.rule
    def mean(predictive, saliency):
        return (predictive + saliency) / 2

    assert float(fusion.fuse(torch.tensor(0.2), torch.tensor(0.4), "mean")) == pytest.approx(0.3)


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown fusion rule 'mena'.*convex, product"):
        fuse(torch.zeros(1), torch.zeros(1), "mena")


def test_fusion_maps_two_variances_to_the_score():
    fused = Fusion(Linear(0.0, 0.25), Linear(0.0, 0.5), "convex", 0.5)
    score = fused(torch.tensor([[0.125, 1.0]]), torch.tensor([[0.5, 0.0]]))
    assert score.tolist() == [[0.75, 0.5]]


def test_logistic_fit_agrees_with_scikit_learn_unpenalised():
    rng = np.random.default_rng(0)
    features = rng.random((5_000, 2))
    wrong = rng.random(5_000) < 1 / (1 + np.exp(2 - 3 * features[:, 0] + features[:, 1]))
    expected = LogisticRegression(C=1e10, tol=1e-10).fit(features, wrong)
    assert fit_logistic(features, wrong) == pytest.approx([*expected.intercept_, *expected.coef_[0]], abs=0.02)


@pytest.mark.parametrize("unit", (1e-9, 1e-3, 1e6))
def test_the_logistic_fit_knows_no_units(unit):
    rng = np.random.default_rng(1)
    features, weight = rng.random((2_000, 2)), rng.random(2_000)
    wrong = rng.random(2_000) < features[:, 1] / 2
    scaled = features * (1.0, unit)
    (a, *b), (c, *d) = fit_logistic(features, wrong, weight), fit_logistic(scaled, wrong, weight)
    np.testing.assert_allclose(c + scaled @ d, a + features @ b, atol=1e-6)
    assert fit_logistic(np.column_stack([features, np.full(2_000, 0.3)]), wrong, weight) == pytest.approx((a, *b, 0.0), abs=1e-9)


def test_logistic_fit_of_one_class_is_a_constant():
    assert fit_logistic(np.ones((3, 2)), np.zeros(3, dtype=bool)) == (-40.0, 0.0, 0.0)
    assert fit_logistic(np.ones((3, 2)), np.ones(3, dtype=bool)) == (40.0, 0.0, 0.0)


def test_a_tuned_rule_names_its_candidates_and_what_it_is_compared_with(monkeypatch):
    monkeypatch.setattr(fusion, "RULES", {})

    @fusion.tuned_rule(candidates=lambda sample, lambdas: lambdas, baseline="other")
    def steep(predictive, saliency, power):
        return predictive**power

    @fusion.rule
    def plain(predictive, saliency):
        return predictive

    rules = fusion.RULES
    assert rules["steep"].candidates(None, (0.0, 1.0)) == (0.0, 1.0) and rules["steep"].baseline == "other"
    assert rules["plain"].candidates(None, (0.0, 1.0)) == (None,) and rules["plain"].baseline == "predictive"
    assert float(fusion.fuse(torch.tensor(0.5), torch.tensor(0.0), "steep", 2.0)) == 0.25


def test_the_name_by_which_maps_know_their_fusion():
    found = repr(Fusion(Linear(0.0, 0.25), Linear(0.0, 0.5), "convex", 0.5))
    assert found == (
        "Fusion(predictive=Linear(low=0.0, high=0.25), saliency=Linear(low=0.0, high=0.5), rule='convex', parameter=0.5, "
        "normalisation='min_max')"
    )
