"""The sections of the report, one function each, in the order in which they are read.

Sentences with numbers are templates of :mod:`reporting.quotes`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.names import CONDITIONS_ON_TRUTH, HEADLINE, REFERENCE
from experiment.saved_run import SavedRun, settings
from experiment.terms import judges_given_maps
from reporting.caveats import caveats, nothing
from reporting.document import Block, Bullets, Code, Contents, Heading, Paragraph, Picture, Piece, Table, Text, plain
from reporting.endpoints import EXPLORATORY, conclusion_blocks
from reporting.figure_texts import FIGURE_TEXTS, GALLERY_ALT, GALLERY_CAPTIONS, GALLERY_LEGEND
from reporting.formats import (
    AGGREGATE_NAMES,
    METHOD_NAMES,
    MISSING,
    REGION_NAMES,
    SCORE_NAMES,
    SYNTHETIC_NOTE,
    count,
    general,
    is_number,
    number,
    percent,
    sentence_case,
    signed,
    signed_span,
    spaced,
    span,
)
from reporting.galleries import RULES
from reporting.quotes import Quotes
from runtime.progress import duration

MEASURES = {
    "brier": "Brier score",
    "brier_reliability": "its reliability: squared gaps of the bins",
    "brier_resolution": "its resolution (higher is better)",
    "log_loss": "log loss, nats",
    "ece": "expected calibration error (ECE)",
    "ece_debiased": "the same, with less bias",
    "signed_gap": "signed gap: confidence minus accuracy",
    "mce": "largest gap of a bin",
    "ace": "mean gap of the bins",
    "auroc": "AUROC for errors (higher is better)",
    "auprc": "AUPRC for errors (higher is better)",
    "aurc": "area under risk and coverage",
    "excess_aurc": "the same, above the ideal ranking",
}
SIGNED_MEASURES = ("signed_gap",)
RANKING_MEASURES = {
    "spearman_with_dice": "Spearman with Dice",
    "auroc_bad_dice": "AUROC for bad images",
    "aurc": "AURC",
    "augrc": "AUGRC",
}
OVERLAPS = {"dice": "Dice", "jaccard": "Jaccard", "thresholded_jaccard": "Jaccard, 0 where below 0.65"}


# ---------------------------------------------------------------- the answer


def opening(folder: Path, quote: Quotes) -> list[Block]:
    """The name of a run or of a pool, its verdict, and what a reader must know about the images."""
    blocks: list[Block] = [
        Heading(1, f"Fusing predictive and saliency variance: {folder.resolve().name}"),
        Paragraph(quote("verdict", str), "lead"),
    ]
    if quote.metrics["synthetic"]:
        works = f"{SYNTHETIC_NOTE}. These numbers show that the pipeline works; they say nothing about patients."
        blocks.append(Paragraph(works, "synthetic"))
    if quote.metrics.get("data_note"):
        blocks.append(Paragraph(quote.fill("Data: {data_note:text}"), "note"))
    return blocks


def answer(run: SavedRun, quote: Quotes) -> list[Block]:
    """The verdict, the tables it rests on, and the table of contents."""
    units = "groups of test images" if quote.get("bootstrap.unit") == "group" else "test images"
    return [
        *opening(run.folder, quote),
        *conclusion_blocks(quote),
        Table("Foreground calibration error on the test set; lower is better",
              ("score", "λ", "ECE", "95 % interval", "minus predictive variance", "95 % interval", ""),
              [_row_of_score(quote, score) for score in HEADLINE], words=(0, 6)),
        Table("The same error after the confidences were recalibrated on validation; lower is better",
              ("recalibration", "predictive variance", "fused score", "fused minus predictive (95 % interval)", ""),
              [_row_of_recalibration(quote, method) for method in run.metrics["verdict_recalibrated"]], words=(0, 4)),
        Paragraph(quote.fill(
            "Pixels inside the true lesions of {test.images:count} test images. Intervals are percentiles of "
            "{bootstrap.resamples:count} bootstrap resamples of whole $units, paired for differences. They hold the "
            "training, the scales and λ fixed; those of the endpoints above do not.", units=units), "note"),
        Table("Segmentation: mean over images, with 95 % interval", ("measure", "validation", "test"),
              [_row_of_overlap(quote, key) for key in OVERLAPS]),
        Contents(),
    ]


def _row_of_score(quote: Quotes, score: str) -> list[Text]:
    """A row of the headline table: name, λ, ECE with interval, difference with interval, and what kind of number that is."""
    error = quote(f"test.foreground_ece.{score}")
    weight: Text = {"predictive_variance": "1", "saliency_variance": "0"}.get(score) or quote("lambda", general)
    row: list[Text] = [SCORE_NAMES[score], weight, error]
    row.append(quote(f"test.foreground_ece_interval.{score}", span) if error.text != MISSING else MISSING)
    path = f"test.foreground_ece_difference.{score}_minus_predictive_variance"
    if score == REFERENCE:
        return [*row, "reference", "", ""]
    if not is_number(quote.get(f"{path}.value")):
        return [*row, MISSING, "", ""]
    kind = "endpoint, see above" if score == "fused" else EXPLORATORY
    return [*row, quote(f"{path}.value", signed), quote(f"{path}.interval", signed_span), kind]


def _row_of_recalibration(quote: Quotes, method: str) -> list[Text]:
    """Foreground ECE of predictive variance and of the fused score after a recalibration, and their difference."""
    paths = [f"test.regions.foreground.scores.{score}.recalibrated.{method}" for score in (REFERENCE, "fused")]
    difference = quote.estimate(f"{paths[1]}.minus_{REFERENCE}.ece", True)
    return [METHOD_NAMES.get(method, method), *(quote(f"{path}.ece.value") for path in paths), difference, EXPLORATORY]


def _row_of_overlap(quote: Quotes, key: str) -> list[Text]:
    """A row of the table of segmentation: the measure, then its mean with interval on validation and on test."""
    row: list[Text] = [OVERLAPS[key]]
    for part in ("validation", "test"):
        row.append([quote(f"{part}.{key}"), " (", quote(f"{part}.{key}_interval", span), ")"])
    return row


def before_you_quote(run: SavedRun) -> list[Block]:
    """What limits the numbers."""
    return [Heading(2, "Before you quote a number", "warnings"), Bullets(caveats(run) or [nothing(run)], "warnings")]


# ---------------------------------------------------------------- pictures


def figures(run: SavedRun, quote: Quotes) -> list[Block]:
    """The figures of the run that lie in its folder."""
    blocks: list[Block] = [Heading(2, "Figures", "figures")]
    for name, texts in FIGURE_TEXTS.items():
        alt, caption = _marked(run, plain(quote.fill(texts.alt))), quote.fill(texts.caption)
        path = run.folder / "figures" / f"{name}.png"
        if path.is_file():
            blocks += [Heading(3, texts.title), Picture(path, alt, caption)]
    return blocks


def cases(run: SavedRun, quote: Quotes) -> list[Block]:
    """The galleries that lie in the run's folder; nothing where there are none."""
    blocks: list[Block] = []
    for name, rule in RULES.items():
        path = run.folder / "figures" / f"gallery_{name}.png"
        if path.is_file():
            caption = GALLERY_CAPTIONS[name] if blocks else f"{GALLERY_CAPTIONS[name]} {GALLERY_LEGEND}"
            alt = _marked(run, plain(quote.fill(GALLERY_ALT, title=rule.title)))
            blocks += [Heading(3, sentence_case(rule.title)), Picture(path, alt, caption, photo=True)]
    return [Heading(2, "Cases, chosen by rule", "cases"), *blocks] if blocks else []


