"""Every measure of every procedure again, pixel by pixel in float64, with scale and lambda fitted to each resample."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from constructed_maps import Images, make_images
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from evaluation import parallel
from evaluation.effects import MEASURES, PROCEDURES, SCALE_FACTORS, Training, image_aurc, resampled_measures, scores_of_cells
from evaluation.fusion import LAMBDAS
from evaluation.joint import shuffled
from evaluation.protocol import count_splits
from evaluation.tuning import tune

VALIDATION, TEST = make_images(8, seed=3, prefix="v"), make_images(12, seed=4, prefix="t")


@pytest.fixture(scope="module")
def study():
    tuned = tune(VALIDATION)
    validation, test = count_splits(tuned, VALIDATION, TEST)
    return tuned.fusion, Training.of(validation, test, tuned.fusion)


def pixels(images: Images, fusion, kind: str) -> list[dict[str, np.ndarray]]:
    """The pixels of each image in float64, with the saliency variance of a procedure."""
    found = []
    for place, (identifier, maps) in enumerate(images.items):
        saliency = maps["saliency_variance"].reshape(-1).double().numpy()
        if kind == "placebo_other_image":
            other = images.items[place - 1][1]["saliency_variance"]
            size = maps["saliency_variance"].shape
            resized = torch.nn.functional.interpolate(other[None, None], size=tuple(size), mode="nearest")[0, 0]
            saliency = (other if other.shape == size else resized).reshape(-1).double().numpy()
        if kind == "placebo_shuffled":  # the cells are what is shuffled
            saliency = shuffled(torch.from_numpy(saliency), identifier).numpy()
        found.append({
            "predictive": maps["pred_variance"].reshape(-1).double().numpy(), "saliency": saliency,
            "own": maps["saliency_variance"].reshape(-1).double().numpy(),
            "predicted": (maps["mean_prediction"].reshape(-1) > 0.5).numpy(),
            "truth": (maps["true_mask"].reshape(-1) > 0).numpy(),
        })
    return found


def score(part: dict[str, np.ndarray], high: tuple[float, float], tuned: float, kind: str, constant: float) -> np.ndarray:
    first, second = (np.clip(part[key] / top, 0, 1) for key, top in zip(("predictive", "saliency"), high))
    if kind == "tuned_scale":
        return np.clip(tuned * first, 0, 1)
    if kind == "placebo_constant":
        second = constant
    return tuned * first + (1 - tuned) * second


def foreground_ece(scored: list[tuple[np.ndarray, dict]], drawn: np.ndarray) -> float:
    """15 bins (lo, hi], 0 in the first."""
    gap, count = np.zeros(15), 0.0
    for (values, part), times in zip(scored, drawn):
        inside = part["truth"]
        confidence = 1 - values[inside]
        place = np.clip(np.ceil(confidence * 15 - 1e-12).astype(int) - 1, 0, 14)
        gap += times * np.bincount(place, part["predicted"][inside] - confidence, 15)
        count += times * inside.sum()
    return float(np.abs(gap).sum() / count)


def slow(fusion, drawn_validation, drawn_test, kind):
    """The four measures and the tuned number of one resample."""
    validation, test = (pixels(images, fusion, kind) for images in (VALIDATION, TEST))
    chosen = [part for part, times in zip(validation, drawn_validation) if times]
    high = tuple(max(part[key].max() for part in chosen) for key in ("predictive", "own"))
    grid = {"predictive_variance": (1.0,), "tuned_scale": SCALE_FACTORS}.get(kind, LAMBDAS)
    constant = np.concatenate([
        np.repeat(np.clip(part["own"] / high[1], 0, 1), int(times)) for part, times in zip(validation, drawn_validation)
    ]).mean()
    errors = [
        foreground_ece([(score(part, high, value, kind, constant), part) for part in validation], drawn_validation)
        for value in grid
    ]
    best = [value for value, error in zip(grid, errors) if error == min(errors)]
    tuned = min(best) if kind == "tuned_scale" else max(best)
    scored = [(score(part, high, tuned, kind, constant), part) for part in test]
    wrong = np.concatenate([part["predicted"] != part["truth"] for part in test])
    values, weight = np.concatenate([s for s, _ in scored]), np.concatenate(
        [np.full(len(s), times) for (s, _), times in zip(scored, drawn_test)]
    )
    brier = np.average((1 - values - ~wrong) ** 2, weights=weight)
    means, risks = [], []
    for (s, part), times in zip(scored, drawn_test):
        both, sizes = (part["predicted"] & part["truth"]).sum(), part["predicted"].sum() + part["truth"].sum()
        means += [s.mean()] * int(times)
        risks += [1 - 2 * both / sizes] * int(times)
    order = np.argsort(means, kind="stable")
    kept = np.cumsum(np.array(risks)[order]) / np.arange(1, len(order) + 1)
    keep = weight > 0
    return {
        "foreground_ece": foreground_ece(scored, drawn_test), "brier": brier,
        "error_auroc": roc_auc_score(wrong[keep], values[keep], sample_weight=weight[keep]),
        "image_aurc": kept.mean(), "tuned": tuned,
    }


@pytest.mark.parametrize("kind", PROCEDURES)
def test_measures_of_resamples_against_pixels(study, kind):
    fusion, training = study
    rng = np.random.default_rng(5)
    weights = [
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), 4)]).astype(float) for n in (8, 12)
    ]
    found = resampled_measures(training, *weights, procedures=(kind,))[kind]
    agreed = 0
    for row in range(5):
        expected = slow(fusion, weights[0][row], weights[1][row], kind)
        if not np.isclose(found["tuned"][row], expected["tuned"]):
            continue  # two values of the tuned number can be as good as each other to the width of a cell
        agreed += 1
        assert found["foreground_ece"][row] == pytest.approx(expected["foreground_ece"], abs=4e-3)
        assert found["brier"][row] == pytest.approx(expected["brier"], abs=1e-3)
        assert found["error_auroc"][row] == pytest.approx(expected["error_auroc"], abs=1e-2)
        # of twelve images: two whose means differ by less than the width of a cell may change places
        assert found["image_aurc"][row] == pytest.approx(expected["image_aurc"], abs=0.03)
    assert agreed >= 3


def test_the_whole_split_has_the_curve_that_was_counted_pixel_by_pixel(study):
    _, training = study
    found = resampled_measures(training, np.ones((1, 8)), np.ones((1, 12)), ("fused",))["fused"]
    place = training.lambdas.index(found["tuned"][0])
    assert place == len(LAMBDAS) - 1 - np.argmin(training.curves[0][::-1])
    assert found["foreground_ece"][0] == pytest.approx(training.curves[1][place], abs=1e-12)


def test_lambda_1_is_predictive_variance():
    first, second = np.array([0.1, 0.6]), np.array([0.9, 0.2])
    scores = scores_of_cells("fused", first, second, (0.0, 1.0), 0.5)
    np.testing.assert_allclose(scores[1], scores_of_cells("predictive_variance", first, second, (0.0, 1.0), 0.5)[0])
    np.testing.assert_allclose(scores[0], [0.9, 0.2, 0.9, 0.2])
    np.testing.assert_allclose(scores_of_cells("placebo_constant", first, second, (0.5,), 0.4)[0], [0.25, 0.25, 0.5, 0.5])
    assert scores_of_cells("tuned_scale", first, second, (), 0.0)[-1].tolist() == [0.1, 0.1, 0.6, 0.6]  # factor 1 last


def test_risk_and_coverage_of_images_by_hand():
    # kept one after the other: 0, (0 + 1) / 2, (0 + 1 + 0.5) / 3
    found = image_aurc(np.array([0.3, 0.1, 0.2]), np.array([0.5, 0.0, 1.0]), np.ones((1, 3)))
    assert found[0] == pytest.approx((0 + 1 / 2 + 1.5 / 3) / 3)
    twice = image_aurc(np.array([0.3, 0.1, 0.2]), np.array([0.5, 0.0, 1.0]), np.array([[0.0, 2.0, 1.0]]))
    assert twice[0] == pytest.approx((0 + 0 + 1 / 3) / 3)


def test_measures_have_a_row_per_resample(study):
    _, training = study
    found = resampled_measures(training, np.ones((3, 8)), np.ones((3, 12)))
    for procedure in PROCEDURES:
        for measure in MEASURES:
            assert len(set(found[procedure][measure].tolist())) == 1 and np.isfinite(found[procedure][measure]).all()


def test_recalibration_is_fitted_to_each_resample(study):
    """Against scikit-learn on single pixels, each with the variance of its cell, a resample at a time."""
    fusion, training = study
    weights = [np.stack([np.ones(n), np.r_[np.zeros(n // 2), np.full(n - n // 2, 2.0)]]) for n in (8, 12)]
    found = resampled_measures(training, *weights, ("fused",), recalibrated=("fused",))["fused"]
    for row in range(2):
        drawn = [weight[row] for weight in weights]
        kept = training.validation.largest[drawn[0] > 0]
        high = kept.max(0)
        lam = found["tuned"][row]
        cells = []
        for joint, times in zip((training.validation, training.test), drawn):
            first, second = (
                np.clip((values - low) / (top - low), 0, 1) for values, low, top in zip(joint.values, joint.low, high)
            )
            score = (lam * first[:, None] + (1 - lam) * second[None]).ravel()
            cells.append((score, np.tensordot(times, joint.counts[:, 0].astype(float), 1).reshape(4, -1)))
        (score, fitted), (other, measured) = cells
        for names, right, wrong in ((("foreground_ece_isotonic",), [3], [2]),
                                    (("brier_isotonic", "log_loss_isotonic"), [0, 3], [1, 2])):
            counts = fitted[right].sum(0), fitted[wrong].sum(0)
            model = IsotonicRegression(increasing=False, out_of_bounds="clip")
            model.fit(np.r_[score, score], np.r_[np.ones(len(score)), np.zeros(len(score))], np.r_[counts])
            confidence = model.predict(other)
            good, bad = measured[right].sum(0), measured[wrong].sum(0)
            total = (good + bad).sum()
            bounded = np.clip(confidence, 0.5 / 8, 1 - 0.5 / 8)
            place = np.clip(np.ceil(confidence * 15) - 1, 0, 14).astype(int)
            gap = np.bincount(place, good - (good + bad) * confidence, minlength=15)
            slow = {
                "foreground_ece_isotonic": np.abs(gap).sum() / total,
                "brier_isotonic": (good * (1 - confidence) ** 2 + bad * confidence**2).sum() / total,
                "log_loss_isotonic": -(good * np.log(bounded) + bad * np.log1p(-bounded)).sum() / total,
            }
            for name in names:  # a hundred bins of the score instead of every cell
                assert found[name][row] == pytest.approx(slow[name], abs=0.01), (name, row)
    assert len({tuple(np.round(found[name], 9)) for name in found}) == len(found)


def test_threads_change_no_number(study, monkeypatch):
    _, training = study
    rng = np.random.default_rng(0)
    weights = [np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), 30)]) for n in (8, 12)]
    results = []
    for count in (1, 5):
        monkeypatch.setattr(parallel, "threads", lambda count=count: count)
        results.append(resampled_measures(training, *weights, recalibrated=PROCEDURES[:2]))
    for procedure, found in results[0].items():
        for name, values in found.items():
            np.testing.assert_array_equal(values, results[1][procedure][name])


def test_work_in_threads_can_be_watched():
    told = []

    @contextmanager
    def watch(total):
        told.append(total)
        yield told.append

    with parallel.watched(watch):
        assert parallel.in_threads(lambda value: value**2, range(4), total=4) == [0, 1, 4, 9]
    assert told == [4, 1, 1, 1, 1]
    parallel.in_threads(abs, [-1], total=1)
    assert len(told) == 5  # nobody watches outside
