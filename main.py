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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isic.source import needs_synthetic
from runtime.config import SYNTHETIC, Config, parse_config
from runtime.cpu import prepare_cpu
from runtime.errors import UserError
from runtime.progress import complain, console, is_main_process, progress_bar, stage
from runtime.signals import StopSignals

# The functions below import PyTorch, when the command line is understood: a wrong flag or --help is answered at once.
if TYPE_CHECKING:
    from dataset import Data
    from experiment.inputs import Inputs
    from experiment.networks import Network
    from experiment.run import Run
    from reporting.galleries import ImageReader
    from runtime.processes import ProcessGroup


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line describes; returns the exit code."""
    with StopSignals() as signals:
        try:
            config = parse_config(argv, __doc__, taken_settings)
            if config.pool is None and config.maps is None and needs_synthetic(config):
                config = parse_config(argv, __doc__, SYNTHETIC)
            with console(config.quiet, config.json):
                (read_runs if config.verify or config.pool else judge_maps if config.maps else run_experiment)(config)
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


def taken_settings(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What stands in for the defaults: the settings of the run whose weights are taken, if any."""
    if "weights_from" not in given:
        return None
    from experiment.source_run import settings_from

    return settings_from(given)


def run_experiment(config: Config) -> dict[str, Any]:
    """The whole experiment: one training, or several and their pool; returns what ``metrics.json`` holds."""
    from experiment.inputs import prepare_inputs, source_of
    from experiment.network_checks import check_network
    from experiment.pooling import check_margins
    from experiment.results import held, kept_of_run, results_folder
    from experiment.trainings import kept_of_trainings, train_all
    from reporting.console import show_result
    from runtime.processes import process_group

    started = time.perf_counter()
    check_margins(config.margin)
    with process_group(config.device) as group:
        if config.model is not None:
            stage("network", str(group.shared(lambda: check_network(config))))
        source = group.shared(lambda: source_of(config, group.device))
        results = results_folder(config, source)
        with held(results, group, kept_of_run if config.trainings == 1 else kept_of_trainings):
            inputs = prepare_inputs(config, source, group)
            if config.trainings > 1:
                train = partial(run_training, inputs=inputs, group=group)
                folders = train_all(config, results, inputs.data, group, train, inputs.records)
                return group.shared(lambda: pool(config, folders, results, started))
            metrics = run_training(config, results, inputs, group)
            group.shared(lambda: show_result(metrics, results, source.name, time.perf_counter() - started))
            return metrics


def run_training(config: Config, results: Path, inputs: Inputs, group: ProcessGroup) -> dict[str, Any]:
    """One training, from weights to its report; returns what its ``metrics.json`` holds."""
    from experiment.maps import make_maps
    from experiment.numbers import measure, measure_targets, tuned_on
    from experiment.results import claim_results
    from experiment.targets import make_target_maps
    from runtime.checkpoints import weights_fingerprint
    from runtime.records import fingerprint
    from runtime.stages import start_clock, timed

    clock, data = start_clock(), inputs.data
    claimed = claim_results(results, config, inputs.source, data, group, inputs.records)
    with timed("training"):
        model = train_model(claimed, data)
    run = replace(claimed, identity=fingerprint([claimed.identity, weights_fingerprint(model)]))
    if data is None:  # only other test sets are left to be measured
        metrics, rows = measure_targets(run, partial(make_target_maps, run, model, inputs.targets))
    else:
        validation = make_maps(run, model, data.pairs, "validation", data.split.validation)
        tuned = tuned_on(run, validation)
        test = make_maps(run, model, data.pairs, "test", data.split.test, tuned.fusion)
        others = make_target_maps(run, model, inputs.targets, tuned.fusion)
        metrics, rows = measure(run, tuned, validation, test, data.groups, others)
        metrics["skipped"] = [entry._asdict() for entry in data.skipped]
    metrics.update(
        synthetic=inputs.source.synthetic, data_note=config.data_note, identity=run.identity,
        config_identity=claimed.identity, minutes=clock.minutes, seconds_by_stage=clock.stages,
    )
    return group.shared(lambda: finish_run(run, metrics, rows, inputs.picture if data else None))


