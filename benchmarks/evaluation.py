"""What the verdict costs beside the descriptive numbers of one training.

    python -m benchmarks.evaluation [--validation 65] [--test 130] [--side 128] [--rounds 3]

Made-up maps. Each round counts the pixels and computes every number of ``metrics.json``, and then concludes from the same
counts, without and with the permutation null of ``--study``. One thread, CPU time; medians, their range, and ratios to
the counting and the numbers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's libraries read it when they are loaded

import argparse
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from evaluation.conclusion import PERMUTATIONS, TrainingResult, conclude
from evaluation.protocol import evaluate


def made_up(count: int, side: int, seed: int, prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """Lesions whose prediction errs near the border, with skewed variances."""
    rng, images = np.random.default_rng(seed), []
    for index in range(count):
        y, x = np.mgrid[:side, :side] - side / 2 + rng.normal(0, side / 20, 2)[:, None, None]
        field = gaussian_filter(rng.standard_normal((side, side)), side / 20) * side / 6
        distance = np.hypot(y, x) - side * rng.uniform(0.2, 0.35)
        probability = 1 / (1 + np.exp((distance + 2 * field) * 30 / side))
        maps = {
            "mean_prediction": probability,
            "pred_variance": (probability * (1 - probability) * rng.random((side, side))) ** 2 * rng.lognormal(0, 0.5),
            "saliency_variance": gaussian_filter(rng.random((side, side)), side / 16) ** 4 * rng.lognormal(),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(values.astype(np.float32)) for name, values in maps.items()}
        tensors["true_mask"] = torch.from_numpy((distance + field / 2 < 0).astype(np.uint8))
        images.append((f"{prefix}{index:04d}", tensors))
    return images


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("validation", 65), ("test", 130), ("side", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    validation, test = (
        made_up(count, options.side, seed, prefix)
        for seed, (count, prefix) in enumerate(((options.validation, "v"), (options.test, "t")))
    )
    rows: dict[str, list[float]] = {"counting and numbers": [], "the verdict": [], "the verdict with its null": []}
    for _ in range(options.rounds):
        started = time.process_time()
        found = evaluate(validation, test)
        counted = time.process_time()
        training = TrainingResult("made up", 42, found.fusion, found.validation, found.test)
        conclude([training], permutations=0)
        concluded = time.process_time()
        conclude([training], permutations=PERMUTATIONS)
        for name, seconds in zip(rows, (counted - started, concluded - counted, time.process_time() - concluded)):
            rows[name].append(seconds)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {options.rounds} rounds, "
          f"{options.validation} and {options.test} images of {options.side} x {options.side}\n")
    print("| step | CPU time relative to counting and numbers | range |\n| --- | --- | --- |")
    for name, seconds in rows.items():
        ratios = [one / reference for one, reference in zip(seconds, rows["counting and numbers"])]
        print(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
