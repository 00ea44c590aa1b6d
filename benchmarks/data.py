"""Reading full-size originals: the decode-once cache against decoding every time.

    python -m benchmarks.data --images DIR --masks DIR

The plain alternative is what a typical ``__getitem__`` does: Pillow decodes
image and mask at their full size and resizes them, each epoch again. Both read
the same files in the same run, in turn; wall seconds, the median of the rounds
with their range, and ratios. The files are in the system's page cache for both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from isic.cache import decode_pairs
from isic.layout import Pair, find_pairs


def plain_epoch(pairs: list[Pair], size: int) -> None:
    """Decode and resize every pair, as a data set without a cache does in each epoch."""
    for pair in pairs:
        with Image.open(pair.image) as image:
            np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        with Image.open(pair.mask) as mask:
            np.asarray(mask.convert("L").resize((size, size), Image.Resampling.NEAREST))


def first_epoch(pairs: list[Pair], size: int, cache: Path) -> None:
    """Make the cache, and read every pair from it."""
    later_epoch(pairs, size, cache)


def later_epoch(pairs: list[Pair], size: int, cache: Path) -> None:
    """Open the cache that is there, which looks at every file's size and time, and read every pair."""
    decoded = decode_pairs(pairs, size, cache)
    for pair in pairs:
        np.array(decoded.image(pair.id)), np.array(decoded.mask(pair.id))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--copies", type=int, default=8, help="each pair is read under this many names")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("images", "masks"):
            (root / name).mkdir()
        for pair in find_pairs(args.images, args.masks):
            for copy in range(args.copies):
                for name, path in (("images", pair.image), ("masks", pair.mask)):
                    os.symlink(path.resolve(), root / name / f"{pair.id}-{copy}{path.suffix}")
        pairs = find_pairs(root / "images", root / "masks")
        times: dict[str, list[float]] = {"plain": [], "first": [], "later": []}
        for number in range(args.rounds):
            cache = root / f"cache{number}"
            for name, work in (
                ("plain", lambda: plain_epoch(pairs, args.size)),
                ("first", lambda cache=cache: first_epoch(pairs, args.size, cache)),
                ("later", lambda cache=cache: later_epoch(pairs, args.size, cache)),
            ):
                started = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - started)
    print(
        f"{len(pairs)} pairs to {args.size} px, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, Pillow {PIL.__version__}, {args.rounds} rounds\n"
    )
    print("| epoch | times faster than plain, median | range |\n| --- | --- | --- |")
    for name, title in (("plain", "plain: decode and resize"), ("first", "first, makes the cache"), ("later", "later")):
        ratios = [plain / own for plain, own in zip(times["plain"], times[name])]
        print(f"| {title} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
