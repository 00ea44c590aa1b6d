"""Every picture, and the command that renders one sample.

``draw_*`` functions take an axes and arrays and return the axes; ``*_figure``
functions put them together. Nothing is computed here that a map or
``metrics.json`` does not already hold.
"""

from __future__ import annotations

import argparse
import csv
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from checkpoints import load_model, weights_fingerprint
from config import Config, Parser, resolve_device
from dataset import Pair, find_pairs, normalise, read_image, read_mask
from fusion import Fusion, Linear
from storage import UserError, fingerprint, read_json, read_sealed, whole_file
from train import segmentation_overlap
from uncertainty import uncertainty_maps

# Okabe and Ito's palette: told apart by colour-blind readers.
TRUTH, PREDICTION = "#56B4E9", "#F0E442"
FALSE_POSITIVE, FALSE_NEGATIVE, TRUE_POSITIVE, BACKGROUND = "#D55E00", "#0072B2", "#BBBBBB", "#FFFFFF"
SCORE_COLOURS = {"predictive_variance": "#0072B2", "saliency_variance": "#D55E00", "fused": "#009E73"}
SCORE_NAMES = {
    "predictive_variance": "predictive variance",
    "saliency_variance": "saliency variance",
    "fused": "fused score",
}
SYNTHETIC_NOTE = "SYNTHETIC LESIONS: not patient data"

STYLE = {"font.size": 9, "axes.titlesize": 9, "svg.fonttype": "none", "pdf.fonttype": 42, "image.interpolation": "nearest"}


class Case(NamedTuple):
    """What a row of the case figure shows.

    image uint8 (H, W, 3); maps: float32 (H, W) under the names of a map file;
    truth uint8 (H, W) or None where no mask is known.
    """

    id: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    truth: np.ndarray | None


# ---------------------------------------------------------------- one case


def draw_outlines(ax: Axes, image: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None) -> Axes:
    """The image with the outlines of the truth (solid) and the prediction (dashed)."""
    ax.imshow(image)
    for mask, colour, style in ((truth, TRUTH, "solid"), (prediction, PREDICTION, "dashed")):
        if mask is not None and mask.any() and not mask.all():
            ax.contour(mask, levels=[0.5], colors="black", linewidths=2.2, linestyles=style, alpha=0.6)
            ax.contour(mask, levels=[0.5], colors=colour, linewidths=1.3, linestyles=style)
    return _bare(ax)


def draw_map(ax: Axes, values: np.ndarray, low: float, high: float, colours: str, label: str) -> Axes:
    """One map on a fixed colour scale, with a colour bar that says what is measured."""
    picture = ax.imshow(values, cmap=colours, vmin=low, vmax=high)
    bar = ax.figure.colorbar(picture, ax=ax, fraction=0.046, pad=0.03, extend="max" if values.max() > high else "neither")
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return _bare(ax)


def draw_error(ax: Axes, prediction: np.ndarray, truth: np.ndarray | None) -> Axes:
    """False positives and false negatives apart; without a mask, only a note."""
    if truth is None:
        ax.text(0.5, 0.5, "no mask:\nerror unknown", ha="center", va="center", transform=ax.transAxes)
        return _bare(ax)
    colours = np.array([_rgb(c) for c in (BACKGROUND, FALSE_POSITIVE, FALSE_NEGATIVE, TRUE_POSITIVE)])
    ax.imshow(colours[2 * truth.astype(int) + prediction.astype(int)])
    return _bare(ax)


def _rgb(colour: str) -> tuple[float, ...]:
    return matplotlib.colors.to_rgb(colour)


def _bare(ax: Axes) -> Axes:
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def case_title(case: Case, threshold: float = 0.5) -> str:
    """Id, Dice and Jaccard (where the truth is known) and mean fused score of a case."""
    title = case.id
    if case.truth is not None:
        dice, jaccard = _overlap(case, threshold)
        title += f"   Dice {dice:.3f}   Jaccard {jaccard:.3f}"
    return title + f"   mean fused score {case.maps['fused_score'].mean():.3f}"


def _overlap(case: Case, threshold: float) -> tuple[float, float]:
    prediction = torch.from_numpy(case.maps["mean_prediction"] > threshold)[None]
    dice, jaccard = segmentation_overlap(prediction, torch.from_numpy(case.truth.astype(bool))[None])
    return float(dice[0]), float(jaccard[0])


