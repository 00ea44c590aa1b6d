"""The figure of several trainings: every endpoint by training and pooled, with its margin."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiment.saved_run import PooledRun
from experiment.terms import terms_of
from reporting.formats import MISSING, is_number, signed, signed_span
from reporting.style import STYLE, save_figure, stamped

ENDPOINTS_FIGURE = "endpoints"
#: Colour, mark and size of a training and of the pooled mean.
TRAINING_LOOK, POOLED_LOOK = ("#0072B2", "o", 4.0), ("#1c1d1f", "D", 6.0)
MARGIN_COLOUR = "0.9"
COLUMNS = 3


def draw_endpoint(ax: Axes, names: Sequence[str], entry: Mapping[str, Any]) -> Axes:
    """The difference of every training, and below them the pooled one with its intervals, around zero.

    Args:
        ax: where to.
        names: of the trainings, from top to bottom.
        entry: of the endpoint, as in ``metrics.json``.
    """
    margin, pooled = entry["margin"], len(names) + 0.5
    ax.axvspan(-margin, margin, color=MARGIN_COLOUR, linewidth=0)
    ax.axvline(0, color="0.3", linewidth=1)
    colour, mark, size = TRAINING_LOOK
    for place, value in enumerate(entry["by_training"]):
        if is_number(value):
            ax.plot([value], [place], mark, color=colour, markersize=size)
    colour, mark, size = POOLED_LOOK
    for key, width in (("interval", 1.2), ("interval_90", 3.2)):
        if all(map(is_number, entry[key])):
            ax.plot(entry[key], [pooled, pooled], color=colour, linewidth=width, solid_capstyle="butt")
    if is_number(entry["value"]):
        ax.plot([entry["value"]], [pooled], mark, color=colour, markersize=size, markeredgecolor="white")
    drawn = (margin, entry["value"], *entry["interval"], *entry["interval_90"], *entry["by_training"])
    reach = 1.1 * max(abs(value) for value in drawn if is_number(value))
    ax.set(xlim=(-reach, reach), ylim=(pooled + 0.7, -0.7))
    ax.set_yticks([*range(len(names)), pooled], [*names, "pooled"])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, symmetric=True))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    title = "\n".join(textwrap.wrap(f"{entry['label']}, {entry['region']}", 38))
    ax.set_title(f"{title}\n{_found(entry)}", fontsize=8.5)
    ax.set_xlabel(f"difference ({'left' if entry['lower_is_better'] else 'right'}: better)", fontsize=8)
    return ax


def _found(entry: Mapping[str, Any]) -> str:
    """Outcome, difference and interval."""
    if not is_number(entry["value"]):
        return MISSING
    return f"{entry['outcome']}: {signed(entry['value'])} ({signed_span(entry['interval'])})"


def endpoints_figure(run: PooledRun) -> Figure:
    """A panel for each endpoint; above all, what the marks mean."""
    names = [entry["name"] for entry in run.metrics["pooled"]]
    endpoints = run.metrics["conclusion"]["endpoints"]
    lines = -(-len(endpoints) // COLUMNS)
    figure = Figure(figsize=(10.2, 0.7 + lines * (1.35 + 0.17 * (len(names) + 1))), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, sharey=True, squeeze=False).ravel()
    for ax, entry in zip(axes, endpoints):
        draw_endpoint(ax, names, entry)
    for ax in axes[len(endpoints):]:
        ax.remove()
    (blue, circle, small), (dark, diamond, large) = TRAINING_LOOK, POOLED_LOOK
    figure.legend(
        handles=[
            Line2D([], [], color=blue, marker=circle, markersize=small, linestyle="none", label="one training"),
            Line2D([], [], color=dark, marker=diamond, markersize=large, linewidth=1.2, label="pooled, 95 % interval"),
            Line2D([], [], color=dark, linewidth=3.2, label="90 % interval"),
            Patch(color=MARGIN_COLOUR, label="inside the margin"),
        ],
        loc="outside upper center", ncols=4, frameon=False,
    )
    return stamped(figure, run.metrics)


def draw_pooled_figures(run: PooledRun) -> list[Path]:
    """Draw the figure of the endpoints into the ``figures`` folder; returns the files."""
    with matplotlib.rc_context(STYLE):
        figure = endpoints_figure(run)
    return [save_figure(figure, run.folder / "figures" / f"{ENDPOINTS_FIGURE}.png", terms_of(run))]
