"""Training speed: the plain loop against ours, same network and batch.

    python -m benchmarks.training                                  # images a second, synthetic pixels
    python -m benchmarks.training --dice --data DIR --limit 500    # and the final Dice on real images
    python -m benchmarks.training --width 64 --size 256            # the study's size, on a GPU

The plain loop is what a typical script does: the default layout, the same
augmentation and the same optimiser, Pillow decoding each image in
``__getitem__``. Ours is the program's own: the decoded cache, channels last,
and on CUDA the fused optimiser and reproducible gradients. Each row names the
precision of its convolutions, which on CUDA is TF32 unless asked otherwise.
The variants take turns step by step in one run; medians of the steps with
their quartiles, and ratios. While others have their turn, a loader with
processes of its own loads ahead, so whole epochs of one variant alone follow:
images a second, and the share of the time spent waiting for data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset import augmentation, derived_seed, normalise, split_ids
from isic.cache import decode_pairs
from isic.decoded import DecodedPairs
from isic.layout import Pair, find_pairs, isic_folders, limit_pairs
from isic.synthetic import write_synthetic_dataset
from model import UNet
from runtime.config import Config
from runtime.devices import resolve_device
from runtime.processes import ProcessGroup
from train import EpochBatches, Training, train


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


class Plain:
    """The plain loop's network, optimiser and loader, in the default layout."""

    def __init__(self, pairs: list[Pair], config: Config, device: torch.device, precision: torch.dtype, ieee: bool):
        torch.manual_seed(0)
        self.device, self.precision, self.ieee = device, precision, ieee
        self.model = UNet(config.width).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.order = EpochBatches(len(pairs), config.batch_size, 0)
        workers = config.workers if config.workers >= 0 else (0 if device.type == "cpu" else 8)
        self.loader = DataLoader(
            PlainImages(pairs, config.image_size), batch_sampler=self.order, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        )

    def step(self, epoch: int, number: int, images: Tensor, masks: Tensor) -> Tensor:
        """One step of the optimiser; returns its loss."""
        flags = {"allow_tf32": False} if self.ieee else {}
        with torch.backends.cudnn.flags(enabled=True, **flags):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self.model(normalise(images).contiguous())[:, 0]
            loss = F.binary_cross_entropy_with_logits(logits.float(), masks.float())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return loss.detach()


class Ours:
    """What :func:`train.train` trains with."""

    def __init__(self, pairs: DecodedPairs, config: Config, device: torch.device, amp: str, ieee: bool):
        self.training = Training(replace(config, amp=amp), pairs, pairs.ids, ProcessGroup(0, 1, device))
        self.order, self.loader, self.ieee = self.training.order, self.training.loader, ieee
        self.training.model.train()

    def step(self, epoch: int, number: int, images: Tensor, masks: Tensor) -> Tensor:
        """One step of the optimiser; returns its loss."""
        flags = {"allow_tf32": False} if self.ieee else {}
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, **flags):
            return self.training._step(epoch, number, images, masks)


def steps(loop: Plain | Ours, device: torch.device) -> Iterator[float]:
    """Train for ever, yielding the seconds of each step, loading included; the device is waited for."""
    while True:
        started = time.perf_counter()
        for number, (images, masks) in enumerate(loop.loader):
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            loop.step(loop.order.epoch, number, images, masks)
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter() - started
            started = time.perf_counter()
        loop.order.epoch += 1


def whole_epochs(loop: Plain | Ours, device: torch.device, epochs: int) -> tuple[float, float]:
    """Images a second of whole epochs, and the share of the time spent waiting for data; nobody waits for the device."""
    rates, shares = [], []
    for _ in range(epochs + 1):
        loop.order.epoch += 1
        started = asked = time.perf_counter()
        waited, losses = 0.0, []
        for number, (images, masks) in enumerate(loop.loader):
            waited += time.perf_counter() - asked
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            losses.append(loop.step(loop.order.epoch, number, images, masks))
            asked = time.perf_counter()
        torch.stack(losses).tolist()
        seconds = time.perf_counter() - started
        rates.append(sum(loop.order.size(number) for number in range(len(loop.order))) / seconds)
        shares.append(waited / seconds)
    return statistics.median(rates[1:]), statistics.median(shares[1:])  # the first starts the loader's processes


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
    parser.add_argument("--whole-epochs", type=int, default=3, help="of each variant alone, after one to start its loader")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there, too")
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
        cuda = device.type == "cuda"
        usual = "tf32" if cuda else "fp32"
        loops: dict[str, Plain | Ours] = {
            f"plain, {usual}": Plain(found, config, device, torch.float32, False),
            f"ours, {usual}": Ours(decoded, config, device, "fp32", False),
            "plain, bf16": Plain(found, config, device, torch.bfloat16, False),
            "ours, bf16": Ours(decoded, config, device, "bf16", False),
        }
        if cuda:
            loops["plain, fp32"] = Plain(found, config, device, torch.float32, True)
            loops["ours, fp32"] = Ours(decoded, config, device, "fp32", True)
        base = next(iter(loops))
        variants = {name: steps(loop, device) for name, loop in loops.items()}
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
        print(f"| loop, precision | times faster than {base}, median of the steps | quartiles |\n| --- | --- | --- |")
        for variant, values in times.items():
            ratios = [plain / own for plain, own in zip(times[base], values)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"| {variant} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        print(f"\n| loop alone, whole epochs | images a second | times {base} | share of the time waiting for data |")
        print("| --- | --- | --- | --- |")
        rates = {name: whole_epochs(loop, device, args.whole_epochs) for name, loop in loops.items()}
        for variant, (rate, share) in rates.items():
            print(f"| {variant} | {rate:.1f} | {rate / rates[base][0]:.2f} | {share:.3f} |")
        if args.json:
            args.json.write_text(json.dumps({"steps": times, "epochs": rates, "device": name}, indent=1))
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
