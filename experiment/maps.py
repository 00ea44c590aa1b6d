"""The saved uncertainty maps of a run: making those that are missing, reading them, completing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dataset import batches
from evaluation.fusion import Fusion
from experiment.map_files import MAP_ARRAYS, read_maps, write_maps
from experiment.results import unfinish
from experiment.run import Run
from isic.cache import DecodedPairs
from model import UNet
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.progress import progress_bar, stage
from runtime.records import fingerprint
from uncertainty import uncertainty_maps

#: Bytes of maps of one part that stay in memory; the others are read again whenever they are needed.
KEPT_BYTES = 512 << 20
MEASURED = tuple(name for name in MAP_ARRAYS if name != "fused_score")


class SavedMaps:
    """The saved maps of one part, one image at a time; can be iterated any number of times.

    A file is read once where the maps fit into ``KEPT_BYTES`` of memory. They must not be changed in place.
    """

    def __init__(self, folder: Path, ids: Sequence[str], device: torch.device, threshold: float):
        self.folder, self.ids, self.device, self.threshold = folder, list(ids), device, threshold
        self._kept: dict[str, dict[str, Any]] = {}
        self._fallbacks: dict[str, int] = {}

    def path(self, id: str) -> Path:
        """The file of one image."""
        return self.folder / f"{id}.npz"

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, maps as tensors (H, W) on the device, with the numbers "empty_cams" and "threshold")."""
        with ThreadPoolExecutor(1) as reader:  # reads the next file, and no more, while this one is worked on
            following: Future[dict[str, Any]] | None = None
            for id, after in zip(self.ids, [*self.ids[1:], None]):
                maps = following.result() if following else self.read(id)
                following = reader.submit(self.read, after) if after is not None else None
                tensors = {name: torch.from_numpy(maps[name]).to(self.device) for name in MEASURED}
                yield id, {**tensors, "empty_cams": maps["empty_cams"], "threshold": self.threshold}

    def read(self, id: str) -> dict[str, Any]:
        """The arrays and numbers of one image, as :func:`read_maps` gives them, but for the fused score.

        Raises:
            UserError: see :func:`read_maps`.
        """
        return self._kept.get(id) or self.keep(id, read_maps(self.path(id), MEASURED))

    def keep(self, id: str, maps: dict[str, Any]) -> dict[str, Any]:
        """Hold the maps of one image in memory, if they fit; returns them without the fused score."""
        self._fallbacks[id] = maps["fallbacks"]
        fusion = maps.get("fusion") if "fused_score" in maps else None
        maps = {**{name: value for name, value in maps.items() if name != "fused_score"}, "fusion": fusion}
        size = sum(maps[name].nbytes for name in MEASURED)
        if size * (len(self._kept) + 1) <= KEPT_BYTES:
            self._kept[id] = maps
        return maps

    def shard(self, group: ProcessGroup) -> SavedMaps:
        """The part of the maps that one of several processes works on; what is in memory is shared."""
        part = SavedMaps(self.folder, group.shard(self.ids), self.device, self.threshold)
        part._kept, part._fallbacks = self._kept, self._fallbacks
        return part

    def fallbacks(self, group: ProcessGroup) -> int:
        """How many maps overflowed in half precision and were made in fp32; to be asked by all processes together."""
        mine = sum(self._fallbacks[id] if id in self._fallbacks else self.read(id)["fallbacks"] for id in group.shard(self.ids))
        return sum(group.gathered(mine))

    def is_current(self, id: str, identity: str) -> bool:
        """Whether a map file is there, whole, and made by this very run; its fused score may be missing."""
        if not self.path(id).exists():
            return False
        try:
            maps = read_maps(self.path(id), MEASURED)
        except UserError:
            return False  # broken or of another version: made again
        return bool(maps["identity"] == identity) and bool(self.keep(id, maps))

    def add_fused_scores(self, fusion: Fusion, group: ProcessGroup) -> None:
        """Complete the files that lack the fused score, or hold that of another fusion."""
        for id in group.shard(self.ids):
            maps = self.read(id)
            if maps["fusion"] == _name(fusion):
                continue
            variances = (torch.from_numpy(maps[key]).to(self.device) for key in ("pred_variance", "saliency_variance"))
            arrays = {**{name: maps[name] for name in MEASURED}, "fused_score": fusion(*variances).cpu().numpy()}
            write_maps(self.path(id), arrays, maps["empty_cams"], maps["identity"], maps["fallbacks"], _name(fusion))
            maps["fusion"] = _name(fusion)


