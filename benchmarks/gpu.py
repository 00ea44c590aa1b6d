"""All that only a GPU can show, in one run; ``benchmarks/gpu.sh`` installs what is missing and calls this.

    python -m benchmarks.gpu DATA                         # one card, under 25 minutes
    python -m benchmarks.gpu DATA --device cpu --small    # the same steps on the CPU, in a few minutes

The tests on the device; the same numbers as on the CPU, and the same bits twice; the maps' speed against the research
loop in TF32 and in fp32, and 779 of them; the training's speed and its share of waiting for data; the whole study; what
each precision changes. Writes ``report.md`` and what every step printed, and exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import normalise
from evaluation.counting import count_scores
from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from isic.cache import decode_pairs
from isic.decoded import DecodedPairs
from isic.layout import find_pairs, isic_folders, limit_pairs
from model import UNet
from runtime.checkpoints import load_model
from uncertainty import UncertaintyMaps, uncertainty_maps

ROOT = Path(__file__).resolve().parent.parent
#: Tests that compute on the device that ``TEST_DEVICE`` names.
TESTS = (
    "tests/test_model.py", "tests/inference/test_unet_passes.py", "tests/inference/test_masks.py",
    "tests/inference/test_strided.py", "tests/runtime/test_reproducible_upsampling.py", "tests/evaluation/test_counting.py",
    "tests/test_uncertainty.py", "tests/test_train.py",
)
#: The maps of the CPU and of the device, in fp32: the largest deviation, relative to the map's largest value.
BOUND = 1e-5
#: All steps together may take.
MINUTES = 25
#: The lowest correlation with fp32, over images, that lets a precision be the default; seconds that may be taken at most.
CORRELATION, SECONDS_OF_MAPS, SECONDS_OF_STUDY = 0.999, 15.0, 300.0


@dataclass
class Step:
    """One line of the report.

    Attributes:
        name: what was done.
        right: whether nothing is wrong.
        seconds: it took.
        found: in a few words.
        details: Markdown for the section below.
    """

    name: str
    right: bool
    seconds: float
    found: str
    details: str = ""


class Runs:
    """Runs commands of this folder, each with a limit on its time and all with one, and keeps what they print."""

    def __init__(self, output: Path, device: str) -> None:
        self.output, self.device, self.deadline = output, device, time.monotonic() + MINUTES * 60

    def __call__(self, name: str, command: Sequence[object], limit: float, **environment: str) -> tuple[int, str, float]:
        """Exit code (124 where the time ran out), what was printed, and the seconds it took."""
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        limit = min(limit, max(1.0, self.deadline - time.monotonic()))
        started, path = time.perf_counter(), self.output / f"{name.replace(' ', '_')}.txt"
        with open(path, "w") as stream:
            try:
                code = subprocess.run(
                    [sys.executable, *map(str, command)], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=limit,
                    env={**os.environ, "MPLBACKEND": "Agg", **environment}, check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        return code, path.read_text(errors="replace").replace("\r", "\n"), time.perf_counter() - started


def table(text: str) -> str:
    """The Markdown tables in what a command printed, with the line before each."""
    lines = text.splitlines()
    kept = [i for i, line in enumerate(lines) if line.startswith("|")]
    titles = {i - 1 for i in kept if i - 1 not in kept} | {i - 2 for i in kept if i - 1 not in kept}
    return "\n".join(lines[i] for i in sorted({*kept, *(i for i in titles if i >= 0)}))


def last_line(text: str) -> str:
    """What a command said last."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


# ---------------------------------------------------------------- the steps


def run_tests(runs: Runs, small: bool) -> Step:
    """The tests of network, maps, training and counting."""
    files = TESTS[:-2] if small else TESTS
    command = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", *files]
    code, text, seconds = runs("tests", command, 480, TEST_DEVICE=runs.device)
    failed = re.findall(r"^FAILED (.*)$", text, re.MULTILINE)
    dots = sum(line.count(".") for line in re.findall(r"^([.FEsx]+) +\[", text, re.MULTILINE))
    found = f"{dots} passed, {len(failed)} failed"
    return Step("tests on the device", code == 0, seconds, found, "\n".join(f"- {name}" for name in failed))


