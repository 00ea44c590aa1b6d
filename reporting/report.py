"""The report of a run, ``report.html`` and ``report.md``: the verdict first, then what it rests on.

Written from saved numbers and figures alone. Every number that is quoted from ``metrics.json`` goes through
:mod:`reporting.quotes` and keeps the path under which it is found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from experiment.saved_run import SavedRun
from reporting import sections
from reporting.document import Block, to_html, to_markdown
from reporting.quotes import Quotes
from runtime.errors import UserError
from runtime.files import atomic_write


def write_report(run: SavedRun) -> list[Path]:
    """Write ``report.html`` and ``report.md`` into the run's folder, with the figures that lie there; returns both paths.

    Args:
        run: the saved numbers.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    return write_documents(run.folder, f"Calibration report: {run.folder.resolve().name}", lambda: report_blocks(run))


def write_documents(folder: Path, title: str, content: Callable[[], Sequence[Block]]) -> list[Path]:
    """Write ``report.html`` and ``report.md`` into a folder; returns both paths.

    Args:
        folder: of a run, or of several pooled trainings.
        title: of the window.
        content: makes the blocks from the metrics that lie in the folder.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    try:
        blocks = content()
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
        *sections.figures(run, quote),
        *sections.cases(run, quote),
        *sections.all_measures(quote),
        *sections.study(quote),
        *sections.setup(run, quote),
    ]
