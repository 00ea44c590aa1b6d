"""The results folder of a run: holding it, claiming it, and what of another run it may use."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from dataset import Data
from evaluation.counting import Counters
from experiment.run import Run
from isic.source import Source
from runtime.checkpoints import load_checkpoint, state_fingerprint
from runtime.config import AFTER_TRAINING, Config
from runtime.devices import training_precision
from runtime.errors import UserError
from runtime.files import atomic_write, remove_partials
from runtime.lock import FolderLock
from runtime.processes import ProcessGroup
from runtime.progress import complain
from runtime.records import fingerprint, read_json, read_sealed, write_json

RESULTS = Path("results")
MAP_FOLDERS = ("uncertainty_maps/validation", "uncertainty_maps/test")
#: The numbers of a finished run; the first says that it is finished.
NUMBERS = ("metrics.json", "report.html", "report.md", "per_image.csv", "calibration.npz")


def results_folder(config: Config, source: Source) -> Path:
    """The folder of a run or of several trainings: the one that was named, or that of the dataset."""
    quick = "-quick" if config.quick and not source.synthetic else ""
    several = "-trainings" if config.trainings > 1 else ""
    return Path(config.results or RESULTS / f"{source.name}{quick}{several}")


def kept_of_run(results: Path) -> str:
    """What of an unfinished run the same command will use."""
    log = results / "training_log.csv"
    epochs = max(len(log.read_text().splitlines()) - 1, 0) if log.is_file() else 0
    maps = len(list(results.glob("uncertainty_maps/*/*.npz")))
    return f"{epochs} finished epochs, {maps} finished maps"


@contextmanager
def held(results: Path, group: ProcessGroup, kept: Callable[[Path], str] = kept_of_run) -> Iterator[None]:
    """Hold a results folder for this command; on a stop, say what in it is safe.

    Args:
        results: the folder; made when absent.
        group: its main process holds it.
        kept: says what is safe.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(FolderLock(results))
            remove_partials(results, *(results / name for name in ("weights", "figures", *MAP_FOLDERS)))

        group.shared(hold)
        try:
            yield
        except KeyboardInterrupt:
            complain(f"\nkept in {results}: {kept(results)}")
            raise


def claim_results(results: Path, config: Config, source: Source, data: Data, group: ProcessGroup) -> Run:
    """Write ``config.json`` and return the run that the folder now belongs to.

    Raises:
        UserError: the folder holds the work of another configuration or of other data.
    """

    def claim() -> str:
        inputs = identity_inputs(results, config, data, group.device)
        record = _record(config, source, data, group.device, inputs)
        path = results / "config.json"
        if config.fresh:
            clear_results(results)
        if path.exists():
            old = read_json(path)
            _refuse_other_settings(results, old, inputs)
            record["earlier"] = _earlier_environments(old, record)
        else:  # what is there cannot be this run's
            unfinish(results)
        write_json(path, record)
        return str(record["identity"])

    return Run(config, group, results, group.shared(claim))


def identity_inputs(results: Path, config: Config, data: Data, device: torch.device) -> dict[str, Any]:
    """All that the numbers of a run depend on: settings, data, and the weights it takes from another run, if any."""
    inputs = {
        **config.experiment(), "amp": str(training_precision(config.amp, device)),
        "data": data.pairs.fingerprint(),
        "skipped": [entry.id for entry in data.skipped],  # they took part in the split, so they decide the numbers too
    }
    if config.weights_from is not None:
        if Path(config.weights_from).resolve() == results.resolve():
            raise UserError(f"--weights-from names {results}, where this run would write; give another --results folder")
        inputs["weights"] = finished_weights(Path(config.weights_from), inputs)
    return inputs


