"""Damage for every kind of file that the program reads: bytes that are wrong, and content that is odd behind a right checksum.

:func:`fuzz` gives a reader many such files. Whatever it says, it may only return or raise a UserError of one line, soon,
and without taking much more memory than the file has bytes.
"""

from __future__ import annotations

import copy
import csv
import functools
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from given_maps import arrays_of
from PIL import Image

from experiment.given_files import read_given
from experiment.map_files import maps_checksum, read_maps
from experiment.networks import read_state
from experiment.pooling import read_training
from experiment.saved_run import load_run
from experiment.trained_run import load_trained_run
from isic.cache import decode_pairs
from isic.decoding import decode_pair, read_image, read_mask
from isic.layout import find_pairs, isic_folders
from isic.tables import read_groups, read_parts
from model import UNet
from runtime.checkpoints import content_checksum, load_model
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.records import is_sealed, seal
from runtime.training_state import resumable_state
from train import Training

CPU = torch.device("cpu")
#: Seconds and bytes that one reading may take; the files are far smaller.
SECONDS, MEMORY = 20, 1 << 30

# ---------------------------------------------------------------- bytes


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or put in; now and then the end is missing."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        if not found:
            return rng.randbytes(rng.randrange(50))
        where = rng.randrange(len(found)) if rng.random() < 0.5 else rng.randrange(min(len(found), 200))
        kind = rng.randrange(7)
        if kind == 0:
            found[where] = rng.randrange(256)
        elif kind == 1:
            found[where : where + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\1\0"])
        elif kind == 2:
            del found[where : where + rng.randrange(1, 200)]
        elif kind == 3:
            found[where:where] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 4:
            found[where:where] = found[where : where + rng.randrange(1, 400)]
        elif kind == 5:
            end = len(found) - rng.randrange(min(len(found), 400))  # where zip files have their directory
            found[end - 1] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.3:
            del found[where:]
    return bytes(found)


# ---------------------------------------------------------------- odd content

#: Texts and numbers that are of no use anywhere.
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e308, -1e-308, "", "a", "NaN", "1", "-1", "../../x",
    "/", "a\0b", "\x1b[31m", "é" * 300, "x" * 200_000, [], [1], ["a", "a"], [None], [[]], {}, {"": 1}, {"a": None}, "\udcff",
    "a\nb", float("nan"), float("inf"),
]


ODD_CELLS = ["", "nan", "inf", "-1", "1e999", "a", "0x10", "1_0", "é", '"', "x" * 200_000, "1e5", " 1 ", "\0"]
ODD_TYPES = ["f2", "f8", "i8", "u1", "c16", "S3", "U3", "?", ">f4"]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside nested dictionaries and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def odd_content(rng: random.Random, content: Any, odd: list[Any], where: list[tuple[Any, ...]]) -> Any:
    """Nested dictionaries and lists, of which one to three places were changed, taken out, doubled or renamed."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(where)
        if rng.random() < 0.5:  # near the top, where the names have a meaning
            path = path[: rng.randint(1, min(3, len(path)))]
        holder, key = content, path[-1]
        try:
            for step in path[:-1]:
                holder = holder[step]
            if not isinstance(holder, (dict, list)):
                continue
            kind = rng.randrange(6)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            elif kind == 2 and isinstance(holder, dict):
                holder[rng.choice(["a", "", "x" * 300, key[::-1] if isinstance(key, str) else -1])] = holder.pop(key)
            else:
                value = rng.choice(odd)
                holder[key] = value if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # changed before
    return content


def odd_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with odd content; where it was sealed, mostly sealed again."""
    before = json.loads(content)
    after = odd_content(rng, before, ODD, _places_of(content))
    if isinstance(after, dict) and is_sealed(before) and rng.random() < 0.8:
        after.pop("checksum", None)
        with suppress(ValueError):  # NaN
            after = seal(after)
    return json.dumps(after).encode("utf-8", "surrogatepass")


_known_places: dict[int, list[tuple[Any, ...]]] = {}


def _places_of(content: bytes) -> list[tuple[Any, ...]]:
    if hash(content) not in _known_places:
        _known_places[hash(content)] = list(places(json.loads(content)))
    return _known_places[hash(content)]


