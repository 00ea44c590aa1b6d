"""A run: its configuration, its processes, its results folder, and the identity that binds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config
from runtime.processes import ProcessGroup


@dataclass(frozen=True)
class Run:
    """What every stage of a run needs to know.

    Attributes:
        config: the resolved configuration.
        group: this process's place among all, and its device.
        results: the folder that receives everything.
        identity: fingerprint of what the numbers depend on; files with another one are made again.
    """

    config: Config
    group: ProcessGroup
    results: Path
    identity: str
