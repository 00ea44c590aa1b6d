"""All pictures of a run together: its figures, its galleries, and the report that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiment.case_images import ImageSet, named_set
from experiment.saved_run import SavedRun
from experiment.terms import terms_of
from reporting.charts import draw_run_figures
from reporting.galleries import RULES, Candidates, ImageReader, gallery_figure
from reporting.report import write_report
from reporting.style import save_figure
from reporting.target_charts import draw_targets
from runtime.files import remove
from runtime.resources import naming_shortage
from runtime.stages import timed

ROWS = 3  # of the galleries that every run draws


@timed("drawing")
@naming_shortage("drawing", "close other programs")
def draw_run(run: SavedRun, read: ImageReader | None = None) -> list[Path]:
    """Draw all figures of a run and write its report; returns the files.

    Args:
        run: its saved numbers.
        read: gives the image of an id at map resolution; the galleries of every rule are drawn with it from saved
            maps. Without it the galleries that lie in the folder stay as they are.

    Raises:
        UserError: the metrics lack something that belongs there, or a map file is missing or broken.
    """
    paths = draw_run_figures(run) + draw_targets(run) + ([] if read is None else draw_galleries(run, read))
    return [*paths, *write_report(run)]


def draw_galleries(run: SavedRun, read: ImageReader, names: Sequence[str] = tuple(RULES)) -> list[Path]:
    """Draw galleries into the run's folder; one that can choose no image leaves no file. Returns the files.

    Args:
        run: its saved numbers.
        read: gives the image of an id at map resolution.
        names: which rules.

    Raises:
        UserError: an unknown rule, or a map file is missing or broken.
    """
    paths = []
    for name in names:
        path = run.folder / "figures" / f"gallery_{name}.png"
        figure = draw_gallery(run, name, ROWS, run_seed(run), read)
        if figure is None:
            remove(path)
        else:
            paths.append(save_figure(figure, path, terms_of(run)))
    return paths


def draw_gallery(
    run: SavedRun, name: str, n: int, seed: int, read: ImageReader, images: ImageSet | None = None
) -> Figure | None:
    """The gallery of one rule, or None where the rule can choose no image.

    Args:
        run: its saved numbers.
        name: the rule, a key of ``RULES``.
        n: most images.
        seed: of the random rule.
        read: gives the image of an id at map resolution.
        images: another test set, whose rows then are those of ``run``.
    """
    options = {**labels(run), "threshold": float(run.record["configuration"]["threshold"])}
    if images is not None and images.name:  # what is known of the run's own images says nothing of these
        options.update(synthetic=False, data_note=None, of=f"images of {images.name}")
    return gallery_figure(name, candidates_of(run, seed, images), n, read, **options)


def candidates_of(run: SavedRun, seed: int, images: ImageSet | None = None) -> Candidates:
    """The saved test images of a run, or those of another test set, as the rules of the galleries look at them."""
    shown = images or named_set(run.folder, run.record, None)
    return Candidates(run.rows, shown.maps, run.metrics["normalisation"], seed, shown.identity(run.metrics), shown.sealed)


def run_seed(run: SavedRun) -> int:
    """The seed of the run's training and masks."""
    return int(run.record["configuration"]["seed"])


def labels(run: SavedRun, how: str = "") -> dict[str, Any]:
    """What every picture of cases says about the run, as keyword arguments: note, synthetic and data_note.

    Args:
        run: its saved numbers.
        how: what else the note says, before the number of passes (where the run made any) and λ.
    """
    passes = run.record["configuration"].get("passes")
    made = [f"T = {passes}"] if passes is not None else []
    without = run.record.get("maps", {}).get("without_image")
    stand_ins = [f"{without} maps came without an image: in its place, the mean prediction in grey"] if without else []
    return {
        "note": ", ".join([*([how] if how else []), *stand_ins, *made, f"λ = {run.metrics['lambda']:g}"]),
        "synthetic": bool(run.metrics["synthetic"]),
        "data_note": run.metrics.get("data_note"),
    }
