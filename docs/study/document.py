"""The numbers, the figures and the text of docs/STUDY.md, from the finished runs of docs/study/run.sh.

    python -m docs.study.document --runs results/study-cpu   # collect the numbers, then write the document
    python -m docs.study.document                            # write it again from the committed numbers
    python -m docs.study.document --runs RUNS --docs FOLDER --numbers-only   # tables and figures of other runs

docs/study/RUN.json holds what the document needs of a run's metrics.json, rounded to six significant digits.
The text, about the committed runs, stands in STUDY.template.md and tables.template.md. Every number in it is a reference:

    {{seed-42: test.dice | number}}     one run
    {{seeds: test.dice | number}}       the three trainings, one after the other
    {{seed-42: study.rules.min_max-noisy_or.foreground_ece | estimate}}   a rule by its name
    {{table: headline}}                 a table of this module
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

import matplotlib
from matplotlib.figure import Figure

from experiment.saved_run import SavedRun, load_run
from reporting.charts import Difference, draw_forest, draw_lambda_curve, forest_figure, reliability_figure, risk_coverage_figure
from reporting.document import Table, Text, to_markdown
from reporting.formats import REGION_NAMES, SCORE_NAMES, count, number, percent, signed, signed_span, span
from reporting.quotes import Quotes
from reporting.style import STYLE, save_figure, stamped
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.records import WALL_CLOCK, read_json

ROOT = Path(__file__).resolve().parents[2]
#: What is written below docs, and the template beside this file that it is made of.
PAGES = {"STUDY.md": "STUDY.template.md", "study/tables.md": "tables.template.md"}
#: The regions that the committed runs were measured in.
REGIONS = ("foreground", "predicted_foreground", "union", "whole_image")
SEEDS = ("seed-42", "seed-43", "seed-44")
SMALL = "dropout-0.2"  # what the other small runs are compared with
ABLATIONS = {
    "dropout-0.1": "dropout 0.1", SMALL: "dropout 0.2, T = 30, scaled", "dropout-0.3": "dropout 0.3",
    "dropout-0.5": "dropout 0.5",
    "passes-5": "T = 5", "passes-10": "T = 10", "passes-100": "T = 100",
    "heatmap-unscaled": "heatmaps not scaled", "heatmap-bottleneck": "heatmaps of the bottleneck",
}
KEPT_OF_ABLATIONS = ("ece", "signed_gap", "auroc", "minus_predictive_variance", "recalibrated", "mean_confidence")
SCORES = tuple(SCORE_NAMES)
SPLIT = ("split_seed", "test_fraction", "validation_fraction", "skipped")

Runs = Mapping[str, Mapping[str, Any]]


# ---------------------------------------------------------------- the numbers


def collect(folder: Path, whole: bool) -> dict[str, Any]:
    """What the document needs of one finished run; ``whole`` keeps all of its tables and curves."""
    run = load_run(folder)
    metrics = {key: value for key, value in run.metrics.items() if key not in ("checksum", *WALL_CLOCK)}
    regions = metrics["test"]["regions"]
    for region in regions.values():
        for entry in region["scores"].values():
            entry["mean_confidence"] = region["accuracy"] + entry["signed_gap"]["value"]
        if not whole:
            region.pop("risk_coverage")
            region["scores"] = {
                score: {key: entry[key] for key in KEPT_OF_ABLATIONS if key in entry}
                for score, entry in region["scores"].items()
            }
    if not whole:
        metrics["test"].pop("ranking_of_images")
    best = max(run.log, key=lambda row: row["validation_dice"])
    return rounded({
        **metrics, "settings": run.record["decides"], "versions": run.record["versions"],
        "training": {
            "images": len(run.record["split"]["train"]), "epochs": len(run.log), "best_epoch": int(best["epoch"]),
        },
    })


def rounded(value: Any) -> Any:
    """Floats to six significant digits, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def collect_all(runs: Path, docs: Path) -> None:
    """Write docs/study/RUN.json of every run; the runs must be of the same images and split."""
    found, kinds = {}, {}
    for name in (*SEEDS, *ABLATIONS):
        found[name] = collect(runs / name, name in (*SEEDS, SMALL))
        settings = found[name]["settings"]
        kinds[json.dumps([settings["data"], *(settings.get(key) for key in SPLIT)])] = name
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(kinds.values())} in {runs} are of different images or splits; make them again in one folder"
        )
    for name, content in found.items():
        with atomic_write(docs / "study" / f"{name}.json") as stream:
            stream.write((json.dumps(content, separators=(",", ":")) + "\n").encode())


