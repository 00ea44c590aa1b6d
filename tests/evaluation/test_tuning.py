from __future__ import annotations

import pickle

import numpy as np
import pytest
from constructed_maps import Images, constructed_images, make_images
from slow_errors import slow_foreground_error

from evaluation.counting import count_curve
from evaluation.fusion import lambda_grid
from evaluation.tuning import lambda_errors, tune
from runtime.errors import UserError


def test_lambda_has_the_lowest_error_by_the_formulas():
    images = make_images(6, seed=3)
    tuned = tune(images, bins=10, lambdas=lambda_grid(5))
    constants = {
        "pred_variance": (tuned.fusion.predictive.low, tuned.fusion.predictive.high),
        "saliency_variance": (tuned.fusion.saliency.low, tuned.fusion.saliency.high),
    }
    errors = [
        slow_foreground_error(images, {"pred_variance": lam, "saliency_variance": 1 - lam}, constants, bins=10)
        for lam in tuned.lambdas
    ]
    assert lambda_errors(tuned.curve.total()) == pytest.approx(errors, abs=1e-6)
    assert tuned.fusion.parameter == tuned.lambdas[int(np.argmin(errors))]
    assert (tuned.bins, tuned.lambdas) == (tuned.curve.bins, tuned.curve.lambdas) == (10, lambda_grid(5))


def test_the_curve_is_that_of_the_tuned_fusion():
    images = constructed_images(3, "informative")
    tuned = tune(images)
    again = count_curve(images, tuned.fusion)
    assert all(np.array_equal(tuned.curve.images[name], again.images[name]) for name in again.images)


def test_what_was_tuned_travels_between_processes():
    tuned = tune(make_images(3))
    again = pickle.loads(pickle.dumps(tuned))
    assert (again.fusion, again.bins, again.lambdas) == (tuned.fusion, tuned.bins, tuned.lambdas)
    assert np.array_equal(again.curve.images["lambda_count"], tuned.curve.images["lambda_count"])


@pytest.mark.parametrize("value", [0.0, 0.125])
def test_a_predictive_variance_without_a_range_is_an_error(value):
    images = make_images(3)
    for _, maps in images:
        maps["pred_variance"].fill_(value)
    with pytest.raises(UserError, match=f"the predictive variance is {value:g} in every validation pixel"):
        tune(images)


def test_a_constant_saliency_variance_counts_as_zero():
    images = make_images(3)
    for _, maps in images:
        maps["saliency_variance"].fill_(0.125)
    fusion = tune(images).fusion
    assert (fusion.saliency.low, fusion.saliency.high) == (0.125, 0.125)
    assert not fusion.saliency(images.items[0][1]["saliency_variance"]).any()


def test_nothing_to_tune_on_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        tune(Images([]))
