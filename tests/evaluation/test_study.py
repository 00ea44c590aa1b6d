from __future__ import annotations

from constructed_maps import Images, constructed_images, make_images

from evaluation.protocol import evaluate
from evaluation.study import run_study, without_widest_image


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


def test_the_study_has_all_its_tables():
    found = run_study(make_images(3, seed=1), make_images(3, seed=2), lambdas=(0.0, 0.5, 1.0), resamples=20)
    assert list(found) == ["rules", "added_value", "added_value_of_trees", "without_widest_image"]
    assert found["without_widest_image"]["lambda"] in (0.0, 0.5, 1.0)
    assert {row["parameter"] for row in found["rules"] if row["rule"] == "convex"} <= {0.0, 0.5, 1.0}