def _marked(run: SavedRun, alt: str) -> str:
    """The description of a picture, with the word that the lesions are synthetic, where they are."""
    return f"{alt} {SYNTHETIC_NOTE.capitalize()}." if run.metrics["synthetic"] else alt


# ---------------------------------------------------------------- tables


def all_measures(quote: Quotes) -> list[Block]:
    """A table of every measure for each region, and one of how the images are ranked."""
    blocks: list[Block] = [Heading(2, "All measures", "measures")]
    for region, words in REGION_NAMES.items():
        if region not in quote.get("test.regions"):
            continue
        words += " (conditions on the truth)" if CONDITIONS_ON_TRUTH[region] else ""
        base = f"test.regions.{region}.scores"
        rows: list[Sequence[Text]] = [
            [name, *(_measure(quote, f"{base}.{score}.{measure}", measure in SIGNED_MEASURES) for score in HEADLINE)]
            for measure, name in MEASURES.items() if measure in quote.get(f"{base}.fused")
        ]
        blocks += [
            Heading(3, sentence_case(words)),
            Table(f"Test set, {words}, with 95 % intervals; lower is better where nothing else is said",
                  ("measure", *(SCORE_NAMES[score] for score in HEADLINE)), rows),
        ]
    return [*blocks, *_rankings_of_images(quote)]


