"""Conclusions with made-up numbers, in the shape that :func:`evaluation.conclusion.conclude` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.added import REGIONS
from evaluation.conclusion import CONTROLS, ENDPOINTS
from evaluation.counting import Counters
from evaluation.effects import MEASURES, PROCEDURES, RECALIBRATED
from experiment.pooling import NEEDED
from experiment.saved_run import PooledRun, load_pooled
from runtime.config import Config
from runtime.records import fingerprint, seal, write_json

OUTCOMES = ("better", "worse", "equivalent", "different but negligible", "undecided", "not defined")


#: Of the counts of an image that a pool needs.
SHAPES = {"joint": (3, 4, 64, 64), "cell_sums": (2, 64), "largest": (2,), "error_cells": (2, 2, 12, 24, 12)}


def conclusion_of(seeds: Sequence[int] = (42,), margins: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A conclusion from these seeds in which each endpoint has another outcome, and no two numbers are alike."""
    count = len(seeds)
    endpoints: list[dict[str, Any]] = []
    for place, (name, endpoint) in enumerate(ENDPOINTS.items()):
        value = (-1) ** place * (place + 1) / 512
        defined = OUTCOMES[place] != "not defined"
        endpoints.append({
            "name": name, "label": endpoint.label, "region": endpoint.region, "lower_is_better": endpoint.lower_is_better,
            "margin": (margins or {}).get(name, endpoint.margin), "value": value if defined else None,
            "interval": [value - 1 / 64, value + 1 / 64] if defined else [None, None],
            "interval_90": [value - 1 / 128, value + 1 / 128] if defined else [None, None],
            "by_training": [value + index / 1024 if defined else None for index in range(count)],
            "seed_sd": 1 / 1024 if defined and count > 1 else None, "image_se": 1 / 2048, "degrees_of_freedom": 3.5,
            "p_value": 0.0001 * (place + 1), "p_holm": 0.0005 * (place + 1) if defined else None, "outcome": OUTCOMES[place],
            "needed": {"trainings": 12, "images_factor": 3.5} if OUTCOMES[place] == "undecided" else None,
        })
    controls = [
        {"name": f"fused_minus_{other}", "label": label, "measure": measure,
         "lower_is_better": ENDPOINTS[measure].lower_is_better, "value": (row - column) / 256,
         "interval": [(row - column) / 256 - 1 / 32, (row - column) / 256 + 1 / 32],
         "by_training": [(row - column) / 256] * count, "tuned": [row / 8 + index / 64 for index in range(count)]}
        for row, (other, label) in enumerate(CONTROLS.items()) for column, measure in enumerate(MEASURES)
    ]
    added = {
        region: {
            **{
                name: {"value": (row + column + 1) / 512, "interval": [(row + column) / 512, (row + column + 2) / 512],
                       "by_training": [(row + column + 1) / 512] * count}
                for column, name in enumerate(("predictive_variance", "saliency_variance"))
            },
            "permutation_null": {"mean": 0.001, "largest": 0.002, "p_value": 1 / 21, "permutations": 20} if row else None,
        } for row, region in enumerate(REGIONS)
    }
    recalibrated = [
        {"measure": measure, "lower_is_better": True, "value": row / 128, "interval": [row / 128 - 1 / 64, row / 128 + 1 / 64],
         "by_training": [row / 128] * count} for row, measure in enumerate(RECALIBRATED)
    ]
    return {
        "added": added, "recalibrated": recalibrated,
        "trainings": count, "seeds": list(seeds), "resamples": 1000, "level": 0.95, "equivalence_level": 0.9,
        "sentence": f"Made up: foreground ECE is better in {count}.", "null_result": False,
        "notes": ["One training: made up."] if count == 1 else [],
        "endpoints": endpoints, "controls": controls, "lambda": [(4 + index) % 9 / 8 for index in range(count)],
        "measures": {
            procedure: {
                measure: {"value": (row + 1) / 16 + column / 128, "by_training": [(row + 1) / 16] * count}
                for column, measure in enumerate(MEASURES)
            } for row, procedure in enumerate(PROCEDURES)
        },
    }


def make_training(
    folder: Path, seed: int, *, inputs: Mapping[str, Any] | None = None, without: Sequence[str] = (), ids: str = "ab",
    **metrics: Any,
) -> Path:
    """A finished training, as far as a pool looks at it, with counts of zeros; returns its folder.

    Args:
        folder: where to.
        seed: of the training.
        inputs: what it depends on, where it is not the default.
        without: counts that it lacks.
        ids: of its images, a letter each.
        metrics: replace some.
    """
    decides = {**Config(seed=seed).experiment(), "data": "d", "skipped": [], **(inputs or {})}
    identity, whole = fingerprint(decides), f"identity of seed {seed}"
    images = {
        name: np.zeros((len(ids), *SHAPES[name]), np.int32 if name in ("joint", "error_cells") else np.float64)
        for name in NEEDED if name not in without
    }
    arrays = Counters(tuple(ids), (), (), 15, images, {}, np.zeros((0, 0))).to_arrays()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "calibration.npz", identity=np.array(whole),
        **{f"{part}/{name}": values for part in ("validation", "test") for name, values in arrays.items()},
    )
    write_json(folder / "config.json", {
        "configuration": Config(seed=seed).to_dict(), "identity": identity, "decides": decides, "synthetic": False,
        "images": "i", "masks": "m", "data_fingerprint": "d", "split": {"train": ["c"], "validation": [*ids], "test": [*ids]},
        "device": "cpu", "device_name": "x", "versions": {"torch": "2"}, "skipped": [],
    })
    write_json(folder / "metrics.json", seal({
        "identity": whole, "config_identity": identity, "synthetic": False, "data_note": None, "lambda": seed / 128,
        "normalisation": {"pred_variance": [0.0, 0.25], "saliency_variance": [0.0, 0.125]},
        "test": {"dice": seed / 64}, **metrics,
    }))
    return folder


def make_pooled(folder: Path, seeds: Sequence[int] = (42, 43, 44), **metrics: Any) -> PooledRun:
    """A folder of pooled trainings with made-up numbers, of which the first has a report; ``metrics`` replace some."""
    conclusion = conclusion_of(seeds)
    names = [f"seed-{seed}" for seed in seeds]
    write_json(folder / "metrics.json", seal({
        "schema_version": 1, "synthetic": True, "data_note": "tiny discs", "verdict": conclusion["sentence"],
        "pooled": [
            {"name": name, "seed": seed, "identity": name * 2, "dice": 0.75 + index / 64, "lambda": (4 + index) % 9 / 8}
            for index, (name, seed) in enumerate(zip(names, seeds))
        ],
        "conclusion": conclusion, "test": {"images": 60, "dice": 0.765625}, **metrics,
    }))
    environment = {"device": "cpu", "device_name": "x", "versions": {"python": "3", "torch": "2"}}
    write_json(folder / "config.json", {
        "configuration": {**Config().to_dict(), "image_size": 32, "trainings": len(seeds), "margin": {"brier": 0.25}},
        "pooled": [{"name": name, "folder": name} for name in names],
        "synthetic": True, "images": "the images", "masks": "the masks", "data_fingerprint": "0123456789abcdef0123",
        "split": {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}, "skipped": [],
        "environments": [environment], "versions": {"python": "3", "scipy": "1"},
        "command": ["main.py", "--trainings", "3", "--data", "a folder"],
    })
    (folder / names[0]).mkdir()
    (folder / names[0] / "report.html").write_text("of a training")
    return load_pooled(folder)
