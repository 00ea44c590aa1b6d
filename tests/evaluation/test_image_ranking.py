from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import make_images
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from evaluation.image_ranking import confusion, measure_rankings, rank_statistics, uncertainty_of_images
from evaluation.names import AGGREGATES
from evaluation.overlap import overlap_of_outcomes
from evaluation.protocol import evaluate
from evaluation.resampling import bootstrap_weights, interval
from evaluation.scores import uncertainty_scores

MEASURES = ("spearman_with_dice", "auroc_bad_dice", "aurc", "augrc")


@pytest.fixture(scope="module")
def images():
    found = make_images(12, seed=2)
    for index, (_, maps) in enumerate(found):
        maps["pass_dice"] = 0.9 - 0.03 * index
    found.items[3][1]["mean_prediction"].mul_(0.5)  # no lesion predicted
    return found


@pytest.fixture(scope="module")
def found(images):
    return evaluate(make_images(8, seed=1), images, resamples=100)


def slow_areas(uncertainty, risk):
    """AURC and AUGRC by a loop over coverages, the risk of tied images spread evenly over the tie."""
    order = np.argsort(uncertainty, kind="stable")
    uncertainty, risk = uncertainty[order], risk[order]
    for value in np.unique(uncertainty):
        risk[uncertainty == value] = risk[uncertainty == value].mean()
    sums = [risk[:kept].sum() for kept in range(1, len(risk) + 1)]
    means = [total / kept for kept, total in enumerate(sums, 1)]
    return np.mean(means), np.mean(sums) / len(risk)


@pytest.mark.parametrize("digits", [1, 12])  # with ties between images, and without
def test_rank_statistics_of_weighted_images_are_those_of_repeated_ones(digits):
    rng = np.random.default_rng(0)
    uncertainty, dice = np.round(rng.random(40), digits), np.round(rng.random(40), 2)
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    for weight, (correlation, area, aurc, augrc) in zip(weights, rank_statistics(uncertainty, dice, weights)):
        images = np.repeat(np.arange(40), weight.astype(int))
        assert correlation == pytest.approx(spearmanr(uncertainty[images], dice[images])[0])
        assert area == pytest.approx(roc_auc_score(dice[images] < 0.8, uncertainty[images]))
        assert (aurc, augrc) == pytest.approx(slow_areas(uncertainty[images], 1 - dice[images]), rel=1e-12)


def test_areas_of_a_perfect_and_of_no_ranking():
    # Risks 0, 0, 1/2, 1/2 of four images, found or all tied.
    dice, whole = np.array([1.0, 0.5, 1.0, 0.5]), np.ones((1, 4))
    perfect = rank_statistics(1 - dice, dice, whole)[0, 2:]
    assert perfect == pytest.approx([(0 + 0 + 0.5 / 3 + 1 / 4) / 4, (0 + 0 + 0.5 + 1) / 4 / 4])
    # Kept at random, the mean risk is 1/4 at every coverage, and its share of all images grows with it.
    tied = rank_statistics(np.zeros(4), dice, whole)[0]
    assert tied[2:] == pytest.approx([1 / 4, (1 + 2 + 3 + 4) / 4 / 4 / 4]) and np.isnan(tied[0]) and tied[1] == 0.5


def test_ranking_of_images_uses_the_rows(found):
    ranking = found.metrics["test"]["ranking_of_images"]
    dice = [row["dice"] for row in found.rows]
    mean = [row["mean_fused"] for row in found.rows]
    expected = spearmanr(mean, dice)[0]
    assert ranking["whole_image"]["fused"]["spearman_with_dice"]["value"] == pytest.approx(expected)
    assert ranking["bad_images"] == sum(value < 0.8 for value in dice)


def test_every_aggregate_is_that_of_the_pixels(images, found):
    for name in found.test.scores:
        aggregates = {aggregate: uncertainty_of_images(found.test, name, aggregate) for aggregate in AGGREGATES}
        for place, (_, maps) in enumerate(images):
            score = uncertainty_scores({key: value for key, value in maps.items() if key != "pass_dice"}, found.fusion)[name]
            inside = maps["mean_prediction"] > 0.5
            ordered = score.flatten().sort().values
            side = min(score.shape) // 8
            windows = score.double().unfold(0, side, 1).unfold(1, side, 1).mean((2, 3))
            expected = {
                "whole_image": float(score.double().mean()),
                "predicted_foreground": float(score[inside].double().mean()),  # NaN where there is none
                "quantile95": float(ordered[int(np.ceil(0.95 * len(ordered))) - 1]),
                "largest_patch": float(windows.max()),
            }
            assert {key: value[place] for key, value in aggregates.items()} == pytest.approx(expected, abs=2e-7, nan_ok=True)
        assert np.isnan(aggregates["predicted_foreground"]).tolist() == [place == 3 for place in range(12)]


