"""The figures of a whole run, drawn from its saved numbers alone: no map and no model is read.

``draw_*`` functions take an axes and arrays and return the axes; ``*_figure`` functions put them together.
None and NaN stand for numbers that are not defined, and are not drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from evaluation.names import HEADLINE
from experiment.saved_run import SavedRun
from experiment.terms import terms_of
from reporting.formats import MISSING, SCORE_NAMES, is_number, number, percent, signed, signed_span, spaced, span
from reporting.style import STYLE, save_figure, stamped
from runtime.errors import UserError
from runtime.files import remove

# Okabe and Ito's palette; lines differ in dashes and marks in shape as well.
SCORE_COLOURS = {"predictive_variance": "#0072B2", "saliency_variance": "#D55E00", "fused": "#007A5A"}
SCORE_DASHES = {"predictive_variance": "solid", "saliency_variance": "dashed", "fused": "dashdot"}
PART_LOOKS = {"validation": ("#0072B2", "o", "solid"), "test": ("#D55E00", "s", "dashed")}
STATUS_LOOKS = {"endpoint": ("#0072B2", "D"), "exploratory": ("0.35", "o")}
LINEAR_DIFFERENCE = 0.02  # the forest plot is linear up to here, logarithmic beyond


def _floats(values: Iterable[float | None]) -> np.ndarray:
    """An array with NaN for None."""
    return np.array([np.nan if value is None else value for value in values], float)


def _intervals(pairs: Iterable[Sequence[float | None] | None]) -> np.ndarray:
    """Intervals as an array (n, 2) with NaN for None."""
    return np.array([_floats((None, None) if pair is None else pair) for pair in pairs]).reshape(-1, 2)


def _note(ax: Axes, text: str) -> None:
    """Write into the corner, lower right or upper left or lower left, that hides the fewest points."""
    points = np.concatenate([
        np.empty((0, 2)), *(line.get_xydata() for line in ax.lines if line.get_marker() not in ("", "None", None)),
        *(np.asarray(dots.get_offsets()) for dots in ax.collections if isinstance(dots, PathCollection)),
    ])
    ax.autoscale_view()
    points = ax.transLimits.transform(points)  # 0 to 1 on both axes

    def hidden(corner: tuple[str, str]) -> int:
        beside = points[:, 0] > 0.4 if corner[0] == "right" else points[:, 0] < 0.6
        level = points[:, 1] < 0.24 if corner[1] == "bottom" else points[:, 1] > 0.76
        return int((beside & level).sum())

    across, up = min((("right", "bottom"), ("left", "top"), ("left", "bottom")), key=hidden)
    ax.text(
        0.97 if across == "right" else 0.03, 0.05 if up == "bottom" else 0.95, text, transform=ax.transAxes, ha=across, va=up,
        linespacing=1.4, bbox={"facecolor": "white", "edgecolor": "0.8", "boxstyle": "round,pad=0.4"},
    )


# ---------------------------------------------------------------- reliability


def draw_reliability(ax: Axes, table: Mapping[str, Sequence[float]], colour: str) -> Axes:
    """Accuracy against mean confidence, one point per non-empty bin, with the diagonal of perfect calibration.

    Args:
        ax: where to.
        table: "count", "confidence" and "accuracy" of each bin, as in ``metrics.json``.
        colour: of points, line and gaps.
    """
    filled = np.asarray(table["count"], float) > 0
    confidence, accuracy = _floats(table["confidence"])[filled], _floats(table["accuracy"])[filled]
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="dotted", label="perfect calibration")
    ax.vlines(confidence, accuracy, confidence, color=colour, alpha=0.35, linewidth=3)
    # Marks at 0 and 1 are not cut in two; without marks the layout needs an extent.
    ax.plot(confidence, accuracy, "o-", color=colour, markersize=4, linewidth=1.2, clip_on=not filled.any())
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    ax.xaxis.set_major_formatter("{x:g}")  # "0" and "1" of neighbouring panels do not run into each other
    return ax


def draw_counts(ax: Axes, table: Mapping[str, Sequence[float]], colour: str) -> Axes:
    """Pixels in each bin, on a logarithmic scale."""
    counts = np.asarray(table["count"], float)
    lower, upper = np.asarray(table["lower"], float), np.asarray(table["upper"], float)
    ax.bar(lower, counts, upper - lower, align="edge", color=colour, alpha=0.75, edgecolor="white", linewidth=0.5)
    ax.set(xlim=(0, 1), xlabel="confidence", ylabel="pixels")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(matplotlib.ticker.SymmetricalLogLocator(base=100, linthresh=1))
    return ax


def reliability_figure(run: SavedRun) -> Figure:
    """Foreground reliability of the three scores on the test set, ECE with its interval, pixel counts below."""
    test = run.metrics["test"]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, score in enumerate(HEADLINE):
        table = test["regions"]["foreground"]["scores"][score]["reliability"]
        draw_reliability(axes[0, column], table, SCORE_COLOURS[score]).set_title(SCORE_NAMES[score], fontsize=10)
        text = f"ECE {number(test['foreground_ece'][score])}"
        if is_number(test["foreground_ece"][score]):
            text += f"\n95 %: {span(test['foreground_ece_interval'][score])}"
        _note(axes[0, column], text)
        axes[0, column].set_xlabel("")
        draw_counts(axes[1, column], table, SCORE_COLOURS[score])
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    return stamped(figure, run.metrics)


# ---------------------------------------------------------------- the lambda curve


def draw_lambda_curve(
    ax: Axes, lambdas: Sequence[float], errors: Sequence[float | None], bands: Sequence[Sequence[float | None]], part: str
) -> Axes:
    """Foreground ECE against lambda with its 95 % band."""
    colour, mark, dashes = PART_LOOKS[part]
    low, high = _intervals(bands).T
    ax.fill_between(lambdas, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(lambdas, _floats(errors), marker=mark, linestyle=dashes, markersize=4, color=colour, label=part)
    ax.set(xlim=(-0.05, 1.05), ylabel="foreground ECE")
    return ax


def lambda_figure(run: SavedRun) -> Figure:
    """The curve on validation, where lambda is tuned, and on test; below, how often each lambda would have won."""
    metrics = run.metrics
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for part in PART_LOOKS:
        values = metrics[part]
        draw_lambda_curve(top, values["lambdas"], values["foreground_ece_by_lambda"],
                          values["foreground_ece_by_lambda_interval"], part)
    top.set_ylim(bottom=0)
    top.axvline(metrics["lambda"], color="0.3", linewidth=1, linestyle="dotted", label=f"chosen, λ = {metrics['lambda']:g}")
    top.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    selection = metrics["validation"]["lambda_selection"]
    step = np.diff(selection["lambdas"]).min() if len(selection["lambdas"]) > 1 else 1.0
    bars = bottom.bar(selection["lambdas"], 100 * _floats(selection["share"]), 0.7 * step, color="#0072B2")
    for bar, share in zip(bars, selection["share"]):
        if is_number(share) and share > 0 and len(selection["lambdas"]) <= 21:
            bottom.annotate(percent(share), (bar.get_x() + bar.get_width() / 2, 100 * share), ha="center", va="bottom",
                            fontsize=7, xytext=(0, 1), textcoords="offset points")
    bottom.set(ylim=(0, 125), yticks=[0, 50, 100], xlabel="λ   (0: saliency variance alone, 1: predictive variance alone)",
               ylabel="% of resamples")
    return stamped(figure, metrics)


# ---------------------------------------------------------------- risk and coverage


def draw_risk_coverage(
    ax: Axes, coverage: Sequence[float], risks: Mapping[str, Sequence[float | None]], ideal: Sequence[float | None]
) -> Axes:
    """Error rate of the most certain share of the pixels against that share; below all, the curve of a perfect ranking."""
    for score, risk in risks.items():
        ax.plot(coverage, _floats(risk), color=SCORE_COLOURS[score], linestyle=SCORE_DASHES[score], linewidth=1.6,
                label=SCORE_NAMES[score])
    ax.plot(coverage, _floats(ideal), color="0.3", linewidth=1.2, linestyle="dotted", label="ideal ranking")
    ax.set(xlim=(0, 1), xlabel="coverage (share of pixels kept)", ylabel="risk (share of kept pixels wrong)")
    ax.set_ylim(bottom=0)
    return ax


def risk_coverage_figure(run: SavedRun) -> Figure:
    """Risk against coverage inside the true lesions and over the whole images, for the three scores and a perfect one."""
    regions = run.metrics["test"]["regions"]
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    for ax, (region, title) in zip(
        figure.subplots(1, 2), (("foreground", "inside the true lesions"), ("whole_image", "whole images"))
    ):
        curve = regions[region]["risk_coverage"]
        risks = {score: regions[region]["scores"][score]["risk"] for score in HEADLINE}
        draw_risk_coverage(ax, curve["coverage"], risks, curve["ideal_risk"]).set_title(title, fontsize=10)
        lines, labels = ax.get_legend_handles_labels()
        for index, score in enumerate(HEADLINE):
            labels[index] += f", area {number(regions[region]['scores'][score]['aurc']['value'])}"
        ax.legend(lines, labels, frameon=False, fontsize=8, loc="best")
    return stamped(figure, run.metrics)


# ---------------------------------------------------------------- Dice and uncertainty


def draw_dice_against_uncertainty(
    ax: Axes, uncertainty: ArrayLike, dice: ArrayLike, colour: str, bad_below: float
) -> Axes:
    """One point per image; the line marks the Dice below which a segmentation counts as bad."""
    ax.axhline(bad_below, color="0.6", linewidth=0.8, linestyle="dotted")
    ax.scatter(uncertainty, dice, s=14, color=colour, alpha=0.65, linewidths=0)
    ax.set(ylim=(-0.02, 1.02), xlabel="mean over the image", ylabel="Dice")
    return ax


def dice_figure(run: SavedRun) -> Figure:
    """Dice of every test image against its mean uncertainty, for the three scores."""
    ranking = run.metrics["test"]["ranking_of_images"]
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    dice = _floats(row["dice"] for row in run.rows)
    for ax, score in zip(figure.subplots(1, 3, sharey=True), HEADLINE):
        uncertainty = _floats(row[f"mean_{score}"] for row in run.rows)
        draw_dice_against_uncertainty(ax, uncertainty, dice, SCORE_COLOURS[score], ranking["bad_dice_below"])
        ax.set_title(SCORE_NAMES[score] + (" (normalised)" if score != "fused" else ""), fontsize=10)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
        found = ranking["whole_image"][score]["spearman_with_dice"]
        text = f"Spearman {signed(found['value'])}"
        if is_number(found["value"]):
            text += f"\n95 %: {signed_span(found['interval'])}"
        _note(ax, text)
    for ax in figure.axes[1:]:
        ax.set_ylabel("")
    return stamped(figure, run.metrics)


# ---------------------------------------------------------------- forest plot


class Difference(NamedTuple):
    """A row of the forest plot: foreground ECE minus that of predictive variance.

    Attributes:
        group: the heading above it.
        label: the name of the score or rule.
        value: the difference.
        interval: its 95 % interval (low, high).
        status: "endpoint", or anything else for what is exploratory.
        path: where in the metrics it stands.
    """

    group: str
    label: str
    value: float | None
    interval: Sequence[float | None]
    status: str
    path: str


def differences(metrics: Mapping[str, Any]) -> list[Difference]:
    """All differences of a run: of the other scores, then (with the study) of every normalisation and fusion rule."""
    found = []
    scores = metrics["test"]["regions"]["foreground"]["scores"]
    for score, entry in scores.items():
        if "minus_predictive_variance" in entry:
            name = SCORE_NAMES.get(score, score) + (f" (λ = {metrics['lambda']:g})" if score == "fused" else "")
            path = f"test.regions.foreground.scores.{score}.minus_predictive_variance.ece"
            status = "endpoint" if score == "fused" else "exploratory"
            found.append(_difference("scores", name, entry["minus_predictive_variance"]["ece"], path, status))
    for index, rule in enumerate(metrics.get("study", {}).get("rules", ())):
        name = spaced(rule["rule"])
        if rule["rule"] == "convex":
            name += f" (λ = {rule['parameter']:g})"
        if (rule["normalisation"], rule["rule"]) != ("min_max", "predictive"):  # that is the reference itself
            group = f"{rule['normalisation'].replace('_', '-')} normalisation"
            path = f"study.rules.{index}.minus_predictive_variance"
            found.append(_difference(group, name, rule["minus_predictive_variance"], path))
    return found


def _difference(group: str, label: str, entry: Mapping[str, Any], path: str, status: str = "exploratory") -> Difference:
    return Difference(group, label, entry["value"], entry["interval"], status, path)


def draw_forest(ax: Axes, rows: Sequence[Difference]) -> Axes:
    """One mark and interval per row, around the line of no difference; the numbers on the right."""
    ticks, position, group = [], 0.0, None
    beside = ax.get_yaxis_transform()
    ax.axvline(0, color="0.3", linewidth=1)
    for row in rows:
        if row.group != group:
            position += 0.5 if group is not None else 0.0
            ax.text(-0.02, position, row.group, transform=beside, ha="right", va="center", weight="bold")
            group, position = row.group, position + 1
        colour, mark = STATUS_LOOKS.get(row.status, STATUS_LOOKS["exploratory"])
        text = MISSING
        if is_number(row.value):
            ax.plot([row.value], [position], marker=mark, color=colour, markersize=5, linestyle="none")
            text = signed(row.value)
            if all(is_number(bound) for bound in row.interval):
                ax.plot(_floats(row.interval), [position, position], color=colour, linewidth=1.6, solid_capstyle="butt")
                text += f"  ({signed_span(row.interval)})"
        ax.text(1.02, position, text, transform=beside, va="center", fontsize=8)
        ticks.append((position, row.label))
        position += 1
    ax.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(position - 0.3, -0.7), xlabel="foreground ECE minus that of predictive variance (left: better)")
    ax.set_xscale("symlog", linthresh=LINEAR_DIFFERENCE, linscale=1.0)
    reach = max([LINEAR_DIFFERENCE, *(abs(b) for row in rows for b in (row.value, *row.interval) if is_number(b))])
    ax.set_xlim(-1.15 * reach, 1.15 * reach)
    marks = [mark for mark in (0.01, 0.1, 1.0) if mark <= 1.15 * reach]
    ax.set_xticks([-mark for mark in marks[::-1]] + [0] + marks)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)
    return ax


def forest_figure(run: SavedRun) -> Figure:
    """The differences of all scores and fusion rules from predictive variance, with intervals, around zero."""
    rows = differences(run.metrics)
    groups = len({row.group for row in rows})
    figure = Figure(figsize=(8.2, 1.3 + 0.2 * (len(rows) + 1.5 * groups)), layout="constrained")
    ax = draw_forest(figure.subplots(), rows)
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker=mark, markersize=5, linewidth=1.6, label=status)
            for status, (colour, mark) in STATUS_LOOKS.items()
        ],
        loc="outside upper center", ncols=2, frameon=False,
    )
    ax.text(1.02, 1.0, "difference  (95 %, test images alone)", transform=ax.transAxes, va="top", fontsize=8, color="0.3")
    return stamped(figure, run.metrics)


# ---------------------------------------------------------------- training


def draw_training(ax: Axes, log: Sequence[Mapping[str, float]], keys: Mapping[str, str]) -> Axes:
    """Columns of the training log by epoch; ``keys`` maps a column to the name of its curve, training or validation."""
    looks = {"training": ("0.35", "^", "dotted"), "validation": PART_LOOKS["validation"]}
    for key, name in keys.items():
        colour, mark, dashes = looks[name]
        ax.plot([row["epoch"] for row in log], [row[key] for row in log], marker=mark, linestyle=dashes, markersize=3,
                color=colour, label=name)
    ax.set(xlabel="epoch")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return ax


def training_figure(run: SavedRun) -> Figure:
    """Losses and validation Dice by epoch, the epoch whose weights were kept marked."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_training(left, run.log, {"train_loss": "training", "validation_loss": "validation"})
    left.set_ylabel("binary cross-entropy, nats per pixel")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    draw_training(right, run.log, {"validation_dice": "validation"})
    right.set(ylabel="validation Dice", ylim=(0, 1))
    dices = _floats(row["validation_dice"] for row in run.log)
    if np.isfinite(dices).any():
        best = int(np.nanargmax(dices))
        right.axvline(run.log[best]["epoch"], color="0.3", linewidth=1, linestyle="dotted")
        side = (0.03, "left") if best > len(dices) / 2 else (0.97, "right")  # away from the line
        right.text(side[0], 0.05, f"kept: epoch {run.log[best]['epoch']:.0f}, Dice {number(dices[best])}",
                   transform=right.transAxes, ha=side[1], va="bottom")
    return stamped(figure, run.metrics)


RUN_FIGURES = {
    "reliability": reliability_figure,
    "lambda_curve": lambda_figure,
    "forest": forest_figure,
    "risk_coverage": risk_coverage_figure,
    "dice_uncertainty": dice_figure,
    "training": training_figure,
}


def draw_run_figures(run: SavedRun) -> list[Path]:
    """Draw every figure of ``RUN_FIGURES`` into the run's ``figures`` folder; returns the files.

    That of the training is left out where nothing was trained.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    paths, terms = [], terms_of(run)
    for name, draw in RUN_FIGURES.items():
        path = run.folder / "figures" / f"{name}.png"
        if name == "training" and not run.log:
            remove(path)
            continue
        try:
            with matplotlib.rc_context(STYLE):
                figure = draw(run)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{run.folder / 'metrics.json'} does not hold what figure {name} shows ({error}); run main.py again"
            ) from error
        paths.append(save_figure(figure, path, terms))
    return paths
