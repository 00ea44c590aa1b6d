"""The report of several pooled trainings: the verdict, what it rests on, and the way to the report of each training."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.saved_run import PooledRun, settings
from experiment.terms import terms_of
from reporting import exploratory
from reporting.caveats import pooled_caveats
from reporting.document import Block, Bullets, Code, Contents, Heading, Link, Paragraph, Picture, Table, Text, plain
from reporting.endpoints import MEASURE_NAMES, PROCEDURE_NAMES, conclusion_blocks, endpoint_name, measure_name, short_name
from reporting.figure_texts import ENDPOINTS_TEXT
from reporting.formats import SYNTHETIC_NOTE, count, general, sentence_case, signed, spaced
from reporting.pooled_charts import ENDPOINTS_FIGURE, draw_pooled_figures
from reporting.quotes import Quotes
from reporting.report import write_documents
from reporting.sections import data_of, opening
from reporting.target_charts import draw_targets
from reporting.targets import target_blocks


def draw_pooled(run: PooledRun) -> list[Path]:
    """Draw the figure of pooled trainings and write their report, from saved numbers alone; returns the files.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    title = f"Calibration report: {run.folder.resolve().name}, {len(run.metrics.get('pooled', ()))} trainings"

    def blocks() -> list[Block]:
        paths.extend(draw_pooled_figures(run) + draw_targets(run))
        return pooled_blocks(run)

    paths: list[Path] = []
    paths += write_documents(run.folder, title, blocks, terms_of(run))
    return paths


def pooled_blocks(run: PooledRun) -> list[Block]:
    """The content of the report, independent of the format.

    Raises:
        KeyError, IndexError, TypeError: the metrics lack what a section quotes.
    """
    quote = Quotes(run.metrics)
    return [
        *_answer(run, quote),
        Heading(2, "Before you quote a number", "warnings"), Bullets(pooled_caveats(run), "warnings"),
        *exploratory.beside_the_endpoints(quote),
        *target_blocks(quote, run.folder),
        *_figure(run, quote),
        *_trainings(run, quote),
        *_procedures(quote),
        *exploratory.ensemble(quote),
        *_setup(run),
    ]


# ---------------------------------------------------------------- the answer


def _answer(run: PooledRun, quote: Quotes) -> list[Block]:
    """The verdict, the endpoints and the controls, and the table of contents."""
    return [
        *opening(run.folder, quote),
        Paragraph(quote.fill(
            "Pooled over {conclusion.trainings:count} trainings that differ in their seed alone, on the same "
            "{test.images:count} test images; mean test Dice {test.dice}. The intervals hold what another seed, other "
            "validation images and other test images would change ({conclusion.resamples:count} resamples of the images, "
            "shared by all trainings)."), "note"),
        *conclusion_blocks(quote),
        Contents(),
    ]


def _figure(run: PooledRun, quote: Quotes) -> list[Block]:
    """The figure of the endpoints, where it lies in the folder."""
    path = run.folder / "figures" / f"{ENDPOINTS_FIGURE}.png"
    if not path.is_file():
        return []
    rows = run.metrics["conclusion"]["endpoints"]
    said = "; ".join(f"{endpoint_name(entry)}: {entry['outcome']}, {signed(entry['value'])}" for entry in rows)
    alt = plain(quote.fill(ENDPOINTS_TEXT.alt, outcomes=sentence_case(said)))
    if run.metrics["synthetic"]:
        alt += f" {SYNTHETIC_NOTE.capitalize()}."
    return [
        Heading(2, "Figures", "figures"), Heading(3, ENDPOINTS_TEXT.title),
        Picture(path, alt, quote.fill(ENDPOINTS_TEXT.caption)),
    ]


# ---------------------------------------------------------------- by training, by procedure


def _trainings(run: PooledRun, quote: Quotes) -> list[Block]:
    """A row per training: seed, report, Dice, lambda, and the difference of each endpoint."""
    endpoints = quote.get("conclusion.endpoints")
    rows: list[Sequence[Text]] = []
    for index, folder in enumerate(run.trainings()):
        path = f"pooled.{index}"
        differences = [quote(f"conclusion.endpoints.{place}.by_training.{index}", signed) for place in range(len(endpoints))]
        rows.append([
            quote(f"{path}.seed", str), _report_of(run, index, folder), quote(f"{path}.dice"), quote(f"{path}.lambda", general),
            *differences,
        ])
    spread: list[Text] = [quote(f"conclusion.endpoints.{place}.seed_sd") for place in range(len(endpoints))]
    rows.append(["standard deviation", "", "", "", *spread])
    return [
        Heading(2, "By training", "trainings"),
        Table("Each training: test Dice, chosen λ, and the difference of every endpoint",
              ("seed", "report", "Dice", "λ", *map(short_name, endpoints)), rows, words=(0, 1)),
        Paragraph("One training alone would have said what its row says. The standard deviation is that between trainings on "
                  "the same images.", "note"),
    ]


