"""The experiment, from images to a verdict.

Trains a U-Net, makes the uncertainty maps of the validation and test images,
tunes the fusion on validation, and measures calibration on test.
"""

from __future__ import annotations

import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from tqdm import tqdm

import evaluation
import visualize
from config import QUICK, Config, parse_config
from counters import Counters, count_scores, merge
from dataset import (
    DecodedPairs,
    Split,
    batches,
    decode_pairs,
    download_isic,
    find_pairs,
    isic_folders,
    limit_pairs,
    split_ids,
)
from fusion import Fusion, lambda_grid
from model import UNet
from processes import Processes, is_first, process_group
from storage import (
    MAP_ARRAYS,
    FolderLock,
    UserError,
    fingerprint,
    read_json,
    read_maps,
    whole_file,
    write_csv,
    write_json,
    write_maps,
)
from study import run_study
from synthetic import write_synthetic_dataset
from train import train, training_precision, weights_fingerprint
from uncertainty import uncertainty_maps

DATA = Path("data")
RESULTS = Path("results")
SYNTHETIC_BANNER = """\
************************************************************************
*  SYNTHETIC LESIONS. No dataset was named and data/ISIC2018 is absent, *
*  so this run draws its own images. Its numbers show that the pipeline *
*  works; they say nothing about patients. README.md: how to get ISIC.  *
************************************************************************"""


class Source(NamedTuple):
    """Where the images come from: a name for the results folder, the two folders, whether made up."""

    name: str
    images: Path
    masks: Path
    synthetic: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line describes; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(parse_config(argv, __doc__))
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\nstopped; finished epochs and maps are kept; the same command goes on from there", file=sys.stderr)
        return 130
    except _Terminated:
        say("\nterminated; finished epochs and maps are kept; the same command goes on from there", file=sys.stderr)
        return 143
    return 0


def say(text: str, file: TextIO | None = None) -> None:
    """Print, in the first process only."""
    if is_first():
        print(text, file=file)


