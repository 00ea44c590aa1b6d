"""What a command says: how much, where, and by which process."""

from __future__ import annotations

import gc
import io
import sys

import pytest
from tqdm import tqdm

from runtime.progress import complain, console, current_console, duration, is_main_process, progress_bar, say, stage


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_the_settings_hold_inside_and_end_outside():
    assert current_console().quiet is False and current_console().answer is None
    with console(quiet=True) as outer:
        assert current_console() is outer and outer.quiet
        with console() as inner:
            assert current_console() is inner and not inner.quiet
        assert current_console() is outer
    assert current_console().quiet is False
    with pytest.raises(KeyboardInterrupt), console(quiet=True):
        raise KeyboardInterrupt
    assert current_console().quiet is False


def test_json_keeps_standard_output_for_itself(capsys):
    with console(as_json=True) as settings:
        say("everything else")
        stage("data", "24 images")
        settings.answer.write("{}\n")
    captured = capsys.readouterr()
    assert captured.out == "{}\n"
    assert captured.err.startswith("everything else\ndata         24 images  (0.")
    assert sys.stdout is not sys.stderr


def test_a_stage_says_its_name_what_it_made_and_how_long_it_took(capsys, monkeypatch):
    monkeypatch.setattr("runtime.progress.time.perf_counter", lambda: 107.25)
    with console() as settings:
        settings.since = 100.0
        stage("maps", "5 test images")
        assert settings.since == 107.25  # the next stage starts here
        stage("evaluation", "done")
    assert capsys.readouterr().out == "maps         5 test images  (7.2 s)\nevaluation   done  (0.0 s)\n"


def test_quiet_leaves_out_stages_and_bars_but_not_results_and_warnings(capsys):
    with console(quiet=True):
        stage("data", "24 images")
        with progress_bar("decoding", 2, "pair") as bar:
            bar.update(2)
        say("the result")
        complain("a warning")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("the result\n", "a warning\n")


def test_a_bar_goes_to_standard_error(capsys):
    with progress_bar("decoding", 2, "pair") as bar:
        bar.update(2)
    captured = capsys.readouterr()
    assert captured.out == "" and "decoding: 100%" in captured.err and "2/2" in captured.err


def test_only_the_main_process_speaks(capsys, monkeypatch):
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_main_process() is speaks
        say("a")
        stage("b", "c")
        complain("d")
        with progress_bar("e", 1, "f") as bar:
            bar.update(1)
        captured = capsys.readouterr()
        assert bool(captured.out) is bool(captured.err) is speaks


def test_a_terminal_that_is_gone_is_no_further_error(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    complain("unheard")


def test_durations_are_in_seconds_below_two_minutes():
    assert [duration(seconds) for seconds in (0, 0.04, 119.94, 120, 3600)] == ["0.0 s", "0.0 s", "119.9 s", "2.0 min", "60.0 min"]


@pytest.mark.parametrize("place", ["_get_free_pos", "status_printer", "refresh"])
def test_a_bar_that_a_stop_hits_while_it_is_made_goes_without_a_word(monkeypatch, place):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)  # prints a traceback, else
    with monkeypatch.context() as patched:
        patched.setattr(tqdm, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            progress_bar("a bar", 3, "image")
    gc.collect()  # the half-made bar is deleted, at the latest now
    assert said == []
