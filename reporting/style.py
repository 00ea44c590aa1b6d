"""What all pictures share: their style, the stamp at the lower edge, saving."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiment.terms import STANDARD, Terms
from reporting.formats import SYNTHETIC_NOTE
from runtime.errors import UserError
from runtime.files import atomic_write

DPI = 160

STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "svg.hashsalt": "figure", "pdf.fonttype": 42, "image.interpolation": "nearest",
}

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg")
# Without dates in the metadata, the same picture is the same file.
SAVE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
    "jpg": {"pil_kwargs": {"quality": 88}},
    "jpeg": {"pil_kwargs": {"quality": 88}},
}


def stamp(figure: Figure, synthetic: bool, data_note: str | None = None, note: str = "", scale: float = 1.0) -> None:
    """Write at the lower edge what a reader must know about a picture.

    Args:
        figure: the picture.
        synthetic: says in red that the images are synthetic lesions.
        data_note: what else must be known about the images.
        note: how the picture was made.
        scale: enlarges all texts.
    """
    baseline = 0.07 * scale / figure.get_size_inches()[1]
    left = "; ".join(text for text in (SYNTHETIC_NOTE if synthetic else None, data_note) if text)
    if left:
        ground = "#B00020" if synthetic else "0.3"
        figure.text(
            0.008, baseline, left, ha="left", va="bottom", fontsize=8 * scale, color="white", weight="bold", parse_math=False,
            bbox={"facecolor": ground, "edgecolor": "none", "pad": 2.5 * scale},
        )
    if note:
        figure.text(0.992, baseline, note, ha="right", va="bottom", fontsize=7.5 * scale, color="0.3", parse_math=False)


def stamped(figure: Figure, metrics: Mapping[str, Any]) -> Figure:
    """Keep a strip free at the lower edge of a chart with constrained layout and stamp it; returns the figure."""
    synthetic, data_note = bool(metrics.get("synthetic")), metrics.get("data_note")
    strip = 0.3 / figure.get_size_inches()[1] if synthetic or data_note else 0.0
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, strip, 1, 1 - strip))
    stamp(figure, synthetic, data_note)
    return figure


def save_figure(figure: Figure, path: Path, terms: Terms = STANDARD) -> Path:
    """Save a figure whole or not at all; text stays text. Returns the path.

    Args:
        figure: the picture; its texts change to those of the terms.
        path: where to; the suffix decides the format (png, jpg, pdf, svg), none means PNG.
        terms: of the run.

    Raises:
        UserError: an unknown suffix or an unwritable folder.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".") or "png"
    if kind not in FORMATS:
        raise UserError(f"cannot draw a picture of type .{kind}; use .png, .jpg, .pdf or .svg")
    if terms is not STANDARD:
        _word(figure, terms)
    with matplotlib.rc_context(STYLE), atomic_write(path) as stream:
        figure.savefig(stream, format=kind, dpi=DPI, **SAVE_OPTIONS.get(kind, {}))
    return path


def short_name(name: str) -> str:
    """A file name that file systems take: one of more than 200 bytes keeps its beginning, its suffix and a checksum.

    Example:
        >>> short_name("case_" + "a" * 250 + ".png").startswith("case_aaa"), len(short_name("a" * 300 + ".png"))
        (True, 142)
    """
    if len(os.fsencode(name)) <= 200:
        return name
    stem, suffix = os.path.splitext(name)
    start = os.fsencode(stem)[:121].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{suffix}"


def _word(figure: Figure, terms: Terms) -> None:
    """Put every text of a figure into the terms of its run."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_text(terms(text.get_text()))
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            if (worded := [terms(label) for label in labels]) != labels:  # an axis writes its labels anew when it is drawn
                axis.set_ticks(axis.get_ticklocs(), labels=worded)
