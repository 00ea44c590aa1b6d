"""The report: every number as in the metrics, the verdict first, nothing fetched, and everything escaped."""

from __future__ import annotations

import json
import re

import pytest
from saved_runs import Page, changed, make_run, many, plain_image

from experiment.saved_run import load_run
from reporting.document import Table
from reporting.endpoints import p_value
from reporting.figure_texts import FIGURE_TEXTS, GALLERY_CAPTIONS
from reporting.formats import MISSING, SYNTHETIC_NOTE, count, number, percent, signed, signed_span, span
from reporting.galleries import RULES
from reporting.report import report_blocks, write_report
from reporting.run_pictures import draw_galleries
from runtime.errors import UserError

HOSTILE = 'a<script>alert(1)</script>&"\' | `x` **b** {test.dice} $part'


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


def page(run) -> Page:
    html, markdown = write_report(run)
    return Page(html.read_text(encoding="utf-8"))


def lookup(metrics, path):
    for key in path.split("."):
        metrics = metrics[int(key)] if isinstance(metrics, list) else metrics[key]
    return metrics


def ways_to_write(value):
    if isinstance(value, list):
        if None in value:
            return {MISSING}
        return {span(value), signed_span(value), f"{value[0]:.6g} to {value[1]:.6g}"}
    if isinstance(value, str):
        return {value}
    if value is None:
        return {MISSING}
    return {number(value), signed(value), count(value), percent(value), f"{value:g}", p_value(value)}


# ---------------------------------------------------------------- what it says


def test_every_number_of_the_report_is_that_of_the_metrics(run):
    metrics = json.loads((run.folder / "metrics.json").read_text())
    quoted = page(run).quoted
    assert len(quoted) > 200
    for path, value, text in quoted:
        assert value == str(lookup(metrics, path)), path
        assert text in ways_to_write(lookup(metrics, path)), path
    paths = {path for path, _, _ in quoted}
    for score in ("predictive_variance", "saliency_variance", "fused"):
        assert {f"test.foreground_ece.{score}", f"test.foreground_ece_interval.{score}"} <= paths
    assert {"verdict", "lambda", "test.dice", "test.images"} <= paths
    assert sum(path.startswith("study.rules") for path in paths) >= 3 * len(metrics["study"]["rules"])


def test_both_formats_say_the_same_numbers(run):
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(run))
    plain = re.sub(r"\\(.)", r"\1", markdown)
    for _, _, text in Page(html).quoted:
        assert text in plain


def test_the_verdict_comes_first_then_the_table(run):
    shown = page(run)
    text = shown.text
    assert text.index(run.metrics["verdict"]) < text.index("predictive variance", text.index(run.metrics["verdict"]) + 1)
    order = [tag for tag, _ in shown.tags if tag in ("h1", "table", "figure")]
    assert order[:2] == ["h1", "table"]
    lead = next(index for index, (tag, a) in enumerate(shown.tags) if a.get("class") == "lead")
    assert lead < next(index for index, (tag, _) in enumerate(shown.tags) if tag == "table")


def test_endpoints_and_controls_stand_at_the_top_and_nothing_else_is_judged(run):
    captions = [block.caption for block in report_blocks(run) if isinstance(block, Table)]
    assert [caption[:8] for caption in captions[:2]] == ["Endpoint", "Controls"]
    said = page(run).text
    assert "One training: made up." in said
    assert not {"improves", "degrades", "improves.", "degrades."} & set(said.split())


def test_the_sections_stand_in_the_order_of_reading(run):
    shown = page(run)
    assert [attributes["id"] for attributes in shown.all("h2")] == [
        "warnings", "beside", "figures", "cases", "measures", "study", "setup"]
    without = {key: value for key, value in run.metrics.items() if key != "study"}
    assert "Beyond the paper" not in page(run._replace(metrics=without)).text


def test_every_figure_and_gallery_has_its_texts(run):
    assert {path.stem for path in (run.folder / "figures").iterdir()} == {
        *FIGURE_TEXTS, *(f"gallery_{name}" for name in GALLERY_CAPTIONS)}
    assert list(GALLERY_CAPTIONS) == list(RULES)
    said = page(run).text
    assert said.count("Columns: the image with the truth") == 1  # the legend of the galleries, below the first


def test_descriptions_of_figures_quote_the_numbers(run):
    descriptions = " ".join(attributes["alt"] for attributes in page(run).all("img"))
    test = run.metrics["test"]
    difference = test["foreground_ece_difference"]["fused_minus_predictive_variance"]
    ranks = test["ranking_of_images"]["whole_image"]
    for part in (
        f"fused score {number(test['foreground_ece']['fused'])}. ", f"λ = {run.metrics['lambda']:g} was chosen",
        f"Fused score: {signed(difference['value'])}, {signed_span(difference['interval'])}.",
        f"saliency variance {signed(ranks['saliency_variance']['spearman_with_dice']['value'])}, fused",
    ):
        assert part in descriptions, part


