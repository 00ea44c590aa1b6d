"""Finished runs made of constructed maps, without training, and ways to read what was drawn and written from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concluded import conclusion_of
from constructed_maps import make_images
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from evaluation import evaluate
from experiment.map_files import write_maps
from experiment.saved_run import SavedRun, load_run, sealed_metrics
from runtime.config import Config
from runtime.records import fingerprint, seal, write_csv, write_json

NAMES = ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy", "true_mask")
SKIN = (200, 150, 140)
#: What every ``config.json`` and every ``metrics.json`` holds, where a test is about something else in them.
RECORD: dict[str, Any] = {
    "configuration": {}, "images": "i", "masks": "m", "split": {"train": ["a"], "validation": ["b"], "test": ["c"]},
}
METRICS: dict[str, Any] = {
    "synthetic": False, "lambda": 0.5, "normalisation": {"pred_variance": [0.0, 0.25], "saliency_variance": [0.0, 0.125]},
    "test": {},
}


# ---------------------------------------------------------------- runs


def make_run(
    root: Path, images: int = 6, *, foreground: bool = True, study: bool = False, ids: Sequence[str] | None = None,
    synthetic: bool = False, data_note: str | None = None,
) -> Path:
    """A results folder of ``images`` test images of 24 x 24 pixels, evaluated by the real code; returns it.

    Args:
        root: where the folders of the run and of its data are made.
        images: how many test images.
        foreground: False empties every mask of the test images.
        study: with the study.
        ids: of the test images, instead of made-up ones.
        synthetic, data_note: as in the metrics.
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
        Image.new("RGB", (48, 48), SKIN).save(data / "images" / f"{id}.png")
        Image.fromarray(arrays["true_mask"] * 255).resize((48, 48)).save(data / "masks" / f"{id}.png")
    conclusion = conclusion_of()
    inputs = Config(image_size=32).experiment()
    metrics = {**result.metrics, "synthetic": synthetic, "data_note": data_note, "minutes": 1.5, "skipped": [],
               "conclusion": conclusion, "verdict": conclusion["sentence"], "identity": "identity",
               "config_identity": fingerprint(inputs)}
    write_csv(run / "per_image.csv", result.rows)
    epochs = [(1, 0.7, 0.6, 0.5), (2, 0.5, 0.55, 0.75), (3, 0.4, 0.56, 0.7)]
    names = ("epoch", "train_loss", "validation_loss", "validation_dice")
    write_csv(run / "training_log.csv", [dict(zip(names, row)) for row in epochs])
    write_json(run / "config.json", seal({
        "configuration": {**Config().to_dict(), "image_size": 32}, "decides": inputs, "identity": fingerprint(inputs),
        "images": str(data / "images"), "masks": str(data / "masks"),
        "split": {"train": ["a"], "validation": ["b"], "test": [id for id, _ in test.items]},
        "command": ["main.py", "--data", "a folder"], "device": "cpu", "device_name": "x", "versions": {"python": "3"},
    }))
    write_json(run / "metrics.json", sealed_metrics(metrics, run))
    return run


def changed(run: SavedRun, **metrics: object) -> SavedRun:
    """A copy of a run with other metrics."""
    return run._replace(metrics={**json.loads(json.dumps(run.metrics)), **metrics})


def many(run: Path, count: int) -> SavedRun:
    """The numbers of a run as if it had ``count`` test images: the rows repeated under new ids."""
    loaded = load_run(run)
    rows = [{**loaded.rows[index % len(loaded.rows)], "id": f"image_{index:05d}"} for index in range(count)]
    return changed(loaded._replace(rows=rows), test={**loaded.metrics["test"], "images": count})


def plain_image(id: str) -> np.ndarray:
    """The picture of every image of :func:`make_run`, at map resolution."""
    return np.full((24, 24, 3), SKIN, np.uint8)


# ---------------------------------------------------------------- maps


def disc(size: int, radius: float) -> np.ndarray:
    """A mask (size, size), uint8, with a disc in the middle."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    inside: np.ndarray = y**2 + x**2 < radius**2
    return inside.astype(np.uint8)


def maps_of(shape: tuple[int, int], **values: float) -> dict[str, np.ndarray]:
    """Constant maps."""
    filled = {"mean_prediction": 0.0, "pred_variance": 0.0, "saliency_variance": 0.0, "fused_score": 0.0, **values}
    return {name: torch.full(shape, value).numpy() for name, value in filled.items()}


# ---------------------------------------------------------------- pictures and pages


def axes() -> tuple[Figure, Any]:
    """A new figure with one axes."""
    figure = Figure()
    return figure, figure.subplots()


def texts(figure: Figure) -> str:
    """Every text in a figure, one per line."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


class Page(HTMLParser):
    """What a test asks of a page: tags with attributes, texts, the text of each element with a data-path."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.stack: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.quoted: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert not self.stack, "elements left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, text: str) -> None:
        if self.stack and self.stack[-1][0] != "style":
            self.texts.append(text)
        if self.stack and "data-path" in self.stack[-1][1]:
            self.quoted.append((self.stack[-1][1]["data-path"], self.stack[-1][1]["value"], text))

    @property
    def text(self) -> str:
        """All that is read, without tags."""
        return "".join(self.texts)

    def all(self, tag: str) -> list[dict[str, Any]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
