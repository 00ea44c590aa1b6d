"""What limits the numbers of a run, and when the report says so."""

from __future__ import annotations

import json

import pytest
from concluded import make_pooled
from saved_runs import Page, changed

from experiment.saved_run import load_run
from reporting.caveats import CAVEATS, caveats, nothing, pooled_caveats
from reporting.document import plain
from reporting.formats import SYNTHETIC_NOTE
from reporting.report import write_report
from runtime.config import Config


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


@pytest.fixture
def clean(run):
    """A run about which nothing is to be said."""
    metrics = json.loads(json.dumps(run.metrics))
    metrics["test"].update(images_without_foreground=0, empty_cams=0, precision_fallbacks=0, images=519, dice=0.87,
                           clipped_pixels={"pred_variance": 0, "saliency_variance": 0})
    metrics["validation"].update(empty_cams=0, images_without_foreground=0, images=260, range_set_by={})
    metrics.update({"synthetic": False, "data_note": None, "lambda": 0.5, "skipped": []})
    return run._replace(metrics=metrics, record={**run.record, "configuration": Config().to_dict()})


def said(run) -> list[str]:
    return [plain(text) for text in caveats(run)]


def test_warnings_name_what_limits_the_numbers(run):
    metrics = json.loads(json.dumps(run.metrics))
    metrics["test"].update(images_without_foreground=2, empty_cams=7, precision_fallbacks=3,
                           clipped_pixels={"pred_variance": 14, "saliency_variance": 1024})
    metrics["test"]["dice"] = 0.51
    metrics["skipped"] = [{"id": "x <b>", "reason": "no mask"}]
    narrow = {"image": "a", "largest": 0.5, "largest_elsewhere": 0.4}
    metrics["validation"]["range_set_by"] = {
        "pred_variance": narrow, "saliency_variance": {"image": "wide", "largest": 0.2, "largest_elsewhere": 0.01}
    }
    shown = Page(write_report(changed(run, **metrics))[0].read_text(encoding="utf-8")).text
    for part in ("synthetic lesions, drawn", "tiny discs", "2 of 6 test images have no lesion", "7 of 180 Grad-CAM",
                 "3 test images overflowed", "14 pixels of the predictive and 1,024 of the saliency", "Only 6 test images",
                 "Only 4 validation images",
                 "One validation image, wide, sets the scale of the saliency variance", "segments badly (test Dice 0.5100)",
                 "Pairs left out, 1 in all: x <b> (no mask).", "image size 32 (default: 256)"):
        assert part in shown, part
    assert "sets the scale of the predictive" not in shown


def test_a_clean_run_has_no_warning(clean):
    html = write_report(clean)[0].read_text(encoding="utf-8")
    assert nothing(clean) in Page(html).text
    assert "Nothing stands out" in nothing(clean) and "no heatmap was empty" in nothing(clean)
    assert SYNTHETIC_NOTE not in html
    assert said(clean) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("synthetic", True,
         "The images are synthetic lesions, drawn by the program. The verdict is about them, not about patients."),
        ("data_note", "centre-cropped", "About the images: centre-cropped"),
        ("test.images", 49, "Only 49 test images: the intervals are rough."),
        ("validation.images", 49, "Only 49 validation images, on which λ and the scales of the scores rest."),
        ("test.dice", 0.69, "The network segments badly (test Dice 0.6900): its uncertainty means little."),
        ("validation.images_without_foreground", 1,
         "1 of 260 validation images have no lesion pixel; they add nothing to the foreground errors."),
        ("test.images_without_foreground", 2,
         "2 of 519 test images have no lesion pixel; they add nothing to the foreground errors."),
        ("lambda", 1.0, "The tuned λ is 1: the fused score is predictive variance alone."),
        ("lambda", 0.0, "The tuned λ is 0: the fused score is saliency variance alone."),
        ("validation.range_set_by", {"pred_variance": {"image": "w", "largest": 0.75, "largest_elsewhere": 0.25}},
         "One validation image, w, sets the scale of the predictive variance: its largest value, 0.7500, is far above that of "
         "any other, 0.2500. The confidence of every pixel and the choice of λ rest on it."),
        ("test.empty_cams", 7,
         "7 of 15,570 Grad-CAM heatmaps of the test images were zero everywhere; they stay zero in the saliency variance."),
        ("validation.precision_fallbacks", 3,
         "3 validation images overflowed in half precision; their maps were made in single precision."),
        ("skipped", [{"id": "a", "reason": "no mask"}, {"id": "b", "reason": "empty\nfile"}],
         "Pairs left out, 2 in all: a (no mask); b (empty\\nfile)."),
    ],
)
def test_each_condition_gives_its_own_sentence(clean, path, value, expected):
    metrics, keys = json.loads(json.dumps(clean.metrics)), path.split(".")
    target = metrics if len(keys) == 1 else metrics[keys[0]]
    target[keys[-1]] = value
    assert said(clean._replace(metrics=metrics)) == [expected]


