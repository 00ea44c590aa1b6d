"""The figure of other test sets: every endpoint by set, with its margin."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment.saved_run import PooledRun, SavedRun
from experiment.terms import terms_of
from reporting.formats import is_number
from reporting.pooled_charts import COLUMNS, MARGIN_COLOUR
from reporting.quotes import Quotes
from reporting.style import STYLE, save_figure, stamped
from reporting.targets import FIGURE, sets_of
from runtime.files import remove

SOURCE_COLOUR, TARGET_COLOUR = "#1c1d1f", "#0072B2"


def draw_sets(ax: Axes, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> Axes:
    """The difference of one endpoint on every set with its intervals, the source at the top.

    Args:
        ax: where to.
        names: of the sets.
        entries: of the endpoint on each of them, as in ``metrics.json``.
    """
    margin = entries[0]["margin"]
    ax.axvspan(-margin, margin, color=MARGIN_COLOUR, linewidth=0)
    ax.axvline(0, color="0.3", linewidth=1)
    reach = margin
    for place, entry in enumerate(entries):
        colour = TARGET_COLOUR if place else SOURCE_COLOUR
        if not is_number(entry["value"]):
            ax.text(0, place, "not defined", ha="center", va="center", fontsize=8, color=colour)
            continue
        for key, width in (("interval", 1.2), ("interval_90", 3.2)):
            if all(map(is_number, entry[key])):
                ax.plot(entry[key], [place, place], color=colour, linewidth=width, solid_capstyle="butt")
                reach = max(reach, *map(abs, entry[key]))
        ax.plot([entry["value"]], [place], "o" if place else "D", color=colour, markersize=5.5, markeredgecolor="white")
        ax.annotate(entry["outcome"], (entry["value"], place), (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        reach = max(reach, abs(entry["value"]))
    ax.set(xlim=(-1.12 * reach, 1.12 * reach), ylim=(len(names) - 0.5, -0.7))
    ax.set_yticks(range(len(names)), [textwrap.shorten(name, 22, placeholder="...") for name in names])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, symmetric=True))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title("\n".join(textwrap.wrap(f"{entries[0]['label']}, {entries[0]['region']}", 38)), fontsize=8.5)
    ax.set_xlabel(f"difference ({'left' if entries[0]['lower_is_better'] else 'right'}: better)", fontsize=8)
    return ax


def targets_figure(metrics: Mapping[str, Any]) -> Figure:
    """A panel for each endpoint, a row in it for each test set."""
    quote, sets = Quotes(metrics), sets_of(metrics)
    by_set = [quote.get(f"{one.path}conclusion.endpoints") for one in sets]
    lines = -(-len(by_set[0]) // COLUMNS)
    figure = Figure(figsize=(10.2, 0.5 + lines * (1.2 + 0.36 * len(sets))), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, sharey=True, squeeze=False).ravel()
    for ax, entries in zip(axes, zip(*by_set)):
        draw_sets(ax, [one.name for one in sets], entries)
    for ax in axes[len(by_set[0]):]:
        ax.remove()
    return stamped(figure, metrics)


def draw_targets(run: SavedRun | PooledRun) -> list[Path]:
    """Draw the figure of the other test sets into the ``figures`` folder; without other sets none stays there."""
    path = run.folder / "figures" / f"{FIGURE}.png"
    if not run.metrics.get("targets"):
        remove(path)
        return []
    with matplotlib.rc_context(STYLE):
        figure = targets_figure(run.metrics)
    return [save_figure(figure, path, terms_of(run))]
