from __future__ import annotations

import numpy as np
import pytest
import torch
from constructed_maps import constructed_images, label_copies, make_images
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss, roc_auc_score
from slow_regions import slow_regions

from evaluation.error_trees import INPUTS, added_value_of_trees, count_error_trees
from evaluation.names import REGIONS
from evaluation.ranking import auroc


def test_numbers_are_those_of_scikit_learn_on_all_pixels():
    validation, test = make_images(6, seed=1), make_images(4, seed=2)
    names, arrays, area = count_error_trees(validation, test, fitted_on=10**6, read_on=10**6)

    def table(images, region):
        parts = []
        for _, maps in images:
            inside, wrong = slow_regions(maps)
            columns = [maps[name].numpy().ravel() for name in ("mean_prediction", "pred_variance", "saliency_variance")]
            parts.append(np.stack([*columns, wrong], 1)[inside[region]])
        return np.concatenate(parts)

    for region in REGIONS:
        fitting, reading = table(validation, region), table(test, region)
        model = HistGradientBoostingClassifier(
            max_iter=150, max_leaf_nodes=16, min_samples_leaf=200, early_stopping=False, random_state=42
        ).fit(fitting[:, :3], fitting[:, 3])
        probability = model.predict_proba(reading[:, :3])[:, 1]
        column = names.index(f"{region}/label_with")
        assert area[column] == pytest.approx(roc_auc_score(reading[:, 3], probability), abs=2e-3)
        pixels = arrays["model_pixels"][:, column].sum(0)
        assert pixels.tolist() == [(reading[:, 3] == 0).sum(), (reading[:, 3] == 1).sum()]
        loss = arrays["model_log_loss"][:, column].sum() / pixels.sum()
        assert loss == pytest.approx(log_loss(reading[:, 3], probability), rel=1e-2)
        histogram = arrays["model_cells"].sum(0)
        assert auroc(histogram[column, 0], histogram[column, 1]) == pytest.approx(area[column], abs=1e-3)


def test_a_drawn_pixel_counts_for_those_it_was_drawn_from():
    test = make_images(3, seed=5)
    names, arrays, _ = count_error_trees(make_images(3, seed=4), test, read_on=40)
    for row, (_, maps) in enumerate(test):
        inside, _ = slow_regions(maps)
        for region in REGIONS:
            column = names.index(f"{region}/with")
            assert arrays["model_pixels"][row, column].sum() == pytest.approx(inside[region].sum())
            assert arrays["model_cells"][row, column].sum() == pytest.approx(inside[region].sum())


def test_saliency_is_found_where_it_is_informative_and_not_where_it_is_noise():
    def gain(kind):
        splits = constructed_images(12, kind, seed=1), constructed_images(20, kind, seed=2)
        found = added_value_of_trees(*splits, resamples=200)
        return found["whole_image"]["difference"]["with_minus_without"]["auroc"]

    assert gain("informative")["verdict"] == "improves" and gain("informative")["value"] > 0.01
    assert gain("noise")["verdict"] != "improves"


def test_a_copy_of_the_label_seems_to_find_errors_only_where_the_region_gives_the_truth_away():
    found = added_value_of_trees(label_copies(seed=1), label_copies(seed=2), resamples=200)
    inside, anywhere = found["foreground"]["difference"], found["predicted_foreground"]["difference"]
    assert inside["with_minus_without"]["auroc"]["value"] > 0.1
    assert inside["label_with_minus_label_without"]["auroc"]["value"] == pytest.approx(0, abs=1e-3)
    assert anywhere["with_minus_without"]["auroc"]["value"] < 0.01


def test_a_region_without_errors_has_no_auroc():
    images = make_images(3, seed=1)
    for _, maps in images:
        maps["true_mask"] = (maps["mean_prediction"] > 0.5).to(torch.uint8)
    names, arrays, area = count_error_trees(images, images)
    assert np.isnan(area).all() and len(names) == len(REGIONS) * len(INPUTS)
    assert np.isfinite(arrays["model_log_loss"]).all() and (arrays["model_pixels"][..., 1] == 0).all()
    found = added_value_of_trees(images, images, resamples=100)
    assert found["foreground"]["models"]["with"]["auroc"]["value"] is None