def read_all(docs: Path) -> dict[str, dict[str, Any]]:
    """The committed numbers of every run."""
    return {name: read_json(docs / "study" / f"{name}.json") for name in (*SEEDS, *ABLATIONS)}


# ---------------------------------------------------------------- the text

FORMATS: dict[str, Callable[[Any], str]] = {
    "number": number, "magnitude": lambda value: number(abs(value)), "signed": signed, "span": span, "signed_span": signed_span,
    "count": count, "percent": percent, "short": "{:g}".format,
    "text": lambda value: "no note" if value is None else str(value),
    "estimate": lambda entry: f"{number(entry['value'])} ({span(entry['interval'])})",
    "signed_estimate": lambda entry: f"{signed(entry['value'])} ({signed_span(entry['interval'])})",
}
NUMBERS_ONLY = """# The study in numbers

Images: {{seed-42: data_note | text}}. Width {{seed-42: settings.width | count}}, {{seed-42: settings.image_size | count}} pixels,
{{seeds: training.epochs | count}} epochs, T = {{seed-42: settings.passes | count}}.
"""
PLACEHOLDER = re.compile(r"\{\{\s*([\w.-]+)\s*:\s*([\w.-]+)\s*(?:\|\s*(\w+)\s*)?\}\}")


def render(template: str, runs: Runs) -> str:
    """The document: the template with every reference replaced by its number, and every table in its place."""

    def quoted(match: re.Match) -> str:
        source, path, shown = match.groups()
        if source == "table":
            return to_markdown([TABLES[path](runs)], Path()).rstrip("\n")
        names = SEEDS if source == "seeds" else (source,)
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
    """A path with the name of a rule, "study.rules.min_max-noisy_or", replaced by its place in the list."""
    named = re.match(r"study\.rules\.(\w+)-(\w+)", path)
    if named is None:
        return path
    index = [(rule["normalisation"], rule["rule"]) for rule in run["study"]["rules"]].index(named.groups())
    return f"study.rules.{index}{path[named.end():]}"


# ---------------------------------------------------------------- the tables


def _others(runs: Runs, path: str, shown: Callable[[Any], str]) -> str:
    """The values of the second and the third training."""
    return ", ".join(shown(Quotes(runs[name]).get(path)) for name in SEEDS[1:])


def _share_of_one(quote: Quotes) -> str:
    """Path of the share of resamples in which the largest λ of the grid, 1, wins."""
    return f"validation.lambda_selection.share.{len(quote.get('validation.lambdas')) - 1}"


def _seed(name: str) -> str:
    return name.split("-")[1]


def _scores_of_regions() -> Iterator[tuple[str, str, str]]:
    """The region in words, the score, and the path of its numbers."""
    for region, words in ((region, REGION_NAMES[region]) for region in REGIONS):
        for score in SCORES:
            yield words, score, f"test.regions.{region}.scores.{score}"


def segmentation(runs: Runs) -> Table:
    rows = []
    for name in SEEDS:
        quote = Quotes(runs[name])
        rows.append([_seed(name), quote("training.best_epoch", count),
                     *([quote(f"{part}.{key}"), " (", quote(f"{part}.{key}_interval", span), ")"]
                       for part, key in (("validation", "dice"), ("test", "dice"), ("test", "jaccard")))])
    header = ("training seed", "epoch kept", "validation Dice", "test Dice", "test Jaccard")
    return Table("Segmentation: means over images, with 95 % intervals", header, rows, (0,))


