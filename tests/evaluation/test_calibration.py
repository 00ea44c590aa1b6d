from __future__ import annotations

from fractions import Fraction
from math import ceil, isnan, nan

import netcal.metrics
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evaluation import calibration
from evaluation.calibration import (
    average_calibration_error,
    bin_index,
    brier_parts,
    confidence_sum,
    count_confidence,
    debiased_calibration_error,
    expected_calibration_error,
    foreground_error,
    maximum_calibration_error,
    region_bins,
    reliability,
    signed_gap,
)
from evaluation.names import REGIONS


def table(uncertainty, correct, bins=15):
    """Counts, correct counts and confidence sums (B,) of pixels, by way of the streaming counter."""
    scores = torch.tensor(np.asarray(uncertainty, dtype=np.float32))[None]
    count, total = count_confidence(scores, torch.tensor(np.asarray(correct)).to(torch.int32), 2, bins)
    return count[0].sum(0).numpy(), count[0, 1].numpy(), confidence_sum(total)[0].sum(0).numpy()


def exact_bin(uncertainty, bins):
    """Bin of 1 - u by rational arithmetic on the float32 confidence."""
    confidence = Fraction(float(np.float32(1) - np.float32(uncertainty)))
    return max(ceil(confidence * bins) - 1, 0)


# ---------------------------------------------------------------- counting


def test_hand_computed_table():
    # Confidences 0.25, 0.25 (one right), 0.75, 1.0, 1.0 (two right of three); four bins of width 1/4.
    count, correct, confidence = table([0.75, 0.75, 0.25, 0.0, 0.0], [1, 0, 0, 1, 1], bins=4)
    assert count.tolist() == [2, 0, 1, 2]
    assert correct.tolist() == [1, 0, 0, 2]
    assert confidence.tolist() == [0.5, 0.0, 0.75, 2.0]
    bins = count, correct, confidence
    assert expected_calibration_error(*bins) == (2 * abs(0.5 - 0.25) + 1 * abs(0 - 0.75) + 2 * abs(1 - 1)) / 5
    assert signed_gap(*bins) == pytest.approx((0.25 + 0.25 + 0.75 + 1 + 1) / 5 - 3 / 5)
    assert maximum_calibration_error(*bins) == 0.75
    assert average_calibration_error(*bins) == (0.25 + 0.75 + 0) / 3


def test_reliability_table_of_an_empty_bin_is_not_a_number():
    result = reliability(np.array([2, 0]), np.array([1, 0]), np.array([0.5, 0.0]))
    assert result["lower"].tolist() == [0.0, 0.5] and result["upper"].tolist() == [0.5, 1.0]
    assert result["confidence"][0] == 0.25 and result["accuracy"][0] == 0.5
    assert isnan(result["confidence"][1]) and isnan(result["accuracy"][1])


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1, width=32), st.sampled_from([1, 2, 7, 10, 15, 16, 30, 63, 64, 100]))
@example(0.0, 15)
@example(1.0, 15)
@example(float(np.float32(2.0**-149)), 15)
def test_bins_agree_with_rational_arithmetic(uncertainty, bins):
    count, _, confidence = table([uncertainty], [1], bins)
    assert count.tolist() == [int(b == exact_bin(uncertainty, bins)) for b in range(bins)]
    assert confidence.sum() == float(np.float32(1) - np.float32(uncertainty))


@pytest.mark.parametrize("bins", [10, 15, 30])
def test_values_at_and_next_to_edges(bins):
    # k / 30 and its neighbours on both sides, as uncertainty and as one minus it, all decided exactly.
    near = [np.float32(k / 30) for k in range(31)] + [np.float32(1) - np.float32(k / 30) for k in range(31)]
    near += [np.nextafter(value, np.float32(2)) for value in near] + [np.nextafter(value, np.float32(-1)) for value in near]
    near = [value for value in near if 0 <= value <= 1]
    count, _, _ = table(near, [1] * len(near), bins)
    assert count.tolist() == np.bincount([exact_bin(value, bins) for value in near], minlength=bins).tolist()


