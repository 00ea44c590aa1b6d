"""Other test sets: decoded, compared with what the network was fitted to, mapped, counted and measured.

Nothing is fitted to them. Weights, scales, lambda, quantile bins and recalibration are those of the source, the images that
the run was trained and tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dataset import Data, decode
from evaluation.counting import Counters
from evaluation.fusion import Fusion
from evaluation.image_ranking import confusion
from evaluation.names import HEADLINE, PREDICTIVE, SALIENCY
from evaluation.overlap import overlap_of_outcomes
from evaluation.protocol import count_images
from evaluation.resampling import units_of
from evaluation.summary import bootstrap_facts, per_image, summarise_test
from experiment.checks import LoudWarning, Range, warnings_of
from experiment.maps import SavedMaps, make_maps
from experiment.networks import Network
from experiment.pooling import conclude_run
from experiment.results import content_mark
from experiment.run import Run
from isic.decoded import DecodedPairs
from isic.layout import SkippedPair, find_pairs
from isic.source import TargetFolders, find_targets
from isic.tables import read_groups
from runtime.config import Config
from runtime.errors import UserError, printable
from runtime.processes import ProcessGroup
from runtime.progress import complain, stage
from runtime.reading import real_path
from runtime.records import fingerprint, write_csv


class FittedOn(NamedTuple):
    """The training and validation images of the source, as far as another set is compared with them.

    Attributes:
        ids: of the images.
        contents: what :func:`experiment.results.content_mark` says of them; empty where an earlier version did not say it.
    """

    ids: frozenset[str]
    contents: frozenset[str]

    @classmethod
    def of_data(cls, data: Data) -> FittedOn:
        """Those of images that are at hand."""
        ids = (*data.split.train, *data.split.validation)
        return cls(frozenset(ids), frozenset(content_mark(data.pairs, id) for id in ids))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> FittedOn:
        """Those of a finished run, from its ``config.json``."""
        return cls(frozenset((*record["split"]["train"], *record["split"]["validation"])), frozenset(record.get("fitted_on", ())))


class TargetSet(NamedTuple):
    """Another test set, decoded.

    Attributes:
        folders: its name, and where it lies.
        pairs: its images and masks.
        skipped: pairs that were left out.
        groups: group by id, of the images that have one.
        shared_ids: ids that training or validation images of the source have as well.
    """

    folders: TargetFolders
    pairs: DecodedPairs
    skipped: list[SkippedPair]
    groups: dict[str, str]
    shared_ids: list[str]

    @property
    def name(self) -> str:
        """Under which its numbers and files are found."""
        return self.folders.name

    def record(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return {
            "name": self.name, "images": str(real_path(self.folders.images)), "masks": str(real_path(self.folders.masks)),
            "ids": self.pairs.ids, "skipped": [entry._asdict() for entry in self.skipped],
            "fingerprint": self.pairs.fingerprint(), **({"groups": self.groups} if self.groups else {}),
        }


# ---------------------------------------------------------------- images


def prepare_targets(config: Config, fitted_on: FittedOn, group: ProcessGroup) -> list[TargetSet]:
    """Find and decode the other test sets of a run.

    Args:
        config: names them.
        fitted_on: what none of their images may be.
        group: its main process decodes.

    Raises:
        UserError: a folder is missing, a pair is broken, or an image of a set is one that the network was fitted to
            (without ``--skip-bad``, which leaves such images out and lists them).
    """

    def prepare() -> list[TargetSet]:
        table = {} if config.groups is None else read_groups(Path(config.groups))
        return [_prepared(folders, config, fitted_on, table) for folders in find_targets(config)]

    targets = group.shared(prepare)
    if group.world_size > 1:  # the main process has just read them
        group.each(lambda: sum(target.pairs.check() for target in targets))
    for target in targets:
        stage("test set", f"{target.name}: {len(target.pairs.ids)} images")
    return targets


def _prepared(folders: TargetFolders, config: Config, fitted_on: FittedOn, table: Mapping[str, str]) -> TargetSet:
    skipped: list[SkippedPair] | None = [] if config.skip_bad else None
    found = find_pairs(folders.images, folders.masks, skipped)
    decoded = decode(found, config, skipped)
    files = {pair.id: pair.image for pair in found}
    known = [id for id in decoded.ids if content_mark(decoded, id) in fitted_on.contents]
    if known and skipped is None:
        raise UserError(
            f"{len(known)} of {len(decoded.ids)} images of test set {folders.name} ({folders.images}) are training or "
            f"validation images of the run, the first of them {known[0]}; remove them, or give --skip-bad to leave them out"
        )
    left_out = [*(skipped or ()), *(SkippedPair(id, str(files[id]), "is a training or validation image") for id in known)]
    ids = [id for id in decoded.ids if id not in set(known)]
    if not ids:
        raise UserError(f"no image of test set {folders.name} ({folders.images}) is left; give another set")
    if left_out:
        reasons = "; ".join(f"{entry.id}: {entry.reason}" for entry in left_out)
        complain(f"warning: {len(left_out)} of {len(found)} pairs of {folders.name} are left out: {printable(reasons)}")
    groups = {id: table[id] for id in ids if id in table}
    if table and len(groups) < len(ids):
        complain(f"{len(ids) - len(groups)} of {len(ids)} images of {folders.name} are in no group; each stands for itself")
    return TargetSet(folders, replace(decoded, ids=ids), sorted(left_out), groups, sorted(fitted_on.ids & set(ids)))


# ---------------------------------------------------------------- maps and counts


def make_target_maps(
    run: Run, model: Network, targets: Sequence[TargetSet], fusion: Fusion
) -> list[tuple[TargetSet, SavedMaps]]:
    """Make the maps of other test sets that are not there yet, with the fused scores of the source's fusion.

    Raises:
        UserError: see :func:`experiment.maps.make_maps`.
    """
    found = []
    for target in targets:
        mapped = replace(run, identity=fingerprint([run.identity, target.pairs.fingerprint()]))
        maps = make_maps(mapped, model, target.pairs, f"target-{target.name}", target.pairs.ids, fusion)
        maps.add_fused_scores(fusion, run.group)
        found.append((target, maps))
    return found


class CountedTarget(NamedTuple):
    """Another test set without its pixels.

    Attributes:
        target: which.
        counters: of its images, with the quantile bins of the source's validation split.
        fallbacks: how many of its maps overflowed in half precision.
        ranges: of its variances.
    """

    target: TargetSet
    counters: Counters
    fallbacks: int
    ranges: dict[str, Range]


def count_targets(
    run: Run, fusion: Fusion, test: Counters, targets: Sequence[tuple[TargetSet, SavedMaps]]
) -> list[CountedTarget]:
    """Count the pixels of other test sets as those of the source's test split were; all processes call it together."""
    group = run.group
    return [
        CountedTarget(
            target,
            count_images(maps.counted_by(group), fusion, test.lambdas, test.bins, test.edges, group.gathered, target.name),
            maps.fallbacks(group), maps.ranges(group),
        )
        for target, maps in targets
    ]


