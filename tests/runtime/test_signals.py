"""Stopping from outside: one exception, once; helpers that never see Ctrl-C and end with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from runtime import signals
from runtime.signals import STOP_SIGNALS, Stopped, StopSignals, block_sigint_in_children, end_with_parent

SHOW_BLOCKED = "import signal; print([int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])])"


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before come back, whatever a test leaves."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_stop_is_no_failure():
    assert issubclass(Stopped, KeyboardInterrupt) and not issubclass(Stopped, Exception)
    assert Stopped(15).signum == 15


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_the_first_signal_stops_and_the_next_ones_change_nothing(signum):
    with StopSignals() as stopping:
        assert stopping.signum is None
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signum)
        assert caught.value.signum == stopping.signum == signum
        for later in STOP_SIGNALS:  # while things are put in order
            os.kill(os.getpid(), later)
        assert stopping.signum == signum


def test_a_later_signal_ends_the_process_on_the_spot(monkeypatch):
    said, codes = [], []
    monkeypatch.setattr(os, "write", lambda stream, text: said.append((stream, text)))
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignals(patience=-1.0):
        with contextlib.suppress(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
    ((stream, text),) = said
    assert stream == 2 and b"the same command goes on" in text


def test_without_a_signal_the_handlers_of_before_come_back():
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with StopSignals():
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_after_a_stop_a_signal_that_kills_stays_caught():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with StopSignals() as stopping, contextlib.suppress(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == stopping._receive  # else it would change the exit code
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_no_handler_is_set():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_forked_helper_ignores_what_was_meant_for_its_parent():
    stopping = StopSignals()
    with stopping:
        stopping.process += 1  # as if this were the helper
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.signum is None


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="the system has no signal masks")
def test_processes_started_meanwhile_never_see_ctrl_c():
    def blocked_in_a_child():
        return subprocess.run([sys.executable, "-S", "-c", SHOW_BLOCKED], capture_output=True, text=True, check=True).stdout

    before = blocked_in_a_child()
    assert before == "[]\n"
    with pytest.raises(KeyboardInterrupt):  # it waits until the end, and is not lost
        with block_sigint_in_children():
            assert blocked_in_a_child() == f"[{int(signal.SIGINT)}]\n"
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # another thread might take one for the process
            finished = True
        raise AssertionError("the signal was lost")
    assert finished
    assert blocked_in_a_child() == before


def test_the_process_that_started_others_waits_for_no_parent():
    hook, threads = sys.excepthook, threading.active_count()
    end_with_parent()
    assert sys.excepthook is hook and threading.active_count() == threads


def test_a_helper_whose_run_hung_up_says_nothing(capsys):
    for error in (ConnectionResetError("gone"), BrokenPipeError("gone"), EOFError()):
        signals._unless_hung_up(type(error), error, None)
    assert capsys.readouterr().err == ""
    signals._unless_hung_up(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err