def _record(
    config: Config, source: Source, data: Data, device: torch.device, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "configuration": config.to_dict(),
        "identity": fingerprint(inputs),
        "decides": dict(inputs),
        "synthetic": source.synthetic,
        "images": str(source.images.resolve()),
        "masks": str(source.masks.resolve()),
        "data_fingerprint": data.pairs.fingerprint(),
        **_environment(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "split": data.split._asdict(),
        "skipped": [entry._asdict() for entry in data.skipped],
        "earlier": [],
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions of Python and of the packages that the numbers depend on."""
    packages = ("torch", "torchvision", "numpy", "pillow", "albumentations", "scikit-learn", "matplotlib")
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def _earlier_environments(old: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other environments that weights and maps which are used again may come from, each once."""
    keys = ("device", "device_name", "versions")
    now = {key: record[key] for key in keys}
    known = [*old.get("earlier", []), {key: old.get(key) for key in keys}]
    return [entry for place, entry in enumerate(known) if entry not in (now, *known[:place])]


def _refuse_other_settings(results: Path, old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    before = old.get("decides")
    if "pooled" in old:
        raise UserError(f"{results} holds several trainings; choose another --results folder for one")
    if not isinstance(before, dict):
        raise UserError(
            f"{results / 'config.json'} does not say what the run in {results} was; give --fresh to delete it and start over"
        )
    changed = [
        f"{key} was {before.get(key)!r} and is now {inputs.get(key)!r}"
        for key in sorted({*before, *inputs}) if before.get(key) != inputs.get(key)
    ]
    if changed:
        raise UserError(
            f"{results} holds a run with other settings: {'; '.join(changed)}; "
            "choose another --results folder, or give --fresh to delete that run and start over"
        )


def unfinish(results: Path) -> None:
    """Delete the numbers of a finished run, because something they came from is about to be made again."""
    for name in NUMBERS:
        (results / name).unlink(missing_ok=True)


def clear_results(results: Path) -> None:
    """Delete what a run leaves behind, and nothing else."""
    unfinish(results)
    for name in ("config.json", "training_log.csv"):
        (results / name).unlink(missing_ok=True)
    for name in ("weights", "uncertainty_maps", "figures"):
        shutil.rmtree(results / name, ignore_errors=True)


# ---------------------------------------------------------------- weights of another run


def finished_weights(source: Path, inputs: Mapping[str, Any]) -> str:
    """The fingerprint of the weights of a finished run that another run wants to take.

    Args:
        source: results folder of the finished run.
        inputs: the settings and the data of the other run; the two may differ in what acts after training.

    Raises:
        UserError: there is no finished run, its weights are not those it was
            evaluated with, or it was trained in another way or on other data.
    """
    if not (source / "metrics.json").is_file():
        raise UserError(f"--weights-from {source} holds no finished run (no metrics.json); finish it, or name another folder")
    metrics, record = read_sealed(source / "metrics.json"), read_json(source / "config.json")
    best = source / "weights" / "best_model.pth"
    weights = state_fingerprint(load_checkpoint(best)["model"])
    if metrics.get("identity") != fingerprint([record.get("identity"), weights]):
        raise UserError(f"{best} does not hold the weights that {source / 'metrics.json'} is about; finish that run first")
    before = record.get("decides", {})
    changed = [
        f"{key} is {before.get(key)!r} there and {inputs.get(key)!r} here"
        for key in sorted({*before, *inputs} - {*AFTER_TRAINING, "weights"}) if before.get(key) != inputs.get(key)
    ]
    if changed:
        raise UserError(f"{source} was trained otherwise: {'; '.join(changed)}; give the same, or leave --weights-from out")
    return weights


def copy_weights(source: Path, results: Path) -> None:
    """Copy the best weights and the training log of one results folder into another."""
    for name in ("weights/best_model.pth", "training_log.csv"):
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {source / name}: {error.strerror or error}") from error
        with atomic_write(results / name) as stream:
            stream.write(content)


# ---------------------------------------------------------------- the counts


def write_counts(run: Run, validation: Counters, test: Counters) -> None:
    """Save ``calibration.npz``: the counts from which every number but those of ``--study`` follows."""
    arrays = {
        f"{part}/{name}": values
        for part, counters in (("validation", validation), ("test", test)) for name, values in counters.to_arrays().items()
    }
    with atomic_write(run.results / "calibration.npz") as stream:
        np.savez_compressed(stream, identity=np.array(run.identity), **arrays)  # type: ignore[arg-type]