def case_figure(
    cases: Sequence[Case], scales: Mapping[str, Sequence[float]], *,
    threshold: float = 0.5, note: str = "", synthetic: bool = False,
) -> Figure:
    """One row a case: outlines, mean prediction, the two variances, fused score, error.

    Args:
        cases: at least one.
        scales: (low, high) under "pred_variance" and "saliency_variance": the
            colour scale of these columns in every row, the run's
            normalisation constants.
        threshold: predicted lesion where the mean prediction exceeds it.
        note: written below the figure (the seed, the rule that chose the cases).
        synthetic: stamps the figure as made from synthetic lesions.
    """
    columns = (
        ("mean_prediction", (0.0, 1.0), "gray", "mean prediction", "probability of lesion"),
        ("pred_variance", scales["pred_variance"], "magma", "predictive variance", "variance of probability"),
        ("saliency_variance", scales["saliency_variance"], "magma", "saliency variance", "variance of Grad-CAM"),
        ("fused_score", (0.0, 1.0), "viridis", "fused score", "uncertainty, 0 to 1"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 2.75 * len(cases) + 0.75), layout="constrained")
        rows = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
        for case, row in zip(cases, rows):
            row.suptitle(case_title(case, threshold), fontsize=10, x=0.01, ha="left")
            axes = row.subplots(1, 6)
            prediction = case.maps["mean_prediction"] > threshold
            draw_outlines(axes[0], case.image, prediction, case.truth).set_title("image")
            for ax, (key, (low, high), colours, title, label) in zip(axes[1:5], columns):
                draw_map(ax, case.maps[key], low, high, colours, label).set_title(title)
            draw_error(axes[5], prediction, case.truth).set_title("error")
        figure.legend(
            handles=[
                Line2D([], [], color=TRUTH, label="truth (outline)"),
                Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction (outline)"),
                Patch(facecolor=FALSE_POSITIVE, label="false positive"),
                Patch(facecolor=FALSE_NEGATIVE, label="false negative"),
                Patch(facecolor=TRUE_POSITIVE, label="true positive"),
            ],
            loc="outside lower center", ncols=5, frameon=False, facecolor="0.3",
        )
        _annotate(figure, note, synthetic)
    return figure


def _annotate(figure: Figure, note: str, synthetic: bool) -> None:
    if note:
        figure.text(0.99, 0.004, note, ha="right", va="bottom", fontsize=7, color="0.35")
    if synthetic:
        figure.text(
            0.008, 0.004, SYNTHETIC_NOTE, ha="left", va="bottom", fontsize=8, color="white", weight="bold",
            bbox={"facecolor": "#B00020", "edgecolor": "none", "pad": 2.5},
        )


# ---------------------------------------------------------------- a whole run


def draw_reliability(ax: Axes, table: Mapping[str, Sequence[float]], colour: str) -> Axes:
    """Accuracy against mean confidence, a point a non-empty bin, with the diagonal of perfect calibration."""
    count = np.asarray(table["count"], float)
    filled = count > 0
    confidence = np.asarray(table["confidence"], float)[filled]
    accuracy = np.asarray(table["accuracy"], float)[filled]
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="dotted")
    ax.vlines(confidence, accuracy, confidence, color=colour, alpha=0.35, linewidth=3)
    ax.plot(confidence, accuracy, "o-", color=colour, markersize=4)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    return ax


def draw_counts(ax: Axes, table: Mapping[str, Sequence[float]], colour: str) -> Axes:
    """Pixels in each bin, on a logarithmic scale."""
    count = np.asarray(table["count"], float)
    lower, upper = np.asarray(table["lower"]), np.asarray(table["upper"])
    ax.bar(lower, count, upper - lower, align="edge", color=colour, alpha=0.7)
    ax.set(xlim=(0, 1), xlabel="confidence", ylabel="pixels")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(bottom=0)
    return ax