def test_edges_that_float32_holds_belong_to_the_lower_bin():
    # 1/4, 1/2, 3/4 lie on the edges of four bins; (lo, hi], and 0 in the first.
    count, _, _ = table([1.0, 0.75, 0.5, 0.25, 0.0], [1] * 5, bins=4)
    assert count.tolist() == [2, 1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, width=32))
def test_a_confidence_is_a_multiple_of_two_to_minus_24(uncertainty):
    assert (float(np.float32(1) - np.float32(uncertainty)) * 2**24).is_integer()


def random_pixels(pixels, scores=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uncertainty = torch.rand(scores, pixels, generator=generator) ** 6
    uncertainty[:, ::17] = 0.0
    uncertainty[:, 5::31] = 1.0
    return uncertainty, torch.randint(0, 4, (pixels,), generator=generator)


@pytest.mark.parametrize("bins", [15, 40])  # 40 bins and four groups need more than 32 bits
def test_both_ways_to_tally_agree_with_numpy(monkeypatch, bins):
    uncertainty, group = random_pixels(20_000)
    count, total = count_confidence(uncertainty, group, 4, bins)
    monkeypatch.setattr(calibration, "_tally_by_bincount", calibration._tally_by_mask)
    again = count_confidence(uncertainty, group, 4, bins)
    assert torch.equal(count, again[0]) and torch.equal(total, again[1])
    confidence = 1 - uncertainty.numpy()
    index = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, None)
    for score in range(3):
        for outcome in range(4):
            here = group.numpy() == outcome
            expected = np.bincount(index[score, here], minlength=bins)
            assert count[score, outcome].tolist() == expected.tolist()
            sums = np.bincount(index[score, here], weights=confidence[score, here].astype(np.float64), minlength=bins)
            assert confidence_sum(total)[score, outcome].tolist() == sums.tolist()  # exactly


def test_order_and_split_of_pixels_do_not_matter():
    uncertainty, group = random_pixels(30_001)
    count, total = count_confidence(uncertainty, group, 4)
    order = torch.randperm(30_001, generator=torch.Generator().manual_seed(1))
    shuffled = count_confidence(uncertainty[:, order], group[order], 4)
    first = count_confidence(uncertainty[:, :12_345], group[:12_345], 4)
    second = count_confidence(uncertainty[:, 12_345:], group[12_345:], 4)
    assert torch.equal(shuffled[0], count) and torch.equal(shuffled[1], total)
    assert torch.equal(first[0] + second[0], count) and torch.equal(first[1] + second[1], total)


def test_more_pixels_in_a_bin_than_float32_can_count():
    pixels = 2**24 + 3
    uncertainty = torch.full((1, pixels), float(np.float32(0.1)))
    count, total = count_confidence(uncertainty, torch.ones(pixels, dtype=torch.int32), 2)
    assert count[0, 1].sum() == count[0, 1, 13] == pixels  # 12/15 < 0.9 <= 14/15 is bin 13
    assert int(total[0, 1, 13]) == pixels * int((np.float32(1) - np.float32(0.1)) * 2**24)
    ece = expected_calibration_error(count[0].sum(0).numpy(), count[0, 1].numpy(), confidence_sum(total)[0].sum(0).numpy())
    assert ece == pytest.approx(0.1, abs=1e-7)


def test_counting_leaves_its_input_alone():
    uncertainty, group = random_pixels(9_000)
    copies = uncertainty.clone(), group.clone()
    count_confidence(uncertainty, group, 4)
    assert torch.equal(uncertainty, copies[0]) and torch.equal(group, copies[1])


def test_no_pixels():
    count, total = count_confidence(torch.zeros(2, 0), torch.zeros(0, dtype=torch.int32), 4)
    assert count.shape == total.shape == (2, 4, 15) and count.sum() == total.sum() == 0