def _measure(quote: Quotes, path: str, signed_value: bool) -> Text:
    """A value with its interval; the value alone where it has none."""
    if quote.get(path)["interval"] is None:
        return quote(f"{path}.value", signed if signed_value else number)
    return quote.estimate(path, signed_value)


def _rankings_of_images(quote: Quotes) -> list[Block]:
    """How every aggregate of every score ranks the images; nothing where the run did not ask."""
    ranking = quote.get("test.ranking_of_images")
    base = "test.ranking_of_images"
    paths = [
        (AGGREGATE_NAMES[aggregate], SCORE_NAMES[score], f"{base}.aggregates.{aggregate}.{score}")
        for aggregate in ranking.get("aggregates", ()) for score in HEADLINE
    ]
    compared = "the difference is from predictive variance under the same aggregate"
    if "baselines" in ranking:
        paths.append(("disagreement of the passes", "1 - mean pairwise Dice", f"{base}.baselines.pass_dice"))
        compared += " (for the passes: its mean over the image)"
    if not paths:
        return []
    rows: list[Sequence[Text]] = []
    for aggregate, score, path in paths:
        row: list[Text] = [aggregate, score]
        row += [quote.estimate(f"{path}.{measure}", measure == "spearman_with_dice") for measure in RANKING_MEASURES]
        difference = f"{path}.minus_{REFERENCE}"
        row.append(quote.estimate(f"{difference}.aurc", True) if f"minus_{REFERENCE}" in quote.get(path) else "reference")
        rows.append(row)
    return [
        Heading(3, "Images ranked by their uncertainty"),
        Paragraph(quote.fill(
            "One number for each image, to find those that are segmented badly (Dice below {$base.bad_dice_below:general}: "
            "{$base.bad_images:count} of {test.images:count}). AURC and AUGRC are areas under risk and coverage of images, the "
            "risk being 1 - Dice: of the mean risk of the images kept, and of the sum of their risks as a share of all images. A "
            "useful number has a negative correlation, a high AUROC and small areas.", base=base)),
        Table(f"Test set, ranking of whole images, with 95 % intervals; {compared}",
              ("one number for an image", "score", *RANKING_MEASURES.values(), "AURC minus predictive variance"),
              rows, words=(0, 1)),
    ]


