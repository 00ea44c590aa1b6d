"""The saved uncertainty maps of a run: making those that are missing, reading them, completing them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import batches
from evaluation.fusion import Fusion
from evaluation.names import PREDICTIVE, SALIENCY
from experiment.checks import Range, check_first_image, check_predictive_range
from experiment.map_files import EXTRA_ARRAYS, MAP_ARRAYS, read_maps, write_maps
from experiment.memory import PassMemory
from experiment.networks import Network, target_layer
from experiment.results import unfinish
from experiment.run import Run
from experiment.saved_run import maps_are_sealed
from isic.decoded import DecodedPairs
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.progress import progress_bar, stage, with_progress
from runtime.records import fingerprint, read_json
from runtime.resources import naming_shortage
from runtime.stages import reused, timed
from uncertainty import UncertaintyMaps, flip_variance, uncertainty_maps

#: Bytes of maps of one part that stay in memory; the others are read again whenever they are needed.
KEPT_BYTES = 512 << 20
MEASURED = tuple(name for name in MAP_ARRAYS if name != "fused_score")


class Facts(NamedTuple):
    """What of a map file stays in memory whatever becomes of its maps."""

    fallbacks: int
    identity: str
    ranges: dict[str, Range]


class SavedMaps:
    """The saved maps of one part, one image at a time; can be iterated any number of times.

    A file is read once where the maps fit into ``KEPT_BYTES`` of memory. They must not be changed in place.

    Args:
        folder: of the part.
        ids: of its images.
        device: of the tensors.
        threshold: of the predicted lesion.
        extra: arrays of ``EXTRA_ARRAYS`` that every file must hold, beside ``MEASURED``.
        memory: bytes of maps that stay in memory at most; ``KEPT_BYTES`` if None.
    """

    def __init__(
        self, folder: Path, ids: Sequence[str], device: torch.device, threshold: float, extra: Sequence[str] = (),
        memory: int | None = None,
    ):
        self.folder, self.ids, self.device, self.threshold, self.memory = folder, list(ids), device, threshold, memory
        self.names, self.sealed = (*MEASURED, *extra), False
        self._kept: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, Facts] = {}
        self._before: dict[str, str] = {}  # in a share of a part: the image before each one in the whole part

    def path(self, id: str) -> Path:
        """The file of one image."""
        return self.folder / f"{id}.npz"

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, maps as tensors (H, W) on the device, with the numbers "empty_cams", "pass_dice" and "threshold")."""
        with ThreadPoolExecutor(1) as reader:  # reads the next file, and no more, while this one is worked on
            following: Future[dict[str, Any]] | None = None
            for id, after in zip(self.ids, [*self.ids[1:], None]):
                maps = following.result() if following else self.read(id)
                following = reader.submit(self.read, after) if after is not None else None
                tensors = {name: torch.from_numpy(maps[name]).to(self.device) for name in self.names}
                numbers = {name: maps[name] for name in ("empty_cams", "pass_dice")}
                if id in self._before:  # the placebo of a share is that of the whole part
                    tensors["other_saliency_variance"] = torch.from_numpy(self.read(self._before[id])[SALIENCY]).to(self.device)
                yield id, {**tensors, **numbers, "threshold": self.threshold}

    def read(self, id: str) -> dict[str, Any]:
        """The arrays and numbers of one image, as :func:`read_maps` gives them, but for the fused score.

        Raises:
            UserError: see :func:`read_maps`.
        """
        return self._kept.get(id) or self.keep(id, read_maps(self.path(id), self.names, sealed=self.sealed))

    def keep(self, id: str, maps: dict[str, Any]) -> dict[str, Any]:
        """Hold the maps of one image in memory, if they fit; returns them without the fused score."""
        variances = (PREDICTIVE, SALIENCY, *(name for name in EXTRA_ARRAYS if name in self.names))
        ranges = {name: (float(maps[name].min()), float(maps[name].max())) for name in variances}
        self._facts[id] = Facts(maps["fallbacks"], maps["identity"], ranges)
        fusion = maps.get("fusion") if "fused_score" in maps else None
        maps = {**{name: value for name, value in maps.items() if name != "fused_score"}, "fusion": fusion}
        size = sum(value.nbytes for value in maps.values() if isinstance(value, np.ndarray))
        if size * (len(self._kept) + 1) <= (KEPT_BYTES if self.memory is None else self.memory):
            self._kept[id] = maps
        return maps

    def release(self) -> None:
        """Keep no maps in memory; they are read again whenever they are needed."""
        self.memory = 0
        self._kept.clear()

    def shard(self, group: ProcessGroup) -> SavedMaps:
        """The part of the maps that one of several processes works on; what is in memory is shared."""
        mine, extra = group.shard(self.ids), self.names[len(MEASURED) :]
        part = SavedMaps(self.folder, mine, self.device, self.threshold, extra, self.memory)
        part._kept, part._facts, part.sealed = self._kept, self._facts, self.sealed
        if len(mine) < len(self.ids):
            before = dict(zip(self.ids, [self.ids[-1], *self.ids[:-1]]))
            part._before = {id: before[id] for id in mine}
        return part

    def counted_by(self, group: ProcessGroup) -> Iterator[tuple[str, dict[str, Any]]]:
        """This process's share of the maps, once, under a progress bar."""
        share = self.shard(group)
        return with_progress(share, f"counting {self.folder.name}", len(share.ids), "map")

    def facts(self, id: str) -> Facts:
        """What is known of the file of one image, which is read where it was not yet."""
        if id not in self._facts:
            self.read(id)
        return self._facts[id]

    def fallbacks(self, group: ProcessGroup) -> int:
        """How many maps overflowed in half precision and were made in fp32; to be asked by all processes together."""
        return sum(group.gathered(sum(self.facts(id).fallbacks for id in group.shard(self.ids))))

    def ranges(self, group: ProcessGroup) -> dict[str, Range]:
        """The smallest and the largest value of each variance over the whole part; to be asked by all processes together."""
        shares = group.gathered([self.facts(id).ranges for id in group.shard(self.ids)])
        images = [ranges for share in shares for ranges in share]
        return {
            name: (min(ranges[name][0] for ranges in images), max(ranges[name][1] for ranges in images)) for name in images[0]
        }

    def is_current(self, id: str, identity: str) -> bool:
        """Whether a map file is there, whole, and made by this very run; its fused score may be missing."""
        if not self.path(id).exists():
            return False
        try:
            maps = read_maps(self.path(id), self.names, identity, self.sealed)
        except UserError:
            return False  # broken, changed, or of another image, run or version: made again
        return not math.isnan(maps["pass_dice"]) and bool(self.keep(id, maps))

    def add_fused_scores(self, fusion: Fusion, group: ProcessGroup) -> None:
        """Complete the files that lack the fused score or a checksum, or hold the score of another fusion."""
        for id in group.shard(self.ids):
            maps = self.read(id)
            if maps["fusion"] == _name(fusion) and "unsealed" not in maps:
                continue
            variances = (torch.from_numpy(maps[key]).to(self.device) for key in ("pred_variance", "saliency_variance"))
            self.write(id, {**maps, "fused_score": fusion(*variances).cpu().numpy(), "fusion": _name(fusion)})
            maps["fusion"] = _name(fusion)
            maps.pop("unsealed", None)

    def write(self, id: str, maps: Mapping[str, Any]) -> None:
        """Save the arrays and numbers of one image, named as :func:`read_maps` gives them."""
        arrays = {name: maps[name] for name in (*MAP_ARRAYS, *EXTRA_ARRAYS) if name in maps}
        write_maps(
            self.path(id), arrays, maps["empty_cams"], maps["identity"], maps["fallbacks"], maps["fusion"], maps["pass_dice"]
        )