@pytest.mark.parametrize("bad, message", [(nan, "NaN"), (float("inf"), "infinite"), (-1e-3, r"\[0, 1\]"), (1.001, r"\[0, 1\]")])
def test_bad_values_are_errors(bad, message):
    uncertainty = torch.full((1, 10), 0.5)
    uncertainty[0, 3] = bad
    with pytest.raises(ValueError, match=message):
        count_confidence(uncertainty, torch.zeros(10, dtype=torch.int32), 2)


def test_regions_add_up_their_outcomes():
    # one decimal place for each outcome, so that a sum says what was added
    count = 10 ** np.arange(8)[:, None]
    expected = {
        "foreground": (11001100, 10001000),
        "predicted_foreground": (10101010, 10001000),
        "union": (11101110, 10001000),
        "whole_image": (11111111, 10011001),
        "predicted_background": (1010101, 10001),
        "boundary_band": (11110000, 10010000),
    }
    assert set(expected) == set(REGIONS)
    for region, numbers in expected.items():
        pixels, right, _ = region_bins(count, count.astype(float), region)
        assert (pixels.item(), right.item()) == numbers


def test_regions_of_four_outcomes_do_not_ask_where_the_band_is():
    count = 10 ** np.arange(4)[:, None]
    expected = {"foreground": (1100, 1000), "predicted_background": (101, 1), "boundary_band": (1111, 1001)}
    for region, numbers in expected.items():
        pixels, right, _ = region_bins(count, count.astype(float), region)
        assert (pixels.item(), right.item()) == numbers


# ---------------------------------------------------------------- measures


def test_netcal_agrees():
    rng = np.random.default_rng(3)
    uncertainty = (rng.random(50_000) ** 5).astype(np.float32)
    correct = rng.random(50_000) > 0.7 * uncertainty + 0.1
    bins = table(uncertainty, correct)
    confidence = (1 - uncertainty).astype(np.float64)
    assert expected_calibration_error(*bins) == pytest.approx(netcal.metrics.ECE(15).measure(confidence, correct.astype(int)))
    assert maximum_calibration_error(*bins) == pytest.approx(netcal.metrics.MCE(15).measure(confidence, correct.astype(int)))
    assert average_calibration_error(*bins) == pytest.approx(netcal.metrics.ACE(15).measure(confidence, correct.astype(int)))


def test_no_pixel_is_not_a_number():
    empty = np.zeros(15, dtype=int), np.zeros(15, dtype=int), np.zeros(15)
    for measure in (expected_calibration_error, signed_gap, maximum_calibration_error, average_calibration_error):
        assert isnan(measure(*empty))


def test_error_is_the_signed_gap_where_all_gaps_have_one_sign():
    uncertainty = np.linspace(0, 0.4, 1000)
    for bins in (5, 15, 40):
        counted = table(uncertainty, np.zeros(1000, dtype=int), bins)
        assert expected_calibration_error(*counted) == pytest.approx(float(np.mean(1 - uncertainty)), abs=1e-7)
        assert signed_gap(*counted) == pytest.approx(float(np.mean(1 - uncertainty)), abs=1e-7)


def test_bin_index_of_recalibrated_values():
    assert bin_index(np.array([0.0, 0.2, 0.25, 0.5, 0.75, 1.0]), 4).tolist() == [0, 0, 0, 1, 2, 3]


