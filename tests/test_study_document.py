import json
import re
import shutil

import pytest
from conftest import write_sealed

from docs.study import document
from reporting.formats import number, percent, signed
from runtime.errors import UserError
from runtime.records import fingerprint, read_json, read_sealed

DOCS = document.ROOT / "docs"
TEMPLATES = {DOCS / page: DOCS / "study" / name for page, name in document.PAGES.items()}
NAMES = (*document.SEEDS, *document.ABLATIONS)
# settings of the experiment, which the text may name
SETTINGS = {"0.1", "0.2", "0.3", "0.5"}


@pytest.fixture(scope="module")
def committed():
    return document.read_all(DOCS)


@pytest.fixture
def runs(saved, tmp_path):
    """Results folders of all the runs of the study, from one of constructed maps."""
    metrics = read_sealed(saved / "metrics.json")
    del metrics["checksum"]
    record = read_json(saved / "config.json")
    inputs = {"data": "the images", "passes": 30, "width": 16, "image_size": 128}
    for index, name in enumerate(NAMES):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file in ("per_image.csv", "training_log.csv"):
            shutil.copy(saved / file, folder)
        write_sealed(folder / "config.json", {**record, "decides": inputs, "identity": fingerprint(inputs)})
        made = {**metrics, "lambda": index / 100, "config_identity": fingerprint(inputs)}
        write_sealed(folder / "metrics.json", made)
    (tmp_path / "docs" / "study").mkdir(parents=True)
    return tmp_path / "runs"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda path: path.name)
