"""The report of a run, ``report.html`` and ``report.md``: the verdict first, then what it rests on.

Written from saved numbers and figures alone. Every number that is quoted from ``metrics.json`` goes through
:mod:`reporting.quotes` and keeps the path under which it is found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from experiment.saved_run import SavedRun
from experiment.terms import STANDARD, Terms, terms_of
from reporting import exploratory, sections
from reporting.document import Block, to_html, to_markdown, worded
from reporting.quotes import Quotes
from reporting.targets import target_blocks
from runtime.errors import UserError
from runtime.files import atomic_write


def write_report(run: SavedRun) -> list[Path]:
    """Write ``report.html`` and ``report.md`` into the run's folder, with the figures that lie there; returns both paths.

    Args:
        run: the saved numbers.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    title = f"Calibration report: {run.folder.resolve().name}"
    return write_documents(run.folder, title, lambda: report_blocks(run), terms_of(run))


def write_documents(
    folder: Path, title: str, content: Callable[[], Sequence[Block]], terms: Terms = STANDARD
) -> list[Path]:
    """Write ``report.html`` and ``report.md`` into a folder; returns both paths.

    Args:
        folder: of a run, or of several pooled trainings.
        title: of the window.
        content: makes the blocks from the metrics that lie in the folder.
        terms: of the run; every text but what is quoted from the metrics is put into them.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    try:
        blocks = worded(content(), terms)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder / 'metrics.json'} lacks what the report quotes ({error}); run main.py again") from error
    texts = {"report.html": to_html(title, blocks), "report.md": to_markdown(blocks, folder)}
    for name, text in texts.items():
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    return [folder / name for name in texts]


def report_blocks(run: SavedRun) -> list[Block]:
    """The content of the report, independent of the format.

    Raises:
        KeyError, IndexError, TypeError: the metrics lack what a section quotes.
    """
    quote = Quotes(run.metrics)
    return [
        *sections.answer(run, quote),
        *sections.before_you_quote(run),
        *exploratory.beside_the_endpoints(quote),
        *target_blocks(quote, run.folder),
        *sections.figures(run, quote),
        *sections.cases(run, quote),
        *sections.all_measures(quote),
        *exploratory.detectors(quote),
        *sections.study(quote),
        *sections.setup(run, quote),
    ]