def reliability_figure(metrics: Mapping[str, Any]) -> Figure:
    """Foreground reliability of the three scores on the test set, pixel counts below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.6), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True, height_ratios=(3, 1))
        for column, (score, name) in enumerate(SCORE_NAMES.items()):
            table = metrics["test"]["regions"]["foreground"]["scores"][score]["reliability"]
            ece = metrics["test"]["foreground_ece"][score]
            draw_reliability(axes[0, column], table, SCORE_COLOURS[score]).set_title(name)
            axes[0, column].text(0.04, 0.96, f"ECE {_number(ece)}", transform=axes[0, column].transAxes, va="top")
            axes[0, column].set_xlabel("")
            draw_counts(axes[1, column], table, SCORE_COLOURS[score])
        figure.suptitle("Reliability inside the true lesions, test set", fontsize=10)
        _annotate(figure, "", metrics["synthetic"])
    return figure


def draw_lambda_curve(ax: Axes, lambdas: Sequence[float], ece: Sequence[float], chosen: float, label: str, colour: str) -> Axes:
    """Foreground ECE against lambda with the chosen lambda marked."""
    values = np.array([np.nan if value is None else value for value in ece], float)
    ax.plot(lambdas, values, "o-", markersize=4, color=colour, label=label)
    ax.axvline(chosen, color="0.6", linewidth=1, linestyle="dotted")
    ax.set(xlabel="λ   (0: saliency variance alone, 1: predictive variance alone)", ylabel="foreground ECE")
    return ax


def lambda_figure(metrics: Mapping[str, Any]) -> Figure:
    """The tuning curve on validation and the same curve on test."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        ax = figure.subplots()
        for part, colour in (("validation", "#0072B2"), ("test", "#D55E00")):
            draw_lambda_curve(
                ax, metrics[part]["lambdas"], metrics[part]["foreground_ece_by_lambda"], metrics["lambda"], part, colour
            )
        ax.set_title(f"Fusion weight: λ = {metrics['lambda']:g} has the lowest ECE on validation")
        ax.legend(frameon=False)
        _annotate(figure, "", metrics["synthetic"])
    return figure


def training_figure(log_path: Path, synthetic: bool) -> Figure:
    """Losses and validation Dice by epoch, from ``training_log.csv``."""
    with open(log_path, newline="") as stream:
        log = list(csv.DictReader(stream))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        epochs = [float(row["epoch"]) for row in log]
        for key, label, colour in (("train_loss", "training", "#0072B2"), ("validation_loss", "validation", "#D55E00")):
            left.plot(epochs, [float(row[key]) for row in log], "o-", markersize=3, color=colour, label=label)
        left.set(xlabel="epoch", ylabel="binary cross-entropy, nats a pixel")
        left.legend(frameon=False)
        right.plot(epochs, [float(row["validation_dice"]) for row in log], "o-", markersize=3, color="#D55E00")
        right.set(xlabel="epoch", ylabel="validation Dice", ylim=(None, 1))
        _annotate(figure, "", synthetic)
    return figure


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a figure whole or not at all; the suffix decides the format (png, jpg, pdf, svg).

    Raises:
        UserError: an unknown suffix or an unwritable folder.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".") or "png"
    if kind not in ("png", "jpg", "jpeg", "pdf", "svg"):
        raise UserError(f"cannot draw a picture of type .{kind}; use .png, .jpg, .pdf or .svg")
    with matplotlib.rc_context(STYLE), whole_file(path) as stream:
        figure.savefig(stream, format=kind, dpi=160)
    return path


# ---------------------------------------------------------------- the command


def newest_run(results: Path) -> Path:
    """The finished run (a folder with ``metrics.json``) in ``results`` that ended last.

    Raises:
        UserError: there is none.
    """
    results = Path(results)
    runs = [path.parent for path in (*results.glob("metrics.json"), *results.glob("*/metrics.json"))]
    if not runs:
        raise UserError(f"there is no finished run in {results}; run main.py first")
    return max(runs, key=lambda path: (path / "metrics.json").stat().st_mtime)


def pick(ids: Sequence[str], seed: int) -> str:
    """The id that a seed stands for; every id is equally likely."""
    return sorted(ids)[int(np.random.default_rng(seed).integers(len(ids)))]