def compare_with_cpu(weights: Path | None, pairs: DecodedPairs, device: torch.device, width: int, passes: int) -> Step:
    """The maps of some images on both, and the counters of the same maps on both.

    The gradient jumps where a ReLU's input is all but zero, and there rounding decides: in a trained network also between
    the two ways in which the CPU alone computes the same maps. Twice what those differ is allowed where it is more than
    the bound.
    """
    started, cpu = time.perf_counter(), torch.device("cpu")
    ids = pairs.ids[:4]
    images = torch.stack([torch.from_numpy(pairs.image(id).copy()) for id in ids])
    masks = torch.stack([torch.from_numpy(pairs.mask(id).copy()) for id in ids])

    def maps(where: torch.device, **options: str) -> UncertaintyMaps:
        torch.manual_seed(0)
        model = UNet(width).eval() if weights is None else load_model(weights, UNet, cpu)
        model = model.to(where)
        found = uncertainty_maps(
            model, normalise(images.to(where)), target_layer=model.encoder4, passes=passes, image_ids=ids, **options
        )
        return UncertaintyMaps(*(values.cpu() for values in found))

    def deviations(one: UncertaintyMaps, other: UncertaintyMaps) -> list[float]:
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(one[:4], other[:4])]

    expected = {method: maps(cpu, method=method) for method in ("fast", "general")}
    own = deviations(expected["general"], expected["fast"])
    lines, right = ["| path, map | largest deviation, relative | CPU, one path from the other |", "| --- | --- | --- |"], True
    for method, theirs in expected.items():
        for name, ours, between in zip(theirs._fields, deviations(maps(device, method=method), theirs), own):
            right = right and ours <= max(BOUND, 2 * between)
            lines.append(f"| {method}, {name} | {ours:.1e} | {between:.1e} |")
    counters = []
    for where in (cpu, device):
        named = {name: getattr(expected["fast"], name).to(where) for name in UncertaintyMaps._fields[:4]}
        split = [(id, {**{n: v[i] for n, v in named.items()}, "true_mask": masks[i].to(where)}) for i, id in enumerate(ids)]
        counters.append(count_scores(split, Fusion(Linear(0.0, 0.25), Linear(0.0, 0.25))).to_arrays())
    whole = [name for name, value in counters[0].items() if value.dtype.kind in "iuU"]
    unequal = [name for name in whole if not np.array_equal(counters[0][name], counters[1][name])]
    lines.append(f"\n{len(whole) - len(unequal)} of {len(whole)} arrays of counts are the same, number for number; "
                 f"others: {', '.join(unequal) or 'none'}.")
    found_words = "the same counts, maps within the bound" if right and not unequal else "they differ"
    return Step("equality with the CPU", right and not unequal, time.perf_counter() - started, found_words, "\n".join(lines))


def same_bits(runs: Runs, data: Path, small: bool) -> Step:
    """Two short runs from the same images, compared value for value."""
    folders = [runs.output / name for name in ("once", "again")]
    flags = ["--limit", 24 if small else 160, "--epochs", 1 if small else 2, "--resamples", 100]
    flags += ["--quick", "--image-size", 64, "--width", 8, "--passes", 4] if small else []
    seconds = 0.0
    for folder in folders:
        command = ["main.py", "--data", data, "--results", folder, "--cache", runs.output / "cache", "--device", runs.device,
                   "--fresh", "--quiet", *flags]
        code, text, taken = runs(f"run {folder.name}", command, 300)
        seconds += taken
        if code:
            return Step("the same bits twice", False, seconds, last_line(text))
    code, text, taken = runs("same numbers", ["-m", "benchmarks.same_numbers", *folders], 120)
    found = re.search(r": (\d+ files, \d+ differences)", text)
    return Step("the same bits twice", code == 0, seconds + taken, found[1] if found else last_line(text))


def time_maps(runs: Runs, data: Path, small: bool) -> Step:
    """Ratios to the research loop, and the whole job."""
    path = runs.output / "maps.json"
    size = ["--width", 8, "--size", 64, "--passes", 4, "--rounds", 2, "--images", 8, "--no-memory"] if small else [
        "--width", 64, "--size", 256, "--rounds", 3, "--images", 779]
    command = ["-m", "benchmarks.maps", "--device", runs.device, "--data", data, "--json", path, *size]
    code, text, seconds = runs("maps", command, 480)
    if code or not path.is_file():
        return Step("maps", False, seconds, last_line(text))
    result = json.loads(path.read_text())
    half = "fp16" if runs.device != "cpu" else "bf16"
    ratio, taken = result["variants"][f"ours, {half}"]["ratio"], result["whole_job"][f"ours, {half}"]
    job = re.findall(r"^(?:\d+ pictures|research loop, extra).*$", text, re.MULTILINE)
    right = small or taken <= SECONDS_OF_MAPS
    found = f"{half}: {ratio:.1f} times the research loop; {8 if small else 779} maps with reading and writing {taken:.1f} s"
    return Step("maps", right, seconds, found, "\n".join([table(text), "", *(f"- {line}" for line in job)]))


def time_training(runs: Runs, data: Path, small: bool) -> Step:
    """Ratios to the plain loop, and the share of waiting for data."""
    path = runs.output / "training.json"
    size = ["--width", 8, "--size", 64, "--limit", 24, "--batch-size", 8, "--rounds", 3, "--whole-epochs", 1] if small else [
        "--width", 64, "--size", 256, "--limit", 512, "--rounds", 25, "--whole-epochs", 2]
    command = ["-m", "benchmarks.training", "--device", runs.device, "--data", data, "--json", path, *size]
    code, text, seconds = runs("training", command, 300)
    if code or not path.is_file():
        return Step("training", False, seconds, last_line(text))
    epochs = json.loads(path.read_text())["epochs"]
    rate, share = epochs["ours, bf16"]
    plain = next(iter(epochs.values()))[0]
    found = f"bf16: {rate:.0f} images a second, {rate / plain:.1f} times the plain loop, {share:.0%} of it waiting for data"
    return Step("training", True, seconds, found, table(text))


