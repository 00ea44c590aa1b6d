import numpy as np
import pytest
import torch
from constructed_maps import Images, constructed_images, make_images
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import fusion
from fusion import (
    NORMALISATIONS,
    PREDICTIVE,
    RULES,
    SALIENCY,
    Fusion,
    Linear,
    best_lambda,
    convex_curve,
    distributions,
    draw_pixels,
    fit_logistic,
    foreground_sample,
    fuse,
    lambda_grid,
    min_max,
)

PARAMETERS = {"convex": 0.3, "logistic_predictive": (-1.0, 2.0), "logistic": (-1.0, 2.0, -3.0)}


def both(count=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator) ** 3, torch.rand(count, generator=generator) ** 5


# Normalisations


def test_min_max_of_known_numbers():
    normalise = Linear(2.0, 6.0)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 7.0])
    assert normalise(values).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert normalise.outside(values) == 2
    assert values.tolist() == [1.0, 2.0, 3.0, 6.0, 7.0]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 0.25, width=32), st.floats(0, 0.25, width=32), st.floats(0, 0.25, width=32))
def test_ends_of_the_range_are_exact_and_nothing_leaves_it(first, second, value):
    low, high = sorted((first, second))
    found = Linear(low, high)(torch.tensor([low, high, value]))
    assert found[0] == 0 and found[1] == (1 if high > low else 0)
    assert 0 <= found[2] <= 1


def test_a_constant_variance_is_normalised_to_zero():
    assert Linear(0.1, 0.1)(torch.full((3,), 0.1)).tolist() == [0, 0, 0]


def test_constants_come_from_all_validation_pixels():
    images = make_images(5)
    found = distributions(images)
    for name in (PREDICTIVE, SALIENCY):
        everything = torch.cat([maps[name].flatten() for _, maps in images])
        assert (found[name].low, found[name].high) == (float(everything.min()), float(everything.max()))
        assert found[name].fine.sum() == len(everything)


def test_robust_quantiles():
    images = make_images(5)
    found = distributions(images)[SALIENCY]
    everything = torch.cat([maps[SALIENCY].flatten() for _, maps in images]).numpy()
    robust = NORMALISATIONS["robust_quantile"](found)
    assert robust.low == pytest.approx(np.quantile(everything, 0.01), abs=1e-9)
    assert robust.high == pytest.approx(np.quantile(everything, 0.99), rel=0.01)


def test_rank_is_uniform_on_validation_and_keeps_order():
    images = make_images(5)
    normalise = NORMALISATIONS["rank"](distributions(images)[SALIENCY])
    values = torch.cat([maps[SALIENCY].flatten() for _, maps in images]).sort().values
    ranks = normalise(values)
    assert (ranks.diff() >= 0).all()
    assert np.abs(ranks.numpy() - (np.arange(len(values)) + 0.5) / len(values)).max() < 2e-3
    assert normalise(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize("bad, message", [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1e-6, "negative")])
def test_bad_variances_are_named(bad, message):
    images = make_images(2)
    images.items[1][1][SALIENCY][0, 0] = bad
    with pytest.raises(ValueError, match=f"image_0001: saliency_variance .*{message}"):
        distributions(images)


def test_no_validation_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        distributions(Images([]))


# Rules


def test_lambda_grid():
    assert lambda_grid() == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert lambda_grid(3) == (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        lambda_grid(1)


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


@pytest.mark.parametrize("lambdas", [2, 3, 11, 12])
def test_the_curve_is_the_rule_at_every_lambda_bit_by_bit(lambdas):
    first, second = both()
    grid = lambda_grid(lambdas)
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


# Choosing


def test_best_lambda_takes_the_larger_of_equals():
    assert best_lambda((0.0, 0.5, 1.0), np.array([0.2, 0.1, 0.1])) == 1.0
    assert best_lambda((0.0, 0.5, 1.0), np.array([0.1, 0.3, 0.2])) == 0.0
    assert best_lambda((0.0, 0.5, 1.0), np.array([np.nan, 0.3, 0.2])) == 1.0
    with pytest.raises(ValueError, match="no foreground"):
        best_lambda((0.0, 1.0), np.array([np.nan, np.nan]))


def test_logistic_fit_agrees_with_scikit_learn_unpenalised():
    rng = np.random.default_rng(0)
    features = rng.random((5_000, 2))
    wrong = rng.random(5_000) < 1 / (1 + np.exp(2 - 3 * features[:, 0] + features[:, 1]))
    expected = LogisticRegression(C=1e10, tol=1e-10).fit(features, wrong)
    assert fit_logistic(features, wrong) == pytest.approx([*expected.intercept_, *expected.coef_[0]], abs=0.02)


def test_logistic_fit_of_one_class_is_a_constant():
    assert fit_logistic(np.ones((3, 2)), np.zeros(3, dtype=bool)) == (-40.0, 0.0, 0.0)
    assert fit_logistic(np.ones((3, 2)), np.ones(3, dtype=bool)) == (40.0, 0.0, 0.0)


def test_drawn_pixels_depend_on_seed_and_id_alone():
    everything = torch.arange(1000)
    drawn = draw_pixels("a", everything, 50, 1)
    assert len(drawn) == len(set(drawn.tolist())) == 50
    assert torch.equal(drawn, draw_pixels("a", everything, 50, 1))
    assert not torch.equal(drawn, draw_pixels("b", everything, 50, 1))
    assert not torch.equal(drawn, draw_pixels("a", everything, 50, 2))
    assert torch.equal(draw_pixels("a", everything, 1000, 1), everything)


def test_foreground_sample_stands_for_the_whole_foreground():
    images = constructed_images(4, "informative")
    found = distributions(images)
    features, wrong, weight = foreground_sample(images, Fusion(min_max(found[PREDICTIVE]), min_max(found[SALIENCY])), 64)
    assert features.shape == (4 * 64, 2) and len(wrong) == len(weight) == 4 * 64
    assert weight.sum() == sum(int(maps["true_mask"].sum()) for _, maps in images)
    assert features.min() >= 0 and features.max() <= 1
