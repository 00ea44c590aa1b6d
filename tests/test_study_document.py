"""The study's pages: every number is one of the committed files, and those are the numbers of the runs."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import write_sealed

from docs.study import document, figures, numbers, tables
from reporting.endpoints import p_value
from reporting.formats import general, number, percent, signed
from runtime.errors import UserError
from runtime.records import fingerprint, read_json, read_sealed

DOCS = document.ROOT / "docs"
TEMPLATES = {DOCS / page: DOCS / "study" / name for page, name in document.PAGES.items()}
# settings of the experiment, margins of its endpoints, and the λ in the middle, which the text may name
SETTINGS = {"0.2", "0.005", "0.002", "0.01", "0.5"}


@pytest.fixture(scope="module")
def committed():
    return numbers.read_all(DOCS)


# ---------------------------------------------------------------- the committed pages


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


def test_the_pages_are_what_the_committed_numbers_say(committed):
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


def test_every_number_of_the_pages_is_found_in_the_files():
    # independent of how the pages are made: every decimal is the rounding of some number of some file
    files = [read_json(path) for path in sorted((DOCS / "study").glob("*.json"))]
    values = {value for content in files for value in leaves(content)}
    known = {shown(value).lstrip("+-") for value in values for shown in (number, percent, signed, general, p_value)} | SETTINGS
    pages = "".join(page.read_text(encoding="utf-8") for page in TEMPLATES)
    text = re.sub(r"`[^`\n]*`|```.*?```|\]\([^)]*\)|< 0\.001", "", pages, flags=re.S)
    quoted = re.findall(r"\d+\.\d+(?: %)?", text)
    assert len(quoted) > 500
    assert [one for one in quoted if one not in known] == []


def test_the_committed_numbers_are_of_one_study_and_small(committed):
    assert len({run["settings"]["split_seed"] for run in committed.values() if "settings" in run and run["settings"]}) == 1
    assert [committed[seed]["settings"]["seed"] for seed in numbers.SEEDS] == list(range(42, 52))
    assert committed["pooled"]["conclusion"]["seeds"] == list(range(42, 52))
    assert [committed[name]["settings"]["seed"] for name in numbers.LARGER] == [42, 43, 44]
    for name in (*numbers.SEEDS, *numbers.LARGER):
        assert committed[name]["validation"]["images"] == 260 and committed[name]["test"]["images"] == 519
        assert committed[name]["synthetic"] is False and "centre-cropped" in committed[name]["data_note"]
    assert sum(path.stat().st_size for path in (DOCS / "study").iterdir()) < 3 * 2**20
    assert not re.search(r"/(work|home|root|tmp)/", "".join(path.read_text() for path in (DOCS / "study").glob("*.json")))


def test_the_settings_are_those_of_the_plan(committed):
    plan = (DOCS / "study" / "PLAN.md").read_text(encoding="utf-8")
    settings = committed["pooled"]["settings"]
    assert f"--image-size {settings['image_size']} --epochs {settings['epochs']}" in plan
    assert (settings["width"], settings["passes"], settings["dropout"], settings["cam_score"]) == (16, 30, 0.2, "all")
    changed = {
        name: {key for key in settings.keys() - {"seed", "weights"} if committed[name]["settings"].get(key) != settings[key]}
        for name in numbers.ABLATIONS if name in committed
    }
    one = {"predicted-score": {"cam_score"}, "bottleneck": {"target_layer"}, "unscaled": {"cam_scale"}, "passes-10": {"passes"}}
    assert changed == {name: one[name] for name in changed}


def test_what_the_text_says_of_all_trainings_is_so(committed):
    """Each sentence about "all ten", "every" and "none", against the numbers."""
    for conclusion, last in ((committed["pooled"]["conclusion"], "equivalent"),
                             (committed["pooled"]["targets"]["HAM10000"]["conclusion"], "better")):
        outcomes = [entry["outcome"] for entry in conclusion["endpoints"]]
        assert outcomes == ["identical"] * 4 + ["equivalent", last]
    detectors = ("predictive_variance", "saliency_variance", "one_minus_max_probability")
    for seed in numbers.SEEDS:
        run = committed[seed]
        for part in (run["validation"], run["test"], run["targets"]["HAM10000"]["test"]):
            assert np.all(np.diff(part["foreground_ece_by_lambda"]) < 0)  # with every step of λ
        assert run["lambda"] == 1
        inside = run["test"]["regions"]["foreground"]
        confidence = {score: inside["scores"][score]["mean_confidence"] for score in detectors}
        assert confidence["saliency_variance"] > confidence["predictive_variance"] > inside["accuracy"]
        found = run["detectors"]["regions"]["whole_image"]
        own = found["predictive_variance"]["raw"]
        for other in ("one_minus_max_probability", "temperature_scaled", "flip_variance"):
            assert found[other]["raw"]["auroc"]["value"] > own["auroc"]["value"]
            assert other == "flip_variance" or found[other]["raw"]["brier"]["value"] < own["brier"]["value"]
    for name in (*numbers.SEEDS, *numbers.LARGER):
        for region in ("foreground", "predicted_foreground", "whole_image"):
            scores = committed[name]["test"]["regions"][region]["scores"]
            assert min(detectors, key=lambda score: scores[score]["auroc"]["value"]) == "saliency_variance"  # noqa: B023
    for region, below_half in (("foreground", 10), ("predicted_foreground", 9), ("whole_image", 0)):
        scores = [committed[seed]["test"]["regions"][region]["scores"] for seed in numbers.SEEDS]
        assert sum(of["saliency_variance"]["auroc"]["value"] < 0.5 for of in scores) == below_half
    for region in committed["pooled"]["conclusion"]["added"].values():
        null = region["permutation_null"]
        assert region["saliency_variance"]["by_training"][0] > null["largest"]


def test_the_mean_is_that_of_the_ten_trainings(committed):
    dices = [committed[seed]["test"]["dice"] for seed in numbers.SEEDS]
    assert committed["mean"]["test"]["dice"] == pytest.approx(sum(dices) / 10, rel=1e-5)
    assert committed["pooled"]["test"]["dice"] == pytest.approx(sum(dices) / 10, rel=1e-5)
    for seed, entry in zip(numbers.SEEDS, committed["pooled"]["pooled"]):
        assert committed[seed]["test"]["dice"] == entry["dice"] and committed[seed]["lambda"] == entry["lambda"]


def test_tables_have_as_many_cells_in_each_row(committed):
    for name in tables.TABLES:
        rows = [line for line in document.render(f"{{{{table: {name}}}}}", committed).splitlines() if line.startswith("|")]
        assert len(rows) >= 4 and len({line.count("|") for line in rows}) == 1


def test_numbers_are_quoted_by_name_by_training_and_as_a_range(committed):
    brier = next(entry for entry in committed["pooled"]["conclusion"]["endpoints"] if entry["name"] == "brier")
    dices = [committed[seed]["test"]["dice"] for seed in numbers.SEEDS]
    text = document.render(
        "{{pooled: conclusion.endpoints.brier.value | signed}} and {{ seed-43:test.dice|number }} and "
        "{{trainings: test.dice | range}} and {{larger: lambda | short}}", committed,
    )
    larger = ", ".join(general(committed[name]["lambda"]) for name in numbers.LARGER)
    assert text == f"{signed(brier['value'])} and {dices[1]:.4f} and {min(dices):.4f} to {max(dices):.4f} and {larger}"
    rule = document.render("{{larger-42: study.rules.rank-maximum.rule | text}}", committed)
    assert rule == "maximum"


def test_a_reference_to_nothing_fails(committed):
    with pytest.raises(KeyError):
        document.render("{{seed-42: test.no_such_number | number}}", committed)
    with pytest.raises(ValueError, match="no_such_rule"):
        document.render("{{larger-42: study.rules.rank-no_such_rule.x | number}}", committed)


def test_the_curves_are_inside_the_figure(committed):
    higher = {**committed["seed-43"], "test": {**committed["seed-43"]["test"]}}
    higher["test"]["foreground_ece_by_lambda"] = [9 * x for x in higher["test"]["foreground_ece_by_lambda"]]
    for ax in figures.lambda_curves({**committed, "seed-43": higher}).axes:
        assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= max(higher["test"]["foreground_ece_by_lambda"])


def test_the_figure_of_the_verdict_shows_better_to_the_right_and_all_of_it(committed):
    ax = figures.verdict(committed).axes[0]
    entry = committed["pooled"]["conclusion"]["endpoints"][0]
    low, high = sorted(-bound / entry["margin"] for bound in entry["interval"])  # a lower ECE is better
    assert any(sorted(line.get_xdata()) == pytest.approx([low, high]) for line in ax.lines if len(line.get_xdata()) == 2)
    drawn = [x for line in ax.lines for x in line.get_xdata()]
    assert ax.get_xlim()[0] <= min(drawn) and max(drawn) <= ax.get_xlim()[1]


# ---------------------------------------------------------------- from runs to numbers


@pytest.fixture
def runs(saved, tmp_path):
    """Results folders of all runs of the study, from one of constructed maps."""
    metrics = read_sealed(saved / "metrics.json")
    del metrics["checksum"]
    record = read_json(saved / "config.json")

    def training(folder, seed, share):
        inputs = {"data": "the images", "passes": 30, "width": 16, "image_size": 80, "seed": seed}
        folder.mkdir(parents=True)
        for file in ("per_image.csv", "training_log.csv"):
            shutil.copy(saved / file, folder)
        write_sealed(folder / "config.json", {**record, "decides": inputs, "identity": fingerprint(inputs)})
        write_sealed(folder / "metrics.json", {**metrics, "lambda": share, "config_identity": fingerprint(inputs)})

    for name, seeds in (("pooled", range(42, 52)), *((name, range(42, 45)) for name in numbers.ABLATIONS)):
        for seed in seeds:
            training(tmp_path / "runs" / name / f"seed-{seed}", seed, (seed - 42) / 10)
        made = {"pooled": [{"name": f"seed-{seed}"} for seed in seeds], "test": {"dice": 1 / 3}, "identity": "x"}
        write_sealed(tmp_path / "runs" / name / "metrics.json", made)
    for name in numbers.LARGER:
        training(tmp_path / "runs" / name, int(name[-2:]), 0.5)
    (tmp_path / "docs" / "study").mkdir(parents=True)
    return tmp_path / "runs"


def test_numbers_are_collected(saved, runs):
    docs = runs.parent / "docs"
    numbers.collect_all(runs, docs)
    found = numbers.read_all(docs)
    assert set(found) == {*numbers.FILES, *numbers.SEEDS, "mean"}
    metrics = read_sealed(saved / "metrics.json")
    exact = metrics["test"]["foreground_ece"]["fused"]
    assert found["seed-43"]["test"]["foreground_ece"]["fused"] == float(f"{exact:.6g}")
    assert found["passes-10"]["test"]["dice"] == 0.333333 and "identity" not in found["passes-10"]
    assert found["mean"]["lambda"] == 0.45 and [found[seed]["lambda"] for seed in numbers.SEEDS[:3]] == [0, 0.1, 0.2]
    score = found["first"]["test"]["regions"]["foreground"]["scores"]["saliency_variance"]
    table = metrics["test"]["regions"]["foreground"]["scores"]["saliency_variance"]["reliability"]
    mean = sum(n * c for n, c in zip(table["count"], table["confidence"]) if n) / sum(table["count"])
    assert score["mean_confidence"] == pytest.approx(mean, abs=1e-5)
    assert "reliability" not in found["seed-42"]["test"]["regions"]["foreground"]["scores"]["fused"]
    assert set(found["seed-42"]["test"]["regions"]["foreground"]["scores"]["fused"]["ece"]) == {"value"}


def test_larger_networks_that_are_not_at_hand_keep_their_numbers(runs):
    docs = runs.parent / "docs"
    (docs / "study" / "larger-43.json").write_text('{"kept": 1}')
    shutil.rmtree(runs / "larger-43")
    numbers.collect_all(runs, docs)
    assert numbers.read_all(docs)["larger-43"] == {"kept": 1}


def test_ablations_that_were_not_run_are_left_out(runs):
    shutil.rmtree(runs / "unscaled")
    numbers.collect_all(runs, runs.parent / "docs")
    assert "unscaled" not in numbers.read_all(runs.parent / "docs")


@pytest.mark.parametrize("name", ["passes-10/metrics.json", "pooled/seed-51/metrics.json"])
def test_a_run_that_is_missing_is_named(runs, name):
    (runs / name).unlink()
    with pytest.raises(UserError, match=name.rsplit("/", 1)[0]):
        numbers.collect_all(runs, runs.parent / "docs")


@pytest.mark.parametrize("other", [{"data": "other images"}, {"data": "the images", "split_seed": 1}])
def test_runs_of_different_images_or_splits_do_not_go_together(runs, other):
    folder = runs / "larger-44"
    record = json.loads((folder / "config.json").read_text())
    write_sealed(folder / "config.json", {**record, "decides": other, "identity": fingerprint(other)})
    metrics = read_json(folder / "metrics.json")
    write_sealed(folder / "metrics.json", {**metrics, "config_identity": fingerprint(other)})
    with pytest.raises(UserError, match="are of different images or splits"):
        numbers.collect_all(runs, runs.parent / "docs")


def test_other_runs_give_pages_without_the_text_about_the_committed_ones(committed, tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    monkeypatch.setattr(document, "collect_all", lambda runs, docs: None)
    monkeypatch.setattr(document, "read_all", lambda docs: committed)
    document.main(["--runs", str(tmp_path), "--docs", str(tmp_path), "--numbers-only"])
    text = (tmp_path / "STUDY.md").read_text(encoding="utf-8")
    assert "Width 16, 80 pixels" in text and "centre-cropped" in text and "{{" not in text
    assert text.count("| --- |") >= len(tables.TABLES) and all(f"study/{name}.png" in text for name in ("verdict", "forest"))
    assert len(list((tmp_path / "study").glob("*.png"))) == 5