def odd_csv(rng: random.Random, content: bytes) -> bytes:
    """A table with odd cells, columns too many or too few, long cells, quotes, another encoding."""
    rows = [list(row) for row in csv.reader(io.StringIO(content.decode()))] or [["id"]]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows) if rows else []
        column = rng.randrange(len(row)) if row else 0
        kind = rng.randrange(8)
        if kind == 0 and row:
            row[column] = rng.choice(ODD_CELLS)
        elif kind == 1 and row:
            del row[column]
        elif kind == 2:
            row.append("1")
        elif kind == 3 and rows:
            for each in rows:
                del each[column : column + 1]
        elif kind == 4:
            rows.append(list(row))
        elif kind == 5 and row:
            rows[0][column % max(len(rows[0]), 1) :][:1] = [rng.choice(rows[0] or ["a"])]
        elif kind == 6 and rows:
            rows.remove(row)
        else:
            rng.shuffle(rows)
    text, quoting = io.StringIO(), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    csv.writer(text, quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"])).writerows(rows)
    return text.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16"]), "surrogatepass")


class _Anything:
    """Pickled where no object belongs."""


def odd_array(rng: random.Random, values: np.ndarray) -> np.ndarray:
    """An array of another type, shape or content."""
    kind = rng.randrange(11)
    if kind == 0:
        with np.errstate(invalid="ignore"):  # NaN has no integer
            return values.astype(rng.choice(ODD_TYPES)) if values.dtype.kind in "fiu" else values
    if kind == 1:
        return values[..., :-1] if values.ndim else values[None]
    if kind == 2:
        return np.zeros(rng.choice([(), (0,), (1,), (2, 0), (3, 3, 3), (1,) * 40]), values.dtype)
    if kind == 3:
        return np.array([_Anything()], dtype=object)
    if kind == 4:
        return np.array(rng.choice(["a", "", "x" * 5000, -1, 2**62, 1e300, float("nan")]))
    if kind == 5:
        return np.asfortranarray(values)
    if kind == 6:
        return np.zeros(3, [("a", "f4"), ("b", "i8")])
    if kind == 7:
        return np.array(["2020-01-01"], "M8[D]")
    changed = np.array(values)
    if changed.size and changed.dtype.kind in "fiu":
        odd = [-1, 2, 255, 7, 1e30, float("nan"), float("inf")] if changed.dtype.kind == "f" else [0, 7, 255, 127]
        with np.errstate(all="ignore"):
            changed.reshape(-1)[rng.randrange(changed.size)] = np.array(rng.choice(odd)).astype(changed.dtype)
    return changed


def odd_npz(rng: random.Random, content: bytes, name: str = "x.npz", sealed: bool = False) -> bytes:
    """An ``.npz`` with odd arrays; where it carried a checksum, mostly with a right one."""
    with np.load(io.BytesIO(content)) as found:
        arrays = {name: found[name] for name in found.files}
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(sorted(arrays))
        kind = rng.randrange(8)
        if kind == 0:
            del arrays[key]
        elif kind == 1:
            arrays[rng.choice(["file", "a" * 200, "..", "é", "allow_pickle_", key + "/x"])] = arrays[key]
        else:
            arrays[key] = odd_array(rng, arrays[key])
        if not arrays:
            break
    if sealed and "checksum" in arrays and rng.random() < 0.8:
        with suppress(TypeError, ValueError, AttributeError):  # an array of objects has no bytes
            arrays["checksum"] = np.array(maps_checksum(Path(name), arrays))
    stream = io.BytesIO()
    try:
        np.savez(stream, **{key.replace("file", "file_"): values for key, values in arrays.items()})
    except RuntimeError:  # what cannot be written cannot be read
        return damaged_bytes(rng, content)
    return stream.getvalue()


@functools.lru_cache
def odd_tensors() -> list[Any]:
    """Tensors and other things that no checkpoint of ours holds."""
    warnings.filterwarnings("ignore", "Sparse CSR|.*quantize_per_tensor")
    dense = torch.arange(6.0).reshape(2, 3)
    return [
        dense.bfloat16(), dense.half(), dense.double(), dense.long(), dense.bool(), dense.to_sparse(), dense.to_sparse_csr(),
        dense.t(), dense[:, 1:], torch.ones(1).expand(10**6, 10**6), torch.ones(()), torch.ones(0), torch.ones(0, 5),
        torch.complex(dense, dense), torch.complex(dense, dense).conj(), torch.tensor([math.nan]), torch.tensor([math.inf]),
        torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8), torch.nn.Parameter(dense), torch.ones(2, 3, device="meta"),
        torch.Size([1, 2]), (1, 2), {"a": dense}, [dense], torch.float32, b"bytes", 1j, set(),
    ]