# ---------------------------------------------------------------- numbers


def target_numbers(
    run: Run, fusion: Fusion, source: tuple[Counters, Counters], groups: Mapping[str, str] | None, found: CountedTarget
) -> dict[str, Any]:
    """The numbers of another test set, and ``per_image_<name>.csv``.

    Args:
        run: its settings decide resamples, margins and seed.
        fusion: of the source.
        source: counters of its validation and of its test split.
        groups: of its images, by id.
        found: the other test set.

    Returns:
        "test", what :func:`evaluation.summary.summarise` says of a test split; "bootstrap", of its intervals;
        "conclusion", from the source's validation split and this set; "shift", see :func:`shift`; "warnings".
    """
    config, (validation, test) = run.config, source
    counters, groups = found.counters, {**(groups or {}), **found.target.groups}
    numbers = summarise_test(validation, counters, resamples=config.resamples, seed=config.seed, groups=groups)
    numbers["precision_fallbacks"] = found.fallbacks
    rows = per_image(counters)
    write_csv(run.results / f"per_image_{found.target.name}.csv", rows)
    grouped = any(units_of(part.ids, groups) is not None for part in (validation, counters))
    return {
        "test": numbers,
        "bootstrap": bootstrap_facts(grouped, config.resamples, config.seed),
        "conclusion": conclude_run(config, fusion, validation, counters, groups),
        "shift": shift(test, counters),
        "warnings": _warnings(found, numbers, rows, config.passes),
    }


def _warnings(
    found: CountedTarget, numbers: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], passes: int
) -> list[LoudWarning]:
    """What a reader of these numbers must hear first; each text names the set."""
    name, shared, skipped = found.target.name, found.target.shared_ids, found.target.skipped
    entries = warnings_of({"validation": {"images": 0}, "test": numbers}, rows, passes, {"test": found.ranges})
    warnings = [{**entry, "text": f"{name}: {entry['text']}"} for entry in entries]
    if shared:
        warnings.insert(0, {"code": "shared_ids", "text": (
            f"{name}: {len(shared)} of {len(rows)} images have the ids of training or validation images, such as {shared[0]}; "
            "if they are the same pictures in another file, this is no new test set."
        )})
    if skipped:
        reasons = "; ".join(f"{entry.id}: {entry.reason}" for entry in skipped)
        warnings.append({"code": "left_out", "text": f"{name}: {len(skipped)} pairs are left out: {printable(reasons)}"})
    return warnings


def shift(source: Counters, target: Counters) -> dict[str, dict[str, float | None]]:
    """What differs between the source's test images and another set, whatever the scores are worth there.

    Returns:
        By quantity, its value under "source" and under "target": mean "dice" of the images, "accuracy" of the pixels, mean
        "probability" of the predicted label (``max(p, 1 - p)``), mean confidence of the three headline scores as
        "confidence_<score>", the mean of both raw variances, and the share of pixels where each is "clipped", beyond what
        validation held. None where there is no such number.
    """
    both = {"source": _level(source), "target": _level(target)}
    return {name: {side: values[name] for side, values in both.items()} for name in both["source"]}


def _level(counters: Counters) -> dict[str, float | None]:
    count, confidence = (counters.images[name].sum((0, 2, 3)) for name in ("count", "confidence"))
    mean = dict(zip(counters.scores, confidence / count))
    pixels, outcomes = int(count[0]), confusion(counters)
    sums, clipped = counters.images["cell_sums"].sum((0, 2)), counters.images["clipped"].sum(0)
    sure = mean.get("one_minus_max_probability")
    return {
        "dice": float(overlap_of_outcomes(outcomes)[0].mean()),
        "accuracy": 1.0 - float(outcomes[:, 1:3].sum()) / pixels,
        "probability": None if sure is None else float(sure),
        **{f"confidence_{name}": float(mean[name]) for name in HEADLINE},
        **{f"mean_{name}": float(value / pixels) for name, value in zip((PREDICTIVE, SALIENCY), sums)},
        **{f"clipped_{name}": float(value / pixels) for name, value in zip((PREDICTIVE, SALIENCY), clipped)},
    }
