"""From image-mask pairs to tensors: the split, the augmentation, batches.

Where pairs lie on disk and how they are decoded is the business of :mod:`isic`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from isic.cache import DecodedPairs, decode_pairs
from isic.layout import SkippedPair, find_pairs, limit_pairs
from isic.source import DATA, Source
from runtime.config import Config
from runtime.errors import UserError, printable
from runtime.processes import ProcessGroup
from runtime.progress import complain, progress_bar, stage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Split(NamedTuple):
    """Sorted ids of the three parts."""

    train: list[str]
    validation: list[str]
    test: list[str]


class Data(NamedTuple):
    """The decoded pairs of a run, how they are split, and which were left out."""

    pairs: DecodedPairs
    split: Split
    skipped: list[SkippedPair]


def prepare_data(config: Config, source: Source, group: ProcessGroup) -> Data:
    """Find, decode and split the pairs.

    The main process decodes; the others map its cache. The split is that of all
    ids found; pairs left out by ``--skip-bad`` then leave their part.

    Raises:
        UserError: a pair is broken (without ``--skip-bad``), a part would be
            empty, or the cache cannot be written.
    """

    def prepare() -> Data:
        skipped: list[SkippedPair] | None = [] if config.skip_bad else None
        found = find_pairs(source.images, source.masks, skipped)
        ids = limit_pairs(sorted([pair.id for pair in found] + [entry.id for entry in skipped or ()]), config.limit)
        wanted = set(ids)
        split = split_ids(ids, config.test_fraction, config.validation_fraction, config.split_seed)
        used = [pair for pair in found if pair.id in wanted]
        with progress_bar("decoding images", len(used), "pair") as bar:
            pairs = decode_pairs(
                used, config.image_size, Path(config.cache or DATA / "cache"), bar.update, skipped,
                waiting=lambda line: bar.write(line, file=sys.stderr),
            )
        left_out = sorted(entry for entry in skipped or () if entry.id in wanted)
        if left_out:
            split = leave_out(split, {entry.id for entry in left_out})
            reasons = "; ".join(f"{entry.id}: {entry.reason}" for entry in left_out)
            complain(f"warning: {len(left_out)} of {len(ids)} pairs are left out: {printable(reasons)}")
        return Data(pairs, split, left_out)

    data = group.shared(prepare)
    parts = ", ".join(f"{len(ids)} {part}" for part, ids in zip(("training", "validation", "test"), data.split))
    stage("data", f"{len(data.pairs.ids)} images: {parts}")
    return data


def split_ids(
    ids: Iterable[str], test_fraction: float = 0.2, validation_fraction: float = 0.125, seed: int = 42
) -> Split:
    """Split ids into train, validation and test, as the study does.

    The ids are sorted; scikit-learn's ``train_test_split`` takes the test set
    from all, then the validation set from the rest, with the same random state.
    2,594 ids at the default fractions give 1,815 / 260 / 519.

    Raises:
        UserError: a part would be empty.
    """
    from sklearn.model_selection import train_test_split  # takes seconds to load, and drawing a picture splits nothing

    ids = sorted(ids)
    try:
        rest, test = train_test_split(ids, test_size=test_fraction, random_state=seed)
        train, validation = train_test_split(rest, test_size=validation_fraction, random_state=seed)
    except ValueError as error:
        raise UserError(
            f"{len(ids)} images are too few to split into training, validation and test; use at least 8, "
            "and --test-fraction and --validation-fraction that leave an image to each"
        ) from error
    return Split(sorted(train), sorted(validation), sorted(test))


def leave_out(split: Split, skipped: Collection[str]) -> Split:
    """The split without some ids; every other id stays in its part.

    Raises:
        UserError: a part has no image left, or training fewer than the two that batch norm needs.
    """
    rest = Split(*([id for id in part if id not in skipped] for part in split))
    for name, part, least in zip(Split._fields, rest, (2, 1, 1)):
        if len(part) < least:
            raise UserError(f"without the {len(skipped)} bad pairs the {name} part has {len(part)} images; repair some of them")
    return rest


# ---------------------------------------------------------------- tensors for the network


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W), ImageNet mean 0 and standard deviation 1."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).to(torch.float32) / 255.0 - mean) / std


def augmentation(kind: str) -> Any:
    """The albumentations pipeline of the training split: "full", "flips" or "none"."""
    # albumentations asks its server for a newer version at import unless told not to
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations
    import cv2

    cv2.setNumThreads(0)  # the processes already use every core
    steps: list[Any] = []
    if kind in ("full", "flips"):
        steps.append(albumentations.D4(p=1.0))  # the eight flips and quarter turns
    if kind == "full":
        steps += [
            albumentations.Affine(
                scale=(0.85, 1.2), translate_percent=(-0.06, 0.06), rotate=(-30, 30), shear=(-6, 6),
                border_mode=cv2.BORDER_REFLECT_101, p=0.5,
            ),
            albumentations.ElasticTransform(alpha=30, sigma=6, border_mode=cv2.BORDER_REFLECT_101, p=0.1),
            albumentations.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.04, p=0.5),
            albumentations.GaussianBlur(blur_limit=(3, 5), p=0.1),
        ]
    return albumentations.Compose(steps)


def derived_seed(*parts: Any) -> int:
    """A 32-bit seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "little")