def judge_maps(config: Config) -> dict[str, Any]:
    """Judge maps that something else made, as those of a run are; returns what ``metrics.json`` holds."""
    from experiment.numbers import measure, tuned_on
    from experiment.own_maps import claim_maps, described, find_maps, kept_of_maps, maps_folder, take_maps
    from experiment.pooling import check_margins
    from experiment.results import held
    from reporting.console import show_result
    from runtime.processes import process_group
    from runtime.stages import start_clock

    started, clock = time.perf_counter(), start_clock()
    check_margins(config.margin)
    with process_group(config.device) as group:
        given, results = find_maps(config, group), maps_folder(config)
        with held(results, group, kept_of_maps):
            run = claim_maps(results, config, given, group)
            validation, test = (take_maps(run, given, part) for part in ("validation", "test"))
            tuned = tuned_on(run, validation)
            numbers = measure(run, tuned, validation, test, given.groups or None)
            found = described(given, run, numbers.metrics)
            metrics = {**found, "minutes": clock.minutes, "seconds_by_stage": clock.stages}
            sealed = group.shared(lambda: finish_run(run, metrics, numbers.rows, test.picture))
            group.shared(lambda: show_result(sealed, results, given.folders["test"].name, time.perf_counter() - started))
            return sealed


def train_model(run: Run, data: Data | None) -> Network:
    """Train, or take the weights that this very configuration made from these very data, or those of a named run or file."""
    from experiment.networks import load_network
    from experiment.results import take_weights_of, unfinish
    from reporting.formats import number
    from train import train

    config, group = run.config, run.group
    taken = config.weights_from or config.model_weights
    if taken is not None:
        group.shared(lambda: take_weights_of(config, run.results, run.identity))
        stage("training", f"none; the weights are those of {taken}")
        return load_network(run.results / "weights" / "best_model.pth", config, group)
    assert data is not None  # it is only where weights are taken
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


def finish_run(run: Run, metrics: Mapping[str, Any], rows: list[dict[str, Any]], read: ImageReader | None) -> dict[str, Any]:
    """Write the numbers, draw the figures and, with pictures that ``read`` gives, the report; returns the sealed metrics."""
    from experiment.saved_run import sealed_metrics, with_tables
    from reporting.console import show_warnings
    from reporting.run_pictures import draw_run
    from runtime.records import write_csv, write_json

    show_warnings(metrics)
    write_csv(run.results / "per_image.csv", rows)
    paths = draw_run(with_tables(run.results, metrics), read)
    stage("figures", f"{len(paths) - 2} figures, report.html and report.md")
    sealed = sealed_metrics(metrics, run.results)
    write_json(run.results / "metrics.json", sealed)  # last: its presence says that the run is finished
    return sealed


def read_runs(config: Config) -> None:
    """Check a finished run against all that it came from, or pool runs that were made elsewhere."""
    from experiment.pooling import pool_folder
    from experiment.verify import verify_results

    if config.verify and is_main_process():
        verify_results(config)
    elif is_main_process():  # one is enough
        with pool_folder(config) as results:
            pool(config, [Path(run) for run in config.pool or ()], results, time.perf_counter())


def pool(config: Config, folders: Sequence[Path], results: Path, started: float) -> dict[str, Any]:
    """Conclude from finished trainings together, draw it and say the verdict; returns what ``metrics.json`` holds."""
    from experiment.pooling import write_pool
    from reporting.console import show_pooled
    from reporting.pooled import draw_pooled

    metrics = write_pool(config, folders, results, draw_pooled)
    show_pooled(metrics, results, time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    prepare_cpu()  # before PyTorch loads
    sys.exit(main())
