from fractions import Fraction
from math import ceil, isnan, nan

import netcal.metrics
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import calibration
from calibration import (
    atoms,
    average_calibration_error,
    bin_index,
    bootstrap,
    bootstrap_weights,
    confidence_sum,
    count_confidence,
    expected_calibration_error,
    interval,
    jsonable,
    maximum_calibration_error,
    region_bins,
    reliability,
    signed_gap,
    verdict,
)


def table(uncertainty, correct, bins=15):
    """Counts, correct counts and confidence sums (B,) of pixels, by way of the streaming counter."""
    scores = torch.tensor(np.asarray(uncertainty, dtype=np.float32))[None]
    count, total = count_confidence(scores, torch.tensor(np.asarray(correct)).to(torch.int32), 2, bins)
    return count[0].sum(0).numpy(), count[0, 1].numpy(), confidence_sum(total)[0].sum(0).numpy()


def exact_bin(uncertainty, bins):
    """Bin of 1 - u by rational arithmetic on the float32 confidence."""
    confidence = Fraction(float(np.float32(1) - np.float32(uncertainty)))
    return max(ceil(confidence * bins) - 1, 0)


# Counting


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
        for atom in range(4):
            here = group.numpy() == atom
            expected = np.bincount(index[score, here], minlength=bins)
            assert count[score, atom].tolist() == expected.tolist()
            sums = np.bincount(index[score, here], weights=confidence[score, here].astype(np.float64), minlength=bins)
            assert confidence_sum(total)[score, atom].tolist() == sums.tolist()  # exactly


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


def test_atoms_and_regions():
    code = atoms(torch.tensor([0.2, 0.8, 0.5, 0.51]), torch.tensor([0, 0, 1, 1], dtype=torch.uint8))
    assert code.tolist() == [0, 1, 2, 3]  # p = 0.5 is predicted background
    count = np.array([[1], [10], [100], [1000]])
    expected = {
        "foreground": (1100, 1000),
        "predicted_foreground": (1010, 1000),
        "union": (1110, 1000),
        "whole_image": (1111, 1001),
    }
    for region, numbers in expected.items():
        pixels, right, _ = region_bins(count, count.astype(float), region)
        assert (pixels.item(), right.item()) == numbers


# Measures


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


# Bootstrap


def test_bootstrap_is_resampling_of_images():
    rng = np.random.default_rng(0)
    counters = {"a": rng.integers(0, 50, (7, 2, 3)), "b": rng.random((7, 4))}
    found = bootstrap(counters, lambda summed: {"a": summed["a"][:, 1, 2], "b": summed["b"].sum(1)}, resamples=40, seed=5)
    weights = np.concatenate(list(bootstrap_weights(7, 40, 5)))
    assert weights.shape == (40, 7) and (weights.sum(1) == 7).all()
    for row, weight in enumerate(weights):
        images = np.repeat(np.arange(7), weight.astype(int))
        assert found["a"][row] == counters["a"][images, 1, 2].sum()
        assert found["b"][row] == pytest.approx(counters["b"][images].sum())


def test_chunks_do_not_change_the_bootstrap_and_seeds_do():
    counters = {"a": np.arange(13.0)}
    runs = [
        bootstrap(counters, lambda summed: {"a": summed["a"]}, 100, seed, chunk)["a"]
        for seed, chunk in ((1, 256), (1, 7), (2, 256))
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


def test_bootstrap_of_the_mean_has_the_textbook_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap({"x": values}, lambda summed: {"x": summed["x"] / 400}, 4000)["x"]
    assert found.std() == pytest.approx(values.std() / np.sqrt(400), rel=0.05)
    low, high = interval(found)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.01)


def test_interval_leaves_out_resamples_without_pixels():
    samples = np.stack([np.r_[np.arange(101.0), nan], np.full(102, nan)], 1)
    bounds = interval(samples)
    assert bounds[:, 0] == pytest.approx([2.5, 97.5])
    assert np.isnan(bounds[:, 1]).all()


def images_of_two_scores(rng, images):
    """Bin counts of images whose accuracy varies from one to the next; score 1 is the more overconfident one."""
    centre = (np.arange(15) + 0.5) / 15
    quality = rng.normal(0, 0.04, size=(images, 1))
    parts = []
    for score in range(2):
        profile = np.exp(3 * centre * (1 + 0.5 * score))
        share = rng.dirichlet(20 * profile / profile.sum(), size=images)
        count = rng.multinomial(rng.integers(100, 800, size=images), share)
        accuracy = np.clip(centre - 0.12 - 0.05 * score + quality, 0.01, 0.99)
        parts.append((count, rng.binomial(count, accuracy), count * centre))
    return {name: np.stack([part[index] for part in parts], 1) for index, name in enumerate(("n", "r", "c"))}


def two_errors_and_their_difference(summed):
    error = expected_calibration_error(summed["n"], summed["r"], summed["c"])
    return {"errors": np.concatenate([error, error[..., 1:] - error[..., :1]], -1)}


def test_intervals_cover_the_truth_in_95_percent_of_repetitions():
    rng = np.random.default_rng(11)
    population = images_of_two_scores(rng, 200_000)
    truth = two_errors_and_their_difference({name: value.sum(0) for name, value in population.items()})["errors"]
    covered = np.zeros(3)
    for repetition in range(2000):  # the share itself then has a standard error of half a point
        sample = images_of_two_scores(rng, 150)
        low, high = interval(bootstrap(sample, two_errors_and_their_difference, 400, repetition)["errors"])
        covered += (low <= truth) & (truth <= high)
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_verdict_needs_an_interval_on_one_side_of_zero():
    assert verdict(-0.02, -0.03, -0.01) == "improves"
    assert verdict(0.02, 0.01, 0.03) == "degrades"
    assert verdict(0.02, -0.01, 0.03) == "no difference shown"
    assert verdict(0.0, 0.0, 0.0) == "no difference shown"
    assert verdict(nan, nan, nan) == "no difference shown"
    assert verdict(-1e-9, -2e-9, -1e-9) == "no difference shown"  # below the step of a confidence: rounding


def test_jsonable():
    value = {"a": np.float64(0.1), "b": [np.int64(3), nan, (np.inf,)], 5: np.array([1.5, nan]), "t": torch.tensor([1, 2])}
    assert jsonable(value) == {"a": 0.1, "b": [3, None, [None]], "5": [1.5, None], "t": [1, 2]}
    assert jsonable({"x": np.bool_(True), "y": "text", "z": None}) == {"x": True, "y": "text", "z": None}
