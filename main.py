"""The experiment, from images to a verdict.

Trains a U-Net, makes the uncertainty maps of the validation and test images,
tunes the fusion on validation, and measures calibration on test.
"""

from __future__ import annotations

import platform
import shutil
import signal
import sys

if __name__ == "__main__":  # while the packages load there is nothing to save: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import evaluation
import terminal
from charts import SavedRun, read_table
from checkpoints import copy_weights, finished_weights, load_model, weights_fingerprint
from config import AFTER_TRAINING, SYNTHETIC, Config, parse_config
from counters import Counters, count_scores, merge
from dataset import BadPair, DecodedPairs, Split, decode_pairs, find_pairs, isic_folders, leave_out, limit_pairs, split_ids
from download import download_isic
from formats import number
from fusion import Fusion, lambda_grid
from interruption import StopSignals
from maps import MAP_FOLDERS, SavedMaps, make_maps
from model import UNet
from processes import Processes, is_first, process_group
from storage import (
    FolderLock,
    UserError,
    fingerprint,
    printable,
    read_json,
    remove_partials,
    seal,
    whole_file,
    write_csv,
    write_json,
)
from study import run_study
from synthetic import is_synthetic, write_synthetic_dataset
from terminal import stage, tqdm
from train import train, training_precision
from visualize import draw_run

DATA = Path("data")
RESULTS = Path("results")
SYNTHETIC_BANNER = """\
************************************************************************
*  SYNTHETIC LESIONS. No dataset was named, and data/ISIC2018 is not   *
*  here, so this run draws its own images and trains a small network.  *
*  Its numbers show that the pipeline works; they say nothing about    *
*  patients. README.md: how to get ISIC.                               *
************************************************************************"""


class Source(NamedTuple):
    """Where the images come from: a name for the results folder, the two folders, whether made up."""

    name: str
    images: Path
    masks: Path
    synthetic: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line describes; returns the exit code."""
    with StopSignals() as signals:
        try:
            config = parse_config(argv, __doc__)
            if needs_synthetic(config):
                config = parse_config(argv, __doc__, SYNTHETIC)
            with terminal.console(config.quiet, config.json):
                run(config)
        except UserError as error:
            complain(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            pass
        except Exception as error:
            # the helpers may die of the same signal and be reported first
            if signals.signum is None and not isinstance(error, OSError):
                raise
            if signals.signum is None:  # a terminal or a pipe that is gone, a disk that fails while it is read
                complain(f"error: {UserError(error)}; run the same command again to go on")
                return 2
        else:
            return 0
        signum = signals.signum or signal.SIGINT
        complain(f"stopped by {signal.Signals(signum).name}; the same command goes on from there")
        return 128 + signum


def complain(line: str) -> None:
    """Print a line for the user, once, unless the terminal or the disk below the log is what failed."""
    with suppress(OSError):
        if is_first():
            print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print, in the first process only."""
    if is_first():
        print(text)


def bar(description: str, total: int, unit: str) -> tqdm:
    """A progress bar; see :func:`terminal.tqdm`."""
    return tqdm(desc=description, total=total, unit=unit, smoothing=0.05)


@contextmanager
def saying_what_is_kept(results: Path) -> Iterator[None]:
    """Where the block is stopped, print what of the run is safe."""
    try:
        yield
    except KeyboardInterrupt:
        log = results / "training_log.csv"
        epochs = max(len(log.read_text().splitlines()) - 1, 0) if log.is_file() else 0
        maps = len(list(results.glob("uncertainty_maps/*/*.npz")))
        complain(f"\nkept in {results}: {epochs} finished epochs, {maps} finished maps")
        raise


def run(config: Config) -> dict[str, Any]:
    """The whole experiment; returns what ``metrics.json`` holds."""
    started = time.perf_counter()
    with process_group(config.device) as group:
        source = group.shared(lambda: find_source(config))
        results = Path(config.results or RESULTS / (source.name + ("-quick" if config.quick and not source.synthetic else "")))
        with ExitStack() as held, saying_what_is_kept(results):

            def hold() -> None:
                held.enter_context(FolderLock(results))
                remove_partials(results, *(results / name for name in ("weights", "figures", *MAP_FOLDERS)))

            group.shared(hold)
            pairs, split = prepare_data(config, source, group)
            identity = group.shared(lambda: claim_results(results, config, source, pairs, split, group.device))
            model = train_model(config, pairs, split, group, results, identity)
            identity = fingerprint([identity, weights_fingerprint(model)])

            make = partial(make_maps, config, model, pairs, group=group, results=results, identity=identity,
                           before_first=partial(unfinish, results))
            validation = make(split.validation, part="validation")
            fusion = group.shared(lambda: evaluation.tune(validation, bins=config.bins, lambdas=config.lambda_steps + 1))
            test = make(split.test, part="test", fusion=fusion)
            for part in (validation, test):
                part.add_fused_scores(fusion, identity, group)

            counted, tested = count(config, validation, test, fusion, group)

            def finish() -> dict[str, Any]:
                metrics, rows = evaluate(config, validation, test, fusion, counted, tested, results, identity)
                metrics = {
                    **metrics, "synthetic": source.synthetic, "data_note": config.data_note, "identity": identity,
                    "skipped": [entry._asdict() for entry in pairs.skipped], "minutes": (time.perf_counter() - started) / 60,
                }
                write_csv(results / "per_image.csv", rows)
                draw_figures(metrics, pairs, results)
                metrics = seal(metrics)
                write_json(results / "metrics.json", metrics)  # last: its presence says that the run is finished
                terminal.show_result(metrics, results, source.name, time.perf_counter() - started)
                return metrics

            return group.shared(finish)