def odd_checkpoint(rng: random.Random, content: bytes) -> bytes:
    """A file of ``torch.save`` with odd tensors and values; mostly with a right checksum, where it had one."""
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    checksum = loaded.pop("checksum", None) if isinstance(loaded, dict) else None
    after = odd_content(rng, loaded, ODD + odd_tensors() * 2, list(places(loaded)))
    if checksum is not None and isinstance(after, dict):
        try:
            after["checksum"] = content_checksum(after) if rng.random() < 0.9 else checksum
        except Exception:  # of some of these tensors there is none
            after["checksum"] = checksum
    stream = io.BytesIO()
    try:
        torch.save(after, stream, _use_new_zipfile_serialization=rng.random() < 0.95)
    except (ValueError, RuntimeError, UnicodeEncodeError):  # what cannot be written cannot be read
        return damaged_bytes(rng, content)
    return stream.getvalue()


# ---------------------------------------------------------------- the kinds of files


class Kind(NamedTuple):
    """A kind of file that is read.

    Attributes:
        path: where it lies.
        originals: contents that are right.
        read: reads it. What it raises that is no UserError is a fault.
        odd: makes odd content of a right one, if there is a way but to damage bytes.
        share: of all inputs.
    """

    path: Path
    originals: list[bytes]
    read: Callable[[], object]
    odd: Callable[[random.Random, bytes], bytes] | None
    share: float


def kinds(finished: Path, data: Path, folder: Path) -> dict[str, Kind]:
    """Every kind of file, in copies.

    Args:
        finished: the results folder of a run on ``data``, with its cache beside it.
        data: the dataset.
        folder: a new folder for the copies.
    """
    run = Path(shutil.copytree(finished, folder / "run"))
    cache = Path(shutil.copytree(finished.parent / "cache", folder / "cache"))
    best, state = run / "weights" / "best_model.pth", run / "weights" / "training_state.pth"
    maps = sorted(run.glob("uncertainty_maps/test/*.npz"))[0]
    pairs = find_pairs(*isic_folders(data))[:6]
    decoded = {pair.id: decode_pair(pair, 32) for pair in pairs}
    (index,) = cache.glob("*/index.json")
    training = Training(_config(run), decode_pairs(pairs, 32, cache), [pair.id for pair in pairs], ProcessGroup(0, 1, CPU))
    identity = json.loads((run / "config.json").read_text())["identity"]

    def read_cache() -> None:
        found = decode_pairs(pairs, 32, folder / "cache")
        for id, (image, mask) in decoded.items():
            assert np.array_equal(found.image(id), image) and np.array_equal(found.mask(id), mask), id

    def read_training_state() -> None:
        found = resumable_state(run, identity)
        if found is not None:
            training.load_state(found, state)

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    # the cache writes its files itself: each input begins with the right ones
    cache_files = [(path, path.read_bytes()) for path in index.parent.iterdir() if path.name != ".lock"]

    def read_damaged_cache(damaged: Path) -> Callable[[], None]:
        def read() -> None:
            for path, content in cache_files:
                if path != damaged:
                    path.write_bytes(content)
            read_cache()

        return read

    ids = [pair.id for pair in pairs]
    parts = "id,part\n" + "".join(f"{id},{part}\n" for id, part in zip(ids, ("train", "val", "test") * 2))
    groups = "id,group\n" + "".join(f"{id},{number // 2}\n" for number, id in enumerate(ids))
    given = io.BytesIO()
    np.savez_compressed(given, **arrays_of(12), group=np.array("one"))
    weights = io.BytesIO()
    torch.save({"state_dict": UNet(2).state_dict()}, weights)
    paths = {
        "image": file("picture.jpg", b""), "mask": file("mask.png", b""), "given maps": file("given.npz", given.getvalue()),
        "parts": file("parts.csv", parts.encode()), "groups": file("groups.csv", groups.encode()),
        "weights of the user's": file("weights.pth", weights.getvalue()),
    }
    expected = UNet(2).state_dict()
    found = {
        "image": Kind(paths["image"], pictures(), lambda: read_image(paths["image"], 32), None, 7),
        "mask": Kind(paths["mask"], pictures(), lambda: read_mask(paths["mask"], 32), None, 7),
        "maps": Kind(maps, [], lambda: read_maps(maps), lambda rng, content: odd_npz(rng, content, maps.name, True), 8),
        "config of a run": Kind(run / "config.json", [], lambda: load_trained_run(run, CPU), odd_json, 4),
        "config of a training": Kind(run / "config.json", [], lambda: read_training(run), odd_json, 1),
        "metrics": Kind(run / "metrics.json", [], lambda: load_run(run), odd_json, 0.4),
        "metrics of a training": Kind(run / "metrics.json", [], lambda: read_training(run), odd_json, 0.4),
        "table of images": Kind(run / "per_image.csv", [], lambda: _without_marks(run, "per_image.csv"), odd_csv, 4),
        "training log": Kind(run / "training_log.csv", [], lambda: _without_marks(run, "training_log.csv"), odd_csv, 4),
        "counts": Kind(run / "calibration.npz", [], lambda: _counts_without_mark(run), odd_npz, 1),
        "weights": Kind(best, [], lambda: load_model(best, UNet, CPU), odd_checkpoint, 5),
        "training state": Kind(state, [], read_training_state, odd_checkpoint, 4),
        "cache index": Kind(index, [], read_damaged_cache(index), odd_json, 2),
        "cache records": Kind(index.with_name("pairs.uint8"), [], read_damaged_cache(index.with_name("pairs.uint8")), None, 1),
        "given maps": Kind(
            paths["given maps"], [], lambda: read_given(paths["given maps"], ("entropy", "variance")), odd_npz, 5
        ),
        "parts": Kind(paths["parts"], [], lambda: read_parts(paths["parts"]), odd_csv, 4),
        "groups": Kind(paths["groups"], [], lambda: read_groups(paths["groups"]), odd_csv, 4),
        "weights of the user's": Kind(
            paths["weights of the user's"], [], lambda: read_state(paths["weights of the user's"], expected), odd_checkpoint, 4
        ),
    }
    return {name: kind if kind.originals else kind._replace(originals=[kind.path.read_bytes()]) for name, kind in found.items()}


