"""The numbers that a finished run left, without its maps and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from experiment.saved_schemas import IMAGE_COLUMNS, LOG_COLUMNS, check_metrics, check_record
from experiment.tables import LOG, check_mark, read_table, with_marks
from runtime.config import IDENTITY_FIELDS, NETWORK_FIELDS, UNET_FIELDS, Config
from runtime.errors import UserError, one_line
from runtime.records import fingerprint, read_json, read_sealed, seal


class SavedRun(NamedTuple):
    """What a finished run saved, except maps and weights.

    Attributes:
        folder: the results folder.
        metrics: ``metrics.json``.
        record: ``config.json``.
        rows: ``per_image.csv``, one row per test image; numbers are floats, NaN where the cell is empty.
        log: ``training_log.csv``, one row per epoch, likewise; none where nothing was trained.
    """

    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]


class PooledRun(NamedTuple):
    """What several pooled trainings left together.

    Attributes:
        folder: the results folder of the whole; each training has its own.
        metrics: its ``metrics.json``.
        record: its ``config.json``.
    """

    folder: Path
    metrics: Mapping[str, Any]
    record: Mapping[str, Any]

    def trainings(self) -> list[Path]:
        """The results folder of each training, in the order of the metrics."""
        return [self.folder / entry["folder"] for entry in self.record["pooled"]]


class Setting(NamedTuple):
    """A setting of a run beside the default."""

    name: str
    value: Any
    default: Any


def load_run(folder: Path) -> SavedRun:
    """Read the numbers of a finished run.

    Args:
        folder: its results folder.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    return with_tables(Path(folder), read_metrics(Path(folder)))


def with_tables(folder: Path, metrics: Mapping[str, Any]) -> SavedRun:
    """The numbers of a run whose ``metrics.json`` may not be written yet.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    record, log = read_record(folder), folder / LOG
    check_belongs(folder, metrics, record)
    epochs = read_marked(log, metrics, LOG_COLUMNS) if trained(record) or log.is_file() else []
    return SavedRun(folder, metrics, record, read_images(folder / "per_image.csv", metrics, record["split"]["test"]), epochs)


def read_marked(path: Path, metrics: Mapping[str, Any], need: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table of a run, which must be the one that its metrics were written with.

    Raises:
        UserError: see :func:`experiment.tables.read_table` and :func:`experiment.tables.check_mark`.
    """
    rows = read_table(path, need)
    check_mark(path, metrics)
    return rows


def read_images(path: Path, metrics: Mapping[str, Any], ids: Sequence[str]) -> list[dict[str, Any]]:
    """The table of the numbers of each image, which must be these images; errors as of :func:`read_marked`."""
    rows = read_marked(path, metrics, IMAGE_COLUMNS)
    if {row["id"] for row in rows} != set(ids):
        raise UserError(f"{path} is not of the images that {path.parent / 'config.json'} lists; run main.py again")
    return rows


def read_metrics(folder: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a run or of a pool.

    Raises:
        UserError: it is missing, broken, or was changed.
    """
    metrics = read_sealed(folder / "metrics.json")
    check_metrics(metrics, folder / "metrics.json")
    return metrics


def sealed_metrics(metrics: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What ``metrics.json`` of a run holds: metrics, checksums of the files beside it, and one of all of this."""
    return seal(with_marks(metrics, folder))


def check_belongs(folder: Path, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse the ``config.json`` of another run, and one whose checksum is gone.

    Raises:
        UserError: names the file.
    """
    path = folder / "config.json"
    identity, inputs = record.get("identity"), record.get("decides")
    own = identity is None or identity == fingerprint(inputs)
    if not own or "files" in metrics and "checksum" not in record:
        raise UserError(f"{path} was changed after the run wrote it; run main.py again")
    if metrics.get("config_identity", identity) != identity:
        raise UserError(f"{folder / 'metrics.json'} does not belong to the config.json beside it; run main.py again")


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn what is raised where numbers lack, or are of another kind than their reader expects, into a line about their file.

    Raises:
        UserError: names the file.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} does not hold what is to be shown ({told}); run main.py again") from error


def maps_are_sealed(record: Mapping[str, Any]) -> bool:
    """Whether every map file of a run, by its ``config.json``, must carry a checksum: no earlier version made some of them."""
    return "checksum" in record and not record.get("maps_unsealed", False)


def trained(record: Mapping[str, Any]) -> bool:
    """Whether a run, by its ``config.json``, trained a network itself, so that it has a training log."""
    asked = record.get("configuration", {})
    return "maps" not in record and asked.get("model_weights") is None and asked.get("weights_from") is None


def read_record(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a run.

    Raises:
        UserError: it is missing or broken, or the folder holds several pooled trainings; the line names them.
    """
    record = read_any_record(folder)
    if "pooled" in record:
        names = ", ".join(map(str, PooledRun(folder, {}, record).trainings()))
        raise UserError(f"{folder} pools several trainings; choose one of them: {names}")
    return record


def read_any_record(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a run or of a pool; the errors of :func:`read_record` but for the last."""
    path = folder / "config.json"
    record = read_sealed(path, needed=False)  # earlier versions wrote no checksum
    check_record(record, path)
    return record


def is_pooled(folder: Path) -> bool:
    """Whether a results folder is that of several pooled trainings.

    Raises:
        UserError: its ``config.json`` is damaged.
    """
    path = Path(folder) / "config.json"
    return path.is_file() and "pooled" in read_json(path)


def load_pooled(folder: Path) -> PooledRun:
    """Read what several pooled trainings left together.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    folder = Path(folder)
    run = PooledRun(folder, read_metrics(folder), read_any_record(folder))
    names = [[entry["name"] for entry in content.get("pooled", ())] for content in (run.metrics, run.record)]
    if not names[0] or names[0] != names[1]:
        raise UserError(f"{folder / 'metrics.json'} does not belong to the config.json beside it; run main.py again")
    return run


def settings(run: SavedRun | PooledRun) -> list[Setting]:
    """Every recorded setting that decides the numbers of a run, in the order of the configuration.

    The number of synthetic images is left out: it says nothing about a run on other images. So are the settings of the
    network that the run did not use; where dropout was inserted into another one is added.
    """
    used = run.record.get("configuration", {})
    idle = UNET_FIELDS if used.get("model") else NETWORK_FIELDS
    found = [
        Setting(name, used[name], getattr(Config, name)) for name in IDENTITY_FIELDS
        if name in used and name != "synthetic_images" and name not in idle
    ]
    sites = run.record.get("decides", {}).get("inserted_dropout")
    return found + ([Setting("dropout_inserted_after", ", ".join(sites), None)] if sites else [])