# ---------------------------------------------------------------- data


def needs_synthetic(config: Config) -> bool:
    """Whether no dataset is named and none is there."""
    named = config.download or config.images is not None or config.data is not None
    return not named and not (DATA / "ISIC2018").exists()


def find_source(config: Config) -> Source:
    """Find the images, or draw them where none are named and none are there."""
    if needs_synthetic(config):
        say(SYNTHETIC_BANNER)
        root = DATA / f"synthetic-{config.synthetic_images}"
        with bar("drawing synthetic lesions", config.synthetic_images, "image") as shown:
            write_synthetic_dataset(root, config.synthetic_images, progress=shown.update)
        return Source("synthetic", *isic_folders(root), True)
    if config.download:
        download_isic(DATA / "ISIC2018")
    if config.images is not None:
        images, masks = Path(config.images), Path(config.masks or "")
        return Source(images.resolve().name.lower(), images, masks, is_synthetic(images.resolve().parent))
    root = Path(config.data or DATA / "ISIC2018")
    return Source(root.resolve().name.lower(), *isic_folders(root), is_synthetic(root))


def prepare_data(config: Config, source: Source, group: Processes) -> tuple[DecodedPairs, Split]:
    """Find, decode and split the pairs; the first process decodes, the others open its cache.

    The split is that of all ids found; pairs left out by ``--skip-bad`` then leave their part.
    """
    bad: list[BadPair] | None = [] if config.skip_bad else None
    found = find_pairs(source.images, source.masks, bad)
    ids = limit_pairs(sorted([pair.id for pair in found] + [entry.id for entry in bad or ()]), config.limit)
    wanted = set(ids)
    found = [pair for pair in found if pair.id in wanted]
    split = split_ids(ids, config.test_fraction, config.validation_fraction, config.split_seed)
    cache = Path(config.cache or DATA / "cache")

    def decode() -> list[BadPair]:
        refused: list[BadPair] | None = None if bad is None else []
        with bar("decoding images", len(found), "pair") as shown:
            waiting = partial(shown.write, file=sys.stderr)
            decode_pairs(found, config.image_size, cache, shown.update, refused, waiting)
        return refused or []

    refused = group.shared(decode)
    broken = {entry.id for entry in refused}
    pairs = decode_pairs([pair for pair in found if pair.id not in broken], config.image_size, cache)
    bad = [*(bad or []), *refused]
    if bad:
        pairs.skipped = sorted(entry for entry in bad if entry.id in wanted)
        split = leave_out(split, {entry.id for entry in pairs.skipped})
    if pairs.skipped:
        reasons = "; ".join(f"{entry.id}: {entry.reason}" for entry in pairs.skipped)
        complain(f"warning: {len(pairs.skipped)} of {len(ids)} pairs are left out: {printable(reasons)}")
    parts = ", ".join(f"{len(ids)} {part}" for part, ids in zip(("training", "validation", "test"), split))
    stage("data", f"{len(pairs.ids)} images: {parts}")
    return pairs, split


def claim_results(
    results: Path, config: Config, source: Source, pairs: DecodedPairs, split: Split, device: torch.device
) -> str:
    """Write ``config.json`` and return the fingerprint of configuration and data.

    Raises:
        UserError: the folder holds the work of another configuration or of other data.
    """
    # the pairs left out took part in the split, so they decide the numbers too
    decides = {
        **config.experiment(), "amp": str(training_precision(config.amp, device)),
        "data": pairs.fingerprint(), "skipped": [entry.id for entry in pairs.skipped],
    }
    if config.weights_from is not None:
        if Path(config.weights_from).resolve() == results.resolve():
            raise UserError(f"--weights-from names {results}, where this run would write; give another --results folder")
        decides["weights"] = finished_weights(Path(config.weights_from), decides, AFTER_TRAINING)
    environment = {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": versions(),
    }
    record = {
        "configuration": config.to_dict(),
        "identity": fingerprint(decides),
        "decides": decides,
        "synthetic": source.synthetic,
        "images": str(source.images.resolve()),
        "masks": str(source.masks.resolve()),
        "data_fingerprint": pairs.fingerprint(),
        **environment,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "split": split._asdict(),
        "skipped": [entry._asdict() for entry in pairs.skipped],
        "earlier": [],
    }
    path = results / "config.json"
    if config.fresh:
        clear_results(results)
    if path.exists():
        old = read_json(path)
        before = old.get("decides")
        if not isinstance(before, dict):
            raise UserError(f"{path} does not say what the run in {results} was; give --fresh to delete it and start over")
        changed = [
            f"{key} was {before.get(key)!r} and is now {decides.get(key)!r}"
            for key in sorted({*before, *decides}) if before.get(key) != decides.get(key)
        ]
        if changed:
            raise UserError(
                f"{results} holds a run with other settings: {'; '.join(changed)}; "
                "choose another --results folder, or give --fresh to delete that run and start over"
            )
        # weights and maps that are used again may come from other versions or another device
        known = [*old.get("earlier", []), {key: old.get(key) for key in environment}]
        record["earlier"] = [entry for place, entry in enumerate(known) if entry not in (environment, *known[:place])]
    else:  # what is there cannot be this run's
        unfinish(results)
    write_json(path, record)
    return record["identity"]