def must_be_sealed(results: Path) -> bool:
    """Whether every map file in the folder of a run must carry a checksum."""
    path = results / "config.json"
    return maps_are_sealed(read_json(path)) if path.is_file() else True


def _name(fusion: Fusion) -> str:
    return fingerprint(repr(fusion))


def map_options(config: Config, model: Network) -> dict[str, Any]:
    """The keyword arguments of :func:`uncertainty.uncertainty_maps` that a configuration stands for."""
    return {
        "target_layer": target_layer(config, model), "passes": config.passes, "seed": config.seed,
        "normalise_cam": config.cam_scale == "maximum", "cam_score": config.cam_score,
        "precision": config.precision,
    }


def extra_arrays(config: Config) -> tuple[str, ...]:
    """The arrays of ``EXTRA_ARRAYS`` that a configuration asks for."""
    return ("flip_variance",) if config.flips else ()


@timed("maps")
@naming_shortage("maps", "lower --image-size or --width")
def make_maps(
    run: Run, model: Network, pairs: DecodedPairs, part: str, ids: Sequence[str], fusion: Fusion | None = None
) -> SavedMaps:
    """Make the maps of one part that are not there yet, and save each as soon as it is finished.

    The processes of a group share the images; a map is the same whoever makes it. The first image that a process makes
    is made twice: see :func:`experiment.checks.check_first_image`.

    Args:
        run: its identity is that of everything that makes a map, the weights included; a file with another one is
            made again.
        model: the trained network.
        pairs: the decoded images and masks.
        part: "validation" or "test".
        ids: of that part.
        fusion: adds the fused score, where it is known already.

    Raises:
        UserError: a file cannot be written, the maps are not finite, the model is random by itself or not at all, or
            its predictive variance is the same everywhere.
    """
    config, group, device = run.config, run.group, run.group.device
    saved = SavedMaps(run.results / "uncertainty_maps" / part, ids, device, config.threshold, extra_arrays(config))

    saved.sealed = group.shared(lambda: must_be_sealed(run.results))

    def find_missing() -> list[str]:
        found = [id for id in saved.ids if not saved.is_current(id, run.identity)]
        if found:
            unfinish(run.results)
        return found

    missing = group.shared(find_missing)
    reused("maps", len(saved.ids) - len(missing))
    mine = group.shard(missing)
    together = 1 if device.type == "cpu" else config.batch_size
    with progress_bar(f"maps of the {part} images", len(ids), "map", initial=len(ids) - len(missing)) as bar, \
            ThreadPoolExecutor(2) as writer:
        pending: list[Future[None]] = []
        memory = PassMemory(saved.release)
        for names, images, masks in batches(pairs, mine, together, device):
            made, flips = _make(run, model, names, images, memory)
            if names[0] == mine[0]:
                chunk, again = memory.chunk, _make(run, model, names[:1], images[:1], memory)[0]
                if memory.chunk != chunk:
                    made, flips = _make(run, model, names, images, memory)
                check_first_image(made, again, names[0])
            for id, maps in _by_image(run, names, made, masks, flips, fusion):
                saved.keep(id, maps)
                pending.append(writer.submit(saved.write, id, maps))
            while len(pending) > 4 * together:  # a bounded queue: memory does not grow with a slow disk
                pending.pop(0).result()
            bar.update(min(len(names) * group.world_size, len(ids) - bar.n))
        for future in pending:
            future.result()
    group.wait_for_all()  # all maps are there before anyone reads them
    check_predictive_range(part, saved.ranges(group))
    stage("maps", f"{len(ids)} {part} images, {len(missing)} of them made now")
    return saved


