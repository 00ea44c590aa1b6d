from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed_maps import Images, make_images
from slow_regions import slow_outcome

from evaluation.counting import Counters, Rows, count_curve, count_scores, merge, split_exactly
from evaluation.fusion import Fusion, lambda_grid
from evaluation.joint import with_partners
from evaluation.normalisation import Linear
from evaluation.protocol import validation_edges
from evaluation.scores import uncertainty_scores
from evaluation.tuning import tune

GRID = lambda_grid()


@pytest.fixture(scope="module")
def split():
    images = make_images(6)
    fused = tune(images).fusion
    counters = count_scores(images, fused, GRID)
    return images, fused, count_scores(images, fused, GRID, edges=validation_edges(counters))


def same(first, second):
    one, two = first.to_arrays(), second.to_arrays()
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def everything(images, fused, name):
    """A score, outcomes and correctness of all pixels of a split, as flat arrays."""
    scores, outcome = [], []
    for _, maps in images:
        scores.append(uncertainty_scores(maps, fused)[name].flatten().cpu().numpy())
        outcome.append(slow_outcome({key: value.cpu() for key, value in maps.items()}))
    scores, outcome = np.concatenate(scores), np.concatenate(outcome)
    return scores, outcome, np.isin(outcome % 4, (0, 3))


def test_counts_agree_with_loops_over_bins(split):
    images, fused, counters = split
    for index, name in enumerate(counters.scores):
        score, outcome, correct = everything(images, fused, name)
        confidence = (np.float32(1) - score).astype(np.float64)
        for b in range(15):
            low = -1 if b == 0 else b / 15
            inside = (confidence > low) & (confidence <= (b + 1) / 15)
            for code in range(8):
                chosen = inside & (outcome == code)
                assert counters.images["count"][:, index, code, b].sum() == chosen.sum()
                assert counters.images["confidence"][:, index, code, b].sum() == confidence[chosen].sum()
        for code in range(8):
            truth = np.where(correct, confidence, 1 - confidence)[outcome == code]
            squared = counters.images["squared_error"][:, index, code].sum()
            loss = counters.images["log_loss"][:, index, code].sum()
            assert squared == pytest.approx(((1 - truth) ** 2).sum(), rel=1e-6)
            assert loss == pytest.approx(-np.log(np.maximum(truth, 2.0**-24)).sum(), rel=1e-6)


def foreground(counters, name, score):
    """Wrong and correct pixels of the foreground by image and bin, or their confidence, (I, 2, B)."""
    values = counters.images[name][:, score]
    return values[:, 2:4] + values[:, 6:8]


def test_curve_ends_are_the_two_variances(split):
    _, _, counters = split
    for name, position in (("predictive_variance", -1), ("saliency_variance", 0)):
        index = counters.scores.index(name)
        assert np.array_equal(counters.images["lambda_count"][:, position], foreground(counters, "count", index))
        confidence = foreground(counters, "confidence", index)
        assert np.array_equal(counters.images["lambda_confidence"][:, position], confidence)


def test_the_curve_at_the_tuned_lambda_is_the_fused_score(split):
    _, fused, counters = split
    index, position = counters.scores.index("fused"), GRID.index(fused.parameter)
    assert np.array_equal(counters.images["lambda_count"][:, position], foreground(counters, "count", index))


def test_curve_alone_is_the_curve_of_the_full_count(split):
    images, fused, counters = split
    alone = count_curve(images, fused, GRID)
    for name in ("lambda_count", "lambda_confidence"):
        assert np.array_equal(alone.images[name], counters.images[name])


def test_histograms_hold_every_pixel(split):
    images, _, counters = split
    pixels = counters.images["count"].sum(-1)
    assert np.array_equal(counters.images["cells"].sum(-1), pixels)
    assert np.array_equal(counters.pooled["fine"].sum(-1), pixels.sum(0))
    assert pixels[0, 0].sum() == images.items[0][1]["true_mask"].numel()


def test_shards_merge_to_the_same_counters_in_any_order(split):
    images, fused, counters = split
    items = with_partners(images)
    shards = [Images(items[start::3]) for start in (2, 0, 1)]
    assert same(merge(count_scores(shard, fused, GRID, edges=counters.edges) for shard in shards), counters)


