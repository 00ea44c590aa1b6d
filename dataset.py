"""Image-mask pairs: finding them, the split, the decoded cache, augmentation."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import unicodedata
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import PIL
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from decoding import Pair, decode_pair
from storage import FolderLock, UserError, check_space, file_checksum, fingerprint, read_json, remove_partials, write_json

ISIC_IMAGES = "ISIC2018_Task1-2_Training_Input"
ISIC_MASKS = "ISIC2018_Task1_Training_GroundTruth"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MASK_ENDINGS = ("_segmentation", "_lesion", "_mask")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadPair(NamedTuple):
    """An id whose pair cannot be used: the file to blame, and what is wrong with it."""

    id: str
    file: str
    reason: str


class Split(NamedTuple):
    """Sorted ids of the three parts."""

    train: list[str]
    validation: list[str]
    test: list[str]


# ---------------------------------------------------------------- finding the pairs


def isic_folders(root: Path) -> tuple[Path, Path]:
    """The image and the mask folder of the official layout under ``root``.

    Raises:
        UserError: ``root`` or one of the two is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"dataset folder {root} does not exist; give --data a folder that holds {ISIC_IMAGES}")
    for name in (ISIC_IMAGES, ISIC_MASKS):
        if not (root / name).is_dir():
            raise UserError(
                f"{root} has no folder {name}; unpack the ISIC 2018 Task 1 archives there "
                "(--download goes on with what it began in data/ISIC2018), or give --images DIR --masks DIR for another layout"
            )
    return root / ISIC_IMAGES, root / ISIC_MASKS


def find_pairs(images: Path, masks: Path, bad: list[BadPair] | None = None) -> list[Pair]:
    """All image files of one folder with their masks from another, sorted by id.

    A mask belongs to an image when its stem equals the image's, with or
    without one of ``MASK_ENDINGS``. The two may be the same folder: files
    with such an ending are then masks. An id is the stem in Unicode's composed
    form: two systems may spell the same accent differently.

    Args:
        images, masks: the folders.
        bad: where given, ids without exactly one image and one mask of its own
            are appended here; otherwise the first of them is an error.

    Raises:
        UserError: a folder is missing, holds no image, an image has no mask,
            two files claim the same id, or two images the same mask.
    """
    images, masks = Path(images), Path(masks)
    # not Path.resolve, which fails on a link to itself
    same = os.path.realpath(images) == os.path.realpath(masks)
    found = _by_stem(images, skip_masks=same)
    candidates = _by_stem(masks)
    if not found:
        raise UserError(f"no image files ({', '.join(IMAGE_SUFFIXES)}) in {images}; check the folder")
    pairs: list[Pair] = []
    owners: dict[Path, str] = {}
    for stem, files in sorted(found.items()):
        try:
            mask = _mask_of(stem, files, candidates, masks, MASK_ENDINGS if same else ("", *MASK_ENDINGS))
            if mask in owners:
                raise UserError(f"{mask} is the mask of both {owners[mask]} and {stem}; rename one of the images", mask)
        except UserError as error:
            if bad is None:
                raise
            bad.append(BadPair(stem, str(error.file or files[0]), str(error)))
        else:
            owners[mask] = stem
            pairs.append(Pair(stem, files[0], mask))
    return pairs


def _mask_of(stem: str, files: list[Path], candidates: dict[str, list[Path]], masks: Path, endings: Sequence[str]) -> Path:
    image = files[0]
    if not stem.isprintable() or "\\" in stem:
        # such a name can neither be printed nor be the name of a map everywhere
        raise UserError(f"{image} has a line break, a backslash or bytes that are no text in its name; rename it", image)
    if len(files) > 1:
        raise UserError(f"{image} and {files[1].name} have the same stem; keep one", image)
    names = [stem + ending for ending in endings if stem + ending in candidates]
    if not names:
        raise UserError(
            f"image {image} has no mask: expected {stem} with or without "
            f"{', '.join(MASK_ENDINGS)} in {masks}; add it or remove the image", image
        )
    if len(names) > 1:
        raise UserError(f"image {image} has several masks in {masks}: {', '.join(names)}; keep one", image)
    found = candidates[names[0]]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} have the same stem; keep one", found[0])
    return found[0]


def _by_stem(folder: Path, skip_masks: bool = False) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; check --images and --masks")
    found: dict[str, list[Path]] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}; check its permissions") from error
    for path in entries:
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if skip_masks and path.stem.endswith(MASK_ENDINGS):
            continue
        # the official image folder also holds superpixel maps in some copies
        if path.stem.endswith("_superpixels"):
            continue
        found.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    return found


