"""Pictures of cases: rows of maps, and overlays at the image's own resolution.

``draw_*`` functions take an axes and arrays and return the axes; ``*_figure`` functions put them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.patheffects
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from reporting.formats import number
from reporting.style import DPI, STYLE, stamp

# Okabe and Ito's palette: told apart by colour-blind readers; the outlines differ in dashes as well.
TRUTH, PREDICTION = "#56B4E9", "#F0E442"
FALSE_POSITIVE, FALSE_NEGATIVE, TRUE_POSITIVE, BACKGROUND = "#D55E00", "#0072B2", "#BBBBBB", "#FFFFFF"
DECADES = 3  # of the colour scales: variances are skewed, on a linear scale most maps would be black


class Case(NamedTuple):
    """What a row of the case figure shows.

    Attributes:
        id: the name of the image.
        image: uint8 (H, W, 3).
        maps: float32 (H, W) under the names of a map file, at least those of ``COLUMNS``.
        truth: uint8 (H, W), nonzero inside the lesion; None where no mask is known.
        dice, jaccard: of the predicted and the true lesion; None where no mask is known.
        detail: what the title says beside the numbers.
    """

    id: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    truth: np.ndarray | None
    dice: float | None = None
    jaccard: float | None = None
    detail: str = ""


class Column(NamedTuple):
    """A map that the case figure shows.

    Attributes:
        key: its name in a map file.
        title: the heading of the column.
        colours: the name of the colour map.
        unit: what the colour bar says.
    """

    key: str
    title: str
    colours: str
    unit: str


COLUMNS = {
    column.key: column
    for column in (
        Column("mean_prediction", "mean prediction", "gray", "probability of lesion"),
        Column("pred_variance", "predictive variance", "magma", "variance of probability, log scale"),
        Column("saliency_variance", "saliency variance", "magma", "variance of Grad-CAM, log scale"),
        Column("fused_score", "fused score", "viridis", "uncertainty, 0 to 1, log scale"),
    )
}


def colour_scale(key: str, scales: Mapping[str, Sequence[float]]) -> Normalize:
    """The colour scale of a map, the same in every row of every figure of a run.

    Probabilities are linear from 0 to 1. The variances and the fused score are logarithmic over three
    decades up to the value that is normalised to 1, so that equal colours mean equal normalised values
    (where the normalisation starts at 0, as variances nearly do); lower values have the lowest colour.

    Args:
        key: a name of ``COLUMNS``.
        scales: the run's normalisation constants (low, high) under "pred_variance" and "saliency_variance"; a map
            that is not among them, the fused score, ends at 1, and so does one whose high is 0.
    """
    if key == "mean_prediction":
        return Normalize(0.0, 1.0)
    high = float(scales[key][1]) if key in scales else 1.0
    if not high > 0:  # a map without any variance
        high = 1.0
    return LogNorm(high / 10**DECADES, high, clip=True)


# ---------------------------------------------------------------- parts of a case


def draw_outlines(ax: Axes, image: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None) -> Axes:
    """The image (H, W, 3) with the outlines of the truth (solid) and the prediction (dashed), masks (H, W)."""
    ax.imshow(image)
    for mask, colour, style in ((truth, TRUTH, "solid"), (prediction, PREDICTION, "dashed")):
        if mask is not None and mask.any() and not mask.all() and min(mask.shape) > 1:  # a line of pixels has no outline
            ax.contour(mask, levels=[0.5], colors="black", linewidths=2.2, linestyles=style, alpha=0.6)
            ax.contour(mask, levels=[0.5], colors=colour, linewidths=1.3, linestyles=style)
    return _bare(ax)


def draw_map(ax: Axes, values: np.ndarray, scale: Normalize, colours: str | Colormap) -> Axes:
    """One map (H, W) on a given colour scale."""
    ax.imshow(values, cmap=colours, norm=scale)
    return _bare(ax)


def draw_error(ax: Axes, prediction: np.ndarray, truth: np.ndarray | None) -> Axes:
    """The outcome of every pixel in colours, false positives and false negatives apart; without a mask, only a note."""
    if truth is None:
        ax.text(0.5, 0.5, "no mask:\nerror unknown", ha="center", va="center", transform=ax.transAxes)
        return _bare(ax)
    colours = np.array([matplotlib.colors.to_rgb(c) for c in (BACKGROUND, FALSE_POSITIVE, FALSE_NEGATIVE, TRUE_POSITIVE)])
    ax.imshow(colours[2 * (truth > 0).astype(int) + prediction.astype(int)])
    return _bare(ax)


def draw_colour_bar(ax: Axes, picture: ScalarMappable, unit: str) -> Axes:
    """A horizontal colour bar with the unit; the triangles say that values beyond the ends exist."""
    logarithmic = isinstance(picture.norm, LogNorm)
    bar = ax.figure.colorbar(picture, cax=ax, orientation="horizontal", extend="both" if logarithmic else "neither")
    high = picture.norm.vmax
    if logarithmic and high is not None:
        powers = range(DECADES, -1, -1)
        bar.set_ticks([high / 10**power for power in powers])
        bar.ax.set_xticklabels([f"{high / 10**power:.1g}" if power else f"{high:.2g}" for power in powers])
        bar.ax.minorticks_off()
    bar.set_label(unit, fontsize=7.5, labelpad=2)
    bar.ax.tick_params(labelsize=7, length=2, pad=1.5)
    bar.outline.set_linewidth(0.5)
    return ax


def _bare(ax: Axes) -> Axes:
    """The axes with a thin grey frame and no ticks."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, linewidth=0.5, color="0.6")
    return ax