def unfinish(results: Path) -> None:
    """Delete the numbers of a finished run, because something they came from is about to be made again."""
    # the first says that the run is finished
    for name in ("metrics.json", "report.html", "report.md", "per_image.csv", "calibration.npz"):
        (results / name).unlink(missing_ok=True)


def clear_results(results: Path) -> None:
    """Delete what a run leaves behind, and nothing else."""
    unfinish(results)
    for name in ("config.json", "training_log.csv"):
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
    """Train, or take the weights that this very configuration made from these very data, or those of a named run."""
    if config.weights_from is not None:
        group.shared(lambda: copy_weights(Path(config.weights_from), results))
        stage("training", f"none; the weights are those of {config.weights_from}")
        return group.shared(lambda: load_model(results / "weights" / "best_model.pth", torch.device("cpu"))).to(group.device)
    with bar("training", config.epochs * len(split.train), "image") as shown:

        def progress(count: int, note: str) -> None:
            shown.update(count)
            shown.set_postfix_str(note)

        result = train(
            config, pairs, split.train, split.validation, group, results, identity, progress,
            before_epoch=partial(unfinish, results),
        )
    stage("training", f"best validation Dice {number(result.best_dice)}, epochs trained: {len(result.log)}")
    return result.model


# ---------------------------------------------------------------- evaluation


def count(
    config: Config, validation: SavedMaps, test: SavedMaps, fusion: Fusion, group: Processes
) -> tuple[Counters, Counters]:
    """Count the pixels of both parts; the counts of all processes are merged by addition."""
    grid = lambda_grid(config.lambda_steps + 1)

    def counters(part: SavedMaps, edges: np.ndarray | None = None) -> Counters:
        mine = part.shard(group)
        shown = tqdm(mine, desc=f"counting {part.folder.name}", total=len(mine.ids), unit="map")
        counted = count_scores(shown, fusion, grid, config.bins, edges) if mine.ids else None
        return merge([shard for shard in group.gathered(counted) if shard is not None])

    counted = counters(validation)
    return counted, counters(test, evaluation.cell_edges(counted))


def evaluate(
    config: Config, validation: SavedMaps, test: SavedMaps, fusion: Fusion, counted: Counters, tested: Counters,
    results: Path, identity: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Save the counts, and compute every number from them: what ``metrics.json`` holds, and a row an image."""
    with whole_file(results / "calibration.npz") as stream:
        np.savez_compressed(
            stream, identity=np.array(identity),
            **{f"{part}/{name}": values for part, counters in (("validation", counted), ("test", tested))
               for name, values in counters.to_arrays().items()},
        )
    metrics = evaluation.summary(counted, tested, fusion, resamples=config.resamples, seed=config.seed)
    for part in (validation, test):
        metrics[part.folder.name]["precision_fallbacks"] = part.fallbacks()
    if config.study:
        metrics["study"] = run_study(
            validation, test, bins=config.bins, lambdas=config.lambda_steps + 1, resamples=config.resamples, seed=config.seed
        )
    stage("evaluation", f"lambda = {metrics['lambda']:g}, {config.resamples} resamples{', study' if config.study else ''}")
    return metrics, evaluation.per_image(tested)


# ---------------------------------------------------------------- what a person sees


def draw_figures(metrics: Mapping[str, Any], pairs: DecodedPairs, results: Path) -> None:
    """Draw the figures of the run and write its report, from saved maps and numbers."""
    rows, log = read_table(results / "per_image.csv"), read_table(results / "training_log.csv")
    run = SavedRun(results, metrics, read_json(results / "config.json"), rows, log)
    paths = draw_run(run, lambda id: np.array(pairs.image(id)))
    stage("figures", f"{len(paths) - 2} figures, report.html and report.md")


if __name__ == "__main__":
    sys.exit(main())