def fusion_of(metrics: Mapping[str, Any], source: Path) -> Fusion:
    """The fusion that a run tuned.

    Raises:
        UserError: ``metrics`` does not describe one; the line names ``source``.
    """
    try:
        scales = metrics["normalisation"]
        ranges = [Linear(*(float(bound) for bound in scales[key])) for key in ("pred_variance", "saliency_variance")]
        weight = float(metrics["lambda"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} lacks a valid normalisation or lambda; delete it and run main.py again") from error
    if not 0 <= weight <= 1:
        raise UserError(f"{source}: lambda is {weight}, outside 0 to 1; delete it and run main.py again")
    return Fusion(*ranges, "convex", weight)


def compute_case(run: Path, pair: Pair | None, image: Path, id: str, device: torch.device) -> tuple[Case, Config, dict]:
    """Compute the maps of one image with the model and the fusion of a finished run.

    The masks are seeded as in the run, so the maps of a test image are those it saved.
    """
    record, metrics = read_json(run / "config.json"), read_sealed(run / "metrics.json")
    config = Config.from_dict(record.get("configuration"), run / "config.json")
    fusion = fusion_of(metrics, run / "metrics.json")
    model = load_model(run / "weights" / "best_model.pth", device)
    if metrics.get("identity") != fingerprint([record.get("identity"), weights_fingerprint(model)]):
        raise UserError(f"{run / 'metrics.json'} was not made from the weights and config.json beside it; run main.py again")
    pixels = read_image(image, config.image_size)
    truth = None if pair is None else read_mask(pair.mask, config.image_size)
    batch = normalise(torch.from_numpy(pixels)[None].to(device))
    maps = uncertainty_maps(model, batch, image_ids=[id], **config.map_options(model))
    arrays = {
        "mean_prediction": maps.mean_prediction[0], "pred_variance": maps.pred_variance[0],
        "saliency_variance": maps.saliency_variance[0],
        "fused_score": fusion(maps.pred_variance[0], maps.saliency_variance[0]),
    }
    case = Case(id, pixels, {name: value.cpu().numpy() for name, value in arrays.items()}, truth)
    return case, config, metrics


def has_display() -> bool:
    """Whether a window can be opened."""
    if sys.platform.startswith(("win", "darwin")):
        return sys.stdout.isatty()
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Render the uncertainty maps of one image of a finished run.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, help="folder of a finished run [the newest one in results/]")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are looked for [results]")
    parser.add_argument("--seed", type=int, help="which random test image [drawn and printed]")
    parser.add_argument("--id", help="this image of the run's data instead of a random one")
    parser.add_argument("--image", type=Path, help="any picture instead; needs no mask")
    parser.add_argument("--output", type=Path, help="file to write: .png, .jpg, .pdf or .svg [RUN/figures/case_ID.png]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    try:
        args = parser.parse_args(argv)
        if args.id is not None and args.image is not None:
            raise UserError("give --id or --image, not both")
        if args.seed is not None and args.seed < 0:
            raise UserError(f"--seed must be at least 0, not {args.seed}")
        path = render(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"saved {path}")
    return 0


def render(args: argparse.Namespace) -> Path:
    """Compute, draw, save and (where there is a display) show the case that the arguments ask for."""
    run = args.run or newest_run(args.results)
    record = read_json(run / "config.json")
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} holds no finished run (no metrics.json); run main.py first")
    device = resolve_device(args.device)
    if args.image is not None:
        pair, image, id, how = None, args.image, args.image.stem, f"--image {args.image}"
    else:
        pairs = {pair.id: pair for pair in find_pairs(Path(record["images"]), Path(record["masks"]), [])}
        seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
        id, how = (args.id, f"--id {args.id}") if args.id else (pick(record["split"]["test"], seed), f"--seed {seed}")
        if id not in pairs:
            raise UserError(f"there is no image {id} in {record['images']}; give --id one of that folder")
        pair, image = pairs[id], pairs[id].image
    case, config, metrics = compute_case(run, pair, image, id, device)
    figure = case_figure(
        [case], metrics["normalisation"], threshold=config.threshold,
        note=f"{how}, dropout seed {config.seed}, T = {config.passes}, λ = {metrics['lambda']:g}",
        synthetic=bool(metrics["synthetic"]) and args.image is None,
    )
    path = save_figure(figure, args.output or run / "figures" / f"case_{id}.png")
    print(f"{case_title(case, config.threshold)}\nthe same picture again: python visualize.py --run {run} {how}")
    if has_display():
        from matplotlib import pyplot

        pyplot.figure(figsize=(15, 3.5))
        pyplot.imshow(pyplot.imread(str(path))) if path.suffix == ".png" else None
        pyplot.axis("off")
        pyplot.show()
    return path


if __name__ == "__main__":
    sys.exit(main())
