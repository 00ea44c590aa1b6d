"""The experiment, from images to a verdict.

Trains a U-Net, makes the uncertainty maps of the validation and test images,
tunes the fusion on validation, and measures calibration on test.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # while the packages load there is nothing to save: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isic.source import Source, find_source, needs_synthetic
from runtime.config import SYNTHETIC, Config, parse_config
from runtime.errors import UserError
from runtime.progress import complain, console, progress_bar, stage, with_progress
from runtime.signals import StopSignals

# PyTorch and whatever needs it are imported by the functions below, when the command line is understood:
# a wrong flag or --help is answered at once.
if TYPE_CHECKING:
    from dataset import Data
    from evaluation.counting import Counters
    from evaluation.tuning import Tuned
    from experiment.maps import SavedMaps
    from experiment.run import Run
    from model import UNet


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line describes; returns the exit code."""
    with StopSignals() as signals:
        try:
            config = parse_config(argv, __doc__)
            if needs_synthetic(config):
                config = parse_config(argv, __doc__, SYNTHETIC)
            with console(config.quiet, config.json):
                run_experiment(config)
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


def run_experiment(config: Config) -> dict[str, Any]:
    """The whole experiment; returns what ``metrics.json`` holds."""
    from dataset import prepare_data
    from evaluation.fusion import lambda_grid
    from evaluation.tuning import tune
    from experiment.maps import make_maps
    from experiment.results import claim_results, held, results_folder
    from runtime.checkpoints import weights_fingerprint
    from runtime.processes import process_group
    from runtime.records import fingerprint

    started = time.perf_counter()
    with process_group(config.device) as group:
        source = group.shared(lambda: find_source(config))
        results = results_folder(config, source)
        with held(results, group):
            data = prepare_data(config, source, group)
            run = claim_results(results, config, source, data, group)

            model = train_model(run, data)
            run = replace(run, identity=fingerprint([run.identity, weights_fingerprint(model)]))

            validation = make_maps(run, model, data.pairs, "validation", data.split.validation)
            tuned = group.shared(lambda: tune(validation, bins=config.bins, lambdas=lambda_grid(config.lambda_steps)))
            test = make_maps(run, model, data.pairs, "test", data.split.test, tuned.fusion)
            for part in (validation, test):
                part.add_fused_scores(tuned.fusion, group)

            counted = count_pixels(run, tuned, validation, test)
            fallbacks = {part.folder.name: part.fallbacks(group) for part in (validation, test)}

            def finish() -> dict[str, Any]:
                metrics, rows = evaluate(run, tuned, counted, validation, test)
                for part, count in fallbacks.items():
                    metrics[part]["precision_fallbacks"] = count
                metrics = {
                    **metrics, "synthetic": source.synthetic, "data_note": config.data_note, "identity": run.identity,
                    "skipped": [entry._asdict() for entry in data.skipped], "minutes": (time.perf_counter() - started) / 60,
                }
                return finish_run(run, source, data, metrics, rows, started)

            return group.shared(finish)


def train_model(run: Run, data: Data) -> UNet:
    """Train, or take the weights that this very configuration made from these very data, or those of a named run."""
    import torch

    from experiment.results import copy_weights, unfinish
    from model import UNet
    from reporting.formats import number
    from runtime.checkpoints import load_model
    from train import train

    config, group = run.config, run.group
    if config.weights_from is not None:
        source = Path(config.weights_from)
        group.shared(lambda: copy_weights(source, run.results))
        stage("training", f"none; the weights are those of {source}")
        best = run.results / "weights" / "best_model.pth"
        model = group.shared(lambda: load_model(best, UNet, torch.device("cpu"))).to(group.device)
        assert isinstance(model, UNet)
        return model
    with progress_bar("training", config.epochs * len(data.split.train), "image") as bar:

        def report(count: int, note: str) -> None:
            bar.update(count)
            bar.set_postfix_str(note)

        result = train(
            config, data.pairs, data.split.train, data.split.validation, group, run.results, run.identity, report,
            before_epoch=lambda: unfinish(run.results),
        )
    stage("training", f"best validation Dice {number(result.best_dice)}, epochs trained: {len(result.log)}")
    return result.model


def count_pixels(run: Run, tuned: Tuned, validation: SavedMaps, test: SavedMaps) -> tuple[Counters, Counters]:
    """Count the pixels of both parts; each process counts its share of the images."""
    from evaluation.protocol import count_splits

    def shown(part: SavedMaps) -> Iterator[tuple[str, dict[str, Any]]]:
        share = part.shard(run.group)
        return with_progress(share, f"counting {part.folder.name}", len(share.ids), "map")

    return count_splits(tuned, shown(validation), shown(test), gather=run.group.gathered)


def evaluate(
    run: Run, tuned: Tuned, counted: tuple[Counters, Counters], validation: SavedMaps, test: SavedMaps
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Save the counts, and compute every number from them: what ``metrics.json`` holds, and a row per image."""
    from evaluation.study import run_study
    from evaluation.summary import per_image, summarise
    from experiment.results import write_counts

    config = run.config
    write_counts(run, *counted)
    metrics = summarise(*counted, tuned.fusion, resamples=config.resamples, seed=config.seed)
    if config.study:
        metrics["study"] = run_study(
            validation, test, bins=config.bins, lambdas=tuned.lambdas, resamples=config.resamples, seed=config.seed
        )
    stage("evaluation", f"lambda = {metrics['lambda']:g}, {config.resamples} resamples{', study' if config.study else ''}")
    return metrics, per_image(counted[1])


def finish_run(
    run: Run, source: Source, data: Data, metrics: Mapping[str, Any], rows: list[dict[str, Any]], started: float
) -> dict[str, Any]:
    """Write the numbers, draw the figures and the report, and say the verdict; returns the sealed metrics."""
    import numpy as np

    from experiment.saved_run import SavedRun, read_table
    from reporting.console import show_result
    from reporting.run_pictures import draw_run
    from runtime.records import read_json, seal, write_csv, write_json

    results = run.results
    write_csv(results / "per_image.csv", rows)
    saved = SavedRun(
        results, metrics, read_json(results / "config.json"),
        read_table(results / "per_image.csv"), read_table(results / "training_log.csv"),
    )
    paths = draw_run(saved, lambda id: np.array(data.pairs.image(id)))
    stage("figures", f"{len(paths) - 2} figures, report.html and report.md")
    sealed = seal(metrics)
    write_json(results / "metrics.json", sealed)  # last: its presence says that the run is finished
    show_result(sealed, results, source.name, time.perf_counter() - started)
    return sealed


if __name__ == "__main__":
    sys.exit(main())
