"""Image-mask pairs: finding and checking them, the split, the decoded cache, augmentation."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

from storage import UserError, fingerprint, read_json, write_json

ISIC_IMAGES = "ISIC2018_Task1-2_Training_Input"
ISIC_MASKS = "ISIC2018_Task1_Training_GroundTruth"
ISIC_ARCHIVES = (
    ("https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task1-2_Training_Input.zip", ISIC_IMAGES),
    ("https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task1_Training_GroundTruth.zip", ISIC_MASKS),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MASK_ENDINGS = ("_segmentation", "_lesion", "_mask")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pair(NamedTuple):
    """An image and its mask; ``id`` is the image file's stem."""

    id: str
    image: Path
    mask: Path


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
                f"{root} has no folder {name}; unpack the ISIC 2018 Task 1 archives there, "
                "or give --images DIR --masks DIR for another layout"
            )
    return root / ISIC_IMAGES, root / ISIC_MASKS


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """All image files of one folder with their masks from another, sorted by id.

    A mask belongs to an image when its stem equals the image's, with or
    without one of ``MASK_ENDINGS``. The two may be the same folder: files
    with such an ending are then masks.

    Raises:
        UserError: a folder is missing, holds no image, an image has no mask,
            or two files claim the same id.
    """
    images, masks = Path(images), Path(masks)
    found = _by_stem(images, skip_masks=images.resolve() == masks.resolve())
    candidates = _by_stem(masks)
    if not found:
        raise UserError(f"no image files ({', '.join(IMAGE_SUFFIXES)}) in {images}; check the folder")
    pairs = []
    for stem, image in sorted(found.items()):
        endings = MASK_ENDINGS if images.resolve() == masks.resolve() else ("", *MASK_ENDINGS)
        names = [stem + ending for ending in endings if stem + ending in candidates]
        if not names:
            raise UserError(
                f"image {image} has no mask: expected {stem} with or without "
                f"{', '.join(MASK_ENDINGS)} in {masks}; add it or remove the image"
            )
        if len(names) > 1:
            raise UserError(f"image {image} has several masks in {masks}: {', '.join(names)}; keep one")
        pairs.append(Pair(stem, image, candidates[names[0]]))
    return pairs


def _by_stem(folder: Path, skip_masks: bool = False) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; check --images and --masks")
    found: dict[str, Path] = {}
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
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path.name} have the same stem; keep one")
        found[path.stem] = path
    return found


def limit_pairs(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """At most ``limit`` pairs, evenly spaced over the sorted ids; None keeps all."""
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
            f"{len(ids)} images are too few to split into training, validation and test; use at least 8"
        ) from error
    return Split(sorted(train), sorted(validation), sorted(test))


# ---------------------------------------------------------------- the download


def download_isic(root: Path, archives: Sequence[tuple[str, str]] = ISIC_ARCHIVES) -> None:
    """Fetch and unpack the official training images and masks under ``root``.

    A download that stopped half-way goes on where it stopped (HTTP range
    requests). An archive is verified by its announced length and by the
    checksum of every member, and unpacked only if every member stays inside
    ``root``. A part that is already unpacked is left alone.

    Raises:
        UserError: the server cannot be reached, or an archive is broken or unsafe.
    """
    root = Path(root)
    for url, folder in archives:
        if (root / folder).is_dir():
            continue
        archive = root / url.rsplit("/", 1)[1]
        _fetch(url, archive)
        _unpack(archive, root, folder)


def _fetch(url: str, path: Path) -> None:
    """Download to ``path``, by way of a ``.part`` file that a later call continues."""
    part = path.with_name(path.name + ".part")
    if check_integrity(str(path)):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            response = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is already all there is
                raise
            part.replace(path)
            return
        with response:
            resumed = response.status == 206
            start = done if resumed else 0  # a server without ranges sends it all again
            total = start + int(response.headers.get("Content-Length", 0))
            with open(part, "ab" if resumed else "wb") as stream, tqdm(
                desc=path.name, total=total or None, initial=start, unit="B", unit_scale=True
            ) as bar:
                for block in iter(lambda: response.read(1 << 20), b""):
                    stream.write(block)
                    bar.update(len(block))
        if total and part.stat().st_size != total:
            raise UserError(f"the download of {url} stopped early; run the same command again to continue it")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({_one_line(error)}); run the same command again to continue, "
            f"or put the unpacked archive into {path.parent}"
        ) from error