def study(quote: Quotes) -> list[Block]:
    """What the study found; nothing where the run made none."""
    if "study" not in quote.metrics:
        return []
    return [
        Heading(2, "Beyond the paper's fusion", "study"),
        Heading(3, "Normalisations and fusion rules"),
        Table("Foreground ECE on test of every normalisation and rule, fitted on validation; the difference is from "
              f"min-max normalised predictive variance; {EXPLORATORY}",
              ("normalisation", "rule", "ECE (95 % interval)", "difference (95 % interval)"),
              [_row_of_rule(quote, index) for index in range(len(quote.get("study.rules")))], words=(0, 1)),
        Heading(3, "What saliency variance adds"),
        Paragraph(
            "Models fitted on validation predict whether a pixel is wrong from the mean prediction and the predictive variance, "
            "without and with the saliency variance: logistic ones of second order, and boosted trees, which have no form of "
            "their own. Saliency adds something where the log loss falls or the AUROC rises. Inside the true lesions an error is "
            "a pixel that was predicted background, so that whatever tells the predicted label seems to find errors: a gain "
            "there by models that do not know this label says nothing, and those that know it cannot gain."),
        _added_value(quote, "added_value", "Logistic models"),
        _added_value(quote, "added_value_of_trees", "Boosted trees"),
        *_without_widest_image(quote),
    ]


def _row_of_rule(quote: Quotes, index: int) -> list[Text]:
    """A row of the table of rules: normalisation, rule, ECE, difference from the reference."""
    path = f"study.rules.{index}"
    rule = quote.get(path)
    name = spaced(rule["rule"]) + (f" (λ = {general(rule['parameter'])})" if rule["rule"] == "convex" else "")
    row: list[Text] = [rule["normalisation"].replace("_", "-"), name, quote.estimate(f"{path}.foreground_ece")]
    if (rule["normalisation"], rule["rule"]) == ("min_max", "predictive"):
        return [*row, "reference"]
    return [*row, quote.estimate(f"{path}.minus_predictive_variance", True)]


def _added_value(quote: Quotes, key: str, models: str) -> Table:
    """What these models gain by the saliency variance, by region, without and with the predicted label."""
    rows: list[Sequence[Text]] = []
    for region in quote.get(f"study.{key}"):
        for pair, label in (("with_minus_without", "unknown"), ("label_with_minus_label_without", "known")):
            path = f"study.{key}.{region}.difference.{pair}"
            row: list[Text] = [spaced(region), label]
            rows.append([*row, *(quote.estimate(f"{path}.{measure}", True) for measure in ("log_loss", "auroc"))])
    return Table(
        f"{models}: with minus without saliency variance, test set; {EXPLORATORY}",
        ("region", "predicted label", "log loss (95 % interval)", "AUROC (95 % interval)"), rows, words=(0, 1),
    )


def _without_widest_image(quote: Quotes) -> list[Block]:
    """What would have come out without the validation image that sets the scale; nothing where that was not asked."""
    if not quote.get("study").get("without_widest_image"):
        return []
    return [
        Heading(3, "Without the image that sets the scale"),
        Paragraph(quote.fill(
            "Of all validation images, {$path.image:text} has the largest saliency variance, {$path.largest} (elsewhere at most "
            "{$path.largest_elsewhere}), and so sets the scale of the saliency score. Without it λ = {$path.lambda:general} "
            "would have been chosen; on test the foreground ECE of the fused score minus that of predictive variance would be "
            "{$path.foreground_ece_difference.fused_minus_predictive_variance:signed_estimate}, that of saliency variance "
            "{$path.foreground_ece_difference.saliency_variance_minus_predictive_variance:signed_estimate}.",
            path="study.without_widest_image")),
    ]


# ---------------------------------------------------------------- how it was made


