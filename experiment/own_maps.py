"""Maps that something else made, judged like those of a run: found, checked, and taken over into a results folder.

What a file must hold says :mod:`experiment.given_files`. The results folder gets map files as every run has them, the first
score as ``pred_variance`` and the second as ``saliency_variance``, so that whatever reads a run reads this one.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiment.case_images import MAPS
from experiment.given_files import TAKEN_NAMES, Facts, facts_of, read_given
from experiment.map_files import NO_HEATMAPS, picture_of, read_maps, write_maps
from experiment.maps import MEASURED, SavedMaps, must_be_sealed
from experiment.results import RESULTS, claim_folder, environment, unfinish
from experiment.run import Run
from experiment.terms import STANDARD_NAMES, Terms, displayed
from isic.tables import read_groups
from runtime.config import IDENTITY_FIELDS, MAPS_FLAGS, Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.progress import progress_bar, stage
from runtime.reading import real_path
from runtime.records import fingerprint, read_json
from runtime.stages import timed

PARTS = ("validation", "test")
#: A longer name of a score does not fit above its map.
LONGEST_NAME = 30


class GivenMaps(NamedTuple):
    """The files of ``--maps``, each of which was read and found in order.

    Attributes:
        folders: by part, "validation" and "test", as they were named.
        files: by part, the file of each image by id, sorted.
        scores: the arrays that hold the first and the second score.
        entropy: whether the files hold ``expected_entropy``.
        without_image: how many of them hold no picture.
        truth: fingerprint of ids, parts and masks: what maps of another training of the same experiment share.
        content: fingerprint of everything else in the files.
        groups: group by id, of the images that have one.
    """

    folders: dict[str, Path]
    files: dict[str, dict[str, Path]]
    scores: tuple[str, str]
    entropy: bool
    without_image: int
    truth: str
    content: str
    groups: dict[str, str]

    @property
    def split(self) -> dict[str, list[str]]:
        """The ids of each part."""
        return {part: list(files) for part, files in self.files.items()}


# ---------------------------------------------------------------- finding


def find_maps(config: Config, group: ProcessGroup) -> GivenMaps:
    """Find and check every file of ``--maps``; the processes of a group share the reading.

    Raises:
        UserError: a folder or a file is not what it must be; one line names it.
    """
    first, second = _checked_names(config.scores or list(STANDARD_NAMES))
    folders = dict(zip(PARTS, map(Path, config.maps or ())))
    files = group.shared(lambda: _files(folders))
    listed = group.shared(lambda: {} if config.groups is None else read_groups(Path(config.groups)))
    facts = _facts(files, (first, second), group)
    _check_parts(folders, files, facts, (first, second))
    groups = {id: name for id, one in facts.items() if (name := listed.get(id, one.group)) is not None}
    _check_groups(files, groups)
    if config.groups is not None and (alone := sum(id not in groups for id in facts)):
        stage("groups", f"{alone} of {len(facts)} images are in no group and stand for themselves")
    stage("maps found", ", ".join(f"{len(files[part])} {part}" for part in PARTS) + f" images; scores {first} and {second}")
    return GivenMaps(
        folders, files, (first, second), all(one.entropy for one in facts.values()),
        sum(not one.image for one in facts.values()),
        fingerprint({part: {id: facts[id].truth for id in files[part]} for part in PARTS}),
        fingerprint({id: one.content for id, one in facts.items()}), groups,
    )


def _checked_names(scores: Sequence[str]) -> tuple[str, str]:
    for name in scores:
        if name in TAKEN_NAMES:
            raise UserError(f"--scores {name}: that array is no score; name the two arrays that hold the scores")
        if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"--scores {name!r}: a name must be printable and have at most {LONGEST_NAME} characters")
    first, second = scores
    if first == second:
        raise UserError(f"--scores names {first} twice; name the score that is judged and the one that may add to it")
    return first, second


def _files(folders: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The files of each part by id, sorted."""
    found = {part: _files_of(folder) for part, folder in folders.items()}
    one, other = (folders[part] for part in PARTS)
    if real_path(one) == real_path(other):
        raise UserError(f"--maps names {one} twice; give the maps of other images for validation and for test")
    for id in found[PARTS[0]]:
        if id in found[PARTS[1]]:
            raise UserError(
                f"{found[PARTS[0]][id]} and {found[PARTS[1]][id]} have the same id; no image may be in validation and in test"
            )
    return found


