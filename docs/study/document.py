"""The text of docs/STUDY.md and its tables, from the finished runs of docs/study/run.sh.

    python -m docs.study.document --runs results/study-cpu   # collect the numbers, then write the pages
    python -m docs.study.document                            # write them again from the committed numbers
    python -m docs.study.document --runs RUNS --docs FOLDER --numbers-only   # tables and figures of other runs

The text, about the committed runs, stands in STUDY.template.md and tables.template.md. Every result in it is a reference
into the files of :mod:`docs.study.numbers`:

    {{pooled: conclusion.endpoints.brier | signed_estimate}}   an endpoint, a control or a rule by its name
    {{seed-43: test.dice | number}}      one training
    {{trainings: test.dice | range}}     the lowest and the highest of the ten
    {{larger: test.dice | number}}       the three larger networks, one after the other
    {{table: endpoints}}                 a table of :mod:`docs.study.tables`
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from docs.study.figures import draw_figures
from docs.study.numbers import LARGER, SEEDS, collect_all, read_all
from docs.study.tables import OF_LARGER, TABLES, Runs
from reporting.document import to_markdown
from reporting.formats import count, general, number, percent, signed, signed_span, span
from reporting.quotes import Quotes
from runtime.errors import UserError
from runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
#: What is written below docs, and the template beside this file that it is made of.
PAGES = {"STUDY.md": "STUDY.template.md", "study/tables.md": "tables.template.md"}
FORMATS: dict[str, Callable[[Any], str]] = {
    "number": number, "magnitude": lambda value: number(abs(value)), "signed": signed, "span": span, "signed_span": signed_span,
    "count": count, "percent": percent, "short": general, "text": lambda value: "no note" if value is None else str(value),
    "list": lambda values: ", ".join(map(general, values)),
    "estimate": lambda entry: f"{number(entry['value'])} ({span(entry['interval'])})",
    "signed_estimate": lambda entry: f"{signed(entry['value'])} ({signed_span(entry['interval'])})",
}
#: Of all ten trainings: how the lowest and the highest are shown.
RANGES = {"range": number, "signed_range": signed, "short_range": general, "percent_range": percent}
NUMBERS_ONLY = """# The study in numbers

Images: {{pooled: data_note | text}}. Width {{pooled: settings.width | count}}, {{pooled: settings.image_size | count}} pixels,
T = {{pooled: settings.passes | count}}.
"""
PLACEHOLDER = re.compile(r"\{\{\s*([\w.-]+)\s*:\s*([\w.-]+)\s*(?:\|\s*(\w+)\s*)?\}\}")


def render(template: str, runs: Runs) -> str:
    """A page: the template with every reference replaced by its number, and every table in its place."""

    def quoted(match: re.Match) -> str:
        source, path, shown = match.groups()
        if source == "table":
            return to_markdown([TABLES[path](runs)], Path()).rstrip("\n")
        if shown in RANGES:
            values = [Quotes(runs[seed]).get(_numbered(path, runs[seed])) for seed in SEEDS]
            return f"{RANGES[shown](min(values))} to {RANGES[shown](max(values))}"
        names = LARGER if source == "larger" else (source,)
        return ", ".join(FORMATS[shown](Quotes(runs[name]).get(_numbered(path, runs[name]))) for name in names)

    return refilled(PLACEHOLDER.sub(quoted, template))


def refilled(text: str) -> str:
    """Markdown whose paragraphs and list items are broken into lines anew: a number is shorter than its reference."""

    def filled(block: str) -> str:
        if block.lstrip("\n").startswith(("#", "|", "!", "```")):
            return block
        items = re.split(r"\n(?=- )", block)
        return "\n".join(
            textwrap.fill(" ".join(item.split()), 130, subsequent_indent="  " * item.startswith("- "), break_long_words=False,
                          break_on_hyphens=False) for item in items
        )

    blocks = text.rstrip("\n").split("\n\n")
    return "\n\n".join(map(filled, blocks)) + text[len(text.rstrip("\n")):]


def _numbered(path: str, run: Mapping[str, Any]) -> str:
    """A path in which a rule, an endpoint or a control is named, with the name replaced by its place in the list.

    "study.rules.min_max-noisy_or", "conclusion.endpoints.brier", "conclusion.controls.fused_minus_tuned_scale-brier",
    "conclusion.recalibrated.brier_isotonic"
    """
    for listed, keys in (("rules", ("normalisation", "rule")), ("endpoints", ("name",)), ("controls", ("name", "measure")),
                         ("recalibrated", ("measure",))):
        named = re.match(rf"(.*\.{listed})\.([a-z][\w-]*)(.*)", path)
        if named is not None:
            entries = Quotes(run).get(named[1])
            if isinstance(entries, list):
                place = ["-".join(entry[key] for key in keys) for entry in entries].index(named[2])
                return f"{named[1]}.{place}{named[3]}"
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder with the results folder of every run")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--numbers-only", action="store_true", help="leave out the text, which is about the committed runs")
    args = parser.parse_args(argv)
    if args.runs is not None:
        collect_all(args.runs, args.docs)
    runs = read_all(args.docs)
    figures = draw_figures(runs, args.docs)
    if args.numbers_only:
        names = [name for name in TABLES if LARGER[0] in runs or name not in OF_LARGER]
        tables = (f"{{{{table: {name}}}}}\n" for name in names)
        pages = {"STUDY.md": "\n".join([NUMBERS_ONLY, *tables, *(f"![{name}](study/{name}.png)\n" for name in figures)])}
    else:
        pages = {page: (Path(__file__).parent / name).read_text(encoding="utf-8") for page, name in PAGES.items()}
    for page, template in pages.items():
        with atomic_write(args.docs / page) as stream:
            stream.write(render(template, runs).encode())
    print(f"wrote {args.docs / 'STUDY.md'} from the numbers of {len(SEEDS)} trainings")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
