"""Where the time after the maps goes: the seconds of each stage of the evaluation as shares of the whole.

    python -m benchmarks.stages [--validation 65] [--test 130] [--side 128] [--rounds 3] [--study] [--against FOLDER]

Made-up maps, the same for all. A round is a fresh process of one thread for each tree of the code, in turn: the one this
file is in, and, with ``--against``, another one of the same layout (``git worktree add FOLDER COMMIT`` makes one). CPU
time without loading the libraries; medians over the rounds and their range, relative to the whole of the other tree, or of
this one where there is no other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parents[1]
STAGES = ("tuning", "counting", "numbers", "verdict", "study")


def measure(tree: Path, validation: int, test: int, side: int, study: bool) -> dict[str, float]:
    """CPU seconds of each stage with the code of a tree, in this process."""
    sys.path.insert(0, str(tree))
    import torch

    torch.set_num_threads(1)
    from scipy.stats import norm  # noqa: F401  # what the stages load
    from sklearn.linear_model import LogisticRegression  # noqa: F401

    from benchmarks.evaluation import made_up  # of this tree, whatever is measured
    from evaluation.conclusion import TrainingResult, conclude
    from evaluation.protocol import count_splits, tune
    from evaluation.study import run_study
    from evaluation.summary import summarise

    parts = [made_up(count, side, seed, prefix) for seed, (count, prefix) in enumerate(((validation, "v"), (test, "t")))]
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = work()
        seconds[stage] = time.process_time() - started
        return found

    tuned = timed("tuning", lambda: tune(parts[0]))
    counted = timed("counting", lambda: count_splits(tuned, *parts))
    timed("numbers", lambda: summarise(*counted, tuned.fusion))
    timed("verdict", lambda: conclude([TrainingResult("made up", 42, tuned.fusion, *counted)], permutations=0))
    if study:
        timed("study", lambda: run_study(*parts))
    return seconds


def in_process(tree: Path, options: argparse.Namespace) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stages", "--measure", str(tree)]
    command += [f"--{name}={getattr(options, name)}" for name in ("validation", "test", "side")]
    command += ["--study"] * options.study
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table, or what one tree took where another process asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("validation", 65), ("test", 130), ("side", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--study", action="store_true", help="also the tables of --study")
    parser.add_argument("--against", type=Path, help="another tree of the code")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.validation, options.test, options.side, options.study)))
        return
    trees = {"this code": HERE, **({"the other": options.against.resolve()} if options.against else {})}
    rounds = [{name: in_process(tree, options) for name, tree in trees.items()} for _ in range(options.rounds)]
    reference = list(trees)[-1]
    print(f"{platform.machine()}, Python {platform.python_version()}, {options.rounds} rounds, "
          f"{options.validation} and {options.test} images of {options.side} x {options.side}\n")
    print(f"| stage | {' | '.join(trees)} |\n| --- |{' --- |' * len(trees)}")
    for stage in [*(stage for stage in STAGES if stage in rounds[0]["this code"]), "all"]:
        cells = []
        for name in trees:
            ratios = [
                (sum(one[name].values()) if stage == "all" else one[name][stage]) / sum(one[reference].values()) for one in rounds
            ]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
