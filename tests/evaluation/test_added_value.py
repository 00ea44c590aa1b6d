from __future__ import annotations

import numpy as np
import pytest
from constructed_maps import constructed_images, label_copies, make_images
from slow_regions import slow_outcome

from evaluation.added_value import (
    MODELS,
    PAIRS,
    added_value,
    compare_models,
    count_error_models,
    error_features,
    fit_error_models,
    model_edges,
)
from evaluation.counting import merge
from evaluation.image_maps import checked_maps
from evaluation.names import REGIONS
from evaluation.normalisation import distributions


def logistic(validation, test, resamples):
    models = fit_error_models(validation, distributions(validation))
    edges = model_edges(count_error_models(validation, models))
    return added_value(models, count_error_models(test, models, edges), resamples)


def test_saliency_adds_something_where_it_is_informative():
    found = logistic(*(constructed_images(count, "informative", seed=seed) for count, seed in ((10, 1), (20, 2))), resamples=300)
    for region in ("foreground", "whole_image"):
        difference = found[region]["difference"]["with_minus_without"]
        assert difference["log_loss"]["verdict"] == "improves" and difference["log_loss"]["value"] < 0
        assert difference["auroc"]["verdict"] == "improves" and difference["auroc"]["value"] > 0.01


def test_saliency_adds_nothing_where_it_is_noise():
    found = logistic(constructed_images(10, "noise", seed=3), constructed_images(20, "noise", seed=4), resamples=300)
    for region in REGIONS:
        difference = found[region]["difference"]["with_minus_without"]
        assert difference["auroc"]["verdict"] != "improves" or difference["auroc"]["value"] < 0.005
        assert abs(difference["log_loss"]["value"]) < 0.005


def test_a_copy_of_the_label_seems_to_find_errors_only_where_the_region_gives_the_truth_away():
    found = logistic(label_copies(seed=1), label_copies(seed=2), resamples=200)["foreground"]["difference"]
    assert found["with_minus_without"]["auroc"]["value"] > 0.1
    assert found["label_with_minus_label_without"]["auroc"]["value"] == pytest.approx(0, abs=1e-3)


def test_model_losses_agree_with_their_formula():
    images = make_images(3)
    models = fit_error_models(images, distributions(images))
    counters = count_error_models(images, models)
    counters = count_error_models(images, models, model_edges(counters))
    table = added_value(models, counters, resamples=50)
    for region, members in REGIONS.items():
        for model in MODELS:
            losses = []
            for _, maps in images:
                flat = checked_maps("image", maps)
                outcome = slow_outcome(maps)
                inside = np.isin(outcome, members)
                features = error_features(flat, models.ranks)[model].double().numpy()[inside]
                weights = np.array(models.coefficients[region, model])
                wrong = np.isin(outcome[inside] % 4, (1, 2))
                losses.append(np.logaddexp(0, np.where(wrong, -1, 1) * (weights[0] + features @ weights[1:])))
            value = table[region]["models"][model]["log_loss"]["value"]
            assert value == pytest.approx(np.concatenate(losses).mean(), rel=1e-4, abs=1e-6)


def test_models_are_counted_alike_in_shards():
    images = make_images(3)
    models = fit_error_models(images, distributions(images))
    edges = model_edges(count_error_models(images, models))
    whole = count_error_models(images, models, edges)
    parts = merge(count_error_models([item], models, edges) for item in images)
    assert all(np.array_equal(whole.images[name], parts.images[name]) for name in whole.images)
    assert np.array_equal(whole.pooled["model_fine"], parts.pooled["model_fine"])
    assert np.array_equal(whole.images["model_cells"].sum(-1), whole.images["model_pixels"])


def test_models_are_compared_by_hand_computed_numbers():
    # Two images alike: two correct and two wrong pixels each, in three bins; "with" ranks them perfectly.
    names = [f"{region}/{model}" for region in REGIONS for model in MODELS]
    histogram = {"with": [[2, 0, 0], [0, 0, 2]]}
    cells = np.array([histogram.get(name.split("/")[1], [[1, 1, 0], [0, 1, 1]]) for name in names])
    loss = np.array([0.5 if name.endswith("/with") else 1.0 for name in names])
    arrays = {"model_log_loss": np.stack([loss] * 2), "model_pixels": np.full((2, len(names), 2), 2)}
    arrays["model_cells"] = np.stack([cells] * 2)
    auroc = np.array([1.0 if name.endswith("/with") else 7 / 8 for name in names])
    found = compare_models(names, arrays, auroc, resamples=20, seed=1)
    for region in REGIONS:
        assert list(found[region]["difference"]) == [f"{first}_minus_{second}" for first, second in PAIRS]
        assert found[region]["models"]["without"] == {
            "log_loss": {"value": 1 / 4, "interval": [1 / 4, 1 / 4]}, "auroc": {"value": 7 / 8, "interval": [7 / 8, 7 / 8]}
        }
        assert found[region]["difference"]["with_minus_without"] == {
            "log_loss": {"value": -1 / 8, "interval": [-1 / 8, -1 / 8], "verdict": "improves"},
            "auroc": {"value": 1 / 8, "interval": [1 / 8, 1 / 8], "verdict": "improves"},
        }
        assert found[region]["difference"]["label_with_minus_label_without"]["auroc"]["verdict"] == "no difference shown"
