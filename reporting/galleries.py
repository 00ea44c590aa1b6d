"""Galleries: test images chosen by a rule, never by hand, and drawn from saved maps without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiment.map_files import read_maps
from reporting.cases import COLUMNS, Case, case_figure
from reporting.formats import number
from runtime.errors import UserError

# Reads the image (H, W, 3) of an id at map resolution.
ImageReader = Callable[[str], np.ndarray]


class Candidates(NamedTuple):
    """The test images that a rule chooses from.

    Attributes:
        rows: the rows of ``per_image.csv``, numbers as floats (NaN: not defined).
        folder: where the map files lie.
        scales: the run's normalisation constants (low, high) under "pred_variance" and "saliency_variance".
        seed: of the random rule.
        identity: that the maps must have; None where that is not known.
        sealed: whether every map file must carry a checksum.
    """

    rows: Sequence[Mapping[str, Any]]
    folder: Path
    scales: Mapping[str, Sequence[float]]
    seed: int
    identity: str | None = None
    sealed: bool = False

    def maps(self, id: str, need: Sequence[str]) -> dict[str, Any]:
        """The maps of one image.

        Raises:
            UserError: the file is missing or broken, or lacks a map of ``need``.
        """
        return read_maps(self.folder / f"{id}.npz", need, self.identity, self.sealed)


class Rule(NamedTuple):
    """How images are ranked.

    Attributes:
        title: heads the gallery.
        rank: gives one number per image; NaN leaves the image out.
        largest: whether the largest number comes first.
        shown: the name of the number in a row's title, empty where the title has it anyway.
    """

    title: str
    rank: Callable[[Candidates], Sequence[float]]
    largest: bool = True
    shown: str = ""


class Choice(NamedTuple):
    """An image that a rule chose, and its number."""

    id: str
    value: float


# ---------------------------------------------------------------- what the rules compute


def by_chance(images: Candidates) -> Sequence[float]:
    """One random number per image: the same for the same seed."""
    return list(np.random.default_rng(images.seed).random(len(images.rows)))


def dice(images: Candidates) -> Sequence[float]:
    """Dice of each image."""
    return [row["dice"] for row in images.rows]


def mean_uncertainty(images: Candidates) -> Sequence[float]:
    """Mean fused score over all pixels of each image."""
    return [row["mean_fused"] for row in images.rows]


def complexity(images: Candidates) -> Sequence[float]:
    """:func:`boundary_complexity` of each true mask."""
    return [boundary_complexity(images.maps(row["id"], ["true_mask"])["true_mask"]) for row in images.rows]


def disagreement(images: Candidates) -> Sequence[float]:
    """Mean over all pixels of the absolute difference of the two normalised variances."""
    values = []
    for row in images.rows:
        maps = images.maps(row["id"], ["pred_variance", "saliency_variance"])
        predictive, saliency = (_scaled(maps[key], images.scales[key]) for key in ("pred_variance", "saliency_variance"))
        values.append(float(np.abs(predictive - saliency).mean()))
    return values


def _scaled(values: np.ndarray, scale: Sequence[float]) -> np.ndarray:
    """Values min-max normalised with the constants (low, high) and clipped to [0, 1]; zeros where high equals low."""
    low, high = scale
    return np.clip((values.astype(float) - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def boundary_complexity(mask: np.ndarray) -> float:
    """The isoperimetric ratio ``perimeter^2 / (4 pi area)`` of a mask: about 1 for a disc, more for anything else.

    The perimeter is Crofton's: with ``n_k`` the changes between neighbours along the rows, columns and the two
    diagonals, ``pi / 8 * (n_1 + n_2 + (n_3 + n_4) / sqrt(2))``. It does not depend on the staircase of the pixels: it
    is right for discs, 5 % low for a square along the axes. Holes and separate pieces add to it, and
    the frame of the image counts as boundary where the mask touches it. Shapes of a few pixels may fall below 1.

    Args:
        mask: (H, W), nonzero inside.

    Returns:
        NaN for an empty mask.
    """
    inside = np.pad(mask > 0, 1)
    area = int(inside.sum())
    if area == 0:
        return float("nan")
    rows = np.count_nonzero(inside[:, 1:] != inside[:, :-1])
    columns = np.count_nonzero(inside[1:] != inside[:-1])
    diagonals = np.count_nonzero(inside[1:, 1:] != inside[:-1, :-1]) + np.count_nonzero(inside[1:, :-1] != inside[:-1, 1:])
    perimeter = np.pi / 8 * (rows + columns + diagonals / np.sqrt(2))
    return float(perimeter**2 / (4 * np.pi * area))


RULES = {
    "random": Rule("random", by_chance),
    "best": Rule("highest Dice", dice),
    "worst": Rule("lowest Dice", dice, largest=False),
    "uncertain": Rule("highest mean fused score", mean_uncertainty),
    "complex": Rule("most complex boundary of the truth", complexity, shown="boundary complexity"),
    "disagreement": Rule("largest disagreement of the two variances", disagreement, shown="disagreement"),
}


# ---------------------------------------------------------------- choosing and drawing


def choose(name: str, images: Candidates, n: int) -> list[Choice]:
    """The first ``n`` images by a rule (fewer where there are fewer); a tie goes to the smaller id.

    Args:
        name: a key of ``RULES``.
        images: to choose from.
        n: most images.

    Raises:
        UserError: an unknown rule.
    """
    if name not in RULES:
        raise UserError(f"there is no gallery {name}; choose one of {', '.join(RULES)}")
    rule = RULES[name]
    ranked = [Choice(row["id"], float(value)) for row, value in zip(images.rows, rule.rank(images))]
    known = [choice for choice in ranked if np.isfinite(choice.value)]
    return sorted(known, key=lambda choice: (-choice.value if rule.largest else choice.value, choice.id))[:n]


def gallery_figure(
    name: str, images: Candidates, n: int, read: ImageReader, *,
    threshold: float = 0.5, note: str = "", synthetic: bool = False, data_note: str | None = None, of: str = "test images",
) -> Figure | None:
    """The figure of the images that a rule chooses; None where it can choose none (no image with a lesion, for example).

    Args:
        name: a key of ``RULES``.
        images: to choose from.
        n: most images.
        read: gives the image of an id at the resolution of its maps.
        threshold, note, synthetic, data_note: as in :func:`reporting.cases.case_figure`.
        of: what the images are, for the note.

    Raises:
        UserError: an unknown rule, or a map file is missing or broken.
    """
    chosen = choose(name, images, n)
    if not chosen:
        return None
    rule, rows = RULES[name], {row["id"]: row for row in images.rows}
    cases = []
    for id, value in chosen:
        maps = images.maps(id, (*COLUMNS, "true_mask"))
        detail = f"{rule.shown} {number(value)}" if rule.shown else ""
        cases.append(Case(id, read(id), maps, maps["true_mask"], rows[id]["dice"], rows[id]["jaccard"], detail))
    title = f"{of}, {rule.title}" + (f", seed {images.seed}" if name == "random" else "")
    return case_figure(
        cases, images.scales, threshold=threshold, note=f"{title}; {note}" if note else title,
        synthetic=synthetic, data_note=data_note,
    )
