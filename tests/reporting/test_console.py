"""What a run prints at its end."""

from __future__ import annotations

import io
import json
import re

import pytest
from concluded import conclusion_of, make_pooled
from conftest import TINY_FLAGS, command
from saved_runs import Page, changed, make_run

from experiment.saved_run import load_run
from reporting import console
from reporting.formats import MISSING, SYNTHETIC_NOTE, number
from runtime.progress import console as talking


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


# ---------------------------------------------------------------- the table


def test_the_table_is_aligned_and_plain(run):
    lines = console.result_table(run.metrics).splitlines()
    assert len(lines) == 4
    for value, line in zip(run.metrics["test"]["foreground_ece"].values(), lines[1:]):
        assert line.index(number(value)) + 6 == lines[0].index("foreground ECE") + len("foreground ECE")
    assert "\033" not in "".join(lines)
    coloured = console.result_table(run.metrics, colour=True)
    assert re.sub(r"\033\[\d*m", "", coloured) == "\n".join(lines)
    coloured.replace("—", "").encode("ascii")  # any terminal can show it


def test_the_table_to_the_letter():
    entry = {"value": 0.03125, "interval": [0.0078125, 0.0625], "verdict": "degrades"}
    better = {"value": -0.03125, "interval": [-0.0625, -0.0078125], "verdict": "improves"}
    metrics = {"lambda": 0.9, "test": {
        "foreground_ece": {"predictive_variance": 0.125, "saliency_variance": 0.15625, "fused": 0.09375},
        "foreground_ece_interval": {name: [0.0625, 0.25] for name in ("predictive_variance", "saliency_variance", "fused")},
        "foreground_ece_difference": {"saliency_variance_minus_predictive_variance": entry,
                                      "fused_minus_predictive_variance": better},
    }}
    table = """\
score                                   foreground ECE     95 % interval  minus predictive       95 % interval
predictive variance alone (lambda = 1)          0.1250  0.0625 to 0.2500
saliency variance alone (lambda = 0)            0.1562  0.0625 to 0.2500           +0.0312  +0.0078 to +0.0625  exploratory
fused score (lambda = 0.9)                      0.0938  0.0625 to 0.2500           -0.0312  -0.0625 to -0.0078  endpoint"""
    found = console.result_table(metrics)
    assert found == table
    coloured = console.result_table(metrics, colour=True).splitlines()
    assert coloured == [f"\033[1m{found.splitlines()[0]}\033[0m", *found.splitlines()[1:]]


def test_the_endpoints_to_the_letter():
    table = """\
endpoint                                           region             difference       95 % interval  margin  outcome
foreground ECE, as the paper has it                true lesions          +0.0020  -0.0137 to +0.0176   0.005  better
Brier score of the confidence                      whole image           -0.0039  -0.0195 to +0.0117    0.25  worse
AUROC of errors                                    whole image           +0.0059  -0.0098 to +0.0215    0.01  equivalent
area under the risk-coverage curve, risk 1 - Dice  images                -0.0078  -0.0234 to +0.0078   0.005  different but negligible
AUROC of errors that saliency adds                 predicted lesion      +0.0098  -0.0059 to +0.0254   0.005  undecided
AUROC of errors that saliency adds                 whole image       not defined         not defined   0.005  not defined"""  # noqa: E501
    found = console.endpoint_table({"conclusion": conclusion_of((42, 43), {"brier": 0.25})})
    assert found == table
    found.encode("ascii")
    coloured = console.endpoint_table({"conclusion": conclusion_of((42, 43), {"brier": 0.25})}, colour=True)
    assert coloured == f"\033[1m{table.splitlines()[0]}\033[0m\n" + "\n".join(table.splitlines()[1:])