def _make(
    run: Run, model: Network, names: list[str], images: torch.Tensor, memory: PassMemory
) -> tuple[UncertaintyMaps, torch.Tensor | None]:
    """The maps of some images, and their variance over flips where it is asked for."""

    def make(chunk: int | None) -> tuple[UncertaintyMaps, torch.Tensor | None]:
        maps = uncertainty_maps(model, images, image_ids=names, chunk=chunk, **map_options(run.config, model))
        return maps, flip_variance(model, images) if extra_arrays(run.config) else None

    try:
        return memory.run(make, f"maps of {names[0]}")
    except ValueError as error:  # weights that overflow; the message names the image
        given = run.config.model_weights
        advice = f"look at {given}" if given else f"delete {run.results / 'weights'} and train again, with a lower --lr"
        raise UserError(f"{error}; {advice}") from error


def _by_image(
    run: Run, names: list[str], maps: UncertaintyMaps, masks: torch.Tensor, flips: torch.Tensor | None, fusion: Fusion | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each image's id and its maps, as :func:`read_maps` would give them."""
    fields: dict[str, torch.Tensor] = {
        "mean_prediction": maps.mean_prediction, "pred_variance": maps.pred_variance,
        "saliency_variance": maps.saliency_variance, "expected_entropy": maps.expected_entropy,
        "true_mask": masks,
    }
    if flips is not None:
        fields["flip_variance"] = flips
    if fusion is not None:
        fields["fused_score"] = fusion(maps.pred_variance, maps.saliency_variance)
    arrays = {name: values.cpu().numpy() for name, values in fields.items()}
    numbers = {name: getattr(maps, name).tolist() for name in ("empty_cams", "fallbacks", "pass_dice")}
    for index, id in enumerate(names):
        yield id, {
            **{name: values[index] for name, values in (arrays | numbers).items()},
            "identity": run.identity, "fusion": None if fusion is None else _name(fusion),
        }
