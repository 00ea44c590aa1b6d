"""The names of the scores in every text: what is replaced, what stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.conclusion import CONTROLS, ENDPOINTS, ONE_TRAINING
from experiment.saved_run import SavedRun
from experiment.terms import STANDARD, Terms, displayed, terms_of, terms_of_metrics

TERMS = Terms("entropy", "variance")


@pytest.mark.parametrize(
    ("text", "worded"),
    [
        ("minus predictive variance", "minus entropy"),
        ("Predictive variance alone", "Entropy alone"),
        ("Fusing predictive and saliency variance: a", "Fusing entropy and variance: a"),
        ("another image's saliency", "another image's variance"),
        ("Saliency adds something", "Variance adds something"),
        ("the scale of the saliency score", "the scale of the variance"),
        ("predictive entropy", "predictive entropy"),
        ("fused minus predictive (95 %)", "fused minus entropy (95 %)"),
        ("variance of Grad-CAM, log scale", "variance, log scale"),
        ("variance of probability, log scale", "entropy, log scale"),
        ("the two normalised variances", "the two normalised scores"),
        ("fused_minus_predictive_variance, maps-saliency", "fused_minus_predictive_variance, maps-saliency"),
        ("nothing of it", "nothing of it"),
    ],
)
def test_standard_terms_become_the_names(text, worded):
    assert TERMS(text) == worded
    assert STANDARD(text) == text


def test_every_text_of_a_conclusion_is_worded():
    for text in (*(endpoint.label for endpoint in ENDPOINTS.values()), *CONTROLS.values(), ONE_TRAINING):
        worded = TERMS(text)
        assert "saliency" not in worded and "predictive" not in worded and "--trainings" not in worded
    assert TERMS(ENDPOINTS["added_auroc_whole_image"].label) == "AUROC of errors that variance adds"


def test_a_name_at_the_start_of_a_sentence_keeps_its_underscores():
    assert Terms("total_u", "mc_var")("Saliency variance; Predictive variance") == "mc_var; total_u"


def test_metrics_are_worded_where_texts_stand_and_nowhere_else():
    metrics = {
        "verdict": "Fused against predictive variance", "verdict_recalibrated": {"platt": "predictive variance alone"},
        "conclusion": {"endpoints": [{"label": "that saliency adds", "name": "saliency"}], "notes": ["saliency"]},
        "study": {"rules": [{"rule": "saliency"}]}, "data_note": "saliency maps", "lambda": 0.5,
        "warnings": [{"code": "constant_saliency_variance", "text": "The saliency variance is 0"}],
    }
    assert TERMS.in_metrics(metrics) == {
        "verdict": "Fused against entropy", "verdict_recalibrated": {"platt": "entropy alone"},
        "conclusion": {"endpoints": [{"label": "that variance adds", "name": "saliency"}], "notes": ["variance"]},
        "study": {"rules": [{"rule": "saliency"}]}, "data_note": "saliency maps", "lambda": 0.5,
        "warnings": [{"code": "constant_saliency_variance", "text": "The variance is 0"}],
    }
    assert metrics["verdict"] == "Fused against predictive variance"  # not changed in place


def test_names_that_are_standard_terms_themselves_are_not_replaced_twice():
    swapped = displayed(["saliency_variance", "pred_variance"])
    assert swapped == {"first": "saliency variance", "second": "predictive variance"}
    told = Terms(**swapped).in_metrics({
        "verdict": "Fused against predictive variance: better", "label": "AUROC of errors that saliency adds"})
    assert told == {
        "verdict": "Fused against saliency variance: better", "label": "AUROC of errors that predictive variance adds"}
    terms = terms_of_metrics({**told, "score_names": swapped})
    shown = f"{told['label']} (whole image); predictive variance alone; {told['verdict']}"
    assert terms(shown) == (
        "AUROC of errors that predictive variance adds (whole image); saliency variance alone; Fused against saliency variance: "
        "better")
    assert terms("AUROC of errors\nthat predictive variance\nadds") == "AUROC of errors\nthat predictive variance\nadds"


def test_names_of_files_stay_as_they_are():
    run = SavedRun(
        Path("the saliency run"), {"score_names": {"first": "entropy", "second": "variance"}},
        {"split": {"test": ["x 1 saliency"]}}, [{"id": "a predictive id"}], [])
    terms = terms_of(run)
    assert terms("the saliency run: saliency; a predictive id; x 1 saliency") == (
        "the saliency run: variance; a predictive id; x 1 saliency")
    assert terms_of(run._replace(metrics={})) is STANDARD
