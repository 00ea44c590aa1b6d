from __future__ import annotations

from math import nan

import numpy as np
import pytest

from evaluation.calibration import brier_parts, expected_calibration_error
from evaluation.resampling import (
    HIGHER_IS_BETTER,
    bootstrap,
    bootstrap_weights,
    count_units,
    estimate,
    interval,
    paired_difference,
    units_of,
    verdict,
)


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


def test_bootstrap_of_groups_draws_each_group_with_all_its_images():
    rng = np.random.default_rng(3)
    ids = [f"image {index}" for index in range(12)]
    groups = {id: f"patient {7 * place % 4}" for place, id in enumerate(ids[:9])}  # the last three stand for themselves
    units = units_of(ids, groups)
    members = {}
    for place, id in enumerate(ids):  # the slow reference: a list of images for each unit, drawn by their numbers
        members.setdefault(groups.get(id, id), []).append(place)
    counters = {"x": rng.random((12, 3)), "n": rng.integers(1, 9, 12)}
    found = bootstrap(counters, lambda summed: {"mean": summed["x"][:, 1] / summed["n"]}, 50, seed=7, chunk=16, units=units)
    drawn = np.random.default_rng(7)
    for first in range(0, 50, 16):
        for row, numbers in enumerate(drawn.integers(0, len(members), size=(min(16, 50 - first), len(members)))):
            images = [image for number in numbers for image in list(members.values())[number]]
            expected = counters["x"][images, 1].sum() / counters["n"][images].sum()
            assert found["mean"][first + row] == pytest.approx(expected, rel=1e-12)
    assert count_units(ids, groups) == len(members) == 4 + 3
    assert units_of(ids, None) is None and units_of(ids, {"another image": "p"}) is None
    assert count_units(ids, None) == count_units(ids, {}) == 12


def test_groups_of_one_image_each_draw_what_images_draw():
    alone = units_of(list("dbca"), {"b": "z", "a": "y", "d": "x", "c": "w"})
    for one, other in zip(bootstrap_weights(4, 30, 5, units=alone), bootstrap_weights(4, 30, 5)):
        assert np.array_equal(one, other)


def test_the_interval_of_groups_is_wider_where_their_images_are_alike_and_covers_what_the_other_misses():
    held = {"groups": 0, "images": 0}
    widths = {"groups": [], "images": []}
    for repetition in range(200):
        rng = np.random.default_rng([11, repetition])
        patients = np.repeat(np.arange(25), rng.integers(1, 9, 25))  # 1 to 8 images each
        values = rng.normal(0, 1, 25)[patients] + rng.normal(0, 0.5, len(patients))  # of which the patient decides most
        units = units_of([str(image) for image in range(len(values))], {str(image): str(p) for image, p in enumerate(patients)})
        arrays = {"x": values, "n": np.ones(len(values))}
        for name, drawn in (("groups", units), ("images", None)):
            samples = bootstrap(arrays, lambda summed: {"mean": summed["x"] / summed["n"]}, 300, repetition, units=drawn)
            low, high = interval(samples["mean"])
            held[name] += low <= 0.0 <= high
            widths[name].append(high - low)
    assert np.mean(widths["groups"]) > 1.6 * np.mean(widths["images"])
    assert held["groups"] / 200 > 0.86 and held["images"] / 200 < 0.75, held


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


def errors_and_their_differences(summed):
    """ECE, reliability and resolution of the first score, and the difference of the second from it in each."""
    bins = summed["n"], summed["r"], summed["c"]
    found = np.stack([expected_calibration_error(*bins), *brier_parts(*bins)[:2]], -1)
    return {"errors": np.concatenate([found[..., 0, :], found[..., 1, :] - found[..., 0, :]], -1)}


def test_intervals_cover_the_truth_in_95_percent_of_repetitions():
    rng = np.random.default_rng(11)
    population = images_of_two_scores(rng, 200_000)
    truth = errors_and_their_differences({name: value.sum(0) for name, value in population.items()})["errors"]
    covered = np.zeros(6)
    for repetition in range(2000):  # the share itself then has a standard error of half a point
        sample = images_of_two_scores(rng, 150)
        low, high = interval(bootstrap(sample, errors_and_their_differences, 400, repetition)["errors"])
        covered += (low <= truth) & (truth <= high)
    assert covered / 2000 == pytest.approx(0.95, abs=0.025)


def test_verdict_needs_an_interval_on_one_side_of_zero():
    assert verdict(-0.02, -0.03, -0.01) == "improves"
    assert verdict(0.02, 0.01, 0.03) == "degrades"
    assert verdict(0.02, -0.01, 0.03) == "no difference shown"
    assert verdict(0.0, 0.0, 0.0) == "no difference shown"
    assert verdict(nan, nan, nan) == "no difference shown"
    assert verdict(-1e-9, -2e-9, -1e-9) == "no difference shown"  # below the step of a confidence: rounding


def paired(second_minus_first=0.25):
    """Two scores whose values vary together from one resample to the next, far more than they differ."""
    common = np.linspace(0.0, 10.0, 101)
    return np.array([5.0, 5.0 + second_minus_first]), np.stack([common, common + second_minus_first], 1)


def test_a_paired_difference_leaves_out_what_both_scores_share():
    found = paired_difference(*paired(), 1, 0)
    assert list(found) == ["value", "interval", "verdict"]
    assert found["value"] == 0.25 and found["interval"] == pytest.approx([0.25, 0.25]) and found["verdict"] == "degrades"
    low, high = estimate(5.0, paired()[1][:, 0])["interval"]
    assert high - low == pytest.approx(9.5)  # of one score alone


def test_a_paired_difference_knows_which_direction_is_better():
    assert paired_difference(*paired(), 0, 1)["verdict"] == "improves"
    found = paired_difference(*paired(), 1, 0, HIGHER_IS_BETTER)
    assert found["verdict"] == "improves" and found["interval"][0] <= found["value"] <= found["interval"][1]
    assert paired_difference(*paired(), 0, 1, HIGHER_IS_BETTER)["verdict"] == "degrades"
    assert paired_difference(*paired(0.0), 0, 1, HIGHER_IS_BETTER)["verdict"] == "no difference shown"
    assert "verdict" not in paired_difference(*paired(), 0, 1, None)


def test_a_paired_difference_of_nothing_shows_nothing():
    found = paired_difference(np.full(2, nan), np.full((5, 2), nan), 0, 1)
    assert np.isnan(found["value"]) and np.isnan(found["interval"]).all() and found["verdict"] == "no difference shown"


def test_no_image_cannot_be_resampled():
    with pytest.raises(ValueError, match="no images"):
        next(bootstrap_weights(0))


def test_a_number_without_resamples_has_no_interval():
    assert estimate(0.25, None) == {"value": 0.25, "interval": None}
