import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import t

from evaluation.conclusion import unit_weights
from evaluation.crossed import Estimate, crossed_estimate, holm, needed, outcome


def estimate(value=0.0, seed=0.0, image=1e-6, trainings=10, degrees=500):
    return Estimate(value, seed, image, trainings, degrees)


def test_the_variance_is_that_between_trainings_over_their_number_plus_that_of_the_images():
    values, samples = [1.0, 3.0, 5.0], np.array([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0], [0.0, 2.0, 4.0]])
    found = crossed_estimate(values, samples, images=20)
    assert (found.value, found.seed_variance) == (3.0, 4.0)
    assert found.image_variance == 1.0  # of the means 3, 4, 2; all trainings move alike
    assert found.standard_error == pytest.approx(math.sqrt(4.0 / 3 + 1.0))
    satterthwaite = (4 / 3 + 1) ** 2 / ((4 / 3) ** 2 / 2 + 1.0**2 / 19)
    assert found.degrees_of_freedom() == pytest.approx(satterthwaite)
    low, high = found.interval()
    assert high - low == pytest.approx(2 * t.ppf(0.975, satterthwaite) * found.standard_error)


def test_a_single_training_knows_only_the_images():
    found = crossed_estimate([2.0], np.array([[1.0], [3.0]]), images=10)
    assert math.isnan(found.seed_variance) and found.standard_error == pytest.approx(math.sqrt(2.0))
    assert found.degrees_of_freedom() == 9


def test_resamples_without_a_number_are_left_out():
    found = crossed_estimate([2.0], np.array([[1.0], [np.nan], [3.0]]), images=10)
    assert found.image_variance == 2.0


def test_p_values_against_scipy():
    found = estimate(value=0.01, seed=1e-5, image=2e-6, trainings=4)
    error = math.sqrt(1e-5 / 4 + 2e-6)
    assert found.p_value() == pytest.approx(2 * t.sf(0.01 / error, found.degrees_of_freedom()))
    assert estimate(value=0.0, image=0.0).p_value() == 1.0


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.0, 0.001, "equivalent"),  # 90 %: +-0.0016, inside 0.005
        (0.003, 0.0005, "different but negligible"),  # 95 %: 0.002 to 0.004
        (0.02, 0.002, "worse"),
        (-0.02, 0.002, "better"),
        (0.004, 0.003, "undecided"),
        (math.nan, 0.001, "not defined"),
    ],
)
def test_six_outcomes(value, error, expected):
    found = estimate(value=value, image=error**2)
    assert outcome(found, 0.005, found.p_value() if math.isfinite(value) else math.nan, True) == expected
    if expected in ("better", "worse"):
        assert outcome(found, 0.005, found.p_value(), False) == {"better": "worse", "worse": "better"}[expected]
    assert outcome(found, 0.005, 1.0, True, identical=True) == "identical"


def test_a_correction_that_takes_the_difference_away_leaves_it_undecided_or_equivalent():
    found = estimate(value=0.006, image=0.0025**2)
    assert found.p_value() < 0.05 and outcome(found, 0.005, 0.2, True) == "undecided"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.02, math.nan])
    assert found[0] == 0.02 and math.isnan(found[1])


def test_more_trainings_decide_where_they_are_what_is_missing():
    found = estimate(value=0.001, seed=4e-5, image=1e-7, trainings=3)
    advice = needed(found, 0.005)
    more = advice["trainings"]
    assert more > 3

    def half(trainings):
        widened = estimate(value=0.001, seed=4e-5, image=1e-7, trainings=trainings)
        return 0.001 + t.ppf(0.95, widened.degrees_of_freedom()) * widened.standard_error

    assert half(more) < 0.005 <= half(more - 1)


def test_more_images_decide_where_they_are_what_is_missing():
    found = estimate(value=0.0, seed=math.nan, image=0.006**2, trainings=1)
    advice = needed(found, 0.005)
    assert advice["trainings"] is None
    assert advice["images_factor"] == pytest.approx((NormalDist().inv_cdf(0.95) * 0.006 / 0.005) ** 2, rel=0.3)


def test_what_a_correction_keeps_undecided_needs_more_than_it_has():
    """Alone the difference would be clear; multiplied by six, its p-value is not."""
    found = estimate(value=0.006, seed=math.nan, image=0.0025**2, trainings=1)
    assert outcome(found, 0.005, min(1.0, 6 * found.p_value()), True) == "undecided"
    assert needed(found, 0.005)["images_factor"] == 1.0
    factor = needed(found, 0.005, tests=6)["images_factor"]
    assert factor > 1 and factor == pytest.approx((t.ppf(1 - 0.05 / 12, 500) * 0.0025 / 0.006) ** 2, rel=0.25)


def test_what_differs_between_trainings_is_counted_once():
    """Against the expected mean squares of a crossed design: pixel noise of each training is in the seed part alone."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        both = rng.normal(0, 2.0, 40) + rng.normal(0, 3.0, (5, 40))  # images, and images by trainings
        weights = unit_weights([f"{i:02d}" for i in range(40)], 60, int(rng.integers(2**31)))[1:]
        one = crossed_estimate(both.mean(1), weights @ both.T / 40, 40)
        found.append((one.seed_variance, one.image_variance))
    seed, image = np.mean(found, 0)
    assert seed == pytest.approx(9 / 40, rel=0.1)
    assert image == pytest.approx(4 / 40, rel=0.1)  # with the interaction it would be (4 + 9 / 5) / 40


def test_intervals_of_crossed_effects_cover():
    """Seeds and images crossed, their product included: 95 % intervals hold the truth about as often as they say."""
    rng = np.random.default_rng(0)
    held = {3: 0, 10: 0}
    for _ in range(1000):
        seeds, images = rng.normal(0, 0.3, 10), rng.normal(0, 1, 60)
        both = seeds[:, None] + images + rng.normal(0, 1, (10, 60))
        weights = unit_weights([f"{i:02d}" for i in range(60)], 100, int(rng.integers(2**31)))[1:]
        for trainings in held:
            part = both[:trainings]
            low, high = crossed_estimate(part.mean(1), weights @ part.T / 60, 60).interval()
            held[trainings] += low <= 0 <= high
    assert 0.92 * 1000 <= held[3] <= 0.97 * 1000
    assert 0.93 * 1000 <= held[10] <= 0.97 * 1000
