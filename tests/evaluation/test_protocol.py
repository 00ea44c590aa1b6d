from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from constructed_maps import Images, constructed_images, make_images
from slow_errors import slow_foreground_error

from evaluation import fusion
from evaluation.counting import Counters, count_scores, merge
from evaluation.detectors import detector_numbers
from evaluation.fusion import lambda_grid
from evaluation.joint import with_partners
from evaluation.measures import score_table
from evaluation.protocol import count_splits, evaluate, tune, validation_edges
from evaluation.summary import per_image, summarise
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def splits():
    return make_images(8, seed=1, prefix="validation"), make_images(12, seed=2, prefix="test")


@pytest.fixture(scope="module")
def found(splits):
    return evaluate(*splits, resamples=300)


def test_protocol_from_the_formulas(splits, found):
    validation, test = splits
    metrics = found.metrics
    constants = {}
    for name in ("pred_variance", "saliency_variance"):
        everything = np.concatenate([maps[name].numpy().ravel() for _, maps in validation])
        constants[name] = [float(everything.min()), float(everything.max())]
    assert metrics["normalisation"] == constants
    curve = [
        slow_foreground_error(validation, {"pred_variance": k / 10, "saliency_variance": 1 - k / 10}, constants)
        for k in range(11)
    ]
    assert metrics["validation"]["foreground_ece_by_lambda"] == pytest.approx(curve, abs=1e-6)
    lam = int(np.argmin(curve)) / 10
    assert metrics["lambda"] == lam == found.fusion.parameter
    errors = metrics["test"]["foreground_ece"]
    assert errors["predictive_variance"] == pytest.approx(slow_foreground_error(test, {"pred_variance": 1}, constants), abs=1e-6)
    assert errors["saliency_variance"] == pytest.approx(
        slow_foreground_error(test, {"saliency_variance": 1}, constants), abs=1e-6
    )
    weights = {"pred_variance": lam, "saliency_variance": 1 - lam}
    assert errors["fused"] == pytest.approx(slow_foreground_error(test, weights, constants), abs=1e-6)
    assert metrics["schema_version"] == 1
    assert metrics["validation"]["images"] == 8 and metrics["test"]["images"] == 12
    assert metrics["test"]["foreground_ece_by_lambda"][10] == errors["predictive_variance"]
    assert metrics["test"]["foreground_ece_by_lambda"][0] == errors["saliency_variance"]


def test_the_predicted_label_of_one_half_is_background():
    validation, test = make_images(4, seed=1), make_images(4, seed=2)
    for _, maps in test:
        maps["mean_prediction"][:] = 0.5  # exactly the threshold, above which a pixel is lesion
    found = evaluate(validation, test, resamples=100)
    lesion = sum(int(maps["true_mask"].sum()) for _, maps in test)
    regions = found.metrics["test"]["regions"]
    assert regions["foreground"]["wrong_pixels"] == regions["foreground"]["pixels"] == lesion
    assert regions["predicted_foreground"]["pixels"] == 0 and found.metrics["test"]["dice"] == 0


def test_everything_follows_from_saved_and_merged_counters(splits, found, tmp_path):
    validation, test = splits
    fused = tune(validation).fusion
    assert fused == found.fusion
    grid = lambda_grid()
    counted = count_scores(validation, fused, grid)
    edges = validation_edges(counted)
    shards = [count_scores(Images(test.items[start::2]), fused, grid, edges=edges) for start in (1, 0)]
    for name, counters in (("validation", counted), ("test", merge(shards))):
        np.savez_compressed(tmp_path / f"{name}.npz", **counters.to_arrays())
    loaded = []
    for name in ("validation", "test"):
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as arrays:
            loaded.append(Counters.from_arrays(arrays))
    assert summarise(*loaded, fused, resamples=300) == found.metrics
    assert per_image(loaded[1]) == found.rows


def test_the_order_of_the_images_does_not_matter(splits, found):
    validation, test = (Images(reversed(split.items)) for split in splits)
    assert evaluate(validation, test, resamples=300).metrics == found.metrics


