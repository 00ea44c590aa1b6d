"""From image-mask pairs to tensors: the split, the augmentation, batches.

Where pairs lie on disk and how they are decoded is the business of :mod:`isic`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from isic.cache import decode_pairs
from isic.decoded import DecodedPairs
from isic.layout import Pair, SkippedPair, find_pairs, limit_pairs
from isic.source import DATA, Source
from isic.tables import Fixed, groups_of, listed_ids, read_groups, read_parts
from runtime.config import Config
from runtime.devices import sent
from runtime.errors import UserError, printable
from runtime.processes import ProcessGroup
from runtime.progress import complain, progress_bar, stage
from runtime.resources import naming_shortage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Split(NamedTuple):
    """Sorted ids of the three parts."""

    train: list[str]
    validation: list[str]
    test: list[str]


PARTS = ("training", "validation", "test")  # in words, in the order of a split
LEAST = (2, 1, 1)  # images of each; batch norm needs two


class Data(NamedTuple):
    """The decoded pairs of a run, how they are split, and which were left out.

    ``groups`` holds the group of each image that has one; None where no groups were given.
    """

    pairs: DecodedPairs
    split: Split
    skipped: list[SkippedPair]
    groups: dict[str, str] | None = None


def prepare_data(config: Config, source: Source, group: ProcessGroup, fixed: Fixed | None = None) -> Data:
    """Find, decode and split the pairs.

    The main process decodes; the others read its cache, and look at every pair before the work begins. The split is that of all
    ids found, or that of ``--split``; pairs left out by ``--skip-bad`` then leave their part.

    Args:
        config: says which pairs, how large, and how they are split.
        source: where they lie.
        group: of processes.
        fixed: split and groups of another run, which hold where no flag gives others.

    Raises:
        UserError: a pair is broken (without ``--skip-bad``), a part would be
            empty, the cache cannot be written, or ``--split`` or ``--groups`` does not fit the images.
    """

    def prepare() -> Data:
        skipped: list[SkippedPair] | None = [] if config.skip_bad else None
        parts, table = fixed or (None, None)
        split_name, groups_name = f"the split of {config.weights_from}", f"the groups of {config.weights_from}"
        if config.split is not None:
            parts, split_name = read_parts(Path(config.split)), f"--split {config.split}"
        if config.groups is not None:
            table, groups_name = read_groups(Path(config.groups)), f"--groups {config.groups}"
        found = find_pairs(source.images, source.masks, skipped)
        ids = sorted([pair.id for pair in found] + [entry.id for entry in skipped or ()])
        if parts is not None:
            every, ids = len(ids), listed_ids(ids, parts, split_name, source.images)
            if len(ids) < every and config.split is not None:
                complain(f"{every - len(ids)} of {every} images are not in {split_name} and are left out")
        ids = limit_pairs(ids, config.limit)
        wanted = set(ids)
        # a table without one of them may be about another test set
        groups = None if table is None else groups_of(ids, table, groups_name, bool(config.test_data or config.test_images))
        if parts is not None:
            split = split_by_parts(ids, parts, groups or {}, split_name)
        else:
            split = split_ids(ids, config.test_fraction, config.validation_fraction, config.split_seed, groups)
        pairs = decode([pair for pair in found if pair.id in wanted], config, skipped)
        left_out = sorted(entry for entry in skipped or () if entry.id in wanted)
        if left_out:
            split = leave_out(split, {entry.id for entry in left_out})
            reasons = "; ".join(f"{entry.id}: {entry.reason}" for entry in left_out)
            complain(f"warning: {len(left_out)} of {len(ids)} pairs are left out: {printable(reasons)}")
        return Data(pairs, split, left_out, groups)

    data = group.shared(prepare)
    if group.world_size > 1:  # the main process has just read them
        group.each(data.pairs.check)
    said = ", ".join(f"{len(ids)} {part}" for part, ids in zip(PARTS, data.split))
    stage("data", f"{len(data.pairs.ids)} images: {said}")
    return data


@naming_shortage("decoding images", "lower --image-size or close other programs")
def decode(pairs: Sequence[Pair], config: Config, skipped: list[SkippedPair] | None) -> DecodedPairs:
    """Decode pairs under a progress bar; see :func:`isic.cache.decode_pairs`."""
    with progress_bar("decoding images", len(pairs), "pair") as bar:
        return decode_pairs(
            pairs, config.image_size, Path(config.cache or DATA / "cache"), bar.update, skipped,
            waiting=lambda line: bar.write(line, file=sys.stderr),
        )


# ---------------------------------------------------------------- the split


def split_ids(
    ids: Iterable[str], test_fraction: float = 0.2, validation_fraction: float = 0.125, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Split ids into train, validation and test, as the study does.

    The ids are sorted; scikit-learn's ``train_test_split`` takes the test set
    from all, then the validation set from the rest, with the same random state.
    2,594 ids at the default fractions give 1,815 / 260 / 519. With groups its ``GroupShuffleSplit`` does so, and the
    fractions are those of the groups.

    Args:
        ids: of all images, in any order.
        test_fraction: share of all that is the test set.
        validation_fraction: share of the rest that is the validation set.
        seed: of both draws.
        groups: by id, kept together; an id without one stands for itself.

    Raises:
        UserError: a part would be empty.
    """
    # takes seconds to load, and drawing a picture splits nothing
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    def halves(ids: list[str], share: float) -> tuple[list[str], list[str]]:
        if not groups:
            return train_test_split(ids, test_size=share, random_state=seed)
        splitter = GroupShuffleSplit(n_splits=1, test_size=share, random_state=seed)
        ((first, second),) = splitter.split(ids, groups=[groups.get(id, id) for id in ids])
        return [ids[place] for place in first], [ids[place] for place in second]

    ids = sorted(ids)
    try:
        rest, test = halves(ids, test_fraction)
        train, validation = halves(rest, validation_fraction)
    except ValueError as error:
        number = f"{len(ids)} images in {len({groups.get(id, id) for id in ids})} groups" if groups else f"{len(ids)} images"
        raise UserError(
            f"{number} are too few to split into training, validation and test; use at least 8, "
            "and --test-fraction and --validation-fraction that leave an image to each"
        ) from error
    return Split(sorted(train), sorted(validation), sorted(test))


