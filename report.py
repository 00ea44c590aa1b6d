"""The report of a run, ``report.html`` and ``report.md``: the verdict first, then what it rests on.

Written from saved numbers and figures alone. Every number that is quoted from ``metrics.json`` goes through
:mod:`formats` and keeps the path under which it is found there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Callable

from charts import HEADLINE, LINEAR_DIFFERENCE, SavedRun
from config import Config
from document import Block, Bullets, Code, Contents, Heading, Paragraph, Picture, Quoted, Table, Text, to_html, to_markdown
from formats import MISSING, SCORE_NAMES, SYNTHETIC_NOTE, count, duration, is_number, number, percent, signed, signed_span, span
from gallery import RULES
from storage import UserError, printable, whole_file

FEW_IMAGES = 50
LOW_DICE = 0.7
EXTREME = 2.0  # an image whose largest variance is this many times that of any other sets the scale alone
REGION_NAMES = {
    "foreground": "inside the true lesions", "predicted_foreground": "inside the predicted lesions",
    "union": "inside either", "whole_image": "whole images",
}

MEASURES = {
    "ece": "expected calibration error (ECE)",
    "signed_gap": "signed gap: confidence minus accuracy",
    "mce": "largest gap of a bin",
    "ace": "mean gap of the bins",
    "brier": "Brier score",
    "log_loss": "log loss, nats",
    "auroc": "AUROC for errors (higher is better)",
    "auprc": "AUPRC for errors (higher is better)",
    "aurc": "area under risk and coverage",
    "excess_aurc": "the same, above the ideal ranking",
}
SIGNED_MEASURES = ("signed_gap",)

GALLERY_TEXTS = {
    "random": "Drawn by chance, so that they show the ordinary case.",
    "best": "The best segmentations. See whether what uncertainty is left lies where the outlines part.",
    "worst": "The worst segmentations. A useful uncertainty is high where the error map is coloured.",
    "uncertain": "The images about which the fused score is least certain, on average over all their pixels.",
    "complex": "The most complex outlines: perimeter squared over 4π times the area of the truth, about 1 for a disc.",
    "disagreement": "The images on which the two normalised variances differ most: the mean absolute difference of their pixels.",
}
GALLERY_LEGEND = (
    " Columns: the image with the truth (solid blue) and the prediction (dashed yellow); the mean prediction; the two variances; "
    "the fused score; false positives (orange) and false negatives (blue). A quantity has one colour scale in all rows of "
    "all galleries; the three uncertainties are logarithmic over three decades up to the value that is normalised to 1."
)


class Quotes:
    """Quotes numbers from the metrics by their dotted path."""

    def __init__(self, metrics: Mapping[str, Any]):
        self.metrics = metrics

    def get(self, path: str) -> Any:
        """The value at a path such as "test.foreground_ece.fused" or "study.rules.0.parameter"."""
        return reduce(
            lambda value, key: value[int(key)] if isinstance(value, list) else value[key], path.split("."), self.metrics
        )

    def __call__(self, path: str, shown: Callable[[Any], str] = number) -> Quoted:
        value = self.get(path)
        return Quoted(path, value, shown(value))

    def estimate(self, path: str, sign: bool = False) -> Text:
        """Value and interval of an entry ``{"value": x, "interval": [low, high]}``."""
        if not is_number(self.get(f"{path}.value")):
            return MISSING
        bounds = self(f"{path}.interval", signed_span if sign else span)
        return [self(f"{path}.value", signed if sign else number), " (", bounds, ")"]


def write_report(run: SavedRun) -> list[Path]:
    """Write ``report.html`` and ``report.md`` into the run's folder, with the figures that lie there; returns both paths.

    Raises:
        UserError: the metrics lack something that belongs there (another version wrote them).
    """
    try:
        blocks = report_blocks(run)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{run.folder / 'metrics.json'} lacks what the report quotes ({error}); run main.py again") from error
    texts = {
        "report.html": to_html(f"Calibration report: {run.folder.resolve().name}", blocks),
        "report.md": to_markdown(blocks, run.folder),
    }
    for name, text in texts.items():
        with whole_file(run.folder / name) as stream:
            stream.write(text.encode())
    return [run.folder / name for name in texts]


def report_blocks(run: SavedRun) -> list[Block]:
    """The content of the report, independent of the format."""
    quote = Quotes(run.metrics)
    return [
        *_opening(run, quote),
        *_warnings(run, quote),
        *_figures(run, quote),
        *_galleries(run),
        *_measures(quote),
        *_study(quote),
        *_setup(run, quote),
    ]


# ---------------------------------------------------------------- the answer


def _opening(run: SavedRun, quote: Quotes) -> list[Block]:
    test, rows = quote.get("test"), []
    for score in HEADLINE:
        weight = {"predictive_variance": "1", "saliency_variance": "0"}.get(score) or quote("lambda", "{:g}".format)
        row: list[Text] = [SCORE_NAMES[score], weight, quote(f"test.foreground_ece.{score}")]
        if is_number(test["foreground_ece"][score]):
            row.append(quote(f"test.foreground_ece_interval.{score}", span))
        else:
            row.append(MISSING)
        path = f"test.foreground_ece_difference.{score}_minus_predictive_variance"
        if score == "predictive_variance":
            row += ["reference", "", ""]
        elif is_number(quote.get(f"{path}.value")):
            row += [quote(f"{path}.value", signed), quote(f"{path}.interval", signed_span), quote(f"{path}.verdict", str)]
        else:
            row += [MISSING, "", ""]
        rows.append(row)
    resamples = quote("bootstrap.resamples", count)
    return [
        Heading(1, f"Fusing predictive and saliency variance: {run.folder.resolve().name}"),
        Paragraph(quote("verdict", str), "lead"),
        *([Paragraph(f"{SYNTHETIC_NOTE}. These numbers show that the pipeline works; they say nothing about patients.",
                     "synthetic")] if run.metrics["synthetic"] else []),
        *([Paragraph(["Data: ", quote("data_note", str)], "note")] if run.metrics.get("data_note") else []),
        Table("Foreground calibration error on the test set; lower is better",
              ("score", "λ", "ECE", "95 % interval", "minus predictive variance", "95 % interval", "verdict"), rows, (0, 6)),
        Paragraph([
            "Pixels inside the true lesions of ", quote("test.images", count), " test images. Intervals are percentiles of ",
            resamples, " bootstrap resamples of whole images; differences are paired. No difference is "
            "shown where the interval of the difference holds zero."], "note"),
        Paragraph("The same question after the confidences were recalibrated on validation:"),
        Bullets([quote(f"verdict_recalibrated.{method}", str) for method in run.metrics["verdict_recalibrated"]]),
        Table("Segmentation: mean over images, with 95 % interval", ("measure", "validation", "test"), [
            [name, *([quote(f"{part}.{key}"), " (", quote(f"{part}.{key}_interval", span), ")"]
                     for part in ("validation", "test"))]
            for key, name in (("dice", "Dice"), ("jaccard", "Jaccard"), ("thresholded_jaccard", "Jaccard, 0 where below 0.65"))
        ]),
        Contents(),
    ]


# ---------------------------------------------------------------- warnings


def _warnings(run: SavedRun, quote: Quotes) -> list[Block]:
    items = warnings(run, quote)
    if not items:
        items = ["Nothing stands out: no value was clipped, no heatmap was empty, every image has a lesion, and the settings are "
                 "the defaults."]
    return [Heading(2, "Before you quote a number", "warnings"), Bullets(items, "warnings")]


def warnings(run: SavedRun, quote: Quotes) -> list[Text]:
    """What limits the numbers of a run, a sentence each."""
    metrics, found = run.metrics, []
    if metrics["synthetic"]:
        found.append("The images are synthetic lesions, drawn by the program. The verdict is about them, not about patients.")
    if metrics.get("data_note"):
        found.append(["About the images: ", quote("data_note", str)])
    if metrics["test"]["images"] < FEW_IMAGES:
        found.append(["Only ", quote("test.images", count), " test images: the intervals are rough."])
    if metrics["validation"]["images"] < FEW_IMAGES:
        found.append(["Only ", quote("validation.images", count), " validation images, on which λ and the scales of the scores "
                      "rest."])
    if is_number(metrics["test"]["dice"]) and metrics["test"]["dice"] < LOW_DICE:
        found.append(["The network segments badly (test Dice ", quote("test.dice"), "): its uncertainty means little."])
    for part in ("validation", "test"):
        if metrics[part]["images_without_foreground"]:
            found.append([quote(f"{part}.images_without_foreground", count), " of ", quote(f"{part}.images", count),
                          f" {part} images have no lesion pixel; they add nothing to the foreground errors."])
    if metrics["lambda"] in (0, 1):
        other = "predictive" if metrics["lambda"] == 1 else "saliency"
        found.append(["The tuned λ is ", quote("lambda", "{:g}".format), f": the fused score is {other} variance alone."])
    for key, name in (("pred_variance", "predictive"), ("saliency_variance", "saliency")):
        entry = metrics["validation"].get("range_set_by", {}).get(key)
        if entry and is_number(entry["largest_elsewhere"]) and entry["largest"] > EXTREME * entry["largest_elsewhere"]:
            path = f"validation.range_set_by.{key}"
            found.append([
                "One validation image, ", quote(f"{path}.image", str), f", sets the scale of the {name} variance: its largest ",
                "value, ", quote(f"{path}.largest"), ", is far above that of any other, ", quote(f"{path}.largest_elsewhere"),
                ". The confidence of every pixel and the choice of λ rest on it."])
    clipped = metrics["test"]["clipped_pixels"]
    if any(clipped.values()):
        found.append([
            "Values outside the validation range were clipped: ", quote("test.clipped_pixels.pred_variance", count),
            " pixels of the predictive and ", quote("test.clipped_pixels.saliency_variance", count),
            " of the saliency variance, of ", quote("test.pixels", count), " test pixels."])
    for part in ("validation", "test"):
        if metrics[part]["empty_cams"]:
            passes = run.record.get("configuration", {}).get("passes")
            of = f" of {count(metrics[part]['images'] * passes)}" if is_number(passes) else ""
            found.append([quote(f"{part}.empty_cams", count), f"{of} Grad-CAM heatmaps of the {part} images were zero "
                          "everywhere; they stay zero in the saliency variance."])
    for part in ("validation", "test"):
        if metrics[part].get("precision_fallbacks"):
            found.append([quote(f"{part}.precision_fallbacks", count), f" {part} images overflowed in half precision; their maps "
                          "were made in single precision."])
    skipped = metrics.get("skipped")
    if skipped:
        reasons = "; ".join(f"{entry['id']} ({entry['reason']})" for entry in skipped)
        found.append(f"Pairs left out, {len(skipped)} in all: {printable(reasons)}.")
    changed = [f"{_words(name)} {value} (default: {default})" for name, value, default in _settings(run) if value != default]
    if changed:
        found.append(f"Settings other than the defaults: {'; '.join(changed)}.")
    earlier = run.record.get("earlier", [])
    if earlier:
        others = "; ".join(f"{entry['device']} with torch {entry['versions']['torch']}" for entry in earlier)
        found.append(f"Parts of what this run used again may have been made on another device or with other versions: {others}.")
    return found


def _settings(run: SavedRun) -> list[tuple[str, Any, Any]]:
    """Name, value and default of every setting that decides the numbers."""
    used = run.record.get("configuration", {})
    return [(name, used[name], default) for name, default in Config().experiment().items()
            if name in used and name != "synthetic_images"]


def _words(name: str) -> str:
    return name.replace("_", " ")


# ---------------------------------------------------------------- figures


def _figures(run: SavedRun, quote: Quotes) -> list[Block]:
    eces = ", ".join(f"{SCORE_NAMES[score]} {quote(f'test.foreground_ece.{score}').text}" for score in HEADLINE)
    spearman = "test.ranking_of_images.whole_image.{}.spearman_with_dice.value"
    ranks = ", ".join(f"{SCORE_NAMES[score]} {quote(spearman.format(score), signed).text}" for score in HEADLINE)
    lam = f"{run.metrics['lambda']:g}"
    texts = {
        "reliability": (
            "Reliability",
            f"Three reliability diagrams with pixel counts below. Foreground ECE: {eces}.",
            "How to read it: each point is a bin of confidence, which is 1 minus the score. On the dotted diagonal, pixels of "
            "confidence 0.8 are right in 80 % of the cases; above it the score is too cautious, below it too sure. The pale "
            "bars are the gaps; the ECE is their mean, weighted by the pixels of the bin, which are counted below on a "
            "logarithmic scale.",
        ),
        "lambda_curve": (
            "The fusion weight",
            f"Foreground ECE against λ on validation and test with 95 % bands; λ = {lam} was chosen. Below, how often each "
            "λ would have been chosen in resamples of the validation images.",
            "How to read it: λ = 0 is saliency variance alone, λ = 1 predictive variance alone. λ is chosen where the "
            "validation curve is lowest; the test curve says whether that holds on other images. The bands are 95 % intervals. "
            "All λ are measured on the same images, so that the bands overlap even where a difference is clear; the paired "
            "intervals are in the table above. The bars show how stable the choice is.",
        ),
        "forest": (
            "All differences from predictive variance",
            "Forest plot of the difference in foreground ECE between every score or fusion rule and predictive variance. "
            + _forest_words(run),
            "How to read it: a mark is the foreground ECE of a score or fusion rule minus that of min-max normalised predictive "
            "variance, the line its paired 95 % interval. Left of zero is better; an interval that holds zero shows no "
            f"difference. The axis is linear within ±{LINEAR_DIFFERENCE:g} and logarithmic beyond. Where many rows are compared "
            "at once, some intervals leave out zero by chance.",
        ),
        "risk_coverage": (
            "Risk and coverage",
            "Two panels of risk against coverage, inside the true lesions and over whole images, for the three scores and an "
            "ideal ranking.",
            "How to read it: keep only the most certain share of the pixels (coverage); the risk is the share of those that are "
            "wrong. A score that finds the errors stays low until the right end; the dotted curve is a perfect ranking. The "
            "legend gives the area under each curve; lower is better. This is about the order of the pixels, not about "
            "calibration.",
        ),
        "dice_uncertainty": (
            "Dice and uncertainty of the images",
            f"Three scatter plots of Dice against the mean uncertainty of each test image. Spearman correlation: {ranks}.",
            ["How to read it: a point is a test image. If uncertainty tells bad from good segmentations, the points fall from "
             "the upper left to the lower right, and the Spearman correlation is negative. Below the dotted line (Dice ",
             quote("test.ranking_of_images.bad_dice_below", "{:g}".format), ") lie ",
             quote("test.ranking_of_images.bad_images", count), " images. The scales of the three panels differ."],
        ),
        "training": (
            "Training",
            "Training and validation loss, and validation Dice, by epoch; the epoch whose weights were kept is marked.",
            "How to read it: the weights of the epoch with the best validation Dice (dotted) made all maps. A curve that still "
            "rises at its end says that the network was not trained to its limit.",
        ),
    }
    blocks: list[Block] = [Heading(2, "Figures", "figures")]
    for name, (title, alt, caption) in texts.items():
        path = run.folder / "figures" / f"{name}.png"
        if path.is_file():
            blocks += [Heading(3, title), Picture(path, _marked(run, alt), caption)]
    return blocks


def _forest_words(run: SavedRun) -> str:
    entries = run.metrics["test"]["foreground_ece_difference"]
    return " ".join(
        f"{SCORE_NAMES[score].capitalize()}: {signed(entry['value'])}, {signed_span(entry['interval'])}."
        for score, entry in ((score, entries[f"{score}_minus_predictive_variance"]) for score in HEADLINE[1:])
    )


def _marked(run: SavedRun, alt: str) -> str:
    return f"{alt} {SYNTHETIC_NOTE.capitalize()}." if run.metrics["synthetic"] else alt


def _galleries(run: SavedRun) -> list[Block]:
    blocks: list[Block] = []
    for name, rule in RULES.items():
        path = run.folder / "figures" / f"gallery_{name}.png"
        if not path.is_file():
            continue
        caption = GALLERY_TEXTS[name] + (GALLERY_LEGEND if not blocks else "")
        alt = f"Test images by rule: {rule.title}. A row an image: outlines, mean prediction, two variances, fused score, error."
        blocks += [Heading(3, rule.title[0].upper() + rule.title[1:]), Picture(path, _marked(run, alt), caption, photo=True)]
    return [Heading(2, "Cases, chosen by rule", "cases"), *blocks] if blocks else []


# ---------------------------------------------------------------- tables


def _measures(quote: Quotes) -> list[Block]:
    """A table of every measure for each region."""
    blocks: list[Block] = [Heading(2, "All measures", "measures")]
    for region, words in REGION_NAMES.items():
        base = f"test.regions.{region}.scores"
        rows = [
            [name, *(quote.estimate(f"{base}.{score}.{measure}", measure in SIGNED_MEASURES) for score in HEADLINE)]
            for measure, name in MEASURES.items() if measure in quote.get(f"{base}.fused")
        ]
        blocks += [
            Heading(3, words[0].upper() + words[1:]),
            Table(f"Test set, {words}, with 95 % intervals; lower is better where nothing else is said",
                  ("measure", *(SCORE_NAMES[score] for score in HEADLINE)), rows),
        ]
    return blocks


def _study(quote: Quotes) -> list[Block]:
    if "study" not in quote.metrics:
        return []
    rules = []
    for index, rule in enumerate(quote.get("study.rules")):
        path = f"study.rules.{index}"
        name = _words(rule["rule"])
        label = f"{name} (λ = {rule['parameter']:g})" if rule["rule"] == "convex" else name
        difference = quote.estimate(f"{path}.minus_predictive_variance", True)
        answer: list[Text] = [difference, quote(f"{path}.minus_predictive_variance.verdict", str)]
        if (rule["normalisation"], rule["rule"]) == ("min_max", "predictive"):
            answer = ["reference", ""]
        rules.append([rule["normalisation"].replace("_", "-"), label, quote.estimate(f"{path}.foreground_ece"), *answer])
    return [
        Heading(2, "Beyond the paper's fusion", "study"),
        Heading(3, "Normalisations and fusion rules"),
        Table("Foreground ECE on test of every normalisation and rule, fitted on validation; the difference is from "
              "min-max normalised predictive variance",
              ("normalisation", "rule", "ECE (95 % interval)", "difference (95 % interval)", "verdict"), rules, (0, 1, 4)),
        Heading(3, "What saliency variance adds"),
        Paragraph(
            "Models fitted on validation predict whether a pixel is wrong from the mean prediction and the predictive variance, "
            "without and with the saliency variance: logistic ones of second order, and boosted trees, which have no form of "
            "their own. Saliency adds something where the log loss falls or the AUROC rises. Inside the true lesions an error is "
            "a pixel that was predicted background, so that whatever tells the predicted label seems to find errors: a gain "
            "there by models that do not know this label says nothing, and those that know it cannot gain."),
        *(_added_value(quote, key, words) for key, words in (
            ("added_value", "Logistic models"), ("added_value_of_trees", "Boosted trees"))),
        *_without_widest_image(quote),
    ]


def _without_widest_image(quote: Quotes) -> list[Block]:
    path = "study.without_widest_image"
    if not quote.get("study").get("without_widest_image"):
        return []
    return [
        Heading(3, "Without the image that sets the scale"),
        Paragraph([
            "Of all validation images, ", quote(f"{path}.image", str), " has the largest saliency variance, ",
            quote(f"{path}.largest"), " (elsewhere at most ", quote(f"{path}.largest_elsewhere"), "), and so sets the scale "
            "of the saliency score. Without it λ = ", quote(f"{path}.lambda", "{:g}".format), " would have been chosen; on "
            "test the foreground ECE of the fused score minus that of predictive variance would be ",
            *quote.estimate(f"{path}.foreground_ece_difference.fused_minus_predictive_variance", True),
            ", that of saliency variance ",
            *quote.estimate(f"{path}.foreground_ece_difference.saliency_variance_minus_predictive_variance", True), "."]),
    ]


def _added_value(quote: Quotes, key: str, words: str) -> Table:
    rows = []
    for region in quote.get(f"study.{key}"):
        for pair, condition in (("with_minus_without", "unknown"), ("label_with_minus_label_without", "known")):
            path = f"study.{key}.{region}.difference.{pair}"
            rows.append([
                _words(region), condition,
                quote.estimate(f"{path}.log_loss", True), quote(f"{path}.log_loss.verdict", str),
                quote.estimate(f"{path}.auroc", True), quote(f"{path}.auroc.verdict", str),
            ])
    return Table(
        f"{words}: with minus without saliency variance, test set",
        ("region", "predicted label", "log loss (95 % interval)", "verdict", "AUROC (95 % interval)", "verdict"),
        rows, (0, 1, 3, 5),
    )


# ---------------------------------------------------------------- how it was made


def _setup(run: SavedRun, quote: Quotes) -> list[Block]:
    record = run.record
    split, used = record.get("split", {}), record.get("configuration", {})
    total = sum(map(len, split.values()))
    shares = [[part, count(len(split[part])), percent(len(split[part]) / total)] for part in split] if total else []
    environment = [["device", f"{record.get('device', '')} ({record.get('device_name', '')})"],
                   ["precision of training", str(record.get("decides", {}).get("amp", "")).replace("torch.", "")],
                   *([name, version] for name, version in record.get("versions", {}).items())]
    if "minutes" in run.metrics:
        environment.append(["time until the figures", duration(60 * run.metrics["minutes"])])
    command = shlex.join(["python", *map(str, record.get("command", ["main.py"]))])
    return [
        Heading(2, "How it was made", "setup"),
        Heading(3, "Data and split"),
        Table("Images in each part", ("part", "images", "share"), shares),
        Paragraph(f"Sorted ids, split with seed {used.get('split_seed')}; all ids are in config.json. "
                  f"Images: {record.get('images')}. Masks: {record.get('masks')}. "
                  f"Fingerprint of the data: {str(record.get('data_fingerprint'))[:16]}.", "note"),
        Paragraph([
            "Normalisation constants from validation: predictive variance ", _bounds(quote, "normalisation.pred_variance"),
            ", saliency variance ", _bounds(quote, "normalisation.saliency_variance"), "."], "note"),
        Heading(3, "Settings"),
        Table("What decides the numbers", ("setting", "this run", "default"),
              [[_words(name), str(value), "same" if value == default else str(default)]
               for name, value, default in _settings(run)], words=(0, 1, 2)),
        Heading(3, "Environment"),
        Table("Device and versions", ("what", "value"), environment, words=(0, 1)),
        Heading(3, "Make it again"),
        Paragraph("The same command in an empty results folder makes the same numbers on the same device and versions; in this "
                  "folder it reuses weights and maps. The second redraws all figures and this report from the saved numbers."),
        Code(f"{command}\n{shlex.join(['python', 'visualize.py', '--summary', '--run', str(run.folder)])}"),
    ]


def _bounds(quote: Quotes, path: str) -> Quoted:
    # six significant digits: the four decimals of all other numbers would show most variances as zero
    return quote(path, lambda pair: f"{pair[0]:.6g} to {pair[1]:.6g}")
