from __future__ import annotations

from math import isnan, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation import ranking
from evaluation.ranking import (
    HISTOGRAM_BINS,
    add_histogram,
    aurc,
    auroc,
    average_precision,
    bin_values,
    equal_mass_error,
    excess_aurc,
    histogram_bin,
    ideal_aurc,
    pool_bins,
    quantile_edges,
    risk_coverage,
)


def histogram(score, wrong):
    """Histograms of correct and wrong pixels, (F,) each."""
    place = histogram_bin(torch.tensor(np.asarray(score, dtype=np.float32)))
    parts = []
    for chosen in (~np.asarray(wrong), np.asarray(wrong)):
        counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
        add_histogram(counts, place[torch.tensor(chosen)])
        parts.append(counts.numpy())
    return parts


def pixels(kind, count=1_500_000, seed=0):
    """Scores and errors; "skewed" spans twenty orders of magnitude, "tied" has eleven values, "zero" mostly one."""
    rng = np.random.default_rng(seed)
    latent = rng.random(count)
    score = {
        "uniform": latent,
        "skewed": 10.0 ** (-20 * (1 - latent)),
        "tied": np.round(latent, 1),
        "zero": np.where(latent < 0.9, 0.0, latent),
    }[kind]
    return score.astype(np.float32), rng.random(count) < 0.02 + 0.3 * latent**3


def slow_aurc(score, wrong):
    """Area under the risk-coverage curve pixel by pixel, errors of a tie spread evenly."""
    order = np.argsort(score, kind="stable")
    score, wrong = score[order], wrong[order].astype(float)
    for value in np.unique(score):
        wrong[score == value] = wrong[score == value].mean()
    return float(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))


@pytest.mark.parametrize("kind", ["uniform", "skewed", "tied", "zero"])
def test_scikit_learn_agrees(kind):
    score, wrong = pixels(kind)
    counts = histogram(score, wrong)
    assert auroc(*counts) == pytest.approx(roc_auc_score(wrong, score), abs=1e-4)
    assert average_precision(*counts) == pytest.approx(average_precision_score(wrong, score), abs=1e-4)


@pytest.mark.parametrize("kind", ["tied", "zero", "uniform"])
def test_risk_coverage_area_agrees_with_a_loop_over_pixels(kind):
    score, wrong = pixels(kind, 3_000)
    counts = histogram(score, wrong)
    assert aurc(*counts) == pytest.approx(slow_aurc(score, wrong), abs=1e-4)
    ideal = slow_aurc(wrong.astype(float) + 0.1 * np.arange(3_000) / 3_000, wrong)
    assert excess_aurc(*counts) == pytest.approx(aurc(*counts) - ideal, abs=1e-4)


def test_hand_computed_ranking():
    # Ascending uncertainty: right, wrong, right, wrong. Errors above right pixels: 3 of 4 pairs.
    correct, wrong = np.array([1, 0, 1, 0]), np.array([0, 1, 0, 1])
    assert auroc(correct, wrong) == 3 / 4
    assert average_precision(correct, wrong) == (1 / 1 + 2 / 3) / 2
    assert aurc(correct, wrong) == pytest.approx((0 / 1 + 1 / 2 + 1 / 3 + 2 / 4) / 4, abs=0.01)
    # Many pixels in each of the four places: the integral of (errors so far) / x over the coverage x, by quarters.
    quarters = 0 + (1 / 4 - log(2) / 4) + log(3 / 2) / 4 + (1 / 4 - log(4 / 3) / 2)
    assert aurc(100_000 * correct, 100_000 * wrong) == pytest.approx(quarters, abs=1e-5)


def test_perfect_and_reversed_rankings():
    perfect = np.array([70, 0]), np.array([0, 30])
    assert auroc(*perfect) == 1 and average_precision(*perfect) == 1
    assert excess_aurc(*perfect) == pytest.approx(0, abs=1e-12)
    assert auroc(np.array([0, 70]), np.array([30, 0])) == 0
    assert auroc(np.array([70]), np.array([30])) == 0.5  # one value for all
    assert average_precision(np.array([70]), np.array([30])) == 0.3
    assert aurc(np.array([70]), np.array([30])) == pytest.approx(0.3)