def test_a_report_by_blocks_has_a_row_per_score_measure_and_rule(run):
    tables = {block.caption.split(";")[0].split(",")[0]: block for block in report_blocks(run) if isinstance(block, Table)}
    assert [row[0] for row in tables["Foreground calibration error on the test set"].rows] == [
        "predictive variance", "saliency variance", "fused score"]
    assert [row[6] for row in tables["Foreground calibration error on the test set"].rows] == [
        "", "exploratory", "endpoint, see above"]
    recalibrated = tables["The same error after the confidences were recalibrated on validation"]
    assert [row[0] for row in recalibrated.rows] == ["isotonic", "Platt"]
    assert list(run.metrics["verdict_recalibrated"]) == ["isotonic", "platt"]
    assert len(tables["Endpoints"].rows) == 6 and len(tables["Controls: is it saliency? Fused score minus each"].rows) == 4
    assert [row[0] for row in tables["Segmentation: mean over images"].rows] == [
        "Dice", "Jaccard", "Jaccard, 0 where below 0.65"]
    rules = tables["Foreground ECE on test of every normalisation and rule"].rows
    assert len(rules) == len(run.metrics["study"]["rules"])
    assert [row[3] for row in rules].count("reference") == 1
    for block in tables.values():
        assert all(len(row) == len(block.header) for row in block.rows)


def test_setup_names_split_settings_versions_and_the_command(run):
    said = page(run).text
    for part in ("12.5 %", "python main.py --data 'a folder'", "visualize.py --summary --run", "90.0 s"):
        assert part in said


def test_what_would_have_come_out_without_the_widest_image(run):
    entry = {"value": 0.125, "interval": [-0.25, 0.5], "verdict": "x"}
    widest = {"image": "wide one", "largest": 0.75, "largest_elsewhere": 0.5, "lambda": 0.3, "foreground_ece_difference": {
        "fused_minus_predictive_variance": entry,
        "saliency_variance_minus_predictive_variance": {**entry, "value": None, "interval": [None, None]}}}
    study = {**run.metrics["study"], "without_widest_image": widest}
    assert (
        "Of all validation images, wide one has the largest saliency variance, 0.7500 (elsewhere at most 0.5000), and so sets "
        "the scale of the saliency score. Without it λ = 0.3 would have been chosen; on test the foreground ECE of the fused "
        "score minus that of predictive variance would be +0.1250 (-0.2500 to +0.5000), that of saliency variance not defined."
    ) in page(changed(run, study=study)).text
    study["without_widest_image"] = None
    assert "Without the image that sets the scale" not in page(changed(run, study=study)).text


# ---------------------------------------------------------------- how it is made


def test_the_page_is_one_file_without_script_or_network(run):
    shown = page(run)
    assert not shown.all("script")
    assert all(attributes["src"].startswith("data:image/") for attributes in shown.all("img"))
    assert all(a["href"].startswith(("#", "data:")) for a in shown.all("a") + shown.all("link"))
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    text = (run.folder / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_the_page_is_accessible(run):
    shown = page(run)
    assert shown.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert len(shown.all("img")) == 12
    descriptions = [attributes["alt"] for attributes in shown.all("img")]
    assert all(len(text) > 40 and SYNTHETIC_NOTE.lower() in text.lower() for text in descriptions)
    assert all(attributes["scope"] in ("row", "col") for attributes in shown.all("th"))
    ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in shown.all("a")} <= set(ids)


@pytest.mark.parametrize(("images", "foreground"), [(1, True), (1, False), (3, False)])
def test_a_report_of_few_images_or_none_with_a_lesion(tmp_path, images, foreground):
    folder = make_run(tmp_path, images=images, foreground=foreground)
    loaded = load_run(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "gallery_complex.png").write_bytes(b"of an earlier run")
    draw_galleries(loaded, plain_image, ["complex"])
    assert ((folder / "figures" / "gallery_complex.png").exists()) is foreground
    shown = page(loaded)
    assert len(shown.all("img")) == foreground
    assert loaded.metrics["verdict"] in shown.text
    assert "nan" not in shown.text.lower().split()
    if not foreground:
        assert MISSING in shown.text
        assert "no lesion pixel" in shown.text


def test_a_report_of_600_images(run):
    assert "600 test images" in page(many(run.folder, 600)).text


def test_hostile_names_are_text(tmp_path):
    ids = [f"{index}{HOSTILE}".replace("/", "") for index in range(2)]
    folder = make_run(tmp_path / "results <b>&", images=2, ids=ids, data_note=HOSTILE)
    loaded = load_run(folder)
    record = {**loaded.record, "images": HOSTILE, "command": ["main.py", HOSTILE], "device_name": HOSTILE,
              "versions": {HOSTILE: HOSTILE}}
    draw_galleries(loaded, plain_image, ["worst"])
    skipped = [{"id": HOSTILE, "reason": "no mask"}]
    shown = page(changed(loaded, skipped=skipped)._replace(record=record))
    assert not shown.all("script")
    assert not shown.all("b")
    assert shown.text.count(HOSTILE) >= 6
    markdown = (folder / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", re.sub("(?s)```.*?```", "", markdown))


def test_a_report_can_be_written_before_any_figure(tmp_path):
    shown = page(load_run(make_run(tmp_path, images=2)))
    assert not shown.all("img")


def test_metrics_of_another_version_are_an_error(run):
    with pytest.raises(UserError, match=r"metrics.json lacks what the report quotes \('bootstrap'\)"):
        write_report(run._replace(metrics={key: value for key, value in run.metrics.items() if key != "bootstrap"}))
