"""The results folder of a run: holding it, claiming it, and what of another run it may use."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from dataset import Data
from evaluation.counting import Counters
from experiment.networks import network_inputs, take_weights
from experiment.run import Run
from experiment.saved_run import check_belongs, maps_are_sealed, read_metrics
from experiment.saved_schemas import fits_record
from experiment.source_run import finished_record
from experiment.tables import LOG, check_mark
from inference.precision import automatic_precision
from isic.decoded import DecodedPairs
from isic.source import Source, find_targets
from runtime.checkpoints import load_checkpoint, state_fingerprint
from runtime.config import AFTER_TRAINING, Config
from runtime.devices import training_precision
from runtime.errors import UserError
from runtime.files import atomic_write, remove, remove_partials, remove_tree
from runtime.lock import FolderLock
from runtime.processes import ProcessGroup
from runtime.progress import complain
from runtime.reading import check_regular, real_path
from runtime.records import fingerprint, is_sealed, read_json, seal, write_json

RESULTS = Path("results")
#: The numbers of a finished run; the first says that it is finished.
NUMBERS = ("metrics.json", "report.html", "report.md", "per_image.csv", "calibration.npz")


def results_folder(config: Config, source: Source) -> Path:
    """The folder of a run or of several trainings: the one that was named, or that of the dataset.

    A command that takes weights to other test sets has one of its own, beside that of the run that it takes them from.
    """
    if config.results is None and config.weights_from is not None and (config.test_data or config.test_images):
        names = "-".join(target.name for target in find_targets(config))
        return RESULTS / f"{real_path(config.weights_from).name}-on-{names}"
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
            remove_leftovers(results)

        group.shared(hold)
        try:
            yield
        except KeyboardInterrupt:
            complain(f"\nkept in {results}: {kept(results)}")
            raise


def remove_leftovers(results: Path) -> None:
    """Delete what killed processes left half-written in the folder of a run."""
    remove_partials(results, results / "weights", results / "figures", *results.glob("uncertainty_maps/*"))


def claim_results(
    results: Path, config: Config, source: Source, data: Data | None, group: ProcessGroup,
    targets: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """Write ``config.json`` and return the run that the folder now belongs to.

    Args:
        results: the folder.
        config: of the run.
        source: of its images.
        data: the images; None where those of the run that the weights are taken from have been measured already.
        group: of processes.
        targets: what the record says of each other test set. None of them decides what the run is.

    Raises:
        UserError: the folder holds the work of another configuration or of other data.
    """

    def claim() -> str:
        inputs = identity_inputs(results, config, data, group.device)
        facts = _facts_of_run(Path(str(config.weights_from))) if data is None else _facts(source, data)
        record = _record(config, facts, group.device, inputs)
        if targets:
            record["targets"] = list(targets)
        return claim_folder(results, record, config.fresh)

    return Run(config, group, results, group.shared(claim))


def claim_folder(results: Path, record: dict[str, Any], fresh: bool) -> str:
    """Write ``config.json``; returns the identity in it.

    Args:
        results: the folder.
        record: what ``config.json`` will hold; completed by the environments that earlier work in the folder came from.
        fresh: whether to delete what another configuration left.

    Raises:
        UserError: the folder holds the work of another configuration or of other data.
    """
    path = results / "config.json"
    if fresh:
        clear_results(results)
    if path.exists():
        old = read_json(path)
        _refuse_other_settings(results, old, record["decides"])
        if fits_record(old) and ("checksum" not in old or is_sealed(old)):
            record["earlier"] = _earlier_environments(old, record)
            if not maps_are_sealed(old):  # made by an earlier version, at least in part
                record["maps_unsealed"] = True
    else:  # what is there cannot be this run's
        unfinish(results)
    write_json(path, seal(record))
    return str(record["identity"])


def identity_inputs(results: Path, config: Config, data: Data | None, device: torch.device) -> dict[str, Any]:
    """All that the numbers of a run depend on: settings, data, and the weights it takes from another run, if any.

    Args:
        results: its folder.
        config: of the run.
        data: its images; None where the numbers are those of the run that the weights are taken from.
        device: that trains.

    Raises:
        UserError: see :func:`finished_weights`; or the run would take its own weights.
    """
    source = None if config.weights_from is None else Path(config.weights_from)
    if source is not None and real_path(source) == real_path(results):
        raise UserError(f"--weights-from names {results}, where this run would write; give another --results folder")
    taken: Mapping[str, Any] = {} if source is None else finished_record(source).get("decides", {})
    if data is None:
        inputs = dict(taken)
    else:
        inputs = {
            **settings_inputs(config, device, taken), "data": data.pairs.fingerprint(),
            "skipped": [entry.id for entry in data.skipped],  # they took part in the split, so they decide the numbers too
            **_split_inputs(config, data, taken),
        }
    if source is not None:
        inputs["weights"] = finished_weights(source, inputs)
    return inputs


def settings_inputs(config: Config, device: torch.device, taken: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What of :func:`identity_inputs` is known before any image is read.

    Args:
        config: of the run.
        device: that trains.
        taken: the inputs of the run whose weights are taken; its precision of training is over and done with.
    """
    amp = taken.get("amp") if taken and config.amp == "auto" else None
    inputs = {**config.experiment(), "amp": amp or str(training_precision(config.amp, device)), **network_inputs(config)}
    resolved = automatic_precision(device, fast=config.model is None)
    if config.precision == "auto" and resolved != "fp32":  # maps of the CPU and of a GPU must not be mixed
        inputs["maps_precision"] = resolved
    return inputs