# ---------------------------------------------------------------- groups


def intervals_of(content, path=""):
    """Every interval in nested metrics, by its path."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key.endswith("interval") and isinstance(value, list) and len(value) == 2 and not isinstance(value[0], list):
                yield f"{path}/{key}", [np.nan if bound is None else bound for bound in value]
            else:
                yield from intervals_of(value, f"{path}/{key}")
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from intervals_of(value, f"{path}/{place}")


def test_two_copies_of_each_image_in_a_group_have_the_intervals_of_the_images(splits):
    # an independent reference for every interval: drawing a group is drawing its image, and two copies change no mean
    validation, test = splits[0], Images(splits[1].items[:6])
    copies = Images([(id + end, maps) for id, maps in test for end in ("", "~")])
    groups = {id + end: f"lesion of {id}" for id, _ in test for end in ("", "~")}
    fused = tune(validation).fusion
    once = evaluate(validation, test, resamples=60, study=True).metrics
    twice = evaluate(validation, copies, resamples=60, study=True, groups=groups).metrics
    once["detectors"] = detector_numbers(validation, test, fused, resamples=60)
    twice["detectors"] = detector_numbers(validation, copies, fused, resamples=60, groups=groups)
    found = dict(intervals_of(twice))
    compared = 0
    for path, interval in intervals_of(once):
        # the area under a curve over k images knows how many there are
        if not ("ranking_of_images" in path and path.endswith(("aurc/interval", "augrc/interval"))):
            np.testing.assert_allclose(found[path], interval, rtol=5e-4, atol=5e-4, err_msg=path)
            compared += 1
    assert compared > 1000 and {"rules", "added_value", "added_value_of_trees"} <= once["study"].keys()
    assert (once["bootstrap"]["unit"], twice["bootstrap"]["unit"]) == ("image", "group")
    assert "12 test images in 6 groups" in twice["verdict"] and "6 test images)" in once["verdict"]
    alone = evaluate(validation, copies, resamples=60).metrics  # copies taken for images of their own: too narrow
    low, high = alone["test"]["dice_interval"]
    assert high - low < 0.85 * np.subtract(*once["test"]["dice_interval"][::-1])


def test_groups_of_one_image_each_change_no_number(splits, found):
    groups = {id: f"patient {place}" for split in splits for place, (id, _) in enumerate(split)}
    metrics = evaluate(*splits, resamples=300, groups=groups).metrics
    assert metrics["bootstrap"].pop("unit") == "group"
    expected = {**found.metrics, "bootstrap": {k: v for k, v in found.metrics["bootstrap"].items() if k != "unit"}}
    for name in ("verdict", "verdict_recalibrated"):  # they say the number of groups
        del metrics[name], expected[name]
    assert metrics == expected


def test_a_smoothed_confidence_knows_the_number_of_groups_and_not_of_images(splits):
    validation, test = splits
    one = {id: "all of them" for id, _ in validation}
    tuned = tune(validation)
    counted = count_splits(tuned, validation, test)
    log_loss = ("foreground", "isotonic", "log_loss")
    plain, grouped = (score_table(*counted, 20, 42, groups) for groups in (None, one))
    # half of one independent group is the bound: every confidence is one half, and the log loss ln 2
    assert grouped.value(log_loss, "fused") == pytest.approx(np.log(2)) != plain.value(log_loss, "fused")


def test_the_number_of_lambda_steps_makes_the_grid(splits):
    metrics = evaluate(*splits, bins=10, lambda_steps=4, resamples=20).metrics
    assert metrics["validation"]["lambdas"] == metrics["test"]["lambdas"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert metrics["bins"] == 10 and metrics["lambda"] in metrics["test"]["lambdas"]


# ---------------------------------------------------------------- several processes


class Group:
    """Processes as threads, with the collective call that the counting needs."""

    def __init__(self, size):
        self.counters, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def gather(self, rank, counters):
        self.counters[rank] = counters
        self.barrier.wait()
        gathered = list(self.counters)
        self.barrier.wait()
        return gathered

    def count(self, tuned, shares):
        """What each process has in the end."""
        with ThreadPoolExecutor(len(shares)) as pool:
            running = [
                pool.submit(count_splits, tuned, *share, gather=partial(self.gather, rank)) for rank, share in enumerate(shares)
            ]
            return [counted.result() for counted in running]


def test_processes_count_together_what_one_counts_alone(splits):
    validation, test = splits
    tuned = tune(validation)
    # three processes, the last of which has no test image
    first, second = with_partners(validation), with_partners(test)
    shares = [
        (Images(first[0::3]), Images(second[0::2])),
        (Images(first[1::3]), Images(second[1::2])),
        (Images(first[2::3]), Images([])),
    ]
    alone = count_splits(tuned, validation, test)
    for counted in Group(3).count(tuned, shares):
        for one, other in zip(alone, counted):
            arrays, others = one.to_arrays(), other.to_arrays()
            assert arrays.keys() == others.keys()
            assert all(np.array_equal(arrays[name], others[name]) for name in arrays)


def test_the_validation_curve_is_not_counted_again(splits, monkeypatch):
    validation, test = splits
    tuned = tune(validation)
    read = []

    def once(images, part):
        for item in images:
            read.append(part)
            yield item

    counted, tested = count_splits(tuned, once(validation, "validation"), once(test, "test"))
    assert read == ["validation"] * 8 + ["test"] * 12
    assert counted.images["lambda_count"] is tuned.curve.images["lambda_count"]
    assert counted.lambdas == tested.lambdas == tuned.lambdas


def test_an_empty_split_is_named(splits):
    validation, test = splits
    tuned = tune(validation)
    with pytest.raises(ValueError, match="the validation split holds no image"):
        count_splits(tuned, Images([]), test)
    with pytest.raises(ValueError, match="the test split holds no image"):
        count_splits(tuned, validation, Images([]))


def test_a_validation_split_other_than_the_tuned_one_is_an_error(splits):
    validation, test = splits
    with pytest.raises(ValueError, match="other images or bins"):
        count_splits(tune(validation), Images(validation.items[1:]), test)


# ---------------------------------------------------------------- the verdict


def test_verdict_when_saliency_is_informative():
    found = evaluate(constructed_images(15, "informative", seed=1), constructed_images(30, "informative", seed=2), resamples=1000)
    assert found.metrics["lambda"] == 0.5
    assert found.metrics["test"]["foreground_ece"]["predictive_variance"] == pytest.approx(1 / 8, abs=0.01)
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference["verdict"] == "improves" and difference["interval"][1] < 0
    assert found.metrics["verdict"].startswith("Fusing at lambda = 0.5 improves")
    assert f"{difference['value']:+.4f}" in found.metrics["verdict"]
    # Recalibration does not help predictive variance to what it does not know: the log loss tells.
    recalibrated = found.metrics["test"]["regions"]["foreground"]["scores"]["fused"]["recalibrated"]["isotonic"]
    assert recalibrated["minus_predictive_variance"]["log_loss"]["verdict"] == "improves"


def test_verdict_when_saliency_is_noise():
    found = evaluate(constructed_images(15, "noise", seed=1), constructed_images(30, "noise", seed=2), resamples=1000)
    assert found.metrics["lambda"] >= 0.9
    assert found.metrics["verdict"].startswith(("No difference shown", "Fusing at lambda = 0.9 degrades"))


def test_verdict_when_validation_misleads():
    found = evaluate(constructed_images(15, "informative", seed=1), constructed_images(30, "noise", seed=2), resamples=1000)
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference["verdict"] == "degrades" and difference["interval"][0] > 0
    assert found.metrics["verdict"].startswith("Fusing at lambda = 0.5 degrades")


def test_verdict_when_both_variances_are_equal():
    found = evaluate(constructed_images(8, "equal", seed=1), constructed_images(8, "equal", seed=2), resamples=200)
    assert found.metrics["lambda"] == 1.0  # every lambda ties, exactly
    assert len(set(found.metrics["validation"]["foreground_ece_by_lambda"])) == 1
    difference = found.metrics["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
    assert difference == {"value": 0.0, "interval": [0.0, 0.0], "verdict": "no difference shown"}
    assert found.metrics["verdict"].startswith("No difference shown: the tuned lambda is 1")
    assert found.metrics["validation"]["lambda_selection"]["share"][10] == 1


# ---------------------------------------------------------------- edges of the data


def emptied(images):
    for _, maps in images:
        maps["true_mask"].zero_()
    return images


def test_no_foreground_on_test_is_said_and_is_null(splits):
    found = evaluate(splits[0], emptied(make_images(3, seed=5)), resamples=50)
    assert found.metrics["test"]["foreground_ece"] == dict.fromkeys(("predictive_variance", "saliency_variance", "fused"))
    assert "no foreground pixel" in found.metrics["verdict"]
    assert found.metrics["test"]["images_without_foreground"] == 3
    assert found.metrics["test"]["regions"]["whole_image"]["scores"]["fused"]["ece"]["value"] is not None


def test_no_foreground_on_validation_is_an_error(splits):
    with pytest.raises(UserError, match="validation masks hold no foreground pixel"):
        evaluate(emptied(make_images(3)), splits[1], resamples=50)


def test_one_image_and_no_error(splits):
    images = make_images(1)
    images.items[0][1]["true_mask"] = (images.items[0][1]["mean_prediction"] > 0.5).to(torch.uint8)
    found = evaluate(images, images, resamples=50)
    assert found.metrics["test"]["dice"] == 1
    score = found.metrics["test"]["regions"]["foreground"]["scores"]["predictive_variance"]
    assert score["auroc"]["value"] is None and score["aurc"]["value"] == 0
    low, high = score["ece"]["interval"]
    assert low == high == score["ece"]["value"]


def test_constant_saliency_is_no_uncertainty(splits):
    images = make_images(3)
    for _, maps in images:
        maps["saliency_variance"].fill_(0.01)
    found = evaluate(images, images, resamples=50)
    gap = found.metrics["test"]["regions"]["foreground"]["scores"]["saliency_variance"]["signed_gap"]["value"]
    assert gap == pytest.approx(1 - found.metrics["test"]["regions"]["foreground"]["accuracy"])


# ---------------------------------------------------------------- another model


class _Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer4 = torch.nn.Conv2d(3, 4, 3, padding=1)


class _OtherModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = _Backbone()
        self.drop, self.last = torch.nn.Dropout2d(0.4), torch.nn.Conv2d(4, 1, 1)

    def forward(self, images):
        return self.last(self.drop(self.backbone.layer4(images).relu()))


def documented(first_line):
    """The Python block of the documentation that starts with a line; there is exactly one."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/EXTENDING.md")]
    (code,) = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if first_line in block]
    return code


