"""Foreground calibration error at 11 lambdas: the streamed counters against what people use.

    python -m benchmarks.calibration [--images 779] [--repeats 5]

All on one CPU thread and in one run, the competitors taking turns, so that a busy machine slows them alike; the
table shows ratios of CPU time, their median and range. The maps are synthetic, as skewed as real ones. All start
from the images' maps: normalise, take the foreground, fuse, compute the ECE of 15 bins at every lambda. Memory is the
growth of the peak of a fresh process that does nothing else. Last, 40 million pixels in one bin.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's libraries read it when they are loaded

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from evaluation.calibration import confidence_sum, count_confidence, expected_calibration_error
from evaluation.counting import count_curve
from evaluation.fusion import Fusion, lambda_grid
from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.normalisation import Linear
from evaluation.tuning import lambda_errors

BINS = 15
SIDE = 256
DISTINCT = 60  # images made; more are these again, under new ids
UNIT = Fusion(Linear(0.0, 0.25), Linear(0.0, 0.25))


class Split:
    """A re-iterable of (id, maps): lesions of about a fifth of the image, small variances but for a few pixels."""

    def __init__(self, images: int):
        self.images = images
        generator = torch.Generator().manual_seed(0)
        grid = torch.arange(SIDE) - SIDE / 2
        self.maps = []
        for _ in range(min(images, DISTINCT)):
            radius = SIDE * (0.12 + 0.22 * float(torch.rand(1, generator=generator)))
            truth = (grid[:, None] ** 2 + grid**2).sqrt() < radius
            wrong = torch.rand(SIDE, SIDE, generator=generator) < 0.12
            self.maps.append(
                {
                    "mean_prediction": torch.where(truth ^ wrong, 0.9, 0.1),
                    PREDICTIVE: 0.25 * torch.rand(SIDE, SIDE, generator=generator) ** 20,
                    SALIENCY: 0.25 * torch.rand(SIDE, SIDE, generator=generator) ** 12,
                    "true_mask": truth.to(torch.uint8),
                }
            )

    def __iter__(self):
        for index in range(self.images):
            yield f"image_{index:06d}", self.maps[index % len(self.maps)]


def flattened(split):
    """Normalised variances and correctness of all foreground pixels, as NumPy arrays."""
    predictive, saliency, correct = [], [], []
    for _, maps in split:
        inside = maps["true_mask"].numpy().astype(bool)
        predictive.append(np.clip(maps[PREDICTIVE].numpy()[inside] / np.float32(0.25), 0, 1))
        saliency.append(np.clip(maps[SALIENCY].numpy()[inside] / np.float32(0.25), 0, 1))
        correct.append(maps["mean_prediction"].numpy()[inside] > 0.5)
    return np.concatenate(predictive), np.concatenate(saliency), np.concatenate(correct)


def loop_error(confidence, correct):
    """The usual loop over bins."""
    edges = np.linspace(0, 1, BINS + 1)
    error = 0.0
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean(dtype=np.float64))
    return error


def torchmetrics_error(confidence, correct):
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct).int(), n_bins=BINS))


def netcal_error(confidence, correct):
    from netcal.metrics import ECE

    return float(ECE(BINS).measure(confidence, correct.astype(np.int64)))


def on_flattened_pixels(measure):
    def errors(split):
        predictive, saliency, correct = flattened(split)
        return [
            measure(np.float32(1) - (np.float32(lam) * predictive + np.float32(1 - lam) * saliency), correct)
            for lam in lambda_grid()
        ]

    return errors


def streamed(split):
    counters = count_curve(split, UNIT, lambda_grid(), BINS)
    return lambda_errors({name: value.sum(0) for name, value in counters.images.items()}).tolist()


METHODS = {
    "NumPy loop": on_flattened_pixels(loop_error),
    "torchmetrics": on_flattened_pixels(torchmetrics_error),
    "netcal": on_flattened_pixels(netcal_error),
    "streamed counters": streamed,
}


def cpu_time(function, *arguments):
    start = time.process_time()
    value = function(*arguments)
    return time.process_time() - start, value


def peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def memory(method: str, images: int) -> float:
    """Growth of the peak in MiB, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.calibration", "--memory-of", method, "--images", str(images)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def growth(method: str, images: int) -> float:
    METHODS[method](Split(1))  # libraries loaded, pools filled
    split = Split(images)
    for _ in split:
        pass
    before = peak()
    METHODS[method](split)
    return peak() - before


def one_bin(pixels: int = 40_000_000) -> list:
    """ECE of `pixels` confidences in (14/15, 1], 95 % of them correct: exactly, by the counters, by torchmetrics."""
    rng = np.random.default_rng(0)
    piece = 1_000_000
    confidence, correct, total, right = [], [], 0, 0
    counts = torch.zeros(1, 2, BINS, dtype=torch.int64)
    sums = torch.zeros_like(counts)
    for _ in range(pixels // piece):
        uncertainty = (rng.random(piece, dtype=np.float32) ** 4) * np.float32(0.06)
        truth = rng.random(piece) < 0.95
        count, part = count_confidence(torch.from_numpy(uncertainty)[None], torch.from_numpy(truth).int(), 2, BINS)
        counts += count
        sums += part
        confidence.append(np.float32(1) - uncertainty)
        correct.append(truth)
        total += int((confidence[-1].astype(np.float64) * 2**24).astype(np.int64).sum())  # whole numbers
        right += int(truth.sum())
    exact = abs(right - total / 2**24) / pixels
    ours = expected_calibration_error(counts[0].sum(0).numpy(), counts[0, 1].numpy(), confidence_sum(sums)[0].sum(0).numpy())
    return [exact, float(ours), torchmetrics_error(np.concatenate(confidence), np.concatenate(correct))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=779)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=list(METHODS), help="only print the growth of the peak, in MiB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(growth(arguments.memory_of, arguments.images))
        return
    split = Split(arguments.images)
    seconds = {name: [] for name in METHODS}
    values = {}
    for method in METHODS.values():
        method(Split(2))  # warm
    for _ in range(arguments.repeats):
        for name, method in METHODS.items():
            spent, values[name] = cpu_time(method, split)
            seconds[name].append(spent)
    pixels = sum(int(maps["true_mask"].sum()) for _, maps in split)
    print(f"{arguments.images} images of {SIDE} x {SIDE}, {pixels:,} foreground pixels, 11 lambdas, {BINS} bins;")
    print(f"{arguments.repeats} repeats on one thread, {platform.processor() or platform.machine()}, ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}")
    print()
    print("| method | CPU s | loop's time / its time (range) | peak memory, MiB | ECE at lambda 1 | at 0.5 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in METHODS:
        ratios = [loop / own for loop, own in zip(seconds["NumPy loop"], seconds[name])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        grown = memory(name, arguments.images)
        print(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {spread} | {grown:.0f} "
            f"| {values[name][10]:.6f} | {values[name][5]:.6f} |"
        )
    few, many = memory("streamed counters", 100), memory("streamed counters", 4 * arguments.images)
    print(f"\nstreamed counters: {few:.0f} MiB for 100 images, {many:.0f} MiB for {4 * arguments.images}")
    exact, ours, theirs = one_bin()
    print(f"40 million pixels in one bin: exact {exact:.6f}, streamed counters {ours:.6f}, torchmetrics {theirs:.6f}")


if __name__ == "__main__":
    main()