def _split_inputs(config: Config, data: Data, taken: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of the split and of the groups, where they do not follow from the settings."""
    inputs = {}
    if config.split is not None or data.groups is not None and config.weights_from is None or "split" in taken:
        inputs["split"] = fingerprint(data.split._asdict())
    if data.groups is not None:
        inputs["groups"] = fingerprint(data.groups)
    return inputs


def _facts(source: Source, data: Data) -> dict[str, Any]:
    """What ``config.json`` says of the images of a run."""
    facts = {
        "synthetic": source.synthetic,
        "images": str(real_path(source.images)),
        "masks": str(real_path(source.masks)),
        "data_fingerprint": data.pairs.fingerprint(),
        "split": data.split._asdict(),
        "skipped": [entry._asdict() for entry in data.skipped],
        # by these another test set is compared where the images themselves are gone
        "fitted_on": [content_mark(data.pairs, id) for id in (*data.split.train, *data.split.validation)],
    }
    return facts if data.groups is None else {**facts, "groups": data.groups}


def _facts_of_run(folder: Path) -> dict[str, Any]:
    """The same of the images of another run, from its record."""
    record = finished_record(folder)
    names = ("synthetic", "images", "masks", "data_fingerprint", "split", "skipped", "fitted_on", "groups")
    return {name: record[name] for name in names if name in record}


def content_mark(pairs: DecodedPairs, id: str) -> str:
    """The start of the checksum of an image file: enough to know the file again."""
    return pairs.checksums[id][0][:16]


def _record(config: Config, facts: Mapping[str, Any], device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "configuration": config.to_dict(),
        "identity": fingerprint(inputs),
        "decides": dict(inputs),
        **facts,
        **environment(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "earlier": [],
    }


def environment(device: torch.device) -> dict[str, Any]:
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
        f"{key} was {_shown(before.get(key))} and is now {_shown(inputs.get(key))}"
        for key in sorted({*before, *inputs}) if before.get(key) != inputs.get(key)
    ]
    if changed:
        raise UserError(
            f"{results} holds a run with other settings: {'; '.join(changed)}; "
            "choose another --results folder, or give --fresh to delete that run and start over"
        )


def _shown(value: Any) -> str:
    """A recorded input in a message; of a fingerprint its beginning."""
    text = repr(value)
    return f"{text[:9]}...'" if isinstance(value, str) and len(value) == 64 else text


def unfinish(results: Path) -> None:
    """Delete the numbers of a finished run, because something they came from is about to be made again."""
    remove(*(results / name for name in NUMBERS), *results.glob("per_image_*.csv"))


def clear_results(results: Path) -> None:
    """Delete what a run leaves behind, and nothing else."""
    unfinish(results)
    remove(*(results / name for name in ("config.json", "training_log.csv")))
    for name in ("weights", "uncertainty_maps", "figures"):
        remove_tree(results / name)


# ---------------------------------------------------------------- weights of another run


def check_weights_from(config: Config, device: torch.device) -> None:
    """Refuse ``--weights-from`` before any image is decoded, as far as that can be known then.

    Raises:
        UserError: see :func:`finished_weights`.
    """
    source = Path(str(config.weights_from))
    taken = finished_record(source).get("decides", {})
    unknown = {key: value for key, value in taken.items() if key in ("data", "skipped", "split")}
    finished_weights(source, {**settings_inputs(config, device, taken), **unknown})


def finished_weights(source: Path, inputs: Mapping[str, Any]) -> str:
    """The fingerprint of the weights of a finished run that another run wants to take.

    Args:
        source: results folder of the finished run.
        inputs: the settings and the data of the other run; the two may differ in what acts after training.

    Raises:
        UserError: there is no finished run, its weights are not those it was
            evaluated with, or it was trained in another way or on other data.
    """
    record, metrics = finished_record(source), read_metrics(source)
    check_belongs(source, metrics, record)
    best = source / "weights" / "best_model.pth"
    weights = state_fingerprint(load_checkpoint(best)["model"])
    if metrics.get("identity") != fingerprint([record.get("identity"), weights]):
        raise UserError(f"{best} does not hold the weights that {source / 'metrics.json'} is about; finish that run first")
    before = record.get("decides", {})
    changed = [
        f"{key} is {_shown(before.get(key))} there and {_shown(inputs.get(key))} here"
        for key in sorted({*before, *inputs} - {*AFTER_TRAINING, "maps_precision", "weights", "groups"})
        if before.get(key) != inputs.get(key)
    ]
    if changed:
        raise UserError(f"{source} was trained otherwise: {'; '.join(changed)}; give the same, or leave --weights-from out")
    return weights


def take_weights_of(config: Config, results: Path, identity: str) -> None:
    """Put the weights of ``--weights-from`` or of ``--model-weights`` into a results folder, in place of a training.

    Raises:
        UserError: see :func:`copy_weights` and :func:`experiment.networks.take_weights`.
    """
    if config.weights_from is not None:
        copy_weights(Path(config.weights_from), results)
    else:
        take_weights(config, results, identity)


def copy_weights(source: Path, results: Path) -> None:
    """Copy the best weights and the training log of one results folder into another.

    Raises:
        UserError: a file cannot be read or written, or the log is not that of the finished run.
    """
    check_mark(source / LOG, read_metrics(source))
    for name in ("weights/best_model.pth", "training_log.csv"):
        try:
            check_regular(source / name)
            content = (source / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {source / name}: {error.strerror or error}") from error
        with atomic_write(results / name) as stream:
            stream.write(content)


# ---------------------------------------------------------------- the counts


def write_counts(run: Run, validation: Counters, test: Counters, targets: Mapping[str, Counters] | None = None) -> None:
    """Save ``calibration.npz``: the counts from which every number but those of ``--study`` follows.

    Args:
        run: that the counts are of.
        validation, test: of its splits.
        targets: of other test sets, by name.
    """
    parts = {"validation": validation, "test": test, **{f"target:{name}": found for name, found in (targets or {}).items()}}
    arrays = {f"{part}/{name}": values for part, found in parts.items() for name, values in found.to_arrays().items()}
    with atomic_write(run.results / "calibration.npz") as stream:
        np.savez_compressed(stream, identity=np.array(run.identity), **arrays)  # type: ignore[arg-type]
