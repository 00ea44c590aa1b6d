"""Starting main.py in several processes, for the tests: by torchrun, or each by hand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def torchrun(count: int, *arguments: object, cwd: Path) -> subprocess.Popen:
    """Start main.py in ``count`` processes, as the README says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", f"--master-port={free_port()}",
         str(ROOT / "main.py"), *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


class Ended(NamedTuple):
    """How a process ended, what it printed on standard error, and when (as of ``time.monotonic``)."""

    code: int
    err: str
    at: float


class Ranks:
    """Processes of one group without a program that ends the others when one fails; each runs main.py after some code.

    Args:
        arguments: of main.py.
        cwd: of all, in whose subfolders ``0``, ``1``, ... their standard errors go.
        code: by rank, run before main.py in that process.
    """

    def __init__(self, count: int, *arguments: object, cwd: Path, code: dict[int, str] | None = None):
        self.cwd, port = cwd, free_port()
        (cwd / "go.py").write_text(
            "import os, sys\n"
            "if __name__ == '__main__':\n"
            "    code = os.environ.pop('CODE', '')\n"
            "    exec(code, globals())\n"
            "    from main import main\n"
            "    sys.exit(main(sys.argv[1:]))\n"
        )
        self.processes = []
        for rank in range(count):
            environment = {
                **os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "CODE": (code or {}).get(rank, ""),
            }
            with open(cwd / f"rank-{rank}.txt", "w") as err:
                self.processes.append(subprocess.Popen(
                    [sys.executable, str(cwd / "go.py"), *map(str, arguments)], cwd=cwd, env=environment, stdout=err, stderr=err
                ))

    def said(self, rank: int) -> str:
        """What a process has printed so far."""
        return (self.cwd / f"rank-{rank}.txt").read_text()

    def wait(self, seconds: float) -> list[Ended]:
        """Wait until all have ended; those that have not after some seconds are killed, and have code None."""
        ended: dict[int, Ended] = {}
        limit = time.monotonic() + seconds
        try:
            while len(ended) < len(self.processes) and time.monotonic() < limit:
                for rank, process in enumerate(self.processes):
                    if rank not in ended and process.poll() is not None:
                        ended[rank] = Ended(process.returncode, self.said(rank), time.monotonic())
                time.sleep(0.02)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        missing = [f"rank {rank}: {self.said(rank)}" for rank in range(len(self.processes)) if rank not in ended]
        assert not missing, f"still there after {seconds} s: {missing}"
        return [ended[rank] for rank in range(len(self.processes))]