def test_a_table_without_any_foreground(tmp_path):
    table = console.result_table(load_run(make_run(tmp_path, images=1, foreground=False)).metrics)
    assert table.count(MISSING) == 3


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.colours_wanted(Terminal())
    assert not console.colours_wanted(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not console.colours_wanted(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.colours_wanted(Terminal())


# ---------------------------------------------------------------- the end of a run


def test_the_end_says_verdict_what_the_images_are_and_where_to_look(run, tmp_path, capsys):
    console.show_result(run.metrics, tmp_path, "discs", 90)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[1].startswith(f"Test set of discs: 6 images, Dice {number(run.metrics['test']['dice'])} (")
    assert lines[3:7] == console.result_table(run.metrics).splitlines()
    assert lines[7:9] == [console.HOLD_FIXED, ""]
    assert lines[9:17] == [*console.endpoint_table(run.metrics).splitlines(), ""]
    assert lines[17:21] == [
        run.metrics["verdict"], "One training: made up.", f"{SYNTHETIC_NOTE}. The verdict describes made-up images.",
        "Data: tiny discs"]
    assert lines[22:] == [
        f"report       {tmp_path / 'report.html'}", f"figures      {tmp_path / 'figures'}",
        f"metrics      {tmp_path / 'metrics.json'}", f"maps         {tmp_path / 'uncertainty_maps'}",
        f"any case     python visualize.py --run {tmp_path}",
        "study        every rule and normalisation: report.html, 'Beyond the paper's fusion'", "time         90.0 s",
    ]
    console.show_result(changed(run, synthetic=False, data_note=None).metrics, tmp_path, "discs", 90)
    said = capsys.readouterr().out
    assert SYNTHETIC_NOTE not in said
    assert "Data:" not in said


def test_the_end_of_several_trainings(tmp_path, capsys):
    metrics = make_pooled(tmp_path, (42, 143), synthetic=False, data_note=None).metrics
    console.show_pooled(metrics, tmp_path, 90)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "", "2 trainings, 60 test images, mean Dice 0.7656", "",
        "training    Dice  lambda", "seed-42   0.7500     0.5", "seed-143  0.7656   0.625"]
    assert lines[7:14] == console.endpoint_table(metrics).splitlines()
    assert lines[15:] == [
        metrics["verdict"], "", f"report       {tmp_path / 'report.html'}", f"figures      {tmp_path / 'figures'}",
        f"metrics      {tmp_path / 'metrics.json'}", "time         90.0 s"]
    with talking(quiet=True, as_json=True):
        console.show_pooled(metrics, tmp_path, 90)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == metrics and captured.err == ""


def test_json_goes_to_standard_output_and_the_table_elsewhere_or_nowhere(run, tmp_path, capsys):
    for quiet in (False, True):
        with talking(quiet=quiet, as_json=True):
            console.show_result(run.metrics, tmp_path, "discs", 1)
        captured = capsys.readouterr()
        assert json.loads(captured.out) == run.metrics
        assert (run.metrics["verdict"] in captured.err) is not quiet
    with talking(quiet=True):
        console.show_result(run.metrics, tmp_path, "discs", 1)
    assert run.metrics["verdict"] in capsys.readouterr().out  # the result is said in any case


# ---------------------------------------------------------------- by the command


def test_a_quiet_json_run_prints_the_metrics_and_nothing_else(tiny, finished, tmp_path):
    outcome = command("--data", tiny, "--results", tmp_path / "run", "--cache", finished.parent / "cache", *TINY_FLAGS,
                      "--quiet", "--json", "--data-note", "noisy discs", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert all(line.startswith("WARNING: ") for line in outcome.stderr.splitlines())  # as quiet as it gets
    assert json.loads(outcome.stdout) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "noisy discs" in Page((tmp_path / "run" / "report.html").read_text()).text


def test_a_run_says_its_stages_and_where_to_look(finished):
    said = (finished.parent / "stdout.txt").read_text()
    for stage in ("data", "training", "maps", "evaluation", "figures"):
        assert re.search(rf"^{stage} .*\(.* (s|min)\)$", said, re.M), stage
    for name in ("report.html", "figures", "metrics.json", "uncertainty_maps"):
        assert str(finished / name) in said
    assert (finished / "report.html").is_file()
    assert (finished / "report.md").is_file()


def test_warnings_are_loud_on_standard_error(monkeypatch, capsys):
    metrics = {"warnings": [{"code": "low_dice", "text": "The test Dice is 0.250."}]}
    console.show_warnings(metrics)
    assert capsys.readouterr() == ("", "WARNING: The test Dice is 0.250.\n")
    monkeypatch.setattr(console, "colours_wanted", lambda stream: True)
    console.show_warnings(metrics)
    assert capsys.readouterr().err == "\x1b[1;31mWARNING: The test Dice is 0.250.\x1b[0m\n"
    console.show_warnings({"warnings": []})
    assert capsys.readouterr().err == ""