def test_limits_of_the_conditions(clean):
    metrics = json.loads(json.dumps(clean.metrics))
    metrics["test"].update(images=50, dice=0.7)
    metrics["validation"].update(images=50)
    twice = {"image": "w", "largest": 0.5, "largest_elsewhere": 0.25}  # not more than twice
    alone = {"image": "w", "largest": 0.5, "largest_elsewhere": None}
    metrics["validation"]["range_set_by"] = {"pred_variance": twice, "saliency_variance": alone}
    assert said(clean._replace(metrics=metrics)) == []
    metrics["test"]["dice"] = None
    assert said(clean._replace(metrics=metrics)) == []


def test_clipped_pixels_are_counted_for_both_variances(clean):
    metrics = json.loads(json.dumps(clean.metrics))
    metrics["test"].update(clipped_pixels={"pred_variance": 0, "saliency_variance": 1024}, pixels=34013184)
    assert said(clean._replace(metrics=metrics)) == [
        "Values outside the validation range were clipped: 0 pixels of the predictive and 1,024 of the saliency variance, of "
        "34,013,184 test pixels."]


def test_settings_and_earlier_environments_come_from_the_record(clean):
    record = {**clean.record, "configuration": {**Config().to_dict(), "passes": 10, "width": 16, "synthetic_images": 9},
              "earlier": [{"device": "cuda:0", "versions": {"torch": "2.6"}}, {"device": "cpu", "versions": {"torch": "2.7"}}]}
    assert said(clean._replace(record=record)) == [
        "Settings other than the defaults: width 16 (default: 64); passes 10 (default: 30).",
        "Parts of what this run used again may have been made on another device or with other versions: "
        "cuda:0 with torch 2.6; cpu with torch 2.7."]


def test_the_numbers_keep_their_paths(clean):
    metrics = json.loads(json.dumps(clean.metrics))
    metrics["validation"]["images_without_foreground"] = 3
    (text,) = caveats(clean._replace(metrics=metrics))
    assert [piece.path for piece in text if not isinstance(piece, str)] == [
        "validation.images_without_foreground", "validation.images"]


def test_every_caveat_is_a_sentence():
    assert all(caveat.template.endswith((".", ":text}")) for caveat in CAVEATS)


# ---------------------------------------------------------------- several trainings


def test_what_limits_pooled_trainings(tmp_path):
    run = make_pooled(tmp_path)
    assert [plain(text) for text in pooled_caveats(run)] == [
        "The images are synthetic lesions, drawn by the program. The verdict is about them, not about patients.",
        "About the images: tiny discs",
        "Only 3 trainings, fewer than 10: the variance between them is hardly known, and the intervals are wide for it.",
        "Settings other than the defaults: image size 32 (default: 256).",
        "Each training has warnings of its own, in its own report.",
    ]


def test_ten_trainings_on_many_images_have_few_limits(tmp_path):
    run = make_pooled(tmp_path, range(42, 52), synthetic=False, data_note=None)
    record = {**run.record, "configuration": Config().to_dict()}
    assert [plain(text) for text in pooled_caveats(run._replace(record=record))] == [
        "Each training has warnings of its own, in its own report."]
    pooled = [{**entry, "dice": dice} for entry, dice in zip(run.metrics["pooled"], (0.5, None, *[0.8] * 8))]
    metrics = {**run.metrics, "pooled": pooled, "test": {"images": 49, "dice": 0.7}}
    record["environments"] = [{"device": "cpu"}, {"device": "cuda:0"}]
    said = [plain(text) for text in pooled_caveats(run._replace(metrics=metrics, record=record))]
    assert said[:-1] == [
        "Only 49 test images: the intervals are rough.",
        "Training seed-42 segments badly (test Dice 0.5000): its uncertainty means little.",
        "The trainings were made on different devices or with different versions; see the end of this report.",
    ]