def bar(description: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A progress bar, in the first process only."""
    return tqdm(desc=description, total=total, unit=unit, initial=initial, smoothing=0.05, disable=not is_first())


class _Terminated(Exception):
    """SIGTERM arrived."""


def _stop(signum: int, frame: object) -> None:
    raise _Terminated


def run(config: Config) -> dict[str, Any]:
    """The whole experiment; returns what ``metrics.json`` holds."""
    started = time.perf_counter()
    with process_group(config.device) as group:
        config, source = group.shared(lambda: find_source(config))
        results = Path(config.results or RESULTS / (source.name + ("-quick" if config.quick and not source.synthetic else "")))
        with FolderLock(results) if group.first else nullcontext():
            pairs, split = prepare_data(config, source, group)
            identity = group.shared(lambda: claim_results(results, config, source, pairs, split, group.device))
            model = train_model(config, pairs, split, group, results, identity)
            identity = fingerprint([identity, weights_fingerprint(model)])

            validation = make_maps(config, model, pairs, split.validation, group, results, "validation", identity)
            fusion = group.shared(lambda: evaluation.tune(validation, bins=config.bins, lambdas=config.lambda_steps + 1))
            test = make_maps(config, model, pairs, split.test, group, results, "test", identity, fusion)
            validation.add_fused_scores(fusion, identity, group)

            counted, tested = count(config, validation, test, fusion, group)
            return group.shared(
                lambda: finish(config, source, pairs, validation, test, fusion, counted, tested, results, started)
            )


def finish(
    config: Config, source: Source, pairs: DecodedPairs, validation: SavedMaps, test: SavedMaps, fusion: Fusion,
    counted: Counters, tested: Counters, results: Path, started: float,
) -> dict[str, Any]:
    """From the counts to every number, table and picture; the first process does it alone."""
    metrics, rows = evaluate(config, validation, test, fusion, counted, tested, results)
    for part in (validation, test):
        metrics[part.folder.name]["precision_fallbacks"] = part.fallbacks()
    metrics = {**metrics, "synthetic": source.synthetic, "minutes": (time.perf_counter() - started) / 60}
    write_csv(results / "per_image.csv", rows)
    draw_figures(config, metrics, pairs, test, results)
    write_json(results / "metrics.json", metrics)  # last: its presence says that the run is finished
    report(metrics, results, source)
    return metrics


# ---------------------------------------------------------------- data


def find_source(config: Config) -> tuple[Config, Source]:
    """Decide which images are used; synthetic ones only where none are named and none are there."""
    if config.download:
        download_isic(DATA / "ISIC2018")
    if config.images is not None:
        images, masks = Path(config.images), Path(config.masks or "")
        return config, Source(images.resolve().name.lower(), images, masks, False)
    if config.data is not None or (DATA / "ISIC2018").exists():
        root = Path(config.data or DATA / "ISIC2018")
        return config, Source(root.resolve().name.lower(), *isic_folders(root), False)
    config = config.with_preset({**QUICK, "epochs": 12})  # few images: more epochs
    say(SYNTHETIC_BANNER)
    root = DATA / f"synthetic-{config.synthetic_images}"
    with bar("drawing synthetic lesions", config.synthetic_images, "image") as shown:
        write_synthetic_dataset(root, config.synthetic_images, progress=shown.update)
    return config, Source("synthetic", *isic_folders(root), True)


def prepare_data(config: Config, source: Source, group: Processes) -> tuple[DecodedPairs, Split]:
    """Find, decode and split the pairs; the first process decodes, the others open its cache."""
    found = limit_pairs(find_pairs(source.images, source.masks), config.limit)
    split = split_ids([pair.id for pair in found], config.test_fraction, config.validation_fraction, config.split_seed)
    cache = Path(config.cache or DATA / "cache")

    def decode() -> None:
        with bar("decoding images", len(found), "pair") as shown:
            decode_pairs(found, config.image_size, cache, shown.update)

    group.shared(decode)
    pairs = decode_pairs(found, config.image_size, cache)
    say(f"{len(found)} images: {len(split.train)} training, {len(split.validation)} validation, {len(split.test)} test")
    return pairs, split


def claim_results(
    results: Path, config: Config, source: Source, pairs: DecodedPairs, split: Split, device: torch.device
) -> str:
    """Write ``config.json`` and return the fingerprint of configuration and data.

    Raises:
        UserError: the folder holds the work of another configuration or of other data.
    """
    decides = {
        **config.experiment(), "amp": str(training_precision(config.amp, device)), "data": pairs.fingerprint(),
    }
    record = {
        "configuration": config.to_dict(),
        "identity": fingerprint(decides),
        "decides": decides,
        "synthetic": source.synthetic,
        "images": str(source.images.resolve()),
        "masks": str(source.masks.resolve()),
        "data_fingerprint": pairs.fingerprint(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "split": split._asdict(),
    }
    path = results / "config.json"
    if config.fresh:
        clear_results(results)
    if path.exists():
        before = read_json(path).get("decides", {})
        changed = [
            f"{key} was {before.get(key)!r} and is now {decides.get(key)!r}"
            for key in sorted({*before, *decides}) if before.get(key) != decides.get(key)
        ]
        if changed:
            raise UserError(
                f"{results} holds a run with other settings: {'; '.join(changed)}; "
                "choose another --results folder, or give --fresh to delete that run and start over"
            )
    write_json(path, record)
    return record["identity"]


def clear_results(results: Path) -> None:
    """Delete what a run leaves behind, and nothing else."""
    for name in ("config.json", "metrics.json", "per_image.csv", "training_log.csv", "calibration.npz"):
        (results / name).unlink(missing_ok=True)
    for name in ("weights", "uncertainty_maps", "figures"):
        shutil.rmtree(results / name, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages the numbers depend on."""
    packages = ("torch", "torchvision", "numpy", "pillow", "albumentations", "scikit-learn", "matplotlib")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


# ---------------------------------------------------------------- training


def train_model(
    config: Config, pairs: DecodedPairs, split: Split, group: Processes, results: Path, identity: str
) -> UNet:
    """Train, or reuse the weights that this very configuration made from these very data."""
    with bar("training", config.epochs * len(split.train), "image") as shown:

        def progress(count: int, note: str) -> None:
            shown.update(count)
            shown.set_postfix_str(note)

        result = train(config, pairs, split.train, split.validation, group, results, identity, progress)
    say(f"best validation Dice {result.best_dice:.4f} in {len(result.log)} epochs")
    return result.model


# ---------------------------------------------------------------- maps


class SavedMaps:
    """The saved maps of one part, read one image at a time; can be iterated any number of times."""

    def __init__(self, folder: Path, ids: Sequence[str], device: torch.device, threshold: float):
        self.folder, self.ids, self.device, self.threshold = folder, list(ids), device, threshold

    def path(self, id: str) -> Path:
        return self.folder / f"{id}.npz"

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, maps as tensors (H, W) on the device, with the numbers "empty_cams" and "threshold")."""
        need = [name for name in MAP_ARRAYS if name != "fused_score"]
        with ThreadPoolExecutor(1) as reader:  # reads the next file while this one is worked on
            files = reader.map(lambda id: read_maps(self.path(id), need), self.ids)
            for id, maps in zip(self.ids, files):
                tensors = {name: torch.from_numpy(maps[name]).to(self.device) for name in need}
                yield id, {**tensors, "empty_cams": maps["empty_cams"], "threshold": self.threshold}

    def shard(self, group: Processes) -> SavedMaps:
        """The part of the maps that one of several processes works on."""
        return SavedMaps(self.folder, group.shard(self.ids), self.device, self.threshold)

    def fallbacks(self) -> int:
        """How many maps overflowed in half precision and were made in fp32."""
        return sum(read_maps(self.path(id), ())["fallbacks"] for id in self.ids)

    def add_fused_scores(self, fusion: Fusion, identity: str, group: Processes) -> None:
        """Complete the files that lack the fused score."""
        for id in group.shard(self.ids):
            with np.load(self.path(id)) as content:
                if "fused_score" in content.files:
                    continue
            maps = read_maps(self.path(id), ["pred_variance", "saliency_variance"])
            fused = fusion(*(torch.from_numpy(maps[key]).to(self.device) for key in ("pred_variance", "saliency_variance")))
            arrays = {**{name: maps[name] for name in MAP_ARRAYS if name in maps}, "fused_score": fused.cpu().numpy()}
            write_maps(self.path(id), arrays, maps["empty_cams"], identity, maps["fallbacks"])


def make_maps(
    config: Config, model: UNet, pairs: DecodedPairs, ids: Sequence[str], group: Processes, results: Path,
    part: str, identity: str, fusion: Fusion | None = None,
) -> SavedMaps:
    """Make the maps of one part that are not there yet, and save each as soon as it is finished.

    The processes of a group share the images; a map is the same whoever makes it.
    """
    device = group.device
    saved = SavedMaps(results / "uncertainty_maps" / part, ids, device, config.threshold)
    missing = [id for id in ids if not _is_current(saved.path(id), identity, complete=fusion is not None)]
    group.gathered(None)  # all have looked before anyone writes
    together = 1 if device.type == "cpu" else config.batch_size
    with bar(f"maps of the {part} images", len(ids), "map", len(ids) - len(missing)) as shown, ThreadPoolExecutor(2) as writer:
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
                pending.append(writer.submit(write_maps, saved.path(id), one, empty[index], identity, fallbacks[index]))
            while len(pending) > 4 * together:  # a bounded queue: memory does not grow with a slow disk
                pending.pop(0).result()
            shown.update(min(len(names) * group.world, len(ids) - shown.n))
        for future in pending:
            future.result()
    group.gathered(None)  # all maps are there before anyone reads them
    return saved


def _is_current(path: Path, identity: str, complete: bool) -> bool:
    """Whether a map file is there, whole, and made by this very run."""
    if not path.exists():
        return False
    need = MAP_ARRAYS if complete else [name for name in MAP_ARRAYS if name != "fused_score"]
    try:
        return read_maps(path, need)["identity"] == identity
    except UserError:
        return False  # broken or of another version: made again


# ---------------------------------------------------------------- evaluation


def count(
    config: Config, validation: SavedMaps, test: SavedMaps, fusion: Fusion, group: Processes
) -> tuple[Counters, Counters]:
    """Count the pixels of both parts; the counts of all processes are merged by addition."""
    grid = lambda_grid(config.lambda_steps + 1)

    def counters(part: SavedMaps, edges: np.ndarray | None = None) -> Counters:
        mine = part.shard(group)
        shown = tqdm(mine, desc=f"counting {part.folder.name}", total=len(mine.ids), unit="map", disable=not group.first)
        counted = count_scores(shown, fusion, grid, config.bins, edges) if mine.ids else None
        return merge([shard for shard in group.gathered(counted) if shard is not None])

    counted = counters(validation)
    return counted, counters(test, evaluation.cell_edges(counted))


def evaluate(
    config: Config, validation: SavedMaps, test: SavedMaps, fusion: Fusion, counted: Counters, tested: Counters, results: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Save the counts, and compute every number from them: what ``metrics.json`` holds, and a row an image."""
    with whole_file(results / "calibration.npz") as stream:
        np.savez_compressed(
            stream,
            **{f"{part}/{name}": values for part, counters in (("validation", counted), ("test", tested))
               for name, values in counters.to_arrays().items()},
        )
    metrics = evaluation.summary(counted, tested, fusion, resamples=config.resamples, seed=config.seed)
    if config.study:
        metrics["study"] = run_study(
            validation, test, bins=config.bins, lambdas=config.lambda_steps + 1, resamples=config.resamples, seed=config.seed
        )
    return metrics, evaluation.per_image(tested)


