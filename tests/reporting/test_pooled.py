"""The report of pooled trainings: the verdict first, every number as in the metrics, a way to the report of each."""

from __future__ import annotations

import re
import shutil

import pytest
from concluded import make_pooled
from conftest import command
from saved_runs import Page

from experiment.saved_run import load_pooled
from reporting.document import Table, plain
from reporting.formats import SYNTHETIC_NOTE
from reporting.pooled import draw_pooled, pooled_blocks
from reporting.quotes import Quotes
from runtime.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_pooled(tmp_path_factory.mktemp("pooled") / "study")
    draw_pooled(made)
    return made


@pytest.fixture(scope="module")
def shown(run) -> Page:
    return Page((run.folder / "report.html").read_text(encoding="utf-8"))


def test_drawing_returns_the_files_that_it_wrote(run):
    paths = draw_pooled(run)
    assert [path.relative_to(run.folder).as_posix() for path in paths] == ["figures/endpoints.png", "report.html", "report.md"]
    assert all(path.is_file() for path in paths)


def test_the_verdict_comes_first_then_endpoints_and_controls(run, shown):
    assert [tag for tag, _ in shown.tags if tag in ("h1", "h2", "table", "img")][:4] == ["h1", "table", "table", "h2"]
    assert shown.text.index(run.metrics["verdict"]) < shown.text.index("Endpoints, with margins") < shown.text.index("Controls:")
    assert [attributes["id"] for attributes in shown.all("h2")] == [
        "warnings", "beside", "figures", "trainings", "procedures", "setup"]
    assert SYNTHETIC_NOTE in shown.text and "Data: tiny discs" in shown.text
    assert "Pooled over 3 trainings" in shown.text and "the same 60 test images" in shown.text


def test_every_number_is_that_of_the_metrics(run, shown):
    quote = Quotes(run.metrics)
    assert len(shown.quoted) > 100
    for path, value, text in shown.quoted:
        assert value == str(quote.get(path)) and text
    markdown = re.sub(r"\\(.)", r"\1", (run.folder / "report.md").read_text(encoding="utf-8"))
    assert all(text in markdown for _, _, text in shown.quoted)


def test_a_row_per_training_with_every_endpoint_and_the_spread(run):
    table = next(block for block in pooled_blocks(run) if isinstance(block, Table) and block.caption.startswith("Each training"))
    assert len(table.header) == 10 and all(len(row) == 10 for row in table.rows)
    rows = [[plain(cell) for cell in row] for row in table.rows]
    # the first endpoint is 1 / 512, and 1 / 1024 more with every training
    assert [row[:5] for row in rows] == [
        ["42", "seed-42", "0.7500", "0.5", "+0.0020"], ["43", "seed-43", "0.7656", "0.625", "+0.0029"],
        ["44", "seed-44", "0.7812", "0.75", "+0.0039"], ["standard deviation", "", "", "", "0.0010"]]


def test_procedures_and_what_they_tuned(run):
    tables = {" ".join(block.caption.split()[:2]): block for block in pooled_blocks(run) if isinstance(block, Table)}
    rows = [[plain(cell) for cell in row] for row in tables["Measures on"].rows]
    assert rows[1] == ["fused score", "0.1250", "0.1328", "0.1406", "0.1484"]  # 2 / 16, and 1 / 128 more with every measure
    tuned = [[plain(cell) for cell in row] for row in tables["What validation"].rows]
    assert len(tuned) == 3 and tuned[1] == ["43", "0.625", "0.015625", "0.140625", "0.265625", "0.390625"]


def test_a_training_with_a_report_is_linked_to(run, shown):
    links = [attributes["href"] for attributes in shown.all("a") if not attributes["href"].startswith("#")]
    assert links == ["seed-42/report.html"] and (run.folder / links[0]).is_file()
    assert "[seed-42](<seed-42/report.html>)" in (run.folder / "report.md").read_text()


def test_settings_versions_and_commands_are_said(shown):
    for part in ("image size", "brier = 0.25", "cpu (x); python 3, torch 2", "python 3, scipy 1",
                 "python main.py --trainings 3 --data 'a folder'", "visualize.py --summary --run", "1,000"):
        assert part in shown.text, part


def test_the_page_is_one_accessible_file_without_script_or_network(shown, run):
    assert not shown.all("script")
    assert all(attributes["src"].startswith("data:image/") for attributes in shown.all("img"))
    (picture,) = shown.all("img")
    assert "better" in picture["alt"] and SYNTHETIC_NOTE.lower() in picture["alt"].lower()
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert "http" not in (run.folder / "report.html").read_text().replace("http-equiv", "")


def test_metrics_of_another_version_are_an_error(run):
    for key in ("pooled", "conclusion"):
        metrics = {name: value for name, value in run.metrics.items() if name != key}
        with pytest.raises(UserError, match=f"metrics.json lacks what the report quotes .*{key}.*; run main.py again"):
            draw_pooled(run._replace(metrics=metrics))


# ---------------------------------------------------------------- the picture command


def test_summary_draws_the_pooled_report_again(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("figures", "report.md"))
    outcome = command("--run", copy, "--summary", script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == f"saved {copy / 'report.html'}\n"
    for name in ("figures/endpoints.png", "report.md"):
        assert (copy / name).is_file()
    assert (copy / "figures" / "endpoints.png").read_bytes() == (run.folder / "figures" / "endpoints.png").read_bytes()
    assert load_pooled(copy).metrics == run.metrics


@pytest.mark.parametrize("flags", [(), ("--id", "a"), ("--gallery", "worst")])
def test_a_picture_of_a_case_needs_one_training(run, tmp_path, flags):
    outcome = command("--run", run.folder, *flags, script="visualize.py", cwd=tmp_path)
    assert outcome.returncode == 2
    trainings = ", ".join(str(run.folder / f"seed-{seed}") for seed in (42, 43, 44))
    assert outcome.stderr == f"error: {run.folder} pools several trainings; choose one of them: {trainings}\n"
