"""Training speed: the plain loop against ours, same network and batch.

    python -m benchmarks.training                                  # images a second, synthetic pixels
    python -m benchmarks.training --dice --data DIR --limit 500    # and the final Dice on real images
    python -m benchmarks.training --width 64 --size 256            # the study's size, on a GPU

The plain loop is what a typical script does: float32 in the default layout,
the same augmentation and the same optimiser, Pillow decoding each image in
``__getitem__``. Ours reads the decoded cache, and computes channels-last in
float32 and in bf16. The variants take turns step by step in one run; medians of
the steps with their quartiles, and ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dataset import TrainingImages, augmentation, derived_seed, normalise, split_ids
from isic.cache import decode_pairs
from isic.layout import Pair, find_pairs, isic_folders, limit_pairs
from isic.synthetic import write_synthetic_dataset
from model import UNet
from runtime.config import Config
from runtime.devices import resolve_device
from runtime.processes import ProcessGroup
from train import EpochBatches, train


class PlainImages(Dataset):
    """Decodes, resizes and augments in ``__getitem__``."""

    def __init__(self, pairs: list[Pair], size: int):
        self.pairs, self.size, self.pipeline = pairs, size, None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = key
        pair, side = self.pairs[index], (self.size, self.size)
        with Image.open(pair.image) as image, Image.open(pair.mask) as mask:
            pixels = np.array(image.convert("RGB").resize(side, Image.Resampling.BILINEAR))
            truth = (np.asarray(mask.convert("L").resize(side, Image.Resampling.NEAREST)) > 127).astype(np.uint8)
        self.pipeline = self.pipeline or augmentation("full")
        self.pipeline.set_random_seed(derived_seed(epoch, index))
        changed = self.pipeline(image=pixels, mask=truth)
        return changed["image"], changed["mask"]


def steps(
    dataset: Dataset, count: int, config: Config, device: torch.device, ours: bool, precision: torch.dtype
) -> Iterator[float]:
    """Train for ever, yielding the seconds of each step, loading included; the device is waited for."""
    torch.manual_seed(0)
    layout = torch.channels_last if ours else torch.contiguous_format
    model = UNet(config.width).to(device, memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    order = EpochBatches(count, config.batch_size, 0)
    workers = config.workers if config.workers >= 0 else (0 if device.type == "cpu" else 8)
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda"
    )
    while True:
        order.epoch += 1
        started = time.perf_counter()
        for images, masks in loader:
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(normalise(images).contiguous(memory_format=layout))[:, 0]
            loss = F.binary_cross_entropy_with_logits(logits.float(), masks.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter() - started
            started = time.perf_counter()


def final_dice(pairs, config: Config, device: torch.device) -> float:
    """Validation Dice of a whole training."""
    split = split_ids(pairs.ids)
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, pairs, split.train, split.validation + split.test, ProcessGroup(0, 1, device), Path(folder), "")
    return result.best_dice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder in the ISIC layout [synthetic lesions]")
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=25, help="steps of each variant, after two to warm up")
    parser.add_argument("--dice", action="store_true", help="also train to the end in each precision")
    parser.add_argument("--epochs", type=int, default=60, help="of those trainings: enough for few images to converge")
    parser.add_argument("--seeds", type=int, default=1, help="trainings in each precision")
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or Path(folder)
        if args.data is None:
            write_synthetic_dataset(root, args.limit)
        found = limit_pairs(find_pairs(*isic_folders(root)), args.limit)
        decoded = decode_pairs(found, args.size, Path(folder) / "cache")
        config = Config(
            image_size=args.size, width=args.width, batch_size=args.batch_size, epochs=args.epochs, workers=args.workers,
            lr=1e-3, schedule="cosine", patience=args.epochs,
        )
        cached: Callable[[], Dataset] = lambda: TrainingImages(decoded, decoded.ids, "full", 0)  # noqa: E731
        variants = {
            "plain": steps(PlainImages(found, args.size), len(found), config, device, False, torch.float32),
            "ours, fp32": steps(cached(), len(found), config, device, True, torch.float32),
            "ours, bf16": steps(cached(), len(found), config, device, True, torch.bfloat16),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(args.rounds + 2):
            for name, variant in variants.items():
                seconds = next(variant)
                if number >= 2:
                    times[name].append(seconds)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
        print(
            f"width {args.width}, {args.size} px, batch {args.batch_size}, {name}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {args.rounds} steps each\n"
        )
        print("| loop | times faster than plain, median of the steps | quartiles |\n| --- | --- | --- |")
        for variant, values in times.items():
            ratios = [plain / own for plain, own in zip(times["plain"], values)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"| {variant} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        if args.dice:
            print(f"\nDice on the images that were not trained on, {len(found)} images, {args.epochs} epochs:")
            for amp in ("fp32", "bf16"):
                dice = [
                    final_dice(decoded, replace(config, amp=amp, seed=config.seed + number), device)
                    for number in range(args.seeds)
                ]
                print(f"  {amp}: mean {statistics.mean(dice):.4f} of " + ", ".join(f"{value:.4f}" for value in dice), flush=True)


if __name__ == "__main__":
    main()