def case_title(case: Case) -> str:
    """Id, Dice and Jaccard (where they are known), mean fused score and detail of a case."""
    parts = [case.id]
    if case.dice is not None:
        parts += [f"Dice {number(case.dice)}", f"Jaccard {number(case.jaccard)}"]
    parts.append(f"mean fused score {number(float(case.maps['fused_score'].mean(dtype=float)))}")
    return "   ".join([*parts, *([case.detail] if case.detail else [])])


# ---------------------------------------------------------------- figures of cases

# Inches. The places are computed, not left to a layout engine: that is faster by seconds per run.
PANEL, GAP, MARGIN, HEADING, TITLE, FOOT, STRIP = 2.1, 0.1, 0.15, 0.26, 0.27, 0.62, 0.3


def case_figure(
    cases: Sequence[Case], scales: Mapping[str, Sequence[float]], *,
    threshold: float = 0.5, note: str = "", synthetic: bool = False, data_note: str | None = None,
) -> Figure:
    """One row per case: outlines, mean prediction, the two variances, fused score, error; colour bars below.

    Args:
        cases: at least one; a row is as high as its own maps ask for.
        scales: the run's normalisation constants, which decide the colour scales (:func:`colour_scale`).
        threshold: predicted lesion where the mean prediction exceeds it.
        note: written below the figure (the seed, the rule that chose the cases).
        synthetic: stamps the figure as made from synthetic lesions.
        data_note: what else a reader has to know about the images.
    """
    shapes = [case.maps["mean_prediction"].shape for case in cases]
    heights = [PANEL * min(height / width, 2.0) for height, width in shapes]
    full_width = 2 * MARGIN + 6 * PANEL + 5 * GAP
    full_height = HEADING + len(cases) * TITLE + sum(heights) + FOOT + STRIP
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(full_width, full_height))

        def place(column: int, bottom: float, high: float, inset: float = 0.0) -> Axes:
            left = MARGIN + column * (PANEL + GAP) + inset
            return figure.add_axes(
                (left / full_width, bottom / full_height, (PANEL - 2 * inset) / full_width, high / full_height)
            )

        bottom = full_height - HEADING
        for case, tall in zip(cases, heights):
            bottom -= TITLE + tall
            figure.text(
                MARGIN / full_width, (bottom + tall + 0.07) / full_height, case_title(case), fontsize=9.5,
                weight="bold", parse_math=False,
            )
            axes = [place(column, bottom, tall) for column in range(6)]
            prediction = case.maps["mean_prediction"] > threshold
            draw_outlines(axes[0], case.image, prediction, case.truth)
            for ax, column in zip(axes[1:5], COLUMNS.values()):
                draw_map(ax, case.maps[column.key], colour_scale(column.key, scales), column.colours)
            draw_error(axes[5], prediction, case.truth)
        headings = ("image", *(column.title for column in COLUMNS.values()), "error")
        for position, heading in enumerate(headings):
            middle = MARGIN + position * (PANEL + GAP) + PANEL / 2
            figure.text(middle / full_width, 1 - 0.19 / full_height, heading, ha="center", fontsize=10)
        for position, column in enumerate(COLUMNS.values(), start=1):
            draw_colour_bar(place(position, STRIP + FOOT - 0.22, 0.11, 0.1), axes[position].images[0], column.unit)
        _legend(place(0, STRIP, FOOT - 0.1), [
            Line2D([], [], color=TRUTH, linewidth=2, label="truth"),
            Line2D([], [], color=PREDICTION, linewidth=2, linestyle="dashed", label="prediction"),
        ])
        _legend(place(5, STRIP, FOOT - 0.1), [
            Patch(facecolor=FALSE_POSITIVE, label="false positive"),
            Patch(facecolor=FALSE_NEGATIVE, label="false negative"),
            Patch(facecolor=TRUE_POSITIVE, label="true positive"),
            Patch(facecolor=BACKGROUND, edgecolor="0.6", label="true negative"),
        ])
        stamp(figure, synthetic, data_note, note)
    return figure


