import numpy as np
import pytest
from constructed_maps import Images, constructed_images, label_copies, make_images

from calibration import REGIONS
from counters import checked_maps, merge
from evaluation import evaluate
from fusion import NORMALISATIONS, RULES, distributions, lambda_grid
from study import (
    MODELS,
    added_value,
    candidate_fusions,
    count_error_models,
    count_fusions,
    fit_error_models,
    model_edges,
    run_study,
    without_widest_image,
)


@pytest.fixture(scope="module")
def informative():
    splits = constructed_images(10, "informative", seed=1), constructed_images(20, "informative", seed=2)
    return run_study(*splits, resamples=300), evaluate(*splits, resamples=300)


def test_a_row_for_every_normalisation_and_rule(informative):
    rows = informative[0]["rules"]
    assert {(row["normalisation"], row["rule"]) for row in rows} == {(n, r) for n in NORMALISATIONS for r in RULES}
    assert len(rows) == len(NORMALISATIONS) * len(RULES)


def test_the_row_of_the_paper_is_the_headline(informative):
    study, evaluation = informative
    row = next(row for row in study["rules"] if (row["normalisation"], row["rule"]) == ("min_max", "convex"))
    assert row["parameter"] == evaluation.metrics["lambda"]
    assert row["foreground_ece"]["value"] == evaluation.metrics["test"]["foreground_ece"]["fused"]
    headline = evaluation.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert row["minus_predictive_variance"] == headline


def test_rules_with_saliency_win_where_it_is_informative(informative):
    rows = {(row["normalisation"], row["rule"]): row for row in informative[0]["rules"]}
    assert rows["min_max", "convex"]["minus_predictive_variance"]["verdict"] == "improves"
    assert rows["min_max", "predictive"]["minus_predictive_variance"]["value"] == 0
    assert rows["min_max", "logistic"]["baseline"] == "logistic_predictive"
    assert rows["rank", "predictive"]["minus_baseline"]["verdict"] == "no difference shown"


def test_one_image_can_set_the_scale_and_the_study_says_what_it_would_be_without_it():
    validation, test = (constructed_images(15, "informative", seed=seed) for seed in (1, 2))
    extreme = validation.items[4]
    extreme[1]["saliency_variance"][0, 0] = 25.0  # 200 times the largest elsewhere: all other pixels become certain
    with_it = evaluate(validation, test, study=True, resamples=200).metrics
    without_it = evaluate(Images(validation.items[:4] + validation.items[5:]), test, resamples=200).metrics
    found = with_it["study"]["without_widest_image"]
    assert found["image"] == extreme[0] and found["largest"] == 25.0 and found["largest_elsewhere"] <= 0.125
    assert with_it["lambda"] > 0.5 and found["lambda"] == without_it["lambda"] == 0.5
    assert found["foreground_ece"] == without_it["test"]["foreground_ece"]
    for name, difference in found["foreground_ece_difference"].items():
        assert difference == without_it["test"]["foreground_ece_difference"][name]


def test_there_is_nothing_without_the_only_image():
    assert without_widest_image(constructed_images(1, "noise", seed=1), constructed_images(3, "noise", seed=2)) is None


def test_fusions_are_counted_alike_in_shards():
    images = make_images(4)
    candidates = candidate_fusions(images, distributions(images), lambda_grid(3))
    whole = count_fusions(images, candidates)
    parts = merge(count_fusions([item], candidates) for item in images)
    assert all(np.array_equal(whole.images[name], parts.images[name]) for name in whole.images)


def test_saliency_adds_something_where_it_is_informative(informative):
    for region in ("foreground", "whole_image"):
        difference = informative[0]["added_value"][region]["difference"]["with_minus_without"]
        assert difference["log_loss"]["verdict"] == "improves" and difference["log_loss"]["value"] < 0
        assert difference["auroc"]["verdict"] == "improves" and difference["auroc"]["value"] > 0.01


def test_saliency_adds_nothing_where_it_is_noise():
    found = run_study(constructed_images(10, "noise", seed=3), constructed_images(20, "noise", seed=4), resamples=300)[
        "added_value"
    ]
    for region in REGIONS:
        difference = found[region]["difference"]["with_minus_without"]
        assert difference["auroc"]["verdict"] != "improves" or difference["auroc"]["value"] < 0.005
        assert abs(difference["log_loss"]["value"]) < 0.005


def test_a_copy_of_the_label_seems_to_find_errors_only_where_the_region_gives_the_truth_away():
    found = run_study(label_copies(seed=1), label_copies(seed=2), resamples=200)["added_value"]["foreground"]["difference"]
    assert found["with_minus_without"]["auroc"]["value"] > 0.1
    assert found["label_with_minus_label_without"]["auroc"]["value"] == pytest.approx(0, abs=1e-3)


def test_model_losses_agree_with_their_formula():
    images = make_images(3)
    models = fit_error_models(images, distributions(images))
    counters = count_error_models(images, models)
    counters = count_error_models(images, models, model_edges(counters))
    table = added_value(models, counters, resamples=50)
    from calibration import atoms
    from study import error_features

    for region, members in REGIONS.items():
        for model in MODELS:
            losses = []
            for _, maps in images:
                flat = checked_maps("image", maps)
                atom = atoms(flat["mean_prediction"], flat["true_mask"]).numpy()
                inside = np.isin(atom, members)
                features = error_features(flat, models.ranks)[model].double().numpy()[inside]
                weights = np.array(models.coefficients[region, model])
                wrong = np.isin(atom[inside], (1, 2))
                losses.append(np.logaddexp(0, np.where(wrong, -1, 1) * (weights[0] + features @ weights[1:])))
            value = table[region]["models"][model]["log_loss"]["value"]
            assert value == pytest.approx(np.concatenate(losses).mean(), rel=1e-4, abs=1e-6)