def limit_pairs(pairs: Sequence[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` pairs (or ids), evenly spaced over the sorted ids; None keeps all."""
    if limit is None or limit >= len(pairs):
        return list(pairs)
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


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


def leave_out(split: Split, bad: Collection[str]) -> Split:
    """The split without some ids; every other id stays in its part.

    Raises:
        UserError: a part has no image left, or training fewer than the two that batch norm needs.
    """
    rest = Split(*([id for id in part if id not in bad] for part in split))
    for name, part, least in zip(Split._fields, rest, (2, 1, 1)):
        if len(part) < least:
            raise UserError(f"without the {len(bad)} bad pairs the {name} part has {len(part)} images; repair some of them")
    return rest


# ---------------------------------------------------------------- the decoded cache


@dataclass
class DecodedPairs:
    """Decoded pairs of one size, memory-mapped.

    Attributes:
        ids: the ids asked for, sorted.
        size: side in pixels.
        records: uint8 memory map (slots, 4 * size * size): RGB rows, then the mask.
        slots: slot of each id.
        checksums: id -> [SHA-256 of the image file, of the mask file].
        skipped: the pairs left out because they are broken or incomplete.
    """

    ids: list[str]
    size: int
    records: np.ndarray
    slots: dict[str, int]
    checksums: dict[str, list[str]]
    skipped: list[BadPair] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is started afresh: the name of the mapped file instead of its content."""
        records = self.records
        if not isinstance(records, np.memmap):
            return self.__dict__
        return {**self.__dict__, "records": (str(records.filename), records.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.records, tuple):
            name, shape = self.records
            self.records = np.memmap(name, np.uint8, "r", shape=shape)

    def image(self, id: str) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return self.records[self.slots[id], : 3 * self.size**2].reshape(self.size, self.size, 3)

    def mask(self, id: str) -> np.ndarray:
        """uint8 (size, size) of 0 and 1."""
        return self.records[self.slots[id], 3 * self.size**2 :].reshape(self.size, self.size)

    def fingerprint(self) -> str:
        """Changes when any image or mask file is changed, added or removed."""
        return fingerprint([[id, *self.checksums[id]] for id in self.ids])


def decode_pairs(
    pairs: Sequence[Pair],
    size: int,
    cache: Path,
    progress: Callable[[int], None] = lambda count: None,
    bad: list[BadPair] | None = None,
    waiting: Callable[[str], None] = lambda line: None,
) -> DecodedPairs:
    """Decode every pair once into a memory-mapped cache and reuse it afterwards.

    A pair whose files kept their size and modification time is not read again;
    a changed one alone is redone. Work is saved as it goes, so an interrupted
    call continues where it stopped. Several runs may use one cache: one decodes
    at a time, and a record that was once listed is never overwritten, so that a
    run that has it mapped keeps what it started with.

    Args:
        pairs: what to decode.
        size: side in pixels.
        cache: folder for the cache; made when absent.
        progress: called with the number of pairs that became ready.
        bad: where given, broken pairs are appended here and left out;
            otherwise the first of them is an error.
        waiting: called with a line when another run is decoding into the cache.

    Raises:
        UserError: a pair is broken, none is left, or the cache cannot be written.
    """
    if not pairs:
        raise UserError("no pair is left: every one is broken; repair some of them")
    refused: dict[str, UserError] = {}
    stamps: dict[str, list[Any]] = {}
    for pair in pairs:
        try:
            stamps[pair.id] = [_stamp(pair.image), _stamp(pair.mask)]
        except UserError as error:
            if bad is None:
                raise
            refused[pair.id] = error
    key = fingerprint([os.path.realpath(pairs[0].image.parent), os.path.realpath(pairs[0].mask.parent), size])[:16]
    folder = Path(cache) / f"{size}px-{key}"
    todo = _outdated(folder, size, pairs, stamps)
    progress(len(stamps) - len(todo))
    if todo:
        with FolderLock(folder, "give --cache another folder", waiting):
            remove_partials(folder)
            missing = _outdated(folder, size, todo, stamps)  # what the run that was waited for has done is done
            progress(len(todo) - len(missing))
            _decode_into(folder, size, missing, stamps, progress, None if bad is None else refused)
    for pair in pairs:
        if bad is not None and pair.id in refused:
            error = refused[pair.id]
            bad.append(BadPair(pair.id, str(error.file or pair.image), str(error)))
    entries = _read_index(folder, size).entries
    ids = [pair.id for pair in pairs if pair.id not in refused]
    if not ids:
        raise UserError("no pair is left: every one is broken; repair some of them")
    records = _map_records(folder, size, entries)
    return DecodedPairs(
        ids, size, records, {id: entries[id]["slot"] for id in ids}, {id: entries[id]["checksums"] for id in ids}
    )


class _Index(NamedTuple):
    """What a cache holds: id -> slot, stamps and checksums of its files, CRC-32 of its record; the first unused slot."""

    entries: dict[str, dict[str, Any]]
    unused: int


def _read_index(folder: Path, size: int) -> _Index:
    """The index of a cache; a missing, damaged or differently made cache counts as empty."""
    try:
        content = read_json(folder / "index.json")
        if content["made_by"] != _maker(size):
            return _Index({}, 0)
        entries, unused = content["pairs"], content["unused"]
        slots = [entry["slot"] for entry in entries.values() if isinstance(entry["checksums"], list)]
        length = (folder / "pairs.uint8").stat().st_size
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return _Index({}, 0)
    whole = len(slots) == len(entries) and all(type(slot) is int and 0 <= slot < unused for slot in slots)
    if not whole or len(set(slots)) < len(slots) or (max(slots, default=-1) + 1) * 4 * size * size > length:
        return _Index({}, 0)
    return _Index(entries, unused)


def _maker(size: int) -> dict[str, Any]:
    """What decides the pixels beside the files: this program's decoding, and Pillow's."""
    return {"decoding": 3, "pillow": PIL.__version__, "size": size}


def _map_records(folder: Path, size: int, entries: dict[str, dict[str, Any]]) -> np.ndarray:
    length = 4 * size * size
    count = 1 + max((entry["slot"] for entry in entries.values()), default=-1)
    if not count:
        return np.empty((0, length), np.uint8)
    try:
        return np.memmap(folder / "pairs.uint8", np.uint8, "r", shape=(count, length))
    except OSError as error:
        raise UserError(f"cannot read the cache in {folder}: {error.strerror or error}; give --cache another folder") from error


def _outdated(folder: Path, size: int, pairs: Sequence[Pair], stamps: dict[str, list[Any]]) -> list[Pair]:
    """The pairs with stamps whose record is missing, of other files, or damaged."""
    entries = _read_index(folder, size).entries
    records = _map_records(folder, size, entries)

    def is_current(pair: Pair) -> bool:
        entry = entries.get(pair.id, {})
        return entry.get("stamps") == stamps[pair.id] and zlib.crc32(records[entry["slot"]]) == entry.get("crc")

    return [pair for pair in pairs if pair.id in stamps and not is_current(pair)]


def _decode_into(
    folder: Path, size: int, pairs: Sequence[Pair], stamps: dict[str, list[Any]], progress: Callable[[int], None],
    refused: dict[str, UserError] | None,
) -> None:
    """Decode pairs into unused slots of the cache that this process has locked."""
    entries, unused = _read_index(folder, size)
    data_path, length, lock = folder / "pairs.uint8", 4 * size * size, threading.Lock()

    def work(pair: Pair) -> tuple[dict[str, Any] | None, UserError | None]:
        nonlocal unused
        try:
            checksums = [_checksum(pair.image), _checksum(pair.mask)]
            image, mask = decode_pair(pair, size)
        except UserError as error:
            if refused is None:
                raise
            return None, error
        record = np.concatenate([image.ravel(), mask.ravel()])
        with lock:  # a full disk is an error to a written file; to a written memory map it is the end of the process
            slot, unused = unused, unused + 1
            stream.seek(slot * length)
            stream.write(record)
            stream.flush()
        return {"slot": slot, "stamps": stamps[pair.id], "checksums": checksums, "crc": zlib.crc32(record)}, None

    def save() -> None:
        os.fsync(stream.fileno())
        write_json(folder / "index.json", {"made_by": _maker(size), "unused": unused, "pairs": entries})

    try:
        if not entries:
            data_path.unlink(missing_ok=True)  # rather than overwrite what another run may have mapped
        present = data_path.stat().st_size if data_path.exists() else 0
        check_space(folder, (unused + len(pairs)) * length - present)
        # Pillow and hashlib release the interpreter lock, so threads use every core.
        with open(data_path, "r+b" if data_path.exists() else "w+b") as stream, \
                ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for count, (pair, (entry, error)) in enumerate(zip(pairs, pool.map(work, pairs)), 1):
                    if entry is not None:
                        entries[pair.id] = entry
                    else:
                        refused[pair.id] = error
                    progress(1)
                    if count % 256 == 0:
                        save()
            finally:
                pool.shutdown(cancel_futures=True)
                save()
    except OSError as error:
        raise UserError(f"cannot write the cache in {folder}: {error.strerror or error}; give --cache another folder") from error


def _stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair", path) from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise UserError(f"{path} is a folder or a device and not a file; rename it or remove its pair", path)
    return [path.name, status.st_size, status.st_mtime_ns]


def _checksum(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair", path) from error


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


class TrainingImages(Dataset):
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
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


def batches(
    pairs: DecodedPairs, ids: Sequence[str], batch_size: int, device: torch.device
) -> Iterable[tuple[list[str], Tensor, Tensor]]:
    """Yield (ids, normalised images float32 (B, 3, H, W), masks uint8 (B, H, W)) in order."""
    for start in range(0, len(ids), batch_size):
        part = list(ids[start : start + batch_size])
        images = torch.from_numpy(np.stack([pairs.image(id) for id in part])).to(device)
        masks = torch.from_numpy(np.stack([pairs.mask(id) for id in part])).to(device)
        yield part, normalise(images), masks
