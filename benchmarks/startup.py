"""How soon the commands answer: --help and a wrong flag, against ``import torch`` alone.

    python -m benchmarks.startup [--rounds 9]

Each is a process of its own, started in turn in every round, so that whatever
else the machine does falls on all of them. User plus system CPU time of the
process; medians, their range, and ratios to the import.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys

import torch

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "main.py --help": ["main.py", "--help"],
    "main.py --no-such-flag": ["main.py", "--no-such-flag"],
    "visualize.py --help": ["visualize.py", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of a Python process with these arguments, its output thrown away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, after one that warms the file cache [9]")
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():
        cpu_seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_seconds(arguments))
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {rounds} rounds\n")
    print("| command | CPU time relative to `import torch` | range |\n| --- | --- | --- |")
    for name, seconds in times.items():
        ratios = [one / reference for one, reference in zip(seconds, times["import torch"])]
        print(f"| `{name}` | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")


if __name__ == "__main__":
    main()