def setup(run: SavedRun, quote: Quotes) -> list[Block]:
    """Data, split, settings and environment of the run, and the commands that make it again."""
    record = run.record
    command = shlex.join(["python", *map(str, record.get("command", ["main.py"]))])
    redraw = shlex.join(["python", "visualize.py", "--summary", "--run", str(run.folder)])
    return [
        Heading(2, "How it was made", "setup"),
        Heading(3, "Data and split"),
        Table("Images in each part", ("part", "images", "share"), _split(record.get("split", {}))),
        Paragraph([f"{how_split(record)} ", *data_of(record, quote)], "note"),
        Paragraph(quote.fill(
            "Normalisation constants from validation: predictive variance {normalisation.pred_variance:bounds}, "
            "saliency variance {normalisation.saliency_variance:bounds}."), "note"),
        Heading(3, "Settings"),
        Table("What decides the numbers", ("setting", "this run", "default"),
              [[spaced(name), str(value), "same" if value == default else str(default)]
               for name, value, default in settings(run)], words=(0, 1, 2)),
        Heading(3, "Environment"),
        Table("Device and versions", ("what", "value"), _environment(run), words=(0, 1)),
        Heading(3, "Make it again"),
        Paragraph("The same command in an empty results folder makes the same numbers on the same device and versions; in this "
                  "folder it reuses what is finished. The second redraws all figures and this report from the saved numbers."),
        Code(f"{command}\n{redraw}"),
    ]


def how_split(record: Mapping[str, Any]) -> str:
    """How the images of a run came into their parts, in a sentence."""
    if judges_given_maps(record):
        return "The parts are the two folders of maps; all ids are in config.json."
    used, groups = record.get("configuration", {}), record.get("groups")
    if used.get("split"):
        how = f"The parts are those of {folder_name(used['split'])}"
    else:
        how = f"Sorted {'groups of images' if groups else 'ids'}, split with seed {used.get('split_seed')}"
    number = f" {count(len(groups))} images are in {count(len(set(groups.values())))} groups." if groups else ""
    return f"{how}; all ids are in config.json.{number}"


def data_of(record: Mapping[str, Any], quote: Quotes) -> list[Piece]:
    """What a run, or several trainings, looked at: names of folders, and the fingerprint of the data."""
    known = f" Fingerprint of the data: {str(record.get('data_fingerprint'))[:16]}."
    if not judges_given_maps(record):
        return [f"Images: {folder_name(record.get('images'))}. Masks: {folder_name(record.get('masks'))}.", known]
    given = record["maps"]
    folders = "Maps that were given, for each training its own." if "validation" not in given else (
        f"Maps of the validation images: {folder_name(given['validation'])}; of the test images: "
        f"{folder_name(given['test'])}."
    )
    return [
        f"{folders} The score that is judged is ", quote("score_names.first", str), ", the one that may add to it ",
        quote("score_names.second", str), ". What made them is unknown to this report.", known,
    ]


def folder_name(path: object) -> str:
    """The name of a folder without its place on this machine."""
    return Path(str(path)).name or str(path)


def _split(split: Mapping[str, Sequence[str]]) -> list[list[Text]]:
    """Part, number of images and share, from the ids of each part."""
    total = sum(map(len, split.values()))
    return [[part, count(len(ids)), percent(len(ids) / total)] for part, ids in split.items()] if total else []


def _environment(run: SavedRun) -> list[list[Text]]:
    """What a run was made with: device, precision, versions, time."""
    record = run.record
    precision = record.get("decides", {}).get("amp")
    rows: list[list[Text]] = [
        ["device", f"{record.get('device', '')} ({record.get('device_name', '')})"],
        *([name, version] for name, version in record.get("versions", {}).items()),
    ]
    if precision:
        rows.insert(1, ["precision of training", str(precision).replace("torch.", "")])
    if "minutes" in run.metrics:
        rows.append(["time until the figures", duration(60 * run.metrics["minutes"])])
    for name, entry in run.metrics.get("seconds_by_stage", {}).items():
        if name == "drawing":  # what a report took is known after it; metrics.json has it
            continue
        unit = "epochs" if name == "training" else name
        already = f"; {count(entry['reused'])} {unit} were reused" if "reused" in entry else ""
        rows.append([f"time of {name}", duration(entry["seconds"]) + already])
    return rows
