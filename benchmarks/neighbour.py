"""What is left of the speed on a machine that others use too, by how the threads wait for each other.

    nice -n -10 python -m benchmarks.neighbour
    python -m benchmarks.neighbour --settings "ours;OMP_NUM_THREADS=1" --works maps --rounds 9

Training, maps and evaluation, each in processes of their own that are started once, one for each setting of the
environment: "none" leaves it to the libraries, "ours" is what the commands set. In each round every process works for a
moment alone, beside one and beside two processes that keep a core busy, in turn, so that whatever else the machine does
falls on all of them. Ratios to the first setting alone in the same round; medians and ranges.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable

from runtime.cpu import DECIDED_BY, WAITING

WORKS = ("training", "maps", "evaluation")
#: Variables that decide how the threads wait, or how many there are.
DECISIVE = (*DECIDED_BY, "OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_PROC_BIND")


# ---------------------------------------------------------------- the work, in a process of its own


def unit_of_work(work: str, folder: Path) -> Callable[[], object]:
    """One unit: a training step, the maps of an image, or all numbers of some images; at the size of ``--quick``."""
    import torch

    torch.manual_seed(0)
    if work == "training":
        from benchmarks.training import Ours, steps
        from isic.cache import decode_pairs
        from isic.layout import find_pairs, isic_folders
        from isic.synthetic import write_synthetic_dataset
        from runtime.config import Config

        write_synthetic_dataset(folder, 32)
        decoded = decode_pairs(find_pairs(*isic_folders(folder)), 128, folder / "cache")
        config, device = Config(image_size=128, width=16, batch_size=16, workers=0), torch.device("cpu")
        return steps(Ours(decoded, config, device, "auto", False), device).__next__
    if work == "maps":
        from model import UNet
        from uncertainty import uncertainty_maps

        model, image = UNet(width=16).eval(), torch.randn(1, 3, 128, 128)
        return lambda: uncertainty_maps(model, image, target_layer=model.encoder4, precision="auto")
    from benchmarks.evaluation import made_up
    from evaluation.protocol import evaluate

    validation, test = made_up(8, 128, 0, "v"), made_up(8, 128, 1, "t")
    return lambda: evaluate(validation, test)


def serve(work: str) -> None:
    """Read a number of seconds from each line of the standard input, work for so long, and write the units per second."""
    with tempfile.TemporaryDirectory() as folder:
        unit = unit_of_work(work, Path(folder))
        for _ in range(3):
            unit()
        print("ready", flush=True)
        for line in sys.stdin:
            units, started = 0, time.perf_counter()
            while time.perf_counter() - started < float(line):
                unit()
                units += 1
            print(units / (time.perf_counter() - started), flush=True)


# ---------------------------------------------------------------- the processes


def environment_of(setting: str) -> dict[str, str]:
    """The environment of a setting: "none", "ours", or NAME=VALUE pairs."""
    environment = {name: value for name, value in os.environ.items() if name not in DECISIVE}
    if setting == "none":
        return environment
    chosen = WAITING if setting == "ours" else dict(pair.split("=") for pair in setting.split())
    return {**environment, **chosen}


@contextmanager
def worker(work: str, setting: str) -> Iterator[Callable[[float], float]]:
    """A process that works; yields what lets it work for some seconds and returns its units per second."""
    command = [sys.executable, "-m", "benchmarks.neighbour", "--serve", work]
    with subprocess.Popen(
        command, env=environment_of(setting), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        source, sink = process.stdout, process.stdin
        if source.readline() != "ready\n":
            raise SystemExit(f"error: the process for {work} did not start")

        def speed(seconds: float) -> float:
            print(seconds, file=sink, flush=True)
            return float(source.readline())

        yield speed
        sink.close()


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.1 * bool(count))  # until they run
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="none;ours", help="settings with ; between them [none;ours]")
    parser.add_argument("--works", default=",".join(WORKS), help=f"with commas between them [{','.join(WORKS)}]")
    parser.add_argument("--neighbours", type=int, default=2, help="how many at most [2]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement [1]")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    settings = args.settings.split(";")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}, {args.rounds} rounds, "
          f"ours is {WAITING}\n")
    print("| work | setting | " + " | ".join(["alone", *(f"beside {n + 1}" for n in range(args.neighbours))]) + " |")
    print("| --- | --- |" + " --- |" * (args.neighbours + 1))
    for work in args.works.split(","):
        with ExitStack() as stack:
            workers = {setting: stack.enter_context(worker(work, setting)) for setting in settings}
            found: dict[tuple[str, int], list[float]] = {}
            for number in range(args.rounds):
                speeds: dict[tuple[str, int], float] = {}
                for count in range(args.neighbours + 1):
                    with neighbours(count):
                        speeds.update({(setting, count): speed(args.seconds) for setting, speed in workers.items()})
                for key, value in speeds.items():
                    found.setdefault(key, []).append(value / speeds[settings[0], 0])
                said = ", ".join(f"{setting} beside {count} {found[setting, count][-1]:.2f}" for setting, count in speeds)
                print(f"{work}, round {number + 1} of {args.rounds}: {said}", file=sys.stderr, flush=True)
            for setting in settings:
                columns = [found[setting, count] for count in range(args.neighbours + 1)]
                cells = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in columns]
                print(f"| {work} | {setting} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
