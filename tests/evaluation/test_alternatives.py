from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import constructed_images, make_images

from evaluation.alternatives import candidate_fusions, count_fusions, fusion_table
from evaluation.counting import merge
from evaluation.fusion import LAMBDAS, RULES, lambda_grid
from evaluation.normalisation import NORMALISATIONS, distributions
from evaluation.protocol import evaluate


@pytest.fixture(scope="module")
def splits():
    return constructed_images(10, "informative", seed=1), constructed_images(20, "informative", seed=2)


@pytest.fixture(scope="module")
def rules(splits):
    candidates = candidate_fusions(splits[0], distributions(splits[0]), LAMBDAS)
    return fusion_table(candidates, *(count_fusions(split, candidates) for split in splits), resamples=300)


def test_a_row_for_every_normalisation_and_rule(rules):
    assert {(row["normalisation"], row["rule"]) for row in rules} == {(n, r) for n in NORMALISATIONS for r in RULES}
    assert len(rules) == len(NORMALISATIONS) * len(RULES)


def test_the_row_of_the_paper_is_the_headline(splits, rules):
    evaluation = evaluate(*splits, resamples=300)
    row = next(row for row in rules if (row["normalisation"], row["rule"]) == ("min_max", "convex"))
    assert row["parameter"] == evaluation.metrics["lambda"]
    assert row["foreground_ece"]["value"] == evaluation.metrics["test"]["foreground_ece"]["fused"]
    headline = evaluation.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert row["minus_predictive_variance"] == headline


def test_rules_with_saliency_win_where_it_is_informative(rules):
    rows = {(row["normalisation"], row["rule"]): row for row in rules}
    assert rows["min_max", "convex"]["minus_predictive_variance"]["verdict"] == "improves"
    assert rows["min_max", "predictive"]["minus_predictive_variance"]["value"] == 0
    assert rows["min_max", "logistic"]["baseline"] == "logistic_predictive"
    assert rows["rank", "predictive"]["minus_baseline"]["verdict"] == "no difference shown"


def test_fusions_are_counted_alike_in_shards():
    images = make_images(4)
    candidates = candidate_fusions(images, distributions(images), lambda_grid(2))
    whole = count_fusions(images, candidates)
    parts = merge(count_fusions([item], candidates) for item in images)
    assert all(np.array_equal(whole.images[name], parts.images[name]) for name in whole.images)


def test_every_candidate_is_counted_as_the_score_it_gives():
    images = make_images(2)
    candidates = candidate_fusions(images, distributions(images), lambda_grid(2))
    counters = count_fusions(images, candidates, bins=10)
    for row, (_, maps) in enumerate(images):
        inside = maps["true_mask"] == 1
        right = (maps["mean_prediction"] > 0.5)[inside].numpy()
        for index, candidate in enumerate(candidates):
            confidence = 1 - candidate(maps["pred_variance"], maps["saliency_variance"])[inside].numpy()
            found = counters.images["fusion_confidence"][row, index].sum(-1)
            assert found == pytest.approx([confidence[~right].sum(dtype=float), confidence[right].sum(dtype=float)])
            assert counters.images["fusion_count"][row, index].sum(-1).tolist() == [(~right).sum(), right.sum()]
