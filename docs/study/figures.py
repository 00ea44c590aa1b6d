"""The figures of the study, each from the numbers of :mod:`docs.study.numbers` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from docs.study.numbers import EXTERNAL, FIRST, LARGER, SEEDS
from docs.study.tables import Runs
from experiment.saved_run import SavedRun
from reporting.charts import forest_figure, reliability_figure, risk_coverage_figure
from reporting.pooled_charts import MARGIN_COLOUR
from reporting.style import STYLE, save_figure, stamped

SETS = (("ISIC 2018", "#0072B2", "D"), (EXTERNAL, "#D55E00", "s"))


def verdict(runs: Runs) -> Figure:
    """Every endpoint on both data sets in units of its margin: dots are trainings, the bar is the 95 % interval."""
    conclusions = (runs["pooled"]["conclusion"], runs["pooled"]["targets"][EXTERNAL]["conclusion"])
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    ax = figure.subplots()
    ax.axvspan(-1, 1, color=MARGIN_COLOUR, linewidth=0)
    ax.axvline(0, color="0.3", linewidth=1)
    beside = ax.get_yaxis_transform()
    ticks = []
    for row in range(len(conclusions[0]["endpoints"])):
        for place, (conclusion, (_, colour, mark)) in enumerate(zip(conclusions, SETS)):
            entry, position = conclusion["endpoints"][row], row + 0.32 * place
            unit = entry["margin"] * (-1 if entry["lower_is_better"] else 1)  # to the right is better, everywhere
            ax.plot(np.array(entry["by_training"], float) / unit, [position] * len(entry["by_training"]), "o",
                    color=colour, alpha=0.35, markersize=3.5, markeredgewidth=0)
            ax.plot(np.array(entry["interval"]) / unit, [position] * 2, color=colour, linewidth=1.8, solid_capstyle="butt")
            ax.plot(entry["value"] / unit, position, mark, color=colour, markersize=6, markeredgecolor="white")
            ax.text(1.02, position, entry["outcome"], transform=beside, va="center", color=colour, fontsize=8.5)
        ticks.append(f"{entry['label']},\n{entry['region']}")
    ax.set_yticks(np.arange(len(ticks)) + 0.16, ticks)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(ticks) - 0.3, -0.5)
    ax.set_xscale("symlog", linthresh=2, linscale=1.2)
    ax.set_xlim(-max(map(abs, ax.get_xlim())), max(map(abs, ax.get_xlim())))
    ax.xaxis.set_major_formatter("{x:g}")
    marks = [mark for mark in (1, 2, 10, 100) if mark < ax.get_xlim()[1]]
    ax.set_xticks([-mark for mark in marks[::-1]] + [0] + marks)
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_xlabel("fused against predictive variance, in margins      (left: fusing hurts, right: fusing helps)")
    ax.spines["left"].set_visible(False)
    figure.legend(
        handles=[
            *(Line2D([], [], color=colour, marker=mark, linewidth=1.8, markeredgecolor="white",
                     label=f"{name}, ten trainings, 95 %") for name, colour, mark in SETS),
            Line2D([], [], color="0.5", marker="o", linestyle="none", markersize=3.5, label="one training"),
            Patch(color=MARGIN_COLOUR, label="too small to matter"),
        ],
        loc="outside upper center", ncols=4, frameon=False, fontsize=8.5,
    )
    return stamped(figure, runs["pooled"])


def lambda_curves(runs: Runs) -> Figure:
    """Foreground ECE against lambda for every training, on validation and test; the chosen lambda is marked."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, part in zip(axes, ("validation", "test")):
        for seed in SEEDS:
            values = runs[seed][part]
            lambdas, errors = values["lambdas"], values["foreground_ece_by_lambda"]
            (line,) = ax.plot(lambdas, errors, linewidth=1.2, alpha=0.7, color="#0072B2")
            chosen = int(np.argmin(np.abs(np.array(lambdas) - runs[seed]["lambda"])))
            ax.plot(lambdas[chosen], errors[chosen], "o", color=line.get_color(), markersize=5, markeredgecolor="white")
        ax.set_title(f"{part} images, {len(SEEDS)} trainings", fontsize=10)
        ax.set_xlabel("λ  (0: saliency variance alone, 1: predictive variance alone)")
    axes[0].set_ylabel("foreground ECE")
    axes[0].set_ylim(bottom=0)  # of both; set earlier it would cut off what is drawn later
    axes[1].legend(handles=[Line2D([], [], color="#0072B2", marker="o", linestyle="none", label="λ chosen on validation")],
                   frameon=False, loc="upper right")
    return stamped(figure, runs["pooled"])


def draw_figures(runs: Runs, docs: Path) -> list[str]:
    """Draw the figures into docs/study; returns their names."""
    first = SavedRun(docs, runs[FIRST], {}, [], [])
    drawn: dict[str, Callable[[], Figure]] = {
        "verdict": lambda: verdict(runs), "lambda_curves": lambda: lambda_curves(runs),
        "reliability": lambda: reliability_figure(first), "risk_coverage": lambda: risk_coverage_figure(first),
    }
    if LARGER[0] in runs:
        drawn["forest"] = lambda: forest_figure(SavedRun(docs, runs[LARGER[0]], {}, [], []))
    for name, draw in drawn.items():
        with matplotlib.rc_context(STYLE):
            save_figure(draw(), docs / "study" / f"{name}.png")
    return list(drawn)