def test_the_template_has_no_result_typed_by_hand(template):
    text = document.PLACEHOLDER.sub("", template.read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    assert set(re.findall(r"\d+\.\d+", text)) <= SETTINGS


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def test_the_document_is_what_the_committed_numbers_say(committed):
    for page, template in TEMPLATES.items():
        text = page.read_text(encoding="utf-8")
        assert text == document.render(template.read_text(encoding="utf-8"), committed)
        assert "{{" not in text and "not defined" not in text


def test_lines_are_broken_anew_and_tables_and_code_are_left_alone():
    text = "# A  title\n\none\ntwo\n\n- an\n  item\n- another\n\n| a  |\n| --- |\n\n```bash\na  b\nc\n```\n"
    assert document.refilled(text) == text.replace("one\ntwo", "one two").replace("an\n  item", "an item")
    long = document.refilled("- " + 40 * "word " + "\n")
    assert [line[:6] for line in long.splitlines()] == ["- word", "  word"] and document.refilled(long) == long


def test_the_page_can_be_read_in_one_go():
    assert len((DOCS / "STUDY.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_every_number_of_the_document_is_found_in_the_metrics(committed):
    # independent of how the document is made: every decimal is the rounding of some number of some run
    values = [value for run in committed.values() for value in leaves(run)]
    known = {shown(value).lstrip("+-") for value in values for shown in (number, percent, signed, "{:g}".format)} | SETTINGS
    pages = "".join(page.read_text(encoding="utf-8") for page in TEMPLATES)
    text = re.sub(r"`[^`\n]*`|```.*?```|\]\([^)]*\)", "", pages, flags=re.S)
    quoted = re.findall(r"\d+\.\d+(?: %)?", text)
    assert len(quoted) > 500
    assert [one for one in quoted if one not in known] == []


def test_what_the_text_says_of_all_runs_is_so(committed):
    for run in committed.values():
        scores = run["test"]["regions"]["foreground"]["scores"]
        saliency_is_lower = scores["saliency_variance"]["mean_confidence"] < scores["predictive_variance"]["mean_confidence"]
        fused = run["test"]["foreground_ece_difference"]["fused_minus_predictive_variance"]
        assert (fused["verdict"] == "improves") == saliency_is_lower
        recalibrated = scores["fused"]["recalibrated"]["isotonic"]["minus_predictive_variance"]["log_loss"]
        assert run["lambda"] == 1 or recalibrated["interval"][0] > 0


def test_the_committed_numbers_are_of_one_study_and_small(committed):
    assert len({run["settings"]["data"] for run in committed.values()}) == 1
    assert len({run["settings"]["split_seed"] for run in committed.values()}) == 1
    assert [committed[name]["settings"]["seed"] for name in document.SEEDS] == [42, 43, 44]
    for run in committed.values():
        assert run["validation"]["images"] == 260 and run["test"]["images"] == 519 and run["synthetic"] is False
        assert "centre-cropped" in run["data_note"]
    assert sum(path.stat().st_size for path in (DOCS / "study").iterdir()) < 3 * 2**20
    assert not re.search(r"/(work|home|root|tmp)/", "".join(path.read_text() for path in (DOCS / "study").glob("*.json")))


def test_numbers_are_collected_and_quoted(runs):
    docs = runs.parent / "docs"
    document.collect_all(runs, docs)
    found = document.read_all(docs)
    metrics = read_sealed(runs / "seed-43" / "metrics.json")
    exact = metrics["test"]["foreground_ece"]["fused"]
    assert found["seed-43"]["test"]["foreground_ece"]["fused"] == float(f"{exact:.6g}")
    region = found["seed-43"]["test"]["regions"]["foreground"]
    score = region["scores"]["saliency_variance"]
    table = metrics["test"]["regions"]["foreground"]["scores"]["saliency_variance"]["reliability"]
    mean = sum(n * c for n, c in zip(table["count"], table["confidence"]) if n) / sum(table["count"])
    assert score["mean_confidence"] == pytest.approx(mean, abs=1e-5)
    assert "reliability" not in found["passes-5"]["test"]["regions"]["foreground"]["scores"]["fused"]
    text = document.render(
        "{{seed-43: test.foreground_ece.fused | number}} and {{seeds: lambda|short}} and {{ passes-5 : lambda | short }}", found
    )
    assert text == f"{exact:.4f} and 0, 0.01, 0.02 and 0.07"
    rules = {(rule["normalisation"], rule["rule"]): rule for rule in found["seed-42"]["study"]["rules"]}
    named = document.render("{{seed-42: study.rules.rank-maximum.foreground_ece.value | text}}", found)
    assert named == str(rules["rank", "maximum"]["foreground_ece"]["value"])
    for name in document.TABLES:
        rows = [line for line in document.render(f"{{{{table: {name}}}}}", found).splitlines() if line.startswith("|")]
        assert len(rows) >= 5 and len({line.count("|") for line in rows}) == 1
    document.draw_figures(found, docs)
    assert len(list((docs / "study").glob("*.png"))) == 5


def test_all_three_curves_are_inside_the_figure(runs):
    document.collect_all(runs, runs.parent / "docs")
    found = document.read_all(runs.parent / "docs")
    found["seed-43"]["test"]["foreground_ece_by_lambda"] = [3 * x for x in found["seed-43"]["test"]["foreground_ece_by_lambda"]]
    axes = document.lambda_curves(found).axes
    for ax in axes:
        assert ax.get_ylim()[0] == 0
        assert ax.get_ylim()[1] >= max(found["seed-43"]["test"]["foreground_ece_by_lambda"])


def test_other_runs_give_a_document_without_the_text_about_the_committed_ones(runs):
    document.main(["--runs", str(runs), "--docs", str(runs.parent / "docs"), "--numbers-only"])
    text = (runs.parent / "docs" / "STUDY.md").read_text(encoding="utf-8")
    assert "Width 16, 128 pixels" in text and "tiny discs" in text and "{{" not in text
    assert text.count("| --- |") >= len(document.TABLES) and all(f"study/{name}.png" in text for name in ("forest", "all_runs"))


@pytest.mark.parametrize("other", [{"data": "other images"}, {"data": "the images", "split_seed": 1}])
def test_runs_of_different_images_or_splits_do_not_go_together(runs, other):
    record = json.loads((runs / "passes-10" / "config.json").read_text())
    write_sealed(runs / "passes-10" / "config.json", {**record, "decides": other, "identity": fingerprint(other)})
    metrics = read_json(runs / "passes-10" / "metrics.json")
    write_sealed(runs / "passes-10" / "metrics.json", {**metrics, "config_identity": fingerprint(other)})
    with pytest.raises(UserError, match="are of different images or splits"):
        document.collect_all(runs, runs.parent / "docs")


def test_a_reference_to_nothing_fails(runs):
    document.collect_all(runs, runs.parent / "docs")
    with pytest.raises(KeyError):
        document.render("{{seed-42: test.no_such_number | number}}", document.read_all(runs.parent / "docs"))
    with pytest.raises(ValueError, match="no_such_rule"):
        document.render("{{seed-42: study.rules.rank-no_such_rule.x | number}}", document.read_all(runs.parent / "docs"))