def _files_of(folder: Path) -> dict[str, Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".npz" and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--maps {folder} is no folder that can be read ({error.strerror or error}); check the path") from error
    if not paths:
        raise UserError(f"--maps {folder} holds no .npz file; write one <id>.npz for each image")
    found: dict[str, Path] = {}
    for path in paths:
        id = unicodedata.normalize("NFC", path.stem)
        if not id.isprintable() or "\\" in id or id != id.strip():
            raise UserError(
                f"{path} has a line break, a backslash, a space at its end or bytes that are no text in its name; rename it"
            )
        if not path.is_file():
            raise UserError(f"{path} is no file; remove it")
        if id in found:
            raise UserError(f"{found[id]} and {path} have the same id; keep one")
        found[id] = path
    return {id: found[id] for id in sorted(found)}


def _facts(files: Mapping[str, Mapping[str, Path]], scores: Sequence[str], group: ProcessGroup) -> dict[str, Facts]:
    """What each file holds, by id, validation first; the first file that is wrong is the error, in every process."""
    items = [(id, path) for part in PARTS for id, path in files[part].items()]
    mine: list[Facts | str] = []
    with progress_bar("checking maps", len(items), "map") as bar:
        for _, path in group.shard(items):
            try:
                mine.append(facts_of(path, scores))
            except UserError as error:
                mine.append(str(error))
                break
            bar.update(min(group.world_size, len(items) - bar.n))
    shares = group.gathered(mine)
    found: dict[str, Facts] = {}
    for place, (id, _) in enumerate(items):
        one = shares[place % group.world_size][place // group.world_size]
        if isinstance(one, str):
            raise UserError(one)
        found[id] = one
    return found


def _check_parts(
    folders: Mapping[str, Path], files: Mapping[str, Mapping[str, Path]], facts: Mapping[str, Facts], scores: Sequence[str]
) -> None:
    """Refuse what would make every number void: it would look like a finding."""
    with_entropy = [id for id, one in facts.items() if one.entropy]
    if 0 < len(with_entropy) < len(facts):
        lacking = next(files[part][id] for part in PARTS for id in files[part] if not facts[id].entropy)
        raise UserError(f"{lacking} holds no expected_entropy and others do; write it into all files or into none")
    for part in PARTS:
        mine = [facts[id] for id in files[part]]
        low, high = min(one.ranges[0][0] for one in mine), max(one.ranges[0][1] for one in mine)
        if low == high:
            raise UserError(
                f"{scores[0]} is {low:g} in every pixel of {folders[part]}, so that it ranks nothing; name another score first"
            )
        if not any(one.foreground for one in mine):
            raise UserError(
                f"no true_mask in {folders[part]} holds a pixel of 1, and the question is about those pixels; add such images"
            )


def _check_groups(files: Mapping[str, Mapping[str, Path]], groups: Mapping[str, str]) -> None:
    owners: dict[str, str] = {groups[id]: id for id in files[PARTS[0]] if id in groups}
    for id in files[PARTS[1]]:
        if id in groups and groups[id] in owners:
            raise UserError(
                f"group {groups[id]} is in validation ({owners[groups[id]]}) and in test ({id}); "
                "put all images of a group into one of the two"
            )


# ---------------------------------------------------------------- the results folder


def maps_folder(config: Config) -> Path:
    """The results folder: the one that was named, or one called after the folder around that of the validation maps."""
    if config.results is not None:
        return Path(config.results)
    validation = real_path((config.maps or [""])[0])
    names = [folder.name for folder in validation.parents if folder.name not in ("", MAPS)]
    return RESULTS / f"maps-{(names or [validation.name])[0].lower()}"


def kept_of_maps(results: Path) -> str:
    """What of an unfinished run the same command will use."""
    return f"{len(list(results.glob(f'{MAPS}/*/*.npz')))} maps that were taken over"


def claim_maps(results: Path, config: Config, given: GivenMaps, group: ProcessGroup) -> Run:
    """Write ``config.json`` and return the run that the folder now belongs to.

    Raises:
        UserError: the folder holds another run, the work of other maps or settings, or the given maps themselves.
    """

    def claim() -> str:
        for folder in given.folders.values():
            if real_path(results / MAPS) in (real_path(folder), *real_path(folder).parents):
                raise UserError(f"--maps {folder} lies in {results}, where this run would write; give another --results folder")
        path = results / "config.json"
        if path.exists() and not config.fresh and "maps" not in read_json(path):
            raise UserError(f"{results} holds a run that made its own maps; choose another --results folder, or give --fresh")
        return claim_folder(results, _record(config, given, group.device), config.fresh)

    return Run(config, group, results, group.shared(claim))


def identity_inputs(config: Config, given: GivenMaps) -> dict[str, Any]:
    """All that the numbers depend on: settings, and the content of all files."""
    inputs = {name: getattr(config, name) for name in IDENTITY_FIELDS if name in MAPS_FLAGS}
    inputs.update(scores=list(given.scores), data=given.truth, maps=given.content)
    return {**inputs, "groups": fingerprint(given.groups)} if given.groups else inputs


def _record(config: Config, given: GivenMaps, device: torch.device) -> dict[str, Any]:
    """What ``config.json`` holds."""
    inputs = identity_inputs(config, given)
    return {
        "configuration": {name: value for name, value in config.to_dict().items() if name in MAPS_FLAGS},
        "identity": fingerprint(inputs),
        "decides": inputs,
        "synthetic": False,
        "maps": {
            **{part: str(real_path(folder)) for part, folder in given.folders.items()}, "fingerprint": given.content,
            "scores": list(given.scores), "expected_entropy": given.entropy, "without_image": given.without_image,
        },
        "score_names": displayed(given.scores),
        "data_fingerprint": given.truth,
        **environment(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "split": given.split,
        **({"groups": given.groups} if given.groups else {}),
        "skipped": [],
        "earlier": [],
    }


# ---------------------------------------------------------------- taking over


class TakenMaps(SavedMaps):
    """The maps of one part that were taken over; unlike those of a network, some hold a picture, or no expected entropy."""

    def __init__(self, run: Run, given: GivenMaps, part: str) -> None:
        config, group = run.config, run.group
        super().__init__(run.results / MAPS / part, given.split[part], group.device, config.threshold)
        if not given.entropy:
            self.names = tuple(name for name in MEASURED if name != "expected_entropy")

    def shard(self, group: ProcessGroup) -> SavedMaps:
        """The part of the maps that one of several processes works on; what is in memory is shared."""
        part = super().shard(group)
        part.names = self.names
        return part

    def is_current(self, id: str, identity: str) -> bool:
        """Whether a map file is there, whole, and taken over by this very run; its fused score may be missing."""
        try:
            maps = read_maps(self.path(id), self.names, identity, self.sealed)
        except UserError:
            return False  # absent, broken, changed, or of another image or run: taken over again
        return bool(self.keep(id, maps))

    def picture(self, id: str) -> np.ndarray:
        """The image, or what stands in its place."""
        return picture_of(self.read(id))

    def write(self, id: str, maps: Mapping[str, Any]) -> None:
        """Save the arrays and numbers of one image, named as :func:`read_maps` gives them."""
        arrays = {name: maps[name] for name in (*self.names, "fused_score", "image") if name in maps}
        write_maps(self.path(id), arrays, NO_HEATMAPS, maps["identity"], fusion=maps["fusion"])


@timed("maps")
def take_maps(run: Run, given: GivenMaps, part: str) -> TakenMaps:
    """Write the maps of one part into the results folder, but for those that are there; the processes share the work.

    Args:
        run: its identity is that of the given maps and the settings; a file with another one is written again.
        given: the files.
        part: "validation" or "test".

    Raises:
        UserError: a file cannot be read any more, or written.
    """
    group, taken = run.group, TakenMaps(run, given, part)
    taken.sealed = group.shared(lambda: must_be_sealed(run.results))

    def find_missing() -> list[str]:
        found = [id for id in taken.ids if not taken.is_current(id, run.identity)]
        if found:
            unfinish(run.results)
        return found

    missing = group.shared(find_missing)
    numbers = {"empty_cams": NO_HEATMAPS, "fallbacks": 0, "identity": run.identity, "pass_dice": float("nan"), "fusion": None}
    with progress_bar(f"taking over {part} maps", len(taken.ids), "map", initial=len(taken.ids) - len(missing)) as bar:
        for id in group.shard(missing):
            maps = {**read_given(given.files[part][id], given.scores), **numbers}
            maps.pop("group", None)
            taken.keep(id, maps)
            taken.write(id, maps)
            bar.update(min(group.world_size, len(taken.ids) - bar.n))
    group.wait_for_all()  # all maps are there before anyone reads them
    stage("maps", f"{len(taken.ids)} {part} images, {len(missing)} of them taken over now")
    return taken


def described(given: GivenMaps, run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run in the names of its scores, with what every ``metrics.json`` says of where they are from."""
    names = displayed(given.scores)
    worded: dict[str, Any] = Terms(names["first"], names["second"]).in_metrics(metrics)
    return {
        **worded, "score_names": names, "synthetic": False, "data_note": run.config.data_note, "identity": run.identity,
        "config_identity": run.identity, "skipped": [],
    }
