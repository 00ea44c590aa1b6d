"""Finished runs made of constructed maps, without training: what figures and reports are drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from constructed_maps import make_images
from PIL import Image

from charts import SavedRun, load_run
from config import Config
from evaluation import evaluate
from storage import seal, write_csv, write_json, write_maps

NAMES = ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy", "true_mask")


def make_run(
    root: Path, images: int = 6, *, foreground: bool = True, study: bool = False, ids=None, synthetic: bool = False,
    data_note: str | None = None,
) -> Path:
    """A results folder of ``images`` test images of 24 x 24 pixels, evaluated by the real code; returns it.

    Args:
        foreground: False empties every mask of the test images.
        ids: of the test images, instead of made-up ones.
    """
    validation, test = make_images(4, seed=1, prefix="val"), make_images(images, seed=2, prefix="test")
    for part in (validation, test):
        part.items = [(id, {name: values[:24, :24] for name, values in maps.items()}) for id, maps in part.items]
    if ids is not None:
        test.items = [(id, maps) for id, (_, maps) in zip(ids, test.items)]
    if not foreground:
        for _, maps in test.items:
            maps["true_mask"].zero_()
    run, data = root / "run", root / "data"
    result = evaluate(validation, test, study=study, resamples=100)
    (data / "masks").mkdir(parents=True)
    (data / "images").mkdir()
    for id, maps in test.items:
        arrays = {name: maps[name].numpy() for name in NAMES}
        arrays["fused_score"] = result.fusion(maps["pred_variance"], maps["saliency_variance"]).numpy()
        write_maps(run / "uncertainty_maps" / "test" / f"{id}.npz", arrays, 0, "identity")
        Image.new("RGB", (48, 48), (200, 150, 140)).save(data / "images" / f"{id}.png")
        Image.fromarray(arrays["true_mask"] * 255).resize((48, 48)).save(data / "masks" / f"{id}.png")
    metrics = {**result.metrics, "synthetic": synthetic, "data_note": data_note, "minutes": 1.5, "skipped": []}
    write_json(run / "metrics.json", seal(metrics))
    write_csv(run / "per_image.csv", result.rows)
    epochs = [(1, 0.7, 0.6, 0.5), (2, 0.5, 0.55, 0.75), (3, 0.4, 0.56, 0.7)]
    names = ("epoch", "train_loss", "validation_loss", "validation_dice")
    write_csv(run / "training_log.csv", [dict(zip(names, row)) for row in epochs])
    write_json(run / "config.json", {
        "configuration": {**Config().to_dict(), "image_size": 32},
        "images": str(data / "images"), "masks": str(data / "masks"),
        "split": {"train": ["a"], "validation": ["b"], "test": [id for id, _ in test.items]},
        "command": ["main.py", "--data", "a folder"], "device": "cpu", "device_name": "x", "versions": {"python": "3"},
    })
    return run


def changed(run: SavedRun, **metrics: object) -> SavedRun:
    """A copy of a run with other metrics."""
    return run._replace(metrics={**json.loads(json.dumps(run.metrics)), **metrics})


def many(run: Path, count: int) -> SavedRun:
    """The numbers of a run as if it had ``count`` test images: the rows repeated under new ids."""
    loaded = load_run(run)
    rows = [{**loaded.rows[index % len(loaded.rows)], "id": f"image_{index:05d}"} for index in range(count)]
    return changed(loaded._replace(rows=rows), test={**loaded.metrics["test"], "images": count})


def disc(size: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (y**2 + x**2 < radius**2).astype(np.uint8)


def maps_of(shape: tuple[int, int], **values: float) -> dict[str, np.ndarray]:
    """Constant maps."""
    filled = {"mean_prediction": 0.0, "pred_variance": 0.0, "saliency_variance": 0.0, "fused_score": 0.0, **values}
    return {name: torch.full(shape, value).numpy() for name, value in filled.items()}