def _legend(ax: Axes, handles: Sequence[Artist], scale: float = 1.0) -> None:
    """A legend in place of the axes; its lines have the dark halo that the outlines have: yellow on white would not be seen."""
    ax.axis("off")
    legend = ax.legend(
        handles=handles, loc="upper center", ncols=2, fontsize=7.5 * scale, frameon=False, handlelength=2.0, columnspacing=1.0,
        borderaxespad=0.0, handletextpad=0.6,
    )
    for line in legend.get_lines():
        line.set_path_effects([
            matplotlib.patheffects.Stroke(linewidth=3.2 * scale, foreground="0.35"), matplotlib.patheffects.Normal(),
        ])


def overlay_figure(
    case: Case, original: np.ndarray, original_truth: np.ndarray | None, key: str, scales: Mapping[str, Sequence[float]], *,
    threshold: float = 0.5, note: str = "", synthetic: bool = False, data_note: str | None = None,
) -> Figure:
    """Outlines and one map over the image at its own resolution: at ``DPI``, each pixel of the image is one of the picture.

    The probability is upsampled bilinearly (half-pixel centres) and then compared with the threshold, so
    that the prediction's outline is smooth; the map is upsampled the same way, and is the more opaque the
    higher it lies on its colour scale. Small images are enlarged by a whole factor.

    Args:
        case: the case at map resolution.
        original: uint8 (H, W, 3), undecimated.
        original_truth: uint8 (H, W) at that resolution, or None.
        key: which map, a name of ``COLUMNS``.
        scales, threshold, note, synthetic, data_note: as in :func:`case_figure`.
    """
    height, width = original.shape[:2]
    zoom = max(1, -(-900 // max(height, width)))
    wide, tall = zoom * width / DPI, zoom * height / DPI
    scale = max(1.0, wide / 6)  # of texts and lines
    top, bottom = 0.62 * scale, 0.72 * scale
    full_width, full_height = 2 * wide, top + tall + bottom
    prediction = enlarged(case.maps["mean_prediction"], (height, width)) > threshold
    values, norm, column = enlarged(case.maps[key], (height, width)), colour_scale(key, scales), COLUMNS[key]
    with matplotlib.rc_context({**STYLE, "font.size": 9 * scale}):
        figure = Figure(figsize=(full_width, full_height))
        left = figure.add_axes((0, bottom / full_height, 0.5, tall / full_height))
        right = figure.add_axes((0.5, bottom / full_height, 0.5, tall / full_height))
        for ax, picture in ((left, original), (right, np.repeat(original.mean(2, keepdims=True), 3, 2) / 255)):
            draw_outlines(ax, picture, prediction, original_truth)
            ax.set_aspect("auto")
            for outline in ax.collections:
                outline.set_linewidth(np.atleast_1d(outline.get_linewidth())[0] * scale)
        opacity = 0.75 * np.clip(np.asarray(norm(values), float), 0, 1)
        shown = right.imshow(values, cmap=column.colours, norm=norm, alpha=opacity, aspect="auto")
        shown.set_zorder(0.5)  # above the image, below the outlines
        figure.text(
            0.01, 1 - 0.26 * scale / full_height, case_title(case), fontsize=9 * scale, weight="bold",
            parse_math=False,
        )
        figure.text(0.25, 1 - 0.5 * scale / full_height, f"image, {width} x {height} pixels", ha="center", fontsize=8.5 * scale)
        figure.text(0.75, 1 - 0.5 * scale / full_height, f"{column.title} over the image", ha="center", fontsize=8.5 * scale)
        bar = figure.add_axes((0.58, (bottom - 0.2 * scale) / full_height, 0.34, 0.1 * scale / full_height))
        draw_colour_bar(bar, ScalarMappable(norm, column.colours), column.unit)
        bar.tick_params(labelsize=7 * scale, length=2 * scale, width=0.8 * scale)
        bar.xaxis.label.set_fontsize(7.5 * scale)
        legend = figure.add_axes((0.02, (bottom - 0.4 * scale) / full_height, 0.46, 0.3 * scale / full_height))
        lines = [Line2D([], [], color=PREDICTION, linewidth=2 * scale, linestyle="dashed", label="prediction")]
        if original_truth is not None:
            lines.insert(0, Line2D([], [], color=TRUTH, linewidth=2 * scale, label="truth"))
        _legend(legend, lines, scale)
        stamp(figure, synthetic, data_note, note, scale)
    return figure


def enlarged(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map upsampled bilinearly with half-pixel centres; where it is reduced instead, every pixel of it has a share.

    Args:
        values: (h, w).
        shape: (H, W) of the result.

    Returns:
        float32 (H, W).
    """
    height, width = shape
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
