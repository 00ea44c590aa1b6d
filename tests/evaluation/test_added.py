import numpy as np
import pytest
import torch
from constructed_maps import make_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from evaluation.added import (
    SHAPE,
    cross_fitted_auroc,
    design,
    error_cells_of_image,
    fit_logistic,
    folds_of,
    gains,
    permutation_null,
    permuted,
)
from evaluation.fusion import Fusion
from evaluation.image_maps import checked_maps
from evaluation.normalisation import Linear


def cells(count=40, scale=1.0, knows=0.0, seed=0):
    """Error cells of images; ``knows``: how much the saliency variance tells about errors; ``scale``: its unit."""
    generator = torch.Generator().manual_seed(seed)
    fusion = Fusion(Linear(0.0, 0.06), Linear(0.0, 0.4 * scale))
    found = []
    for identifier, maps in make_images(count, seed=seed):
        wrong = ((maps["mean_prediction"] > 0.5) != (maps["true_mask"] > 0)).float()
        noise = torch.rand(wrong.shape, generator=generator) ** 2
        maps["saliency_variance"] = scale * (0.1 * noise + knows * wrong * torch.rand(wrong.shape, generator=generator))
        found.append(error_cells_of_image(checked_maps(identifier, maps), fusion))
    return np.stack(found)


@pytest.fixture(scope="module")
def noise():
    return cells()


def test_every_pixel_is_counted_once(noise):
    images = list(make_images(40))
    assert noise.sum((1, 2, 3, 4, 5)).tolist() == [maps["true_mask"].numel() for _, maps in images]
    wrong = [int(((maps["mean_prediction"] > 0.5) != (maps["true_mask"] > 0)).sum()) for _, maps in images]
    assert noise[:, 1].sum((1, 2, 3, 4)).tolist() == wrong


def test_the_fit_is_that_of_scikit_learn_without_penalty(noise):
    known = design(noise.sum((0, 1)), "whole_image")
    correct, wrong = noise.reshape(len(noise), 2, -1)[:, :, known.cells].sum(0).astype(float)
    for features in known.features.values():
        fitted = fit_logistic(features, correct, wrong)
        rows = np.concatenate([features, features])
        label, weight = np.repeat([0, 1], len(features)), np.concatenate([correct, wrong])
        model = LogisticRegression(C=1e9, max_iter=5000, tol=1e-10).fit(
            rows[weight > 0][:, 1:], label[weight > 0], sample_weight=weight[weight > 0] / weight.mean()
        )
        difference = features @ fitted - model.decision_function(features[:, 1:])
        assert np.abs(difference[correct + wrong > 20]).max() < 0.05


def test_auroc_of_each_fold_is_of_images_the_model_has_not_seen(noise):
    folds = folds_of([str(i) for i in range(len(noise))])
    found = cross_fitted_auroc(noise, folds, np.ones((1, len(noise))), "whole_image")
    known = design(noise.sum((0, 1)), "whole_image")
    flat = noise.reshape(len(noise), 2, -1)[:, :, known.cells].astype(float)
    for model, features in known.features.items():
        scores, labels, weights = [], [], []
        for fold in range(5):
            fitted = fit_logistic(features, *flat[folds != fold].sum(0))
            for side in (0, 1):
                scores.append(features @ fitted)
                labels.append(np.full(len(features), side))
                weights.append(flat[folds == fold].sum(0)[side])
        keep = np.concatenate(weights) > 0
        expected = roc_auc_score(
            np.concatenate(labels)[keep], np.concatenate(scores)[keep], sample_weight=np.concatenate(weights)[keep]
        )
        assert found[model][0] == pytest.approx(expected, abs=1e-9)


def test_groups_share_a_fold():
    folds = folds_of(["a", "b", "a", "c", "d", "e", "b"])
    assert folds[0] == folds[2] and folds[1] == folds[6] and len(set(folds.tolist())) == 5