def headline(runs: Runs) -> Table:
    rows = []
    for name in SEEDS:
        quote = Quotes(runs[name])
        scores = ([quote(f"test.foreground_ece.{score}"), " (", quote(f"test.foreground_ece_interval.{score}", span), ")"]
                  for score in SCORES[:3])
        differences = (quote.estimate(f"test.foreground_ece_difference.{score}_minus_predictive_variance", True)
                       for score in ("fused", "saliency_variance"))
        rows.append([_seed(name), *scores, quote("lambda", "{:g}".format), *differences,
                     quote("test.foreground_ece_difference.fused_minus_predictive_variance.verdict", str),
                     quote(_share_of_one(quote), percent)])
    header = ("training seed", "predictive variance", "saliency variance", "fused", "λ", "fused − predictive",
              "saliency − predictive", "fusing", "λ = 1 in resamples")
    return Table("Foreground ECE on test, with 95 % intervals; the last column is the share of resamples of the validation "
                 "images in which λ = 1 would have been chosen", header, rows, (0, 7))


def gaps(runs: Runs) -> Table:
    rows, base = [], "test.regions.foreground"
    for name in SEEDS:
        quote = Quotes(runs[name])
        rows.append([_seed(name), quote(f"{base}.accuracy"),
                     *(quote(f"{base}.scores.{score}.{key}") for score in SCORES[:2]
                       for key in ("mean_confidence", "ece.value", "signed_gap.value"))])
    header = ("training seed", "accuracy", *(f"{score} variance: {what}" for score in ("predictive", "saliency")
                                             for what in ("mean confidence", "ECE", "signed gap")))
    return Table("Inside the true lesions of the test images", header, rows, (0,))


def detectors(runs: Runs) -> Table:
    rows = []
    for region in ("foreground", "predicted_foreground", "whole_image"):
        base = f"test.regions.{region}.scores"
        rows.append([REGION_NAMES[region],
                     *(Quotes(runs[name])(f"{base}.{score}.auroc.value") for score in SCORES[:2] for name in SEEDS)])
    header = ("region", *(f"{score} variance, seed {_seed(name)}" for score in ("predictive", "saliency") for name in SEEDS))
    return Table("AUROC of errors on test", header, rows, (0,))


def calibration(runs: Runs) -> Table:
    quote, rows = Quotes(runs[SEEDS[0]]), []
    for words, score, base in _scores_of_regions():
        row: list[Text] = [words, SCORE_NAMES[score], quote(f"{base}.mean_confidence"), quote.estimate(f"{base}.ece")]
        for kind in ("", ".recalibrated.isotonic", ".recalibrated.platt"):
            if kind:
                row.append(quote.estimate(f"{base}{kind}.ece"))
            same = score == SCORES[0]
            row.append("reference" if same else quote.estimate(f"{base}{kind}.minus_predictive_variance.ece", True))
        log_loss = f"{base}.recalibrated.isotonic.minus_predictive_variance.log_loss"
        rows.append([*row, "reference" if same else quote.estimate(log_loss, True)])
    header = ("region", "score", "mean confidence", "ECE", "− predictive", "ECE, isotonic", "− predictive", "ECE, Platt",
              "− predictive", "log loss, isotonic, − predictive")
    return Table("Calibration of every score on test before and after recalibration on validation, training seed 42, "
                 "with 95 % intervals", header, rows, (0, 1))


def ranking(runs: Runs) -> Table:
    quote, rows = Quotes(runs[SEEDS[0]]), []
    for words, score, base in _scores_of_regions():
        rows.append([words, SCORE_NAMES[score], quote.estimate(f"{base}.auroc"), _others(runs, f"{base}.auroc.value", number),
                     quote.estimate(f"{base}.auprc"), quote.estimate(f"{base}.excess_aurc")])
    header = ("region", "score", "AUROC", "AUROC, seeds 43 and 44", "AUPRC", "excess AURC")
    return Table("How well every score ranks the errors on test, training seed 42, with 95 % intervals", header, rows, (0, 1))


def rules(runs: Runs) -> Table:
    quote, rows = Quotes(runs[SEEDS[0]]), []
    for index, rule in enumerate(quote.get("study.rules")):
        base = f"study.rules.{index}"
        label = rule["rule"].replace("_", " ") + (f" (λ = {rule['parameter']:g})" if rule["rule"] == "convex" else "")
        row: list[Text] = [rule["normalisation"].replace("_", "-"), label, quote.estimate(f"{base}.foreground_ece")]
        if (rule["normalisation"], rule["rule"]) == ("min_max", "predictive"):
            row += ["reference", "", ""]
        else:
            row += [quote.estimate(f"{base}.minus_predictive_variance", True),
                    _others(runs, f"{base}.minus_predictive_variance.value", signed),
                    quote(f"{base}.minus_predictive_variance.verdict", str)]
        own = rule["rule"] == rule["baseline"]
        row.append("reference" if own else quote.estimate(f"{base}.minus_baseline", True))
        rows.append(row)
    header = ("normalisation", "rule", "ECE", "− min-max predictive", "the same, seeds 43 and 44", "verdict",
              "− own rule without saliency")
    return Table("Foreground ECE on test of every normalisation and fusion rule, training seed 42, with 95 % intervals",
                 header, rows, (0, 1, 5))