def test_an_interrupted_count_is_continued_from_its_file(split):
    images, fused, counters = split
    items = with_partners(images)
    done = count_scores(Images(items[:4]), fused, GRID, edges=counters.edges)
    file = io.BytesIO()
    np.savez_compressed(file, **done.to_arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        done = Counters.from_arrays(arrays)
    rest = Images([item for item in items if item[0] not in done.ids])
    assert same(merge([done, count_scores(rest, fused, GRID, edges=counters.edges)]), counters)


def test_merging_what_does_not_belong_together_is_an_error(split):
    images, fused, counters = split
    with pytest.raises(ValueError, match="image_0000 was counted twice"):
        merge([counters, counters])
    with pytest.raises(ValueError, match="cannot be merged"):
        merge([counters, count_scores(make_images(1, prefix="other"), fused, GRID, bins=10, edges=counters.edges)])
    with pytest.raises(ValueError, match="no counters"):
        merge([])


def test_large_images_are_counted_in_pieces(split):
    _, fused, _ = split
    image = make_images(1, size=300).items[0]
    flipped = {name: values.flip(0, 1) for name, values in image[1].items()}
    whole = count_scores(Images([image]), fused, GRID)
    again = count_scores(Images([("image_0000", flipped)]), fused, GRID)
    for name in ("count", "confidence", "lambda_count", "lambda_confidence"):
        assert np.array_equal(whole.images[name], again.images[name])
    assert whole.images["squared_error"] == pytest.approx(again.images["squared_error"], rel=1e-12)


def test_clipped_pixels_are_counted(split):
    images, fused, counters = split
    assert counters.images["clipped"].sum() == 0  # the normalisation was fitted to these very images
    narrow = Fusion(Linear(0.01, 0.02), fused.saliency)
    found = count_scores(images, narrow, GRID).images["clipped"]
    outside = [int(((maps["pred_variance"] < 0.01) | (maps["pred_variance"] > 0.02)).sum()) for _, maps in images]
    assert found[:, 0].tolist() == outside and found[:, 1].sum() == 0


def test_mutual_information_needs_the_expected_entropy():
    images = make_images(2)
    for _, maps in images:
        del maps["expected_entropy"]
    fused = tune(images).fusion
    assert "mutual_information" not in count_scores(images, fused, GRID).scores
    mixed = Images(images.items + make_images(1, prefix="with").items)
    with pytest.raises(ValueError, match="with_0000: expected_entropy"):
        count_scores(mixed, fused, GRID)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("mean_prediction", float("nan"), "mean_prediction holds NaN"),
        ("mean_prediction", 1.5, r"mean_prediction must lie in \[0, 1\]"),
        ("pred_variance", float("inf"), "pred_variance holds NaN or infinite"),
        ("saliency_variance", -0.1, "saliency_variance must not be negative"),
        ("expected_entropy", float("nan"), "expected_entropy holds NaN"),
        ("true_mask", 255, "true_mask holds values other than 0 and 1"),
    ],
)
def test_bad_maps_are_named(split, name, value, message):
    _, fused, _ = split
    images = make_images(2)
    images.items[1][1][name][3, 3] = value
    for count in (count_scores, count_curve):
        with pytest.raises(ValueError, match=f"image_0001: {message}"):
            count(images, fused, GRID)


def test_maps_of_different_shapes_are_an_error(split):
    _, fused, _ = split
    images = make_images(1)
    images.items[0][1]["true_mask"] = images.items[0][1]["true_mask"][1:]
    with pytest.raises(ValueError, match="image_0000: true_mask is"):
        count_scores(images, fused, GRID)


def test_counting_leaves_the_maps_alone(split):
    images, fused, counters = split
    copies = [{name: value.clone() for name, value in maps.items()} for _, maps in images]
    count_scores(images, fused, GRID, edges=counters.edges)
    for (_, maps), copy in zip(images, copies):
        assert all(torch.equal(maps[name], copy[name]) for name in copy)


def test_no_image_is_an_error(split):
    with pytest.raises(ValueError, match="no image"):
        count_scores(Images([]), split[1], GRID)


def test_a_curve_counted_before_completes_the_counters(split):
    images, fused, counters = split
    rest = count_scores(images, fused, (), edges=counters.edges)
    assert rest.lambdas == () and "lambda_count" not in rest.images
    curve = count_curve(images, fused, GRID)
    assert same(rest.with_curve(curve), counters)
    with pytest.raises(ValueError, match="other images or bins"):
        rest.with_curve(count_curve(Images(images.items[1:]), fused, GRID))
    with pytest.raises(ValueError, match="other images or bins"):
        rest.with_curve(replace(curve, bins=10))


def test_quantile_bins_of_other_scores_are_an_error(split):
    images, fused, counters = split
    fewer = Images([(name, {key: value for key, value in maps.items() if key != "expected_entropy"}) for name, maps in images])
    with pytest.raises(ValueError, match="image_0001: expected_entropy has to be present in both splits"):
        count_scores(fewer, fused, GRID, edges=counters.edges)


def test_rows_of_more_images_than_a_block_come_back_in_the_order_of_their_ids():
    rows = Rows()
    for number in reversed(range(2 * Rows.BLOCK + 3)):
        rows.add(f"{number:04d}", {"number": np.array([number, -number])})
    found = rows.counters(("score",), bins=15)
    assert found.ids == tuple(f"{number:04d}" for number in range(2 * Rows.BLOCK + 3))
    assert found.images["number"].tolist() == [[number, -number] for number in range(2 * Rows.BLOCK + 3)]
    assert found.total()["number"].tolist() == [sum(range(2 * Rows.BLOCK + 3)), -sum(range(2 * Rows.BLOCK + 3))]


def test_losses_inside_and_outside_the_band_add_up_without_rounding(split):
    _, _, counters = split
    rng = np.random.default_rng(1)
    whole = np.concatenate([[0.0, 1e-300, 3.5], rng.random(500) * 10.0 ** rng.integers(-12, 9, 500)])[None]
    for part in (whole * rng.random(whole.shape), whole, np.zeros_like(whole), whole * (1 + 2e-16)):
        found = split_exactly(whole, part)
        outside, inside = found[:, : whole.shape[1]], found[:, whole.shape[1] :]
        assert np.array_equal(outside + inside, whole) and (found >= 0).all()
        assert inside == pytest.approx(part, rel=1e-15, abs=1e-15 * whole.max())
    for name in ("squared_error", "log_loss"):
        assert counters.images[name].shape == (6, len(counters.scores), 8) and (counters.images[name] >= 0).all()