# ---------------------------------------------------------------- what a person sees


def draw_figures(config: Config, metrics: Mapping[str, Any], pairs: DecodedPairs, test: SavedMaps, results: Path) -> None:
    """Draw the figures of the run from saved maps and numbers."""
    folder = results / "figures"
    rng = np.random.default_rng(config.seed)
    chosen = sorted(rng.choice(test.ids, size=min(6, len(test.ids)), replace=False).tolist())
    cases = []
    for id in chosen:
        maps = read_maps(test.path(id))
        cases.append(visualize.Case(id, np.array(pairs.image(id)), maps, maps["true_mask"]))
    figure = visualize.case_figure(
        cases, metrics["normalisation"], threshold=config.threshold, synthetic=metrics["synthetic"],
        note=f"test images drawn with seed {config.seed}; T = {config.passes}, λ = {metrics['lambda']:g}",
    )
    visualize.save_figure(figure, folder / "cases.png")
    visualize.save_figure(visualize.reliability_figure(metrics), folder / "reliability.png")
    visualize.save_figure(visualize.lambda_figure(metrics), folder / "lambda_curve.png")
    visualize.save_figure(visualize.training_figure(results / "training_log.csv", metrics["synthetic"]), folder / "training.png")


def report(metrics: Mapping[str, Any], results: Path, source: Source) -> None:
    """Print the table, the verdict, and where everything lies."""
    test, ece = metrics["test"], metrics["test"]["foreground_ece"]
    print(f"\nTest set of {source.name}: {test['images']} images, Dice {test['dice']:.4f}, Jaccard {test['jaccard']:.4f}")
    print(f"{'foreground ECE (lower is better)':<44}           95 % interval")
    labels = {
        "predictive_variance": "predictive variance alone (lambda = 1)",
        "saliency_variance": "saliency variance alone (lambda = 0)",
        "fused": f"fused score (lambda = {metrics['lambda']:g})",
    }
    for key, label in labels.items():
        if ece[key] is None:
            print(f"  {label:<42}  not a number: no foreground pixel")
        else:
            low, high = test["foreground_ece_interval"][key]
            print(f"  {label:<42}  {ece[key]:.4f}   {low:.4f} to {high:.4f}")
    print(f"\n{metrics['verdict']}")
    if metrics["synthetic"]:
        print("These are SYNTHETIC LESIONS: the verdict describes made-up images, not patients.")
    print(f"\nmetrics  {results / 'metrics.json'}\nmaps     {results / 'uncertainty_maps'}\nfigures  {results / 'figures'}")
    print(f"{metrics['minutes']:.1f} minutes; look at any case: python visualize.py --run {results}")


if __name__ == "__main__":
    sys.exit(main())