def _report_of(run: PooledRun, index: int, folder: Path) -> Text:
    """A link to the report of a training, or its name where there is none."""
    entry = run.record["pooled"][index]
    if not (folder / "report.html").is_file():
        return str(entry["name"])
    target = folder / "report.html"
    try:
        target = Path(os.path.relpath(target.resolve(), run.folder.resolve()))
    except ValueError:  # on another drive
        target = target.resolve()
    return Link(target, str(entry["name"]))


def _procedures(quote: Quotes) -> list[Block]:
    """The four measures of every procedure, means over trainings, and what each training tuned."""
    controls, measures = quote.get("conclusion.controls"), quote.get("conclusion.measures")
    names = list(MEASURE_NAMES)
    rows: list[Sequence[Text]] = [
        [PROCEDURE_NAMES.get(name, spaced(name)), *(quote(f"conclusion.measures.{name}.{measure}.value") for measure in names)]
        for name in measures
    ]
    tuned = {entry["name"]: index for index, entry in reversed(list(enumerate(controls)))}
    labels = [PROCEDURE_NAMES.get(name[len("fused_minus_"):], spaced(name)) for name in reversed(tuned)]
    by_seed: list[Sequence[Text]] = [
        [quote(f"pooled.{place}.seed", str), quote(f"conclusion.lambda.{place}", general),
         *(quote(f"conclusion.controls.{index}.tuned.{place}", general) for index in reversed(tuned.values()))]
        for place in range(len(quote.get("pooled")))
    ]
    return [
        Heading(2, "Scores and controls", "procedures"),
        Table("Measures on the test set, means over trainings; lower is better where nothing else is said",
              ("score", *(measure_name(controls, measure) for measure in names)), rows),
        Table("What validation tuned in each training: λ, or the factor of the tuned scale",
              ("seed", "fused score", *labels), by_seed),
    ]


# ---------------------------------------------------------------- how it was made


def _setup(run: PooledRun) -> list[Block]:
    """Data, split, settings and versions that the trainings share, and the commands that pool them again."""
    record = run.record
    command = shlex.join(["python", *map(str, record.get("command", ["main.py"]))])
    redraw = shlex.join(["python", "visualize.py", "--summary", "--run", str(run.folder)])
    used: Mapping[str, Any] = record.get("configuration", {})
    split: Mapping[str, Sequence[str]] = record.get("split") or {}
    margins = ", ".join(f"{name} = {general(value)}" for name, value in (used.get("margin") or {}).items())
    conclusion = run.metrics["conclusion"]
    return [
        Heading(2, "How it was made", "setup"),
        Heading(3, "Data and split"),
        Table("Images in each part", ("part", "images"), [[part, count(len(ids))] for part, ids in split.items()]),
        Paragraph(data_of(record, Quotes(run.metrics)), "note"),
        Heading(3, "Settings"),
        Table("What all trainings share; the seed alone differs", ("setting", "these trainings", "default"),
              [[spaced(name), str(value), "same" if value == default else str(default)]
               for name, value, default in settings(run) if name != "seed"], words=(0, 1, 2)),
        Table("How they were concluded from", ("setting", "value"), [
            ["resamples of the images", count(conclusion["resamples"])],
            ["margins other than the defaults", margins or "none"],
        ], words=(0, 1)),
        Heading(3, "Environment"),
        Table("Devices and versions of the trainings, and versions that pooled them", ("what", "value"),
              [*(["training", _environment(entry)] for entry in record.get("environments", ())),
               ["pooling", _versions(record.get("versions", {}))]], words=(0, 1)),
        Heading(3, "Make it again"),
        Paragraph("The first command pools again, and trains first what is missing; the second redraws this report from the "
                  "saved numbers."),
        Code(f"{command}\n{redraw}"),
    ]


def _environment(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('device')} ({entry.get('device_name')}); {_versions(entry.get('versions') or {})}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