def split_by_parts(ids: Sequence[str], parts: Mapping[str, str], groups: Mapping[str, str], table: str) -> Split:
    """The split that a table says.

    Args:
        ids: sorted, all of them in the table.
        parts: "train", "validation" or "test" by id.
        groups: by id, of which none may be in two parts.
        table: flag and file, for messages.

    Raises:
        UserError: a part has too few images, or a group is in two parts.
    """
    split = Split(*([id for id in ids if parts[id] == name] for name in Split._fields))
    for name, part, least in zip(PARTS, split, LEAST):
        if len(part) < least:
            raise UserError(f"{table} leaves {len(part)} images for {name}; give it at least {least}")
    seen: dict[str, str] = {}
    for id in ids:
        first = seen.setdefault(groups[id], id) if id in groups else id
        if parts[first] != parts[id]:
            places = [PARTS[Split._fields.index(parts[one])] for one in (first, id)]
            raise UserError(
                f"{table}: group {groups[id]} is in two parts: {first} is in {places[0]}, {id} in {places[1]}; "
                "put all images of a group into one part"
            )
    return split


def leave_out(split: Split, skipped: Collection[str]) -> Split:
    """The split without some ids; every other id stays in its part.

    Raises:
        UserError: a part has no image left, or training fewer than the two that batch norm needs.
    """
    rest = Split(*([id for id in part if id not in skipped] for part in split))
    for name, part, least in zip(Split._fields, rest, LEAST):
        if len(part) < least:
            raise UserError(f"without the {len(skipped)} bad pairs the {name} part has {len(part)} images; repair some of them")
    return rest


# ---------------------------------------------------------------- tensors for the network


@functools.lru_cache(maxsize=8)
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of ImageNet, (1, 3, 1, 1) each; copied to a device once, as each copy would wait for it."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, deviation


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W), ImageNet mean 0 and standard deviation 1."""
    mean, std = _mean_and_deviation(images.device)
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
        image, mask = map(np.array, self.pairs.pair(id))
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
        images, masks = (sent(torch.from_numpy(np.stack(arrays)), device) for arrays in zip(*map(pairs.pair, part)))
        yield part, normalise(images), masks