def test_every_ranking_has_its_measures_and_differences(found):
    ranking = found.metrics["test"]["ranking_of_images"]
    dice, _ = overlap_of_outcomes(confusion(found.test))
    for aggregate, table in ranking["aggregates"].items():
        reference = table["predictive_variance"]
        for name, entry in table.items():
            uncertainty = uncertainty_of_images(found.test, name, aggregate)
            known = ~np.isnan(uncertainty)
            expected = rank_statistics(uncertainty[known], dice[known], np.ones((1, known.sum())))[0]
            assert entry["images"] == known.sum() == (11 if aggregate == "predicted_foreground" else 12)
            for measure, value in zip(MEASURES, expected):
                low, high = entry[measure]["interval"]
                assert entry[measure]["value"] == pytest.approx(value) and low <= high
                if name != "predictive_variance":
                    difference = entry["minus_predictive_variance"][measure]
                    assert difference["value"] == pytest.approx(value - reference[measure]["value"], abs=1e-12)
        assert "minus_predictive_variance" not in reference
    for region in ("whole_image", "predicted_foreground"):
        for name, entry in ranking[region].items():
            assert entry == {key: ranking["aggregates"][region][name][key] for key in ("images", *MEASURES[:2])}


def test_differences_are_paired(found):
    dice, _ = overlap_of_outcomes(confusion(found.test))
    rankings = [uncertainty_of_images(found.test, name, "quantile95") for name in ("predictive_variance", "saliency_variance")]
    first, second = measure_rankings(rankings, dice, 100, 42)
    expected = np.nanquantile(second.samples[:, 2] - first.samples[:, 2], [0.025, 0.975])
    table = found.metrics["test"]["ranking_of_images"]["aggregates"]["quantile95"]
    assert table["saliency_variance"]["minus_predictive_variance"]["aurc"]["interval"] == pytest.approx(expected)


def test_disagreement_of_the_passes_is_a_baseline_where_all_maps_have_it(images, found):
    entry = found.metrics["test"]["ranking_of_images"]["baselines"]["pass_dice"]
    dice = np.array([row["dice"] for row in found.rows])
    disagreement = 1 - np.array([maps["pass_dice"] for _, maps in images])
    assert entry["aurc"]["value"] == pytest.approx(slow_areas(disagreement, 1 - dice)[0])
    reference = found.metrics["test"]["ranking_of_images"]["aggregates"]["whole_image"]["predictive_variance"]
    difference = entry["minus_predictive_variance"]["aurc"]["value"]
    assert difference == pytest.approx(entry["aurc"]["value"] - reference["aurc"]["value"])
    without = evaluate(make_images(3, seed=1), make_images(3, seed=2), resamples=20)
    assert "baselines" not in without.metrics["test"]["ranking_of_images"]


def test_flat_maps_have_a_largest_pixel_for_a_patch():
    images = make_images(3, seed=2)
    for _, maps in images:
        maps.update({name: values.flatten() for name, values in maps.items()})
    counted = evaluate(make_images(3, seed=1), images, resamples=20).test
    for place, (_, maps) in enumerate(images):
        largest = float((maps["mean_prediction"] - (maps["mean_prediction"] > 0.5).float()).abs().max())
        found = uncertainty_of_images(counted, "one_minus_max_probability", "largest_patch")
        assert found[place] == pytest.approx(largest)
    assert counted.images["count"][:, :, 4:].sum() == 0  # and no band


def test_no_image_has_no_rank():
    assert np.isnan(rank_statistics(np.zeros(0), np.zeros(0), np.ones((3, 0)))).all()


def test_a_resample_without_ranked_images_has_no_rank():
    weights = np.array([[0.0, 0.0], [1.0, 1.0]])
    found = rank_statistics(np.array([0.1, 0.2]), np.array([0.9, 0.5]), weights)
    assert np.isnan(found[0]).all() and found[1] == pytest.approx([-1, 1, (0.1 + 0.3) / 2, (0.1 + 0.6) / 4])


def test_the_ranks_of_many_images_are_exact():
    rng = np.random.default_rng(2)
    uncertainty, dice = rng.random(3000), rng.random(3000)
    found = rank_statistics(uncertainty, dice, np.ones((1, 3000)))[0]
    assert found[0] == pytest.approx(spearmanr(uncertainty, dice)[0], abs=1e-12)
    assert found[2:] == pytest.approx(slow_areas(uncertainty, 1 - dice), rel=1e-10)


def two_rankings(rng, images):
    """Measures of a better and a worse uncertainty of simulated images, then their differences, as a function of weights."""
    dice = rng.beta(6, 1.2, images)
    scores = [1 - dice + rng.normal(0, spread, images) for spread in (0.15, 0.25)]

    def measures(weights):
        first, second = (rank_statistics(score, dice, weights) for score in scores)
        return np.concatenate([first, second - first], 1)

    return measures


def test_intervals_of_rankings_cover_the_truth_in_95_percent_of_repetitions():
    rng = np.random.default_rng(3)
    truth = np.mean([two_rankings(rng, 20_000)(np.ones((1, 20_000)))[0] for _ in range(10)], 0)
    covered = np.zeros(8)
    for repetition in range(400):  # the share itself then has a standard error of one point
        measures = two_rankings(rng, 150)
        low, high = interval(np.concatenate([measures(weights) for weights in bootstrap_weights(150, 400, repetition)]))
        covered += (low <= truth) & (truth <= high)
    assert covered / 400 == pytest.approx(0.95, abs=0.035)