def _added_value(runs: Runs, key: str, words: str) -> Table:
    quote, rows = Quotes(runs[SEEDS[0]]), []
    for region, place in ((region, REGION_NAMES[region]) for region in REGIONS):
        for kind, known in (("", "unknown"), ("label_", "known")):
            models = f"study.{key}.{region}.models"
            pair = f"study.{key}.{region}.difference.{kind}with_minus_{kind}without"
            rows.append([place, known, quote.estimate(f"{models}.{kind}without.auroc"),
                         quote.estimate(f"{models}.{kind}with.auroc"),
                         quote.estimate(f"{pair}.auroc", True), _others(runs, f"{pair}.auroc.value", signed),
                         quote.estimate(f"{pair}.log_loss", True)])
    header = ("region", "predicted label", "AUROC without saliency", "AUROC with", "gain", "gain, seeds 43 and 44",
              "change of log loss, nats")
    return Table(f"{words}, fitted on validation and read on test, training seed 42, with 95 % intervals", header, rows, (0, 1))


def trees(runs: Runs) -> Table:
    return _added_value(runs, "added_value_of_trees", "Boosted trees that predict a pixel's error")


def logistic(runs: Runs) -> Table:
    return _added_value(runs, "added_value", "Logistic models that predict a pixel's error")


def ablations(runs: Runs) -> Table:
    rows = []
    for name, words in ABLATIONS.items():
        quote = Quotes(runs[name])
        isotonic = "test.regions.foreground.scores.fused.recalibrated.isotonic.minus_predictive_variance"
        confidence = (quote(f"test.regions.foreground.scores.{score}.mean_confidence") for score in SCORES[:2])
        rows.append([words, quote("test.dice"), *confidence, *(quote(f"test.foreground_ece.{score}") for score in SCORES[:3]),
                     quote("lambda", "{:g}".format),
                     quote.estimate("test.foreground_ece_difference.fused_minus_predictive_variance", True),
                     quote("test.foreground_ece_difference.fused_minus_predictive_variance.verdict", str),
                     quote.estimate(f"{isotonic}.ece", True), quote.estimate(f"{isotonic}.log_loss", True),
                     quote(_share_of_one(quote), percent)])
    header = ("run", "test Dice", "mean confidence, predictive", "mean confidence, saliency", "ECE predictive", "ECE saliency",
              "ECE fused", "λ", "fused − predictive", "fusing", "fused − predictive, isotonic", "the same, log loss in nats",
              "λ = 1 in resamples")
    return Table("Small networks, short trainings: foreground ECE on test, with 95 % intervals", header, rows, (0, 9))


CLAIMS = (
    ("test Dice", "test.dice", None),
    ("foreground ECE, predictive variance", "test.regions.foreground.scores.predictive_variance.ece", ""),
    ("foreground ECE, saliency variance", "test.regions.foreground.scores.saliency_variance.ece", ""),
    ("foreground ECE, fused", "test.regions.foreground.scores.fused.ece", ""),
    ("tuned λ", "lambda", "g"),
    ("foreground accuracy", "test.regions.foreground.accuracy", "n"),
    ("mean confidence there, predictive variance", "test.regions.foreground.scores.predictive_variance.mean_confidence", "n"),
    ("mean confidence there, saliency variance", "test.regions.foreground.scores.saliency_variance.mean_confidence", "n"),
    ("signed gap there, predictive variance", "test.regions.foreground.scores.predictive_variance.signed_gap", ""),
    ("signed gap there, saliency variance", "test.regions.foreground.scores.saliency_variance.signed_gap", ""),
    *((f"error AUROC {words}, {SCORE_NAMES[score]}", f"test.regions.{region}.scores.{score}.auroc", "")
      for region, words in (("foreground", "inside the true lesions"), ("predicted_foreground", "inside the predicted lesions"),
                            ("whole_image", "over whole images"))
      for score in ("predictive_variance", "saliency_variance", "one_minus_max_probability")),
)