def test_noise_adds_nothing_and_knowledge_adds_something(noise):
    folds, once = folds_of([str(i) for i in range(40)]), np.ones((1, 40))
    nothing = gains(cross_fitted_auroc(noise, folds, once, "whole_image"))["saliency_variance"][0]
    something = gains(cross_fitted_auroc(cells(knows=0.1), folds, once, "whole_image"))["saliency_variance"][0]
    assert abs(nothing) < 0.003 and something > 0.01


def test_the_unit_of_a_variance_does_not_matter():
    folds, once = folds_of([str(i) for i in range(40)]), np.ones((1, 40))
    one, other = (cross_fitted_auroc(cells(scale=scale, knows=0.05), folds, once, "whole_image") for scale in (1.0, 2.0**-20))
    for model in one:
        assert one[model][0] == pytest.approx(other[model][0], abs=1e-12)


def test_a_resample_weighs_the_images_that_are_scored(noise):
    folds = folds_of([str(i) for i in range(40)])
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 2).astype(float)
    found = cross_fitted_auroc(noise, folds, drawn, "whole_image")["sureness"]
    known = design(noise.sum((0, 1)), "whole_image")
    flat = noise.reshape(len(noise), 2, -1)[:, :, known.cells].astype(float)
    features = known.features["sureness"]
    fits = [features @ fit_logistic(features, *flat[folds != fold].sum(0)) for fold in range(5)]
    for row in range(2):
        weights = [(flat[folds == fold] * drawn[row][folds == fold][:, None, None]).sum(0) for fold in range(5)]
        score = np.concatenate([np.concatenate([fit, fit]) for fit in fits])
        label = np.concatenate([np.repeat([0, 1], len(features))] * 5)
        weight = np.concatenate([np.concatenate(list(pair)) for pair in weights])
        expected = roc_auc_score(label[weight > 0], score[weight > 0], sample_weight=weight[weight > 0])
        assert found[row] == pytest.approx(expected, abs=1e-6)


def test_a_permutation_keeps_what_the_model_knows_otherwise(noise):
    mixed = permuted(noise, np.random.default_rng(0))
    np.testing.assert_array_equal(mixed.sum(-1), noise.sum(-1))  # outcome, label, sureness, predictive variance
    np.testing.assert_array_equal(mixed.sum(1), noise.sum(1))  # the saliency variances of each stratum
    assert (mixed >= 0).all() and (mixed != noise).any()


def test_the_null_holds_noise_and_not_knowledge(noise):
    folds = folds_of([str(i) for i in range(40)])
    assert permutation_null(noise, folds, "whole_image", permutations=9)["p_value"] > 0.1
    telling = cells(knows=0.1)
    gain = gains(cross_fitted_auroc(telling, folds, np.ones((1, 40)), "whole_image"))["saliency_variance"][0]
    found = permutation_null(telling, folds, "whole_image", permutations=9)
    # none of nine gains as much; what they gain is what the saliency of a stratum says about its share of errors
    assert found["p_value"] == 0.1 and found["mean"] < found["largest"] < gain - 0.01


def test_the_predicted_lesion_is_a_part_of_the_cells(noise):
    whole, part = (design(noise.sum((0, 1)), region) for region in ("whole_image", "predicted_lesion"))
    assert set(part.cells) < set(whole.cells)
    assert (np.unravel_index(part.cells, SHAPE)[0] == 1).all()


def test_without_a_predicted_lesion_nothing_is_defined(noise):
    background = noise.copy()
    background[:, :, 1] = 0
    folds, once = folds_of([str(i) for i in range(40)]), np.ones((2, 40))
    assert np.isnan(cross_fitted_auroc(background, folds, once, "predicted_lesion")["sureness"]).all()
    assert np.isnan(permutation_null(background, folds, "predicted_lesion")["p_value"])
    assert np.isfinite(cross_fitted_auroc(background, folds, once, "whole_image")["sureness"]).all()
