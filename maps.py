"""The saved uncertainty maps of a run: making those that are missing, reading them, completing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from config import Config
from dataset import DecodedPairs, batches
from fusion import Fusion
from model import UNet
from processes import Processes
from storage import MAP_ARRAYS, UserError, fingerprint, read_maps, write_maps
from terminal import stage, tqdm
from uncertainty import uncertainty_maps

MAP_FOLDERS = ("uncertainty_maps/validation", "uncertainty_maps/test")


class SavedMaps:
    """The saved maps of one part, read one image at a time; can be iterated any number of times."""

    def __init__(self, folder: Path, ids: Sequence[str], device: torch.device, threshold: float):
        self.folder, self.ids, self.device, self.threshold = folder, list(ids), device, threshold

    def path(self, id: str) -> Path:
        """The file of one image."""
        return self.folder / f"{id}.npz"

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, maps as tensors (H, W) on the device, with the numbers "empty_cams" and "threshold")."""
        need = [name for name in MAP_ARRAYS if name != "fused_score"]
        with ThreadPoolExecutor(1) as reader:  # reads the next file, and no more, while this one is worked on
            following: Future | None = None
            for id, after in zip(self.ids, [*self.ids[1:], None]):
                maps = following.result() if following else read_maps(self.path(id), need)
                following = reader.submit(read_maps, self.path(after), need) if after is not None else None
                tensors = {name: torch.from_numpy(maps[name]).to(self.device) for name in need}
                yield id, {**tensors, "empty_cams": maps["empty_cams"], "threshold": self.threshold}

    def shard(self, group: Processes) -> SavedMaps:
        """The part of the maps that one of several processes works on."""
        return SavedMaps(self.folder, group.shard(self.ids), self.device, self.threshold)

    def fallbacks(self) -> int:
        """How many maps overflowed in half precision and were made in fp32."""
        return sum(read_maps(self.path(id), ())["fallbacks"] for id in self.ids)

    def add_fused_scores(self, fusion: Fusion, identity: str, group: Processes) -> None:
        """Complete the files that lack the fused score, or hold that of another fusion."""
        for id in group.shard(self.ids):
            maps = read_maps(self.path(id), ("pred_variance", "saliency_variance"))
            if "fused_score" in maps and str(maps.get("fusion")) == _name(fusion):
                continue
            fused = fusion(*(torch.from_numpy(maps[key]).to(self.device) for key in ("pred_variance", "saliency_variance")))
            arrays = {name: maps[name] for name in MAP_ARRAYS if name in maps}
            arrays.update(fused_score=fused.cpu().numpy(), fusion=np.array(_name(fusion)))
            write_maps(self.path(id), arrays, maps["empty_cams"], identity, maps["fallbacks"])


def _name(fusion: Fusion) -> str:
    return fingerprint(repr(fusion))


def make_maps(
    config: Config, model: UNet, pairs: DecodedPairs, ids: Sequence[str], group: Processes, results: Path,
    part: str, identity: str, fusion: Fusion | None = None, before_first: Callable[[], None] = lambda: None,
) -> SavedMaps:
    """Make the maps of one part that are not there yet, and save each as soon as it is finished.

    The processes of a group share the images; a map is the same whoever makes it.

    Args:
        config: passes, seed, target and so on.
        model: the trained network.
        pairs: the decoded images and masks.
        ids: the part's.
        group: this process's place among all, and its device.
        results: folder of the run.
        part: "validation" or "test".
        identity: fingerprint of what makes the maps; a file with another one is made again.
        fusion: adds the fused score, where it is known already.
        before_first: called before a map is made; not at all where none is missing.

    Raises:
        UserError: a file cannot be written, or the maps are not finite.
    """
    device = group.device
    saved = SavedMaps(results / "uncertainty_maps" / part, ids, device, config.threshold)
    missing = [id for id in ids if not _is_current(saved.path(id), identity)]
    group.gathered(None)  # all have looked before anyone writes
    if missing:
        before_first()
    together = 1 if device.type == "cpu" else config.batch_size
    title, done = f"maps of the {part} images", len(ids) - len(missing)
    with tqdm(desc=title, total=len(ids), initial=done, unit="map") as shown, ThreadPoolExecutor(2) as writer:
        pending: list[Future] = []
        for names, images, masks in batches(pairs, group.shard(missing), together, device):
            try:
                maps = uncertainty_maps(model, images, image_ids=names, **config.map_options(model))
            except ValueError as error:  # weights that overflow; the message names the image
                raise UserError(f"{error}; delete {results / 'weights'} and train again, with a lower --lr") from error
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
                one = {name: values[index] for name, values in arrays.items()}
                if fusion is not None:
                    one["fusion"] = np.array(_name(fusion))
                pending.append(writer.submit(write_maps, saved.path(id), one, empty[index], identity, fallbacks[index]))
            while len(pending) > 4 * together:  # a bounded queue: memory does not grow with a slow disk
                pending.pop(0).result()
            shown.update(min(len(names) * group.world, len(ids) - shown.n))
        for future in pending:
            future.result()
    group.gathered(None)  # all maps are there before anyone reads them
    stage("maps", f"{len(ids)} {part} images, {len(missing)} of them made now")
    return saved


def _is_current(path: Path, identity: str) -> bool:
    """Whether a map file is there, whole, and made by this very run; its fused score may be missing."""
    if not path.exists():
        return False
    try:
        return read_maps(path, [name for name in MAP_ARRAYS if name != "fused_score"])["identity"] == identity
    except UserError:
        return False  # broken or of another version: made again
