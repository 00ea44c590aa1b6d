"""How this process uses the CPUs: set before PyTorch loads, because its threads read it then."""

from __future__ import annotations

import os

#: Between two parallel parts OpenMP's threads wait for the slowest; left to itself, each spins until then and takes the
#: core from the very thread that it waits for, where other processes keep the cores busy. Asleep they give it up.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
#: Variables by which a user has already said how threads wait.
DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare_cpu() -> None:
    """Let waiting threads sleep; what the user set wins. The processes that this one starts inherit it.

    Call it before NumPy or PyTorch is imported.
    """
    if not any(name in os.environ for name in DECIDED_BY):
        os.environ.update(WAITING)
