"""What a command with ``--weights-from`` takes from the finished run that it names, beside the weights.

Its settings, where the command line gives no other; its split and its groups; and its numbers, where only other test sets
are left to be measured. Loads neither PyTorch nor a weight: the settings are needed before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiment.saved_run import read_any_record
from isic.tables import Fixed, read_groups
from runtime.config import IDENTITY_FIELDS, QUICK, Config
from runtime.errors import UserError

#: Settings that are taken as well, though they decide neither weights nor maps: what is left out, what is said.
ALSO_TAKEN = ("skip_bad", "data_note", "resamples", "margin")
#: Flags that say where the images are.
PLACES = ("data", "images", "masks", "download")


def settings_from(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that stand in for the defaults where weights are taken from a run; None where none are.

    Args:
        given: the values of the flags on the command line, by field.

    Raises:
        UserError: the named folder holds no finished run.
    """
    if "weights_from" not in given:
        return None
    several: dict[str, int] = {}
    folder = Path(given["weights_from"])
    if _is_pooled(folder) and given.get("trainings", 2) > 1:
        seeds = _seeds_inside(folder)
        several = {"trainings": len(seeds), "seed": seeds[0]}
        folder = folder / f"seed-{given.get('seed', seeds[0])}"
    elif given.get("trainings", 1) > 1:
        folder = folder / f"seed-{given.get('seed', Config.seed)}"
    record = finished_record(folder)
    known, used = {item.name for item in fields(Config)}, record["configuration"]
    values = {name: used[name] for name in (*IDENTITY_FIELDS, *ALSO_TAKEN) if name in known & used.keys()}
    if not any(given.get(name) for name in PLACES):
        values.update(images=record["images"], masks=record["masks"])
    return {**values, **several, **(QUICK if given.get("quick") else {})}


def finished_record(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a finished run that has weights.

    Raises:
        UserError: there is none.
    """
    if not (folder / "metrics.json").is_file():
        raise UserError(f"--weights-from {folder} holds no finished run (no metrics.json); finish it, or name another folder")
    record = read_any_record(folder)
    if "pooled" in record:
        names = ", ".join(str(entry["folder"]) for entry in record["pooled"])
        raise UserError(f"--weights-from {folder} pools several trainings; name one of them: {names}")
    if "maps" in record:
        raise UserError(f"--weights-from {folder} judged maps that were made elsewhere and has no weights; name another run")
    return record


def _is_pooled(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "pooled" in read_any_record(folder)


def _seeds_inside(folder: Path) -> list[int]:
    """The seeds of pooled trainings that lie in the folder of the pool and follow each other."""
    names = [entry["folder"] for entry in read_any_record(folder)["pooled"]]
    seeds = sorted(int(name[5:]) for name in names if name.startswith("seed-") and name[5:].isdigit())
    if len(seeds) < len(names) or seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        raise UserError(
            f"--weights-from {folder} pools runs that are not its own seeds in a row; name one of them: {', '.join(names)}"
        )
    return seeds


# ---------------------------------------------------------------- the split, and whether the numbers are there


def taken_from(config: Config) -> Fixed | None:
    """The split and the groups of the run whose weights are taken; None where none are.

    The split is that of the run whatever else is given: weights are not to be tested on what they were trained on.
    Pairs that the run left out count as training images, so that they are left out, and compared, again.
    """
    if config.weights_from is None:
        return None
    record = finished_record(first_run(config))
    split = record["split"]
    parts = {entry["id"]: "train" for entry in record.get("skipped", ())}
    parts.update((id, part) for part in ("train", "validation", "test") for id in split[part])
    return Fixed(parts, record.get("groups"))


def numbers_suffice(config: Config) -> bool:
    """Whether only other test sets are left to be measured: the run whose weights are taken was made as is asked for here.

    Its counts, scales and lambda are then all that is needed of it. ``--study`` and ``--flips`` need its maps and images.
    """
    others = config.test_data or config.test_images
    if config.weights_from is None or not others or config.study or config.flips or config.split is not None:
        return False
    record = finished_record(first_run(config))
    used = {**{name: getattr(Config, name) for name in IDENTITY_FIELDS}, **record["configuration"]}
    if any(getattr(config, name) != used[name] for name in IDENTITY_FIELDS):
        return False
    if config.data is not None or config.download or (config.images, config.masks) != (record["images"], record["masks"]):
        return False
    if config.groups is None:
        return True
    listed = read_groups(Path(config.groups))
    return not any(id in listed for part in ("validation", "test") for id in record["split"][part])


def first_run(config: Config) -> Path:
    """The folder of the run, or of the first of several trainings."""
    folder = Path(str(config.weights_from))
    return folder / f"seed-{config.seed}" if config.trainings > 1 else folder