def _config(run: Path) -> Config:
    return Config.from_dict(json.loads((run / "config.json").read_text())["configuration"], run / "config.json")


def _without_marks(run: Path, name: str) -> None:
    """Read a table as if the metrics knew this very content; else every odd table would end at its checksum."""
    from experiment import saved_run

    with _replaced(saved_run, "check_mark", lambda path, metrics: None), _replaced(saved_run, "read_metrics", _small_metrics):
        load_run(run)


def _counts_without_mark(run: Path) -> None:
    from experiment import pooling

    with _replaced(pooling, "check_mark", lambda path, metrics: None), _replaced(pooling, "read_metrics", _small_metrics):
        read_training(run)


_metrics: dict[Path, dict[str, Any]] = {}


def _small_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a run, which are not what is tried, read once."""
    if folder not in _metrics:
        _metrics[folder] = json.loads((folder / "metrics.json").read_text())
    return _metrics[folder]


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def pictures() -> list[bytes]:
    """Small pictures of many formats."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    y, x = np.mgrid[:24, :24] - 11.5
    disc = ((y * y + x * x < 64) * 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    formats: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "JPEG", {"exif": exif}), (colour, "JPEG", {"progressive": True}), (colour, "PNG", {}), (colour, "BMP", {}),
        (colour, "TIFF", {}), (colour, "TIFF", {"compression": "tiff_lzw"}), (colour, "WEBP", {}), (colour, "GIF", {}),
        (Image.fromarray(disc), "PNG", {}), (Image.fromarray(disc / np.float32(255)), "TIFF", {}),
        (Image.fromarray(disc.astype(np.uint16) * 257), "PNG", {}), (colour.convert("P"), "PNG", {}),
    ]
    found = []
    for picture, kind, options in formats:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        found.append(stream.getvalue())
    return found


# ---------------------------------------------------------------- reading them


class _TooLong(BaseException):
    pass


@contextmanager
def bounded() -> Iterator[None]:
    """Within, memory is limited to what is in use and :data:`MEMORY` more, and time to :data:`SECONDS`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def stop(signum: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def complaint(read: Callable[[], object]) -> str | None:
    """What is wrong with how a file was read; None where nothing is."""
    try:
        with bounded():
            read()
    except UserError as error:
        if not str(error).isprintable():
            return f"not a line: {str(error)!r:.300}"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "t allocate memory" in str(cause):
                return f"too much memory: {cause!r:.300}"
            cause = cause.__cause__ or cause.__context__
    except _TooLong:
        return f"longer than {SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error):.300}\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    return None


def fuzz(kind: Kind, count: int, seed: object, keep: Path | None = None) -> dict[str, list[int]]:
    """Read damaged files of a kind.

    Args:
        kind: of the file, which holds what it held before afterwards.
        count: how many.
        seed: of the damage.
        keep: a folder for the first input of each complaint.

    Returns:
        The number of the inputs by complaint.
    """
    before, faults = kind.path.read_bytes(), {}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        content = rng.choice(kind.originals)
        content = kind.odd(rng, content) if kind.odd is not None and rng.random() < 0.5 else damaged_bytes(rng, content)
        kind.path.write_bytes(content)
        found = complaint(kind.read)
        if found is not None:
            faults.setdefault(found, []).append(number)
            if keep is not None and len(faults[found]) == 1:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}-{kind.path.name}").write_bytes(content)
    kind.path.write_bytes(before)
    assert (right := complaint(kind.read)) is None or not before, right
    return faults