def _unpack(archive: Path, root: Path, folder: str) -> None:
    """Unpack a zip archive beside its place and move it there when it is whole."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                target = (root / member.filename).resolve()
                if root.resolve() not in target.parents:
                    raise UserError(f"{archive} holds the unsafe path {member.filename!r}; delete it and download again")
            _check_space(root, sum(member.file_size for member in members))
        staging = root / f".{folder}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        extract_archive(str(archive), str(staging))  # checks every member's CRC as it reads
        inner = staging / folder
        if not inner.is_dir():
            raise UserError(f"{archive} does not hold the folder {folder}; delete it and download again")
        inner.rename(root / folder)
        shutil.rmtree(staging, ignore_errors=True)
        archive.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is broken ({_one_line(error)}); delete it and run the same command again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive}: {error.strerror or error}; make room and run again") from error


# ---------------------------------------------------------------- decoding


def _open(path: Path) -> Image.Image:
    """Open an image file; every failure of Pillow becomes one line naming the file."""
    if not path.is_file():
        raise UserError(f"{path} is not a readable file; restore it or remove its pair")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); restore it or remove its pair")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} has too many pixels to be a photograph ({error}); remove its pair") from error
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        raise UserError(
            f"cannot decode {path} ({type(error).__name__}: {_one_line(error)}); restore it or remove its pair"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """Decode any image file to 8-bit RGB, upright, optionally resized.

    Grey, palette, RGBA (the alpha is dropped), CMYK, 16-bit and float images
    are converted; the EXIF orientation is applied. JPEGs are decoded at a
    reduced scale when that leaves at least twice ``size`` on both sides.

    Args:
        path: the file.
        size: side of the square result, resized bilinearly with antialiasing
            when shrinking; None keeps the file's own size.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: the file is missing, truncated or not an image.
    """
    return _guarded(Path(path), lambda: _read_image(Path(path), size)[0])


def _read_image(path: Path, size: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    with _open(path) as image:
        original = image.size
        if size is not None and image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))
        orientation = image.getexif().get(0x0112, 1)
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        if orientation in (5, 6, 7, 8):
            original = original[::-1]
        if size is not None:
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(rgb), original


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image).astype(np.float64)
        # 16-bit files use 0 to 65535, float files 0 to 1 or 0 to 255
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 255.0
        if image.mode != "F":
            top = 65535.0
        values = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
        image = Image.fromarray(values)
    return image.convert("RGB")


def read_mask(path: Path, size: int | None = None) -> np.ndarray:
    """Decode a mask file to 0 and 1, upright, optionally resized (nearest).

    A pixel is lesion where its grey value exceeds half of the file's largest
    one, so masks of 0 and 255, of 0 and 1, and soft ones all work.

    Returns:
        uint8 (H, W) of 0 and 1.

    Raises:
        UserError: the file is missing, truncated, not an image, or empty of lesion.
    """
    return _guarded(Path(path), lambda: _read_mask(Path(path), size)[0])


def _read_mask(path: Path, size: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    with _open(path) as image:
        image = ImageOps.exif_transpose(image)
        original = image.size
        if image.mode not in ("L", "1", "I", "I;16", "I;16B", "I;16L", "F"):
            image = image.convert("RGB").convert("L")
        values = np.asarray(image)
    peak = values.max(initial=0)
    if not peak > 0:
        raise UserError(f"mask {path} is empty: it marks no lesion anywhere; correct it or remove its pair")
    binary = (values > peak / 2).astype(np.uint8)
    if size is not None:
        binary = np.asarray(Image.fromarray(binary).resize((size, size), Image.Resampling.NEAREST))
    return binary, original


def decode_pair(pair: Pair, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (size, size, 3) and mask uint8 (size, size) of 0 and 1.

    Raises:
        UserError: a file is broken, the two differ in size, or no lesion is
            left in the resized mask.
    """
    image, image_size = _guarded(pair.image, lambda: _read_image(pair.image, size))
    mask, mask_size = _guarded(pair.mask, lambda: _read_mask(pair.mask, size))
    if image_size != mask_size:
        raise UserError(
            f"{pair.image} is {image_size[0]} x {image_size[1]} but its mask {pair.mask.name} is "
            f"{mask_size[0]} x {mask_size[1]}; correct the mask or remove the pair"
        )
    if not mask.any():
        raise UserError(f"mask {pair.mask} vanishes at {size} x {size} pixels; remove its pair or use a larger --image-size")
    return image, mask


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
    """

    ids: list[str]
    size: int
    records: np.ndarray
    slots: dict[str, int]
    checksums: dict[str, list[str]]

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
    pairs: Sequence[Pair], size: int, cache: Path, progress: Callable[[int], None] = lambda count: None
) -> DecodedPairs:
    """Decode every pair once into a memory-mapped cache and reuse it afterwards.

    A pair whose files kept their size and modification time is not read again;
    a changed one alone is redone. Work is saved as it goes, so an interrupted
    call continues where it stopped.

    Args:
        pairs: what to decode.
        size: side in pixels.
        cache: folder for the cache; made when absent.
        progress: called with the number of pairs that became ready.

    Raises:
        UserError: a pair is broken, or the cache cannot be written.
    """
    key = fingerprint([str(pairs[0].image.parent.resolve()), str(pairs[0].mask.parent.resolve()), size])[:16]
    folder = Path(cache) / f"{size}px-{key}"
    index_path, data_path = folder / "index.json", folder / "pairs.uint8"
    index: dict[str, Any] = read_json(index_path)["pairs"] if index_path.is_file() and data_path.is_file() else {}
    stamps = {pair.id: [_stamp(pair.image), _stamp(pair.mask)] for pair in pairs}
    todo = [pair for pair in pairs if index.get(pair.id, {}).get("stamps") != stamps[pair.id]]
    progress(len(pairs) - len(todo))
    slots = {id: entry["slot"] for id, entry in index.items()}
    for pair in todo:
        slots.setdefault(pair.id, len(slots))
    record_bytes = 4 * size * size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if todo:
            _check_space(folder, len(slots) * record_bytes - (data_path.stat().st_size if data_path.exists() else 0))
            with open(data_path, "ab") as stream:
                stream.truncate(len(slots) * record_bytes)
        records = np.memmap(data_path, np.uint8, "r+" if todo else "r", shape=(len(slots), record_bytes))
    except OSError as error:
        raise UserError(f"cannot write the cache in {folder}: {error.strerror or error}; give --cache another folder") from error

    def work(pair: Pair) -> tuple[str, list[str]]:
        checksums = [_checksum(pair.image), _checksum(pair.mask)]
        image, mask = decode_pair(pair, size)
        records[slots[pair.id]] = np.concatenate([image.ravel(), mask.ravel()])
        return pair.id, checksums

    def save() -> None:
        records.flush()
        write_json(index_path, {"version": 1, "size": size, "pairs": index})

    # Pillow and hashlib release the interpreter lock, so threads use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for count, (id, checksums) in enumerate(pool.map(work, todo), 1):
                index[id] = {"slot": slots[id], "stamps": stamps[id], "checksums": checksums}
                progress(1)
                if count % 256 == 0:
                    save()
        finally:
            pool.shutdown(cancel_futures=True)
            if todo:
                save()
    ids = [pair.id for pair in pairs]
    return DecodedPairs(ids, size, records, slots, {id: index[id]["checksums"] for id in ids})


def _stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair") from error
    return [path.name, status.st_size, status.st_mtime_ns]


def _checksum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it or remove its pair") from error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**20:.0f} MiB more but {free / 2**20:.0f} MiB are free; "
            "make room, or give --cache another folder"
        )


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