def test_foreground_error_takes_wrong_and_correct_pixels_apart():
    # Two bins: 3 wrong and 1 right at confidence 0.5, 4 right at 0.75; with a leading axis of two lambdas.
    count = np.array([[[3, 0], [1, 4]], [[0, 0], [0, 0]]])
    found = foreground_error(count, np.array([[[1.5, 0.0], [0.5, 3.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert found[0] == (4 * abs(0.25 - 0.5) + 4 * abs(1 - 0.75)) / 8 and isnan(found[1])


# ---------------------------------------------------------------- the Brier score and its parts


def test_the_parts_of_the_brier_score_are_those_of_a_loop_over_bins():
    rng = np.random.default_rng(7)
    uncertainty = (rng.random(20_000) ** 3).astype(np.float32)
    correct = rng.random(20_000) > 0.6 * uncertainty + 0.1
    found = brier_parts(*table(uncertainty, correct))
    confidence = (np.float32(1) - uncertainty).astype(np.float64)
    reliability = resolution = inside_bins = 0.0
    for b in range(15):
        here = (confidence > (b / 15 if b else -1)) & (confidence <= (b + 1) / 15)
        if here.any():
            reliability += here.mean() * (confidence[here].mean() - correct[here].mean()) ** 2
            resolution += here.mean() * (correct[here].mean() - correct.mean()) ** 2
            inside_bins += here.mean() * (confidence[here].var() - 2 * np.cov(confidence[here], correct[here], bias=True)[0, 1])
    uncertainty_part = correct.mean() * (1 - correct.mean())
    assert found == pytest.approx((reliability, resolution, uncertainty_part), rel=1e-9)
    brier = np.mean((confidence - correct) ** 2)
    assert brier == pytest.approx(reliability - resolution + uncertainty_part + inside_bins, rel=1e-9) and inside_bins != 0


def test_the_brier_score_is_its_parts_where_a_bin_holds_one_confidence():
    count, correct, centre = np.array([4, 0, 6, 10]), np.array([1, 0, 5, 10]), np.array([0.2, 0.4, 0.6, 0.9])
    reliability, resolution, uncertainty = brier_parts(count, correct, count * centre)
    brier = (correct * (1 - centre) ** 2 + (count - correct) * centre**2).sum() / 20
    assert brier == pytest.approx(reliability - resolution + uncertainty, rel=1e-12)


# ---------------------------------------------------------------- the debiased error


def test_the_jackknife_is_that_of_a_loop_over_images():
    rng = np.random.default_rng(5)
    count = rng.integers(0, 9, (6, 2, 15))
    count[2] = 0  # an image without a pixel in the region
    correct = rng.binomial(count, 0.6)
    confidence = count * np.linspace(0.1, 0.9, 15)
    found = debiased_calibration_error(count, correct, confidence)
    for score in range(2):
        bins = [part[:, score] for part in (count, correct, confidence)]
        errors = [expected_calibration_error(*(np.delete(part, [2, i], 0).sum(0) for part in bins)) for i in (0, 1, 3, 4, 5)]
        whole = expected_calibration_error(*(part.sum(0) for part in bins))
        assert found[score] == pytest.approx(max(5 * whole - 4 * np.mean(errors), 0.0), abs=1e-12)


def simulated_errors(gap, repetitions=300, images=100):
    """Means of plug-in and debiased ECE over simulated splits whose accuracy is the confidence minus a gap, and the truth."""
    rng = np.random.default_rng(11)
    centre = (np.arange(15) + 0.5) / 15

    def split(number):
        count = rng.multinomial(300, np.exp(2 * centre) / np.exp(2 * centre).sum(), size=number)
        quality = rng.normal(0, 0.08, (number, 1)) * np.minimum(1, 4 * centre * (1 - centre))
        return count, rng.binomial(count, np.clip(centre - gap + quality, 0, 1)), count * centre

    errors = []
    for _ in range(repetitions):
        bins = split(images)
        errors.append((expected_calibration_error(*(part.sum(0) for part in bins)), debiased_calibration_error(*bins)))
    return *np.mean(errors, 0), expected_calibration_error(*(part.sum(0) for part in split(100_000)))


def test_the_debiased_error_is_nearly_unbiased_where_the_gap_is_as_large_as_its_noise():
    plain, debiased, truth = simulated_errors(0.012)
    assert plain - truth > 0.0015 and abs(debiased - truth) < 0.3 * (plain - truth)


def test_the_debiased_error_has_half_the_bias_where_calibration_is_perfect():
    plain, debiased, truth = simulated_errors(0.0)
    assert truth < 0.001 and plain > 0.007  # all that the plug-in shows is bias
    assert debiased - truth < 0.65 * (plain - truth)


def test_one_image_has_no_debiased_error():
    count = np.array([[3, 1], [0, 0]])
    assert np.isnan(debiased_calibration_error(count, count, 0.5 * count))
