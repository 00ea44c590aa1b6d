"""What ``config.json``, ``metrics.json`` and the tables of a results folder may hold, as far as this program reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from runtime.config import Config
from runtime.errors import UserError
from runtime.schemas import (
    CHECKSUM,
    LARGEST,
    Check,
    Mismatch,
    anything,
    flag,
    identifier,
    list_of,
    mapping_of,
    nullable,
    number,
    record,
    text,
    whole,
)

# ---------------------------------------------------------------- config.json


def _of_field(item: Field[Any]) -> Check:
    """What ``config.json`` may hold for a field of the configuration."""
    low = max(item.metadata.get(key, -math.inf) for key in ("low", "above"))
    high = min(item.metadata.get(key, math.inf) for key in ("high", "below"))
    kind, bar, null = str(item.type).partition(" | ")
    check = {
        "str": text(), "bool": flag, "float": number(low, high), "list[str]": list_of(text()),
        "dict[str, float]": mapping_of(number()), "int": whole(int(max(low, -LARGEST)), int(min(high, LARGEST))),
    }[kind]
    return nullable(check) if bar else check


_IDS = list_of(identifier, unique=True)
_ENVIRONMENT: dict[str, Check] = {"device": text(), "device_name": text(), "versions": mapping_of(text())}
_SKIPPED = list_of(record({"id": text(), "file": text(), "reason": text()}))
_CONFIGURATION = record({}, {item.name: _of_field(item) for item in fields(Config)})
_SAID: dict[str, Check] = {
    "identity": text(), "decides": mapping_of(anything), "synthetic": flag, "data_fingerprint": text(), "skipped": _SKIPPED,
    "fitted_on": list_of(text()), "groups": mapping_of(text()), "command": list_of(text()), **_ENVIRONMENT,
    "earlier": list_of(record({}, {name: nullable(check) for name, check in _ENVIRONMENT.items()})),
    "score_names": record({"first": text(), "second": text()}), "maps_unsealed": flag, "checksum": text(CHECKSUM),
    "targets": list_of(record({
        "name": identifier, "images": text(), "masks": text(), "ids": _IDS, "fingerprint": text(), "skipped": _SKIPPED,
    }, {"groups": mapping_of(text())})),
}
_SPLIT = record({"validation": _IDS, "test": _IDS}, {"train": _IDS})
#: Of a run that made its maps itself.
RUN = record({
    "configuration": _CONFIGURATION, "images": text(), "masks": text(),
    "split": record({"train": _IDS, "validation": _IDS, "test": _IDS}),
}, _SAID)
#: Of a run that judged maps from elsewhere.
RUN_OF_MAPS = record({
    "configuration": _CONFIGURATION, "split": _SPLIT,
    "maps": record({}, {"validation": text(), "test": text(), "fingerprint": text(), "scores": list_of(text(), 2, 2)}),
}, _SAID)
#: Of several trainings that were pooled.
POOL = record({
    "configuration": _CONFIGURATION, "pooled": list_of(record({"name": text(), "folder": text(r"[^\0]+")}), least=1),
}, {
    **_SAID, "data_fingerprint": nullable(text()), "images": nullable(text()), "masks": nullable(text()),
    "skipped": nullable(_SKIPPED), "split": nullable(_SPLIT), "maps": mapping_of(anything), "synthetic": nullable(flag),
    "environments": list_of(record({}, {name: nullable(check) for name, check in _ENVIRONMENT.items()})),
})


def check_record(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a ``config.json`` that does not say what a run was.

    Raises:
        UserError: names what is wrong with it.
    """
    _check(POOL if "pooled" in content else RUN_OF_MAPS if "maps" in content else RUN, content, path)


def fits_record(content: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says what a run was."""
    try:
        check_record(content, Path("config.json"))
    except UserError:
        return False
    return True


# ---------------------------------------------------------------- metrics.json


_NUMBERS = mapping_of(anything)
_RANGE = list_of(number(), 2, 2)
_METRICS: dict[str, Check] = {
    "identity": text(), "config_identity": text(), "synthetic": flag, "data_note": nullable(text()), "verdict": text(),
    "lambda": number(0, 1), "normalisation": record({"pred_variance": _RANGE, "saliency_variance": _RANGE}),
    "bins": whole(1), "minutes": number(0),
    "seconds_by_stage": mapping_of(record({"seconds": number(0)}, {"reused": whole(0)}, others=False)),
    "skipped": _SKIPPED, "warnings": list_of(record({"text": text()})),
    "validation": _NUMBERS, "test": _NUMBERS, "conclusion": _NUMBERS, "targets": mapping_of(_NUMBERS, identifier),
    "score_names": record({"first": text(), "second": text()}), "numbers_from": text(),
    "files": mapping_of(text(CHECKSUM)), "checksum": text(CHECKSUM),
}
#: Of a run; the document that quotes a number finds out itself where that is missing.
METRICS = record({name: _METRICS[name] for name in ("synthetic", "lambda", "normalisation", "test")}, _METRICS)
#: Of several trainings that were pooled.
METRICS_OF_POOL = record({
    "pooled": list_of(record({
        "name": text(), "seed": whole(0), "identity": text(), "dice": nullable(number()), "lambda": number(0, 1)})),
}, _METRICS)


def check_metrics(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a ``metrics.json`` that is not one of a run or of a pool.

    Raises:
        UserError: names what is wrong with it.
    """
    _check(METRICS_OF_POOL if "pooled" in content else METRICS, content, path)


def _check(schema: Check, content: Mapping[str, Any], path: Path) -> None:
    try:
        schema(content, path.name)
    except Mismatch as error:
        raise UserError(f"{path} is not of this program: {error}; delete it and run main.py again") from error


# ---------------------------------------------------------------- tables


#: The columns that every table of images has, and that of the epochs.
IMAGE_COLUMNS = ("id", "dice", "jaccard", "predicted_pixels", "mean_predictive_variance", "mean_saliency_variance", "mean_fused")
LOG_COLUMNS = ("epoch", "train_loss", "validation_loss", "validation_dice")
#: Columns that differ between two runs of the same experiment; no checksum is of them.
WALL_CLOCK_COLUMNS = ("images_per_second", "seconds_waited_for_data")