def test_nothing_to_rank_is_not_a_number():
    nothing, some = np.zeros(3), np.array([1, 2, 3])
    assert isnan(auroc(some, nothing)) and isnan(auroc(nothing, some)) and isnan(average_precision(some, nothing))
    assert isnan(aurc(nothing, nothing)) and isnan(excess_aurc(nothing, nothing))
    assert isnan(equal_mass_error(np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)))
    assert aurc(some, nothing) == 0 and excess_aurc(some, nothing) == 0
    assert isnan(ideal_aurc(nothing, nothing)) and ideal_aurc(some, nothing) == 0


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_histogram_bins_keep_order_and_value(first, second):
    places = histogram_bin(torch.tensor([first, second]))
    if first <= second:
        assert places[0] <= places[1]
    if first > 1e-30:
        assert bin_values()[places[0]] == pytest.approx(first, rel=2**-13 if first >= 2**-16 else 2**-7)


def test_ends_and_odd_values_of_the_histogram_bins():
    places = histogram_bin(torch.tensor([0.0, -0.0, 1.0, 7.0]))
    assert places.tolist() == [0, 0, HISTOGRAM_BINS - 1, HISTOGRAM_BINS - 1]
    assert bin_values()[0] == 0 and bin_values()[-1] == 1


@pytest.mark.parametrize("way", [ranking.scattered, ranking.sorted_out])
def test_histograms_by_scatter_and_by_sorting_count_the_same(way):
    index = torch.randint(0, 50, (10, 100), generator=torch.Generator().manual_seed(0))
    counts = torch.ones(60, dtype=torch.int64)
    way(counts, index.view(-1))
    assert torch.equal(counts, torch.bincount(index.view(-1), minlength=60) + 1)
    add_histogram(counts, index)
    assert torch.equal(counts, 2 * torch.bincount(index.view(-1), minlength=60) + 1)


def test_quantile_bins_share_the_pixels_evenly_and_keep_all_of_them():
    score, wrong = pixels("skewed")
    counts = np.stack(histogram(score, wrong))[None]
    edges = quantile_edges(counts, [(0, 1)], bins=64)
    pooled = pool_bins(counts[0].sum(0), edges[0])
    assert len(pooled) == 64 and pooled.sum() == 1_500_000
    assert abs(pooled / 1_500_000 - 1 / 64).max() < 0.003


def test_quantile_bins_rank_nearly_as_well_as_histogram_bins():
    counts = np.stack(histogram(*pixels("skewed")))
    edges = quantile_edges(counts[None], [(0,), (1,)])
    assert auroc(*pool_bins(counts, edges[0])) == pytest.approx(auroc(*counts), abs=1e-4)


@pytest.mark.parametrize("right", [600, 618])  # the shares of 618 add up to a little less than one half
def test_quantile_bins_keep_errors_apart_that_a_score_tells_completely(right):
    counts = np.zeros((2, HISTOGRAM_BINS))
    counts[0, 10_000 : 10_000 + right] = np.arange(1, right + 1)
    counts[1, 10_000 + right : 11_003 + right] = 7
    pooled = pool_bins(counts, quantile_edges(counts[None], [(0,), (1,)])[0])
    assert not (pooled[0] * pooled[1]).any() and auroc(*pooled) == 1


def test_risk_coverage_curve():
    # Uncertainty ascending: 60 right, a tie of 20 right and 20 wrong.
    curve = risk_coverage(np.array([60, 20]), np.array([0, 20]), points=11)
    assert curve["coverage"] == pytest.approx(np.arange(1, 11) / 10)
    assert curve["risk"][5] == 0 and curve["risk"][7] == pytest.approx(10 / 80) and curve["risk"][9] == 0.2
    assert curve["ideal"][7] == 0 and curve["ideal"][8] == pytest.approx(10 / 90) and curve["ideal"][9] == 0.2


def test_equal_mass_bins_agree_with_sorting():
    score, wrong = pixels("uniform", 150_000)
    order = np.argsort(score)
    parts = zip(np.array_split((1 - score)[order], 15), np.array_split(~wrong[order], 15))
    expected = sum(abs(confidence.mean() - right.mean()) * len(right) for confidence, right in parts) / 150_000
    assert equal_mass_error(*histogram(score, wrong)) == pytest.approx(expected, abs=1e-3)


def test_equal_mass_bins_do_not_split_ties():
    # All pixels at u = 0.25 (the middle of whose histogram bin lies 2**-15 above it): one bin, |0.75 - 0.6|.
    score, wrong = np.full(100, 0.25), np.arange(100) < 40
    assert equal_mass_error(*histogram(score, wrong)) == pytest.approx(0.75 - 0.6, abs=2**-14)