def test_the_documentation_says_how_another_model_gets_a_verdict():
    from uncertainty import uncertainty_maps

    torch.manual_seed(0)

    def loader(prefix, count):
        return [([f"{prefix}{index}a", f"{prefix}{index}b"], torch.randn(2, 3, 16, 16),
                 (torch.rand(2, 16, 16) > 0.4).to(torch.uint8)) for index in range(count)]

    names = {"model": _OtherModel(), "uncertainty_maps": uncertainty_maps, "validation": loader("v", 3), "test": loader("t", 4)}
    exec(documented("from evaluation import evaluate"), names)
    metrics = names["result"].metrics
    assert metrics["test"]["images"] == 8 and "foreground calibration error" in metrics["verdict"]
    assert metrics["test"]["empty_cams"] is not None


def test_the_documentation_says_how_a_rule_is_entered(monkeypatch):
    monkeypatch.setattr(fusion, "RULES", dict(fusion.RULES))
    exec(documented("from evaluation import rule"), {})
    assert fusion.fuse(torch.tensor([1.0]), torch.tensor([1.0]), "quadratic_mean").tolist() == [1.0]
    assert fusion.fuse(torch.tensor([0.8]), torch.tensor([0.0]), "quadratic_mean").item() == pytest.approx((0.64 / 2) ** 0.5)