def whole_study(runs: Runs, data: Path, small: bool) -> tuple[Step, Path]:
    """From images to the report; its results folder."""
    folder = runs.output / "study"
    flags = ["--quick", "--image-size", 64, "--width", 8, "--passes", 4, "--limit", 24, "--epochs", 2, "--resamples", 100]
    command = ["main.py", "--data", data, "--study", "--results", folder, "--cache", runs.output / "cache", "--device",
               runs.device, "--fresh", *(flags if small else [])]
    code, text, seconds = runs("study", command, 600)
    if code:
        return Step("the whole study", False, seconds, last_line(text)), folder
    metrics = json.loads((folder / "metrics.json").read_text())
    stages = metrics.get("seconds_by_stage") or {}
    overflowed = sum(metrics[part].get("precision_fallbacks") or 0 for part in ("validation", "test"))
    found = f"test Dice {metrics['test']['dice']:.3f}, {metrics['minutes'] * 60:.0f} s after decoding, {overflowed} overflows"
    lines = ["| stage | seconds |", "| --- | --- |", *(f"| {name} | {entry['seconds']:.1f} |" for name, entry in stages.items())]
    right = small or metrics["minutes"] * 60 <= SECONDS_OF_STUDY
    return Step("the whole study", right, seconds, found, "\n".join(lines) if stages else ""), folder


def precisions(runs: Runs, data: Path, weights: Path, small: bool) -> Step:
    """What each precision changes; the one that "auto" stands for must change next to nothing on every image."""
    path = runs.output / "precision.json"
    images, masks = isic_folders(data)
    size = ["--count", 6, "--size", 64, "--passes", 4] if small else ["--count", 60, "--size", 256]
    command = ["-m", "benchmarks.precision", weights, "--images", images, "--masks", masks, "--device", runs.device,
               "--json", path, *size]
    code, text, seconds = runs("precision", command, 300)
    if code or not path.is_file():
        return Step("precision", False, seconds, last_line(text))
    rows = json.loads(path.read_text())
    names = [f"worst_correlation_{name}" for name in ("pred_variance", "saliency_variance")]
    worst = {precision: min(row[name] for name in names) for precision, row in rows.items()}
    right = small or runs.device == "cpu" or worst["fp16"] >= CORRELATION
    return Step("precision", right, seconds, ", ".join(f"{name} {value:.4f}" for name, value in worst.items()), table(text))


# ---------------------------------------------------------------- the report


def described(device: torch.device) -> str:
    """The card and the versions, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    cudnn = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}{cudnn}; {time.strftime('%Y-%m-%d')}"


def written(steps: Sequence[Step], device: torch.device, small: bool) -> str:
    """The report in Markdown."""
    lines = ["# What this card shows", "", described(device) + ("; a small run, whose times say nothing" if small else ""), ""]
    lines += ["| step | | seconds | found |", "| --- | --- | --- | --- |"]
    lines += [f"| {step.name} | {'right' if step.right else '**wrong**'} | {step.seconds:.0f} | {step.found} |" for step in steps]
    for step in steps:
        if step.details:
            lines += ["", f"## {step.name.capitalize()}", "", step.details]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder in the ISIC 2018 Task 1 layout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="all steps at a size for two cores of a CPU; no time is judged")
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    options = parser.parse_args()
    device, output, data, small = torch.device(options.device), options.output.resolve(), options.data.resolve(), options.small
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is available here; give --device cpu --small to see the steps", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    runs, steps = Runs(output, options.device), []
    found = limit_pairs(find_pairs(*isic_folders(data)), 4)
    pairs = decode_pairs(found, 64 if small else 256, output / "cache")

    def done(step: Step) -> None:
        steps.append(step)
        (output / "report.md").write_text(written(steps, device, small))  # a run that is cut short leaves what it knows
        print(f"  {'right' if step.right else 'WRONG'}, {step.seconds:.0f} s: {step.found}", flush=True)

    done(run_tests(runs, small))
    study, folder = whole_study(runs, data, small)
    done(study)
    weights = folder / "weights" / "best_model.pth"
    known = weights if weights.is_file() else None
    done(compare_with_cpu(known, pairs, device, 8 if small else 64, 4))
    done(same_bits(runs, data, small))
    done(time_maps(runs, data, small))
    done(time_training(runs, data, small))
    if known is not None:
        done(precisions(runs, data, known, small))
    print((output / "report.md").read_text())
    return int(not all(step.right for step in steps))


if __name__ == "__main__":
    sys.exit(main())