class TrainingImages(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Augmented training pairs, indexed by (epoch, position).

    The augmentation of a pair is seeded by (seed, epoch, id), so it is the same
    in any order, with any number of workers, and after a resumed run.

    Returns image uint8 (H, W, 3) and mask uint8 (H, W).
    """

    def __init__(self, pairs: DecodedPairs, ids: Sequence[str], kind: str, seed: int):
        self.pairs, self.ids, self.kind, self.seed = pairs, list(ids), kind, seed
        self.pipeline: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Any) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = key
        id = self.ids[position]
        image, mask = np.array(self.pairs.image(id)), np.array(self.pairs.mask(id))
        if self.kind == "none":
            return image, mask
        if self.pipeline is None:  # built here so that every worker has its own
            self.pipeline = augmentation(self.kind)
        self.pipeline.set_random_seed(derived_seed(self.seed, epoch, id))
        changed = self.pipeline(image=image, mask=mask)
        return changed["image"], changed["mask"]


class EpochBatches(Sampler[Any]):
    """The batches of one epoch: lists of (epoch, position), of which each process takes its rows.

    Positions are shuffled by (seed, epoch) and cut into global batches of
    ``batch_size``; a process gets the contiguous part ``rows(step)`` of each, so
    that the global batches are the same for any number of processes. A last
    batch of a single image is left out: batch norm has no variance over it.

    Raises:
        UserError: a batch has fewer images than there are processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        edges = [*range(0, length, batch_size), length]
        self.batches = [(start, stop) for start, stop in zip(edges, edges[1:]) if stop - start > 1]
        smallest = min((stop - start for start, stop in self.batches), default=0)
        if smallest < world_size:
            raise UserError(
                f"a training batch has {smallest} images for {world_size} processes; "
                "choose another --batch-size, more images or fewer processes"
            )
        self.length = length

    def __len__(self) -> int:
        return len(self.batches)

    def size(self, step: int) -> int:
        """Images of the global batch of a step."""
        start, stop = self.batches[step]
        return stop - start

    def rows(self, step: int) -> slice:
        """This process's part of the global batch of a step; the parts differ in size by one at most."""
        size = self.size(step)
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step, (start, stop) in enumerate(self.batches):
            yield [(self.epoch, position) for position in order[start:stop][self.rows(step)]]


def batches(
    pairs: DecodedPairs, ids: Sequence[str], batch_size: int, device: torch.device
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield (ids, normalised images float32 (B, 3, H, W), masks uint8 (B, H, W)) in order."""
    for start in range(0, len(ids), batch_size):
        part = list(ids[start : start + batch_size])
        images = torch.from_numpy(np.stack([pairs.image(id) for id in part])).to(device)
        masks = torch.from_numpy(np.stack([pairs.mask(id) for id in part])).to(device)
        yield part, normalise(images), masks
