"""Processes that compute together end together: what ends one of them reaches the others at once, as one line.

A process that waits for another inside a collective call hears neither a signal nor that the other is gone. So each has
a thread that listens meanwhile: to the signals of its own process, and to a connection between it and the main process.
The system closes the connection of a process that dies in whatever way.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from runtime.errors import SharedError, UserError, one_line, printable
from runtime.resources import shortage
from runtime.signals import STOP_SIGNALS

#: Seconds: for all processes to start; for the main thread to act on a signal; to be told what broke a collective call;
#: for the main thread to say itself what another process says; for the main process to say what ended this one.
STARTING, PATIENCE, VERDICT, GRACE, HEARD = 600.0, 5.0, 5.0, 1.0, 3.0
GOES_ON = "what is finished is kept, and the same command goes on"
_KEY, _MAIN = "watch", 0


class GroupWatch:
    """While entered, the end of this process is told to the others, and theirs ends this one.

    Args:
        rank, world_size: of this process and its group.
        host, port: of the store that the group meets at.
        agent: whether the program that started the processes keeps the store; otherwise the main process does.

    Attributes:
        store: where the processes exchange their addresses.

    Raises:
        UserError: on entering, the store or the main process cannot be reached.
    """

    def __init__(self, rank: int, world_size: int, host: str, port: int, agent: bool):
        self.rank, self.world_size, self.host, self.port, self.agent = rank, world_size, host, port, agent
        self.store: Any = None
        self.peers: dict[int, socket.socket] = {}  # of the main process all others, of the others the main process
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._received: dict[socket.socket, bytes] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._deadline: tuple[float, str, int] | None = None
        self._gone: set[int] = set()  # processes that said that they leave
        self._stopping = False

    # ---------------------------------------------------------------- joining and leaving

    def __enter__(self) -> GroupWatch:
        self._wake, self._alarm = socket.socketpair()
        self._wake.setblocking(False)
        self._alarm.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        try:
            self._connect()
        except (OSError, RuntimeError) as error:  # PyTorch's errors of the store are RuntimeErrors
            self._close()
            raise UserError(
                f"process {self.rank} cannot join the others at {self.host}, port {self.port} ({one_line(error)}); "
                "look at what the others print, and start them all again"
            ) from error
        self._of_main_thread = threading.current_thread() is threading.main_thread()  # nowhere else are signals heard
        if self._of_main_thread:
            self._signals_before = signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        if hasattr(os, "register_at_fork"):
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget(reference))
        self._thread = threading.Thread(target=self._listen, name="group watch", daemon=True)
        self._thread.start()
        return self

    def _connect(self) -> None:
        server = self.rank == _MAIN and not self.agent
        limit = time.monotonic() + STARTING
        while not server:  # in Python, where a signal is heard; the store's own waiting is deaf
            try:
                socket.create_connection((self.host, self.port), 1).close()
                break
            except OSError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
        raw = TCPStore(
            self.host, self.port, self.world_size, server, timedelta(seconds=30), wait_for_workers=False, multi_tenant=True
        )
        self.store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", raw)
        if self.rank == _MAIN:
            self._token = secrets.token_hex(16)
            self._listener = _listener(self.host)
            self._selector.register(self._listener, selectors.EVENT_READ)
            places = [self.host, socket.gethostname()]
            address = {"hosts": places, "port": self._listener.getsockname()[1], "token": self._token}
            self.store.set(_KEY, json.dumps(address))
            self._deadline = (limit, "", 2)
            return
        while not self.store.check([_KEY]):
            if time.monotonic() > limit:
                raise OSError("the main process did not start")
            time.sleep(0.05)
        address = json.loads(self.store.get(_KEY))
        self._add(_MAIN, _reach(address["hosts"], address["port"]))
        self._send(_MAIN, rank=self.rank, token=address["token"])

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and shortage(error) is None:
            # most likely a collective call that broke because another process is gone: the thread will say why; the main
            # process, which is told by the others, waits longer
            self._over.wait(VERDICT if self.rank == _MAIN else VERDICT / 2)
        self._over.set()
        self._alarm.send(b"\0")
        self._thread.join(HEARD)
        if self._of_main_thread:
            signal.set_wakeup_fd(self._signals_before)
        if error is None or isinstance(error, SharedError):  # or it is raised in all
            self._tell(left=True)
        elif isinstance(error, KeyboardInterrupt):
            self._tell(stopped=int(getattr(error, "signum", signal.SIGINT)))
        elif isinstance(error, UserError):
            self._fail(str(error))
        else:
            self._fail(f"{type(error).__name__}: {one_line(error)}")
        self._close()

    def _fail(self, line: str) -> None:
        if self.rank == _MAIN:  # it prints the line itself
            self._tell(end=2, line="")
            return
        self._tell(failed=line)
        main = self.peers.get(_MAIN)
        with suppress(OSError, KeyError):
            if main is not None:
                main.settimeout(HEARD)
                while main.recv(1 << 12):  # until the main process has said it and is gone
                    pass

    def _close(self) -> None:
        for one in (*self.peers.values(), self._listener, self._wake, self._alarm):
            if one is not None:
                one.close()
        self._selector.close()

    # ---------------------------------------------------------------- listening

    def _listen(self) -> None:
        while not self._over.is_set():
            pause = None if self._deadline is None else max(0.0, self._deadline[0] - time.monotonic())
            for key, _ in self._selector.select(pause):
                found: Any = key.fileobj
                if found is self._wake:
                    self._signals(self._drained())
                elif found is self._listener:
                    self._accept()
                else:
                    self._receive(found)
            if self._deadline is not None and time.monotonic() >= self._deadline[0] and not self._over.is_set():
                _, line, code = self._deadline
                self._end(line or f"error: {self._missing()} did not start within {STARTING:.0f} s; start all again", code)

    def _drained(self) -> bytes:
        with suppress(BlockingIOError):
            return self._wake.recv(256)
        return b""

    def _missing(self) -> str:
        missing = sorted({*range(1, self.world_size)} - {*self.peers})
        return f"process {', '.join(map(str, missing))}"

    def _signals(self, received: bytes) -> None:
        for signum in received:
            if signum not in STOP_SIGNALS or self._stopping:
                continue
            self._stopping = True
            line = f"stopped by {signal.Signals(signum).name}"
            joined = self.rank != _MAIN or len(self.peers) == self.world_size - 1
            if not joined:
                line += f"; {self._missing()} had not started"
            self._limit(PATIENCE if joined else GRACE, f"{line}; the same command goes on from there", 128 + signum)

    def _limit(self, seconds: float, line: str, code: int) -> None:
        """End this process after some seconds, unless its main thread does so before."""
        until = time.monotonic() + seconds
        if self._deadline is None or until < self._deadline[0]:
            self._deadline = (until, line, code)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            found, _ = self._listener.accept()
        except OSError:  # it hung up meanwhile
            return
        rank = self._introduced(found)
        if rank is None:
            found.close()
            return
        self._add(rank, found)
        if len(self.peers) == self.world_size - 1 and not self._stopping:
            self._deadline = None

    def _introduced(self, found: socket.socket) -> int | None:
        """The rank of a process that knows the token; None of a stranger."""
        found.settimeout(2)
        try:
            with found.makefile("rb", buffering=0) as stream:
                said = json.loads(stream.readline(1 << 12))
            if said["token"] == self._token and said["rank"] in {*range(1, self.world_size)} - {*self.peers}:
                return int(said["rank"])
        except (OSError, ValueError, TypeError, KeyError):  # silent, gone, no JSON, or another's
            pass
        return None

    def _add(self, rank: int, peer: socket.socket) -> None:
        _keep_alive(peer)
        peer.settimeout(5)
        self.peers[rank], self._received[peer] = peer, b""
        self._selector.register(peer, selectors.EVENT_READ, rank)

    def _receive(self, peer: socket.socket) -> None:
        rank = next(rank for rank, one in self.peers.items() if one is peer)
        try:
            content = peer.recv(1 << 16)
        except OSError:  # its machine is gone
            content = b""
        *lines, self._received[peer] = (self._received[peer] + content).split(b"\n")
        for line in lines:
            self._heard(rank, json.loads(line))
        if not content:
            self._selector.unregister(peer)
            if rank not in self._gone and not self._stopping:
                died = f"error: process {rank} ended without a word (killed, or out of memory?); {GOES_ON}"
                self._end(died if self.rank in (_MAIN, 1) else "", 2)

    def _heard(self, rank: int, said: dict[str, Any]) -> None:
        self._gone.add(rank)
        if "end" in said:
            self._end(str(said["line"]), int(said["end"]))
        if "failed" in said:  # the main thread may be about to say the same
            self._limit(GRACE, f"error: process {rank}: {said['failed']}", 2)
        if "stopped" in said:
            if not self._stopping:
                os.kill(os.getpid(), int(said["stopped"]))
            elif rank == _MAIN:
                self._limit(GRACE, "", 128 + int(said["stopped"]))

    # ---------------------------------------------------------------- telling

    def _tell(self, **said: Any) -> None:
        for rank in list(self.peers):
            self._send(rank, **said)

    def _send(self, to: int, **said: Any) -> None:
        with self._lock, suppress(OSError):  # a process that is gone need not be told
            self.peers[to].sendall(json.dumps(said).encode() + b"\n")

    def _end(self, line: str, code: int) -> NoReturn:
        """End this process now: its main thread may be deaf. Every file is whole or absent."""
        self._tell(end=code, line=line)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            if line and (self.rank == _MAIN or line.startswith("error: process 0 ")):
                print(f"\n{printable(line)}", file=sys.stderr, flush=True)
        os._exit(code)


def watch_from_environment() -> GroupWatch:
    """The watch of the group that ``torchrun`` describes in the environment.

    Raises:
        UserError: the environment describes none.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK is set, but RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe no group ({one_line(error)}); "
            "start with torchrun, or unset RANK"
        ) from error
    if not 0 <= rank < world_size or not 0 < port < 1 << 16:
        raise UserError(f"RANK {rank}, WORLD_SIZE {world_size} and MASTER_PORT {port} describe no group; start with torchrun")
    return GroupWatch(rank, world_size, host, port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _listener(host: str) -> socket.socket:
    """A socket that the others can reach, on this machine alone where all are there."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError:  # the store is on another machine
        return socket.create_server(("", 0))


def _reach(hosts: list[str], port: int) -> socket.socket:
    for host in hosts[:-1]:
        with suppress(OSError):
            return socket.create_connection((host, port), 10)
    return socket.create_connection((hosts[-1], port), 10)


def _keep_alive(peer: socket.socket) -> None:
    """Let the system notice within 10 s that the machine at the other end is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget(reference: weakref.ReferenceType[GroupWatch]) -> None:
    """In a forked helper: its end is not that of this process, and its signals are its own."""
    watch = reference()
    if watch is None or watch._over.is_set():
        return
    watch._over.set()
    signal.set_wakeup_fd(-1)
    for one in (*watch.peers.values(), watch._listener, watch._wake, watch._alarm):
        if one is not None:
            one.close()