def claims(runs: Runs) -> Table:
    rows = []
    for words, path, kind in CLAIMS:
        row: list[Text] = [words]
        for name in (*SEEDS, SMALL):
            quote = Quotes(runs[name])
            if kind is None:
                row.append([quote(path), " (", quote(f"{path}_interval", span), ")"])
            elif kind:
                row.append(quote(path, "{:g}".format if kind == "g" else number))
            else:
                row.append(quote.estimate(path))
        rows.append(row)
    header = ("what", *(f"seed {_seed(name)}" for name in SEEDS), "small, 8 epochs")
    return Table("The headline and what explains it, on test, with 95 % intervals", header, rows, (0,))


TABLES = {function.__name__: function for function in (
    segmentation, headline, gaps, detectors, calibration, ranking, rules, trees, logistic, ablations, claims)}


# ---------------------------------------------------------------- the figures


def lambda_curves(runs: Runs) -> Figure:
    """The lambda curves of the three trainings side by side."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 3, sharey=True), SEEDS):
        metrics = runs[name]
        for part in ("validation", "test"):
            values = metrics[part]
            draw_lambda_curve(ax, values["lambdas"], values["foreground_ece_by_lambda"],
                              values["foreground_ece_by_lambda_interval"], part)
        ax.axvline(metrics["lambda"], color="0.3", linewidth=1, linestyle="dotted")
        ax.set_title(f"training seed {_seed(name)}, chosen λ = {metrics['lambda']:g}", fontsize=10)
        ax.set(xlabel="λ", ylabel="foreground ECE" if name == SEEDS[0] else "")
    ax.set_ylim(bottom=0)  # of all three; set earlier it would cut off what is drawn later
    ax.legend(frameon=False, loc="lower right")
    return stamped(figure, runs[SEEDS[0]])


def all_runs(runs: Runs) -> Figure:
    """Fused minus predictive variance of every training and ablation."""
    rows = []
    path = "test.foreground_ece_difference.fused_minus_predictive_variance"
    for name in (*SEEDS, *ABLATIONS):
        entry = Quotes(runs[name]).get(path)
        group = "trainings" if name in SEEDS else "small networks"
        label = f"seed {_seed(name)}" if name in SEEDS else ABLATIONS[name]
        label += f" (λ = {runs[name]['lambda']:g})"
        rows.append(Difference(group, label, entry["value"], entry["interval"], entry["verdict"], path))
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    ax = draw_forest(figure.subplots(), rows)
    ax.set_xlabel("foreground ECE, fused minus predictive variance (left: better)")
    return stamped(figure, runs[SEEDS[0]])


def draw_figures(runs: Runs, docs: Path) -> list[str]:
    """Draw the figures of the document into docs/study, from the numbers alone; returns their names."""
    first = SavedRun(docs, runs[SEEDS[0]], {}, [], [])
    drawn: dict[str, Callable[[], Figure]] = {
        "reliability": lambda: reliability_figure(first), "risk_coverage": lambda: risk_coverage_figure(first),
        "forest": lambda: forest_figure(first), "lambda_curves": lambda: lambda_curves(runs), "all_runs": lambda: all_runs(runs),
    }
    for name, draw in drawn.items():
        with matplotlib.rc_context(STYLE):
            save_figure(draw(), docs / "study" / f"{name}.png")
    return list(drawn)


def main(argv: Sequence[str] | None = None) -> None:
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
        tables = (f"{{{{table: {name}}}}}\n" for name in TABLES)
        pages = {"STUDY.md": "\n".join([NUMBERS_ONLY, *tables, *(f"![{name}](study/{name}.png)\n" for name in figures)])}
    else:
        pages = {page: (Path(__file__).parent / name).read_text(encoding="utf-8") for page, name in PAGES.items()}
    for page, template in pages.items():
        with atomic_write(args.docs / page) as stream:
            stream.write(render(template, runs).encode())
    print(f"wrote {args.docs / 'STUDY.md'} from the numbers of {len(runs)} runs")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
