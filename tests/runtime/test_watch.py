"""Joining the watch of a group, and leaving it; what it does when a process fails, tests/test_ranks.py says."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from launched import free_port

from runtime.errors import UserError
from runtime.watch import GroupWatch, watch_from_environment


@pytest.mark.parametrize("changed", [
    {"MASTER_ADDR": None}, {"MASTER_PORT": "many"}, {"MASTER_PORT": "70000"}, {"RANK": "2"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"},
])
def test_an_environment_that_describes_no_group_is_one_line(changed, monkeypatch):
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **changed}
    for name, value in group.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="describe no group.*start with torchrun"):
        watch_from_environment()


def test_one_alone_joins_and_leaves_and_signals_are_as_before():
    before = signal.set_wakeup_fd(-1)
    for _ in range(2):
        with GroupWatch(0, 1, "127.0.0.1", free_port(), agent=False) as watch:
            watch.store.set("a", "b")
            assert watch.store.get("a") == b"b"
            assert watch._thread.is_alive()
        assert not watch._thread.is_alive() and signal.set_wakeup_fd(-1) == -1
    signal.set_wakeup_fd(before)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        watch = GroupWatch(0, 2, "127.0.0.1", taken.getsockname()[1], agent=False)
        with pytest.raises(UserError, match="process 0 cannot join the others at 127"), watch:
            pass


def test_a_main_process_that_never_starts_is_one_line(monkeypatch):
    monkeypatch.setattr("runtime.watch.STARTING", 0.5)
    with pytest.raises(UserError, match="process 1 cannot join the others at 127.0.0.1.*start them all again"), \
            GroupWatch(1, 2, "127.0.0.1", free_port(), agent=False):
        pass


def test_a_stranger_is_sent_away_and_a_helper_that_is_forked_is_no_member():
    with GroupWatch(0, 2, "127.0.0.1", free_port(), agent=False) as watch:
        port = watch._listener.getsockname()[1]
        for said in (b"{}\n", b'{"rank": 1, "token": "guessed"}\n', b"\xff not JSON\n", b"[1]\n", b'{"token": null}\n', b""):
            with socket.create_connection(("127.0.0.1", port), 5) as stranger:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(5)
                assert stranger.recv(10) == b""  # hung up
        assert watch.peers == {} and watch._thread.is_alive()
        child = os.fork()
        if not child:
            os._exit(0 if signal.set_wakeup_fd(-1) == -1 and watch._wake.fileno() == -1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        time.sleep(0.1)
        assert watch._thread.is_alive() and watch._listener.fileno() >= 0