def _name(fusion: Fusion) -> str:
    return fingerprint(repr(fusion))


def map_options(config: Config, model: UNet) -> dict[str, Any]:
    """The keyword arguments of :func:`uncertainty.uncertainty_maps` that a configuration stands for."""
    return {
        "target_layer": getattr(model, config.target_layer), "passes": config.passes, "seed": config.seed,
        "normalise_cam": config.cam_scale == "maximum", "precision": config.precision,
    }


def make_maps(
    run: Run, model: UNet, pairs: DecodedPairs, part: str, ids: Sequence[str], fusion: Fusion | None = None
) -> SavedMaps:
    """Make the maps of one part that are not there yet, and save each as soon as it is finished.

    The processes of a group share the images; a map is the same whoever makes it.

    Args:
        run: its identity is that of everything that makes a map, the weights included; a file with another one is
            made again.
        model: the trained network.
        pairs: the decoded images and masks.
        part: "validation" or "test".
        ids: of that part.
        fusion: adds the fused score, where it is known already.

    Raises:
        UserError: a file cannot be written, or the maps are not finite.
    """
    config, group, device = run.config, run.group, run.group.device
    saved = SavedMaps(run.results / "uncertainty_maps" / part, ids, device, config.threshold)

    def find_missing() -> list[str]:
        found = [id for id in saved.ids if not saved.is_current(id, run.identity)]
        if found:
            unfinish(run.results)
        return found

    missing = group.shared(find_missing)
    together = 1 if device.type == "cpu" else config.batch_size
    with progress_bar(f"maps of the {part} images", len(ids), "map", initial=len(ids) - len(missing)) as bar, \
            ThreadPoolExecutor(2) as writer:
        pending: list[Future[None]] = []
        for names, images, masks in batches(pairs, group.shard(missing), together, device):
            for id, maps in _maps_of_batch(run, model, names, images, masks, fusion):
                saved.keep(id, maps)
                pending.append(writer.submit(
                    write_maps, saved.path(id), {name: maps[name] for name in MAP_ARRAYS if name in maps},
                    maps["empty_cams"], run.identity, maps["fallbacks"], maps["fusion"],
                ))
            while len(pending) > 4 * together:  # a bounded queue: memory does not grow with a slow disk
                pending.pop(0).result()
            bar.update(min(len(names) * group.world_size, len(ids) - bar.n))
        for future in pending:
            future.result()
    group.wait_for_all()  # all maps are there before anyone reads them
    stage("maps", f"{len(ids)} {part} images, {len(missing)} of them made now")
    return saved


def _maps_of_batch(
    run: Run, model: UNet, names: list[str], images: torch.Tensor, masks: torch.Tensor, fusion: Fusion | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each image's id and its maps, as :func:`read_maps` would give them."""
    try:
        maps = uncertainty_maps(model, images, image_ids=names, **map_options(run.config, model))
    except ValueError as error:  # weights that overflow; the message names the image
        raise UserError(f"{error}; delete {run.results / 'weights'} and train again, with a lower --lr") from error
    fields: dict[str, torch.Tensor] = {
        "mean_prediction": maps.mean_prediction, "pred_variance": maps.pred_variance,
        "saliency_variance": maps.saliency_variance, "expected_entropy": maps.expected_entropy,
        "true_mask": masks,
    }
    if fusion is not None:
        fields["fused_score"] = fusion(maps.pred_variance, maps.saliency_variance)
    arrays = {name: values.cpu().numpy() for name, values in fields.items()}
    empty, fallbacks = maps.empty_cams.tolist(), maps.fallbacks.tolist()
    for index, id in enumerate(names):
        yield id, {
            **{name: values[index] for name, values in arrays.items()},
            "empty_cams": empty[index], "fallbacks": fallbacks[index], "identity": run.identity,
            "fusion": None if fusion is None else _name(fusion),
        }
