"""The images that a picture of a run can show: its own, and those of its other test sets; choosing one of them."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiment.map_files import picture_of, read_maps
from experiment.saved_run import is_pooled, maps_are_sealed, read_images
from experiment.terms import judges_given_maps
from isic.decoding import read_image
from isic.layout import Pair, find_pairs
from runtime.errors import UserError
from runtime.records import fingerprint, read_json

MAPS = "uncertainty_maps"


# ---------------------------------------------------------------- runs


def newest_run(results: Path) -> Path:
    """The finished run (a folder with ``metrics.json``) in ``results`` that ended last; of pooled trainings one of them.

    Raises:
        UserError: there is none.
    """
    places = ("metrics.json", "*/metrics.json", "*/seed-*/metrics.json")
    found = [path for place in places for path in Path(results).glob(place)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if not is_pooled(path.parent):
            return path.parent
    raise UserError(f"there is no finished run in {results}; run main.py first")


def check_finished(folder: Path) -> None:
    """Refuse a folder without a finished run.

    Raises:
        UserError: names the command that finishes what lies there, where it is known.
    """
    if (folder / "metrics.json").is_file():
        return
    command = read_json(folder / "config.json").get("command") if (folder / "config.json").is_file() else None
    if command and isinstance(command, list):
        raise UserError(
            f"{folder} holds an unfinished run (no metrics.json); this finishes it: {shlex.join(['python', *map(str, command)])}"
        )
    raise UserError(f"{folder} holds no finished run (no metrics.json); run main.py first")


# ---------------------------------------------------------------- sets of images


class NoPicture(UserError):
    """A picture is not where the run found it, or cannot be read any more; saved maps and numbers are as good as before."""


class ImageSet(NamedTuple):
    """The test images of a run, or those of another test set that it was tested on.

    Attributes:
        name: of the other test set; empty for the run's own images.
        test: the ids that a random case and the galleries are chosen from.
        maps: the folder of their map files.
        table: the CSV file of their numbers.
        images, masks: the folders of their files; None where maps were given, and whatever they showed is in the map files.
        content: fingerprint of another test set.
        sealed: whether every map file must carry a checksum.
    """

    name: str
    test: Sequence[str]
    maps: Path
    table: Path
    images: Path | None
    masks: Path | None
    content: str | None = None
    sealed: bool = False

    def identity(self, metrics: Mapping[str, Any]) -> str | None:
        """The identity that the maps must have, from the metrics of the run."""
        identity = metrics.get("identity")
        return identity if self.content is None else fingerprint([identity, self.content])

    def saved_maps(self, id: str, need: Sequence[str], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The saved maps of one image; see :func:`experiment.map_files.read_maps`."""
        return read_maps(self.maps / f"{id}.npz", need, self.identity(metrics), self.sealed)

    def pairs(self) -> dict[str, Pair]:
        """The image-mask pairs by id, those of the run's training as well; broken ones are left out.

        Raises:
            UserError: the folders are gone.
        """
        if self.images is None or self.masks is None:
            return {}
        return {pair.id: pair for pair in find_pairs(self.images, self.masks, [])}

    def rows(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The numbers of the test images, a row for each, with the metrics of the run.

        Raises:
            UserError: the file is missing or broken, or was changed.
        """
        return read_images(self.table, metrics, self.test)

    def reader(self, size: int, metrics: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
        """Reads the images at the resolution of their maps.

        Args:
            size: of the maps that a run made itself.
            metrics: of the run.

        Raises:
            NoPicture: the images are not where the run found them.
        """
        if self.images is None:
            return lambda id: picture_of(self.saved_maps(id, ("mean_prediction",), metrics))
        try:
            pairs = self.pairs()
        except UserError as error:
            raise NoPicture(error) from error

        def read(id: str) -> np.ndarray:
            if id not in pairs:
                raise NoPicture(f"there is no image {id} in {self.images}")
            try:
                return read_image(pairs[id].image, size)
            except UserError as error:
                raise NoPicture(error) from error

        return read


def image_sets(folder: Path, record: Mapping[str, Any]) -> list[ImageSet]:
    """The run's own images, and then each of its other test sets.

    Args:
        folder: of the run.
        record: its ``config.json``.
    """
    given = judges_given_maps(record)
    images, masks = (None if given else Path(record[key]) for key in ("images", "masks"))
    sealed = maps_are_sealed(record)
    own = ImageSet("", record["split"]["test"], folder / MAPS / "test", folder / "per_image.csv", images, masks, None, sealed)
    others = [
        ImageSet(
            entry["name"], entry["ids"], folder / MAPS / f"target-{entry['name']}", folder / f"per_image_{entry['name']}.csv",
            Path(entry["images"]), Path(entry["masks"]), entry["fingerprint"], sealed,
        )
        for entry in record.get("targets", ())
    ]
    return [own, *others]


def named_set(folder: Path, record: Mapping[str, Any], name: str | None) -> ImageSet:
    """The test set of that name; the run's own images without one.

    Raises:
        UserError: there is none; lists those there are.
    """
    own, *others = image_sets(folder, record)
    if name is None:
        return own
    for one in others:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in others)
    there = f"there are {names}; leave it out for the run's own test images" if names else "the run was tested on its own images"
    raise UserError(f"--test-set: {folder} has no test set {name}; {there}")


# ---------------------------------------------------------------- one image


class Chosen(NamedTuple):
    """The image of a case.

    Attributes:
        id: its id.
        images: the set that it is of; None for a picture of no set.
        file: the picture; None where maps were given.
        pair: with its mask, where that is known.
        detail: what its title says beside the numbers: where it is no test image of the run, what it is.
        how: the flags that choose it again.
    """

    id: str
    images: ImageSet | None
    file: Path | None
    pair: Pair | None
    detail: str
    how: tuple[str, ...]


def pick(ids: Sequence[str], seed: int) -> str:
    """The id that a seed stands for; every id is equally likely."""
    return sorted(ids)[int(np.random.default_rng(seed).integers(len(ids)))]


def any_picture(file: Path) -> Chosen:
    """A picture of no set.

    Raises:
        UserError: it is no picture.
    """
    try:
        read_image(file)
    except UserError as error:  # its advice is about pairs
        raise UserError(f"{str(error).rsplit('; ', 1)[0]}; give --image another file") from error
    return Chosen(file.stem, None, file, None, "", ("--image", os.fspath(file)))


def choose_image(folder: Path, record: Mapping[str, Any], id: str | None, seed: int | None, test_set: str | None) -> Chosen:
    """An image of the run: by id, or a random test image.

    Args:
        folder: of the run.
        record: its ``config.json``.
        id: of an image of any part of the run's data or of any of its test sets; None draws one.
        seed: of the draw; drawn itself if None.
        test_set: the name of another test set to look in alone.

    Raises:
        UserError: there is no such image.
    """
    asked = named_set(folder, record, test_set)
    within = () if test_set is None else ("--test-set", test_set)
    if id is not None:
        sets = image_sets(folder, record) if test_set is None else [asked]
        return _by_id(record, sets, id, within)
    seed = seed if seed is not None else secrets.randbelow(2**31)
    return _by_id(record, [asked], pick(asked.test, seed), within)._replace(how=("--seed", str(seed), *within))


def _by_id(record: Mapping[str, Any], sets: Sequence[ImageSet], id: str, within: tuple[str, ...]) -> Chosen:
    how = ("--id", id, *within)
    if judges_given_maps(record):
        part = next((part for part, ids in record["split"].items() if id in ids), None)
        if part is None:
            raise UserError(f"there are no maps of an image {id} in {sets[0].maps.parent}; give --id one of those")
        own = sets[0]._replace(maps=sets[0].maps.parent / part)
        return Chosen(id, own, None, None, "" if part == "test" else f"{part} image", how)
    for one in sets:
        pair = one.pairs().get(id)
        if pair is not None:
            return Chosen(id, one, pair.image, pair, _detail(record, one, id), how)
    left_out = [entry["reason"] for entry in record.get("skipped", ()) if entry["id"] == id]
    if left_out:
        raise UserError(f"image {id} was left out of the run: {left_out[0]}")
    places = " or ".join(str(one.images) for one in sets)
    raise UserError(f"there is no image {id} in {places}; give --id one of that folder")


def _detail(record: Mapping[str, Any], images: ImageSet, id: str) -> str:
    if images.name:
        return f"test set {images.name}"
    part = next((part for part, ids in record["split"].items() if id in ids), "unused")
    return "" if part == "test" else f"{'training' if part == 'train' else part} image"
