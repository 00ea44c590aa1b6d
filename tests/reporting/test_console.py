"""What a run prints at its end."""

from __future__ import annotations

import io
import json
import re

import pytest
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
saliency variance alone (lambda = 0)            0.1562  0.0625 to 0.2500           +0.0312  +0.0078 to +0.0625  degrades
fused score (lambda = 0.9)                      0.0938  0.0625 to 0.2500           -0.0312  -0.0625 to -0.0078  improves"""
    found = console.result_table(metrics)
    assert found == table
    coloured = console.result_table(metrics, colour=True).splitlines()
    assert coloured[0] == f"\033[1m{found.splitlines()[0]}\033[0m"
    assert coloured[2].endswith("\033[33mdegrades\033[0m")
    assert coloured[3].endswith("\033[32mimproves\033[0m")


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
    assert lines[8:11] == [
        run.metrics["verdict"], f"{SYNTHETIC_NOTE}. The verdict describes made-up images.", "Data: tiny discs"]
    assert lines[12:] == [
        f"report       {tmp_path / 'report.html'}", f"figures      {tmp_path / 'figures'}",
        f"metrics      {tmp_path / 'metrics.json'}", f"maps         {tmp_path / 'uncertainty_maps'}",
        f"any case     python visualize.py --run {tmp_path}",
        "study        every rule and normalisation: report.html, 'Beyond the paper's fusion'", "time         90.0 s",
    ]
    console.show_result(changed(run, synthetic=False, data_note=None).metrics, tmp_path, "discs", 90)
    said = capsys.readouterr().out
    assert SYNTHETIC_NOTE not in said
    assert "Data:" not in said


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
    assert outcome.stderr == ""
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
