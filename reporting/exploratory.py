"""Tables of what stands beside the endpoints: after recalibration, in models of errors, other detectors, the ensemble."""

from __future__ import annotations

from collections.abc import Sequence

from reporting.document import Block, Heading, Paragraph, Table, Text
from reporting.endpoints import EXPLORATORY, p_value
from reporting.formats import METHOD_NAMES, REGION_NAMES, SCORE_NAMES, signed, span
from reporting.quotes import Quotes

RECALIBRATED_NAMES = {
    "foreground_ece_isotonic": "foreground ECE",
    "brier_isotonic": "Brier score, whole images",
    "log_loss_isotonic": "log loss, whole images, nats",
}
ADDED_NAMES = {
    "predictive_variance": "predictive variance, to the predicted probability",
    "saliency_variance": "saliency variance, to both",
}
DETECTOR_NAMES = {
    **SCORE_NAMES,
    "temperature_scaled": "one minus maximum probability, temperature-scaled",
    "flip_variance": "variance over flips",
}
MEASURES = {"brier": "Brier score", "log_loss": "log loss, nats", "ece": "ECE", "auroc": "AUROC for errors (higher is better)"}
ENSEMBLE_ROWS = (
    ("one_minus_max_probability", "brier", "Brier score"),
    ("predictive_entropy", "auroc", "AUROC for errors (higher is better)"),
    ("mutual_information", "auroc", "AUROC for errors (higher is better)"),
    ("predictive_variance", "auroc", "AUROC for errors (higher is better)"),
)


# ---------------------------------------------------------------- beside the endpoints


def beside_the_endpoints(quote: Quotes) -> list[Block]:
    """Differences after recalibration, and what each variance adds to a model of errors; each where it was computed."""
    return [Heading(2, "Beside the endpoints", "beside"), *added(quote), *recalibrated(quote)]


def recalibrated(quote: Quotes) -> list[Block]:
    """Fused minus predictive variance after recalibration."""
    entries = quote.get("conclusion").get("recalibrated", ())
    rows: list[Sequence[Text]] = [
        [RECALIBRATED_NAMES[entry["measure"]], quote.estimate(f"conclusion.recalibrated.{index}", True)]
        for index, entry in enumerate(entries)
    ]
    if not rows:
        return []
    return [Table(
        "Fused score minus predictive variance after isotonic recalibration, which each resample fits again; lower is better; "
        f"{EXPLORATORY}", ("measure", "difference (95 % interval)"), rows,
    )]


def added(quote: Quotes) -> list[Block]:
    """What each variance adds to a model of errors, by region."""
    rows: list[Sequence[Text]] = []
    permuted = False
    for region, entry in quote.get("conclusion.added").items():
        for name, words in ADDED_NAMES.items():
            row: list[Text] = [REGION_NAMES.get(REGION_KEYS[region], region), words]
            row.append(quote.estimate(f"conclusion.added.{region}.{name}", True))
            null = f"conclusion.added.{region}.permutation_null"
            if name == "saliency_variance" and entry["permutation_null"]:
                permuted = True
                largest = quote(f"{null}.largest", signed)
                row.append([quote(f"{null}.mean", signed), ", at most ", largest, "; p ", quote(f"{null}.p_value", p_value)])
            else:
                row.append("")
            rows.append(row)
    note = (
        "Models of errors that are fitted on other images than they are scored on. The first row of a region says what "
        "predictive variance adds to the predicted probability and label; the second is the endpoint above."
    )
    if permuted:
        note += (
            " Permuted: the same gain where saliency variance is dealt anew among pixels of one image that are alike in all "
            "else the model knows; p is the share of permutations of the first training that gain as much."
        )
    columns = ("region", "what is added", "gain in AUROC of errors (95 % interval)", *(("permuted",) if permuted else ()))
    return [
        Table("What each variance adds to a model of errors; higher is better", columns,
              [row[: len(columns)] for row in rows], words=(0, 1, 3)),
        Paragraph(note, "note"),
    ]


#: The regions of the error models by the names that the other tables have for them.
REGION_KEYS = {"predicted_lesion": "predicted_foreground", "whole_image": "whole_image"}


# ---------------------------------------------------------------- other detectors


def detectors(quote: Quotes) -> list[Block]:
    """Temperature-scaled probability and variance over flips beside predictive variance; nothing where they were not made."""
    if "detectors" not in quote.metrics:
        return []
    base = "detectors.regions.whole_image"
    rows: list[Sequence[Text]] = []
    for score, kinds in quote.get(base).items():
        for kind, found in kinds.items():
            name = DETECTOR_NAMES.get(score, score) + ("" if kind == "raw" else f", {METHOD_NAMES.get(kind, kind)}")
            rows.append([
                name, *(quote.estimate(f"{base}.{score}.{kind}.{measure}") if measure in found else "" for measure in MEASURES)
            ])
    fitted = quote.fill("The temperature is {detectors.temperature:general}, fitted on validation by maximum likelihood.")
    return [
        Heading(2, "Other detectors of errors", "detectors"),
        Table(f"Test set, whole images, with 95 % intervals; lower is better where nothing else is said; {EXPLORATORY}",
              ("detector", *MEASURES.values()), rows),
        Paragraph(fitted, "note"),
    ]


def ensemble(quote: Quotes) -> list[Block]:
    """The ensemble of the pooled trainings beside its members; nothing where it was not asked for."""
    if not quote.metrics.get("ensemble"):
        return []
    members = range(len(quote.get("ensemble.members")))
    rows: list[Sequence[Text]] = [[
        "test Dice", [quote("ensemble.dice"), " (", quote("ensemble.dice_interval", span), ")"],
        _range(quote, [f"ensemble.members.{member}.dice" for member in members]),
    ]]
    given = "score_names" in quote.metrics  # what spreads between the trainings is then none of the scores
    for score, measure, words in ENSEMBLE_ROWS:
        path = f"whole_image.{score}.{measure}"
        known = all(score in quote.get(f"ensemble.members.{member}.whole_image") for member in members)
        if not known or quote.get(f"ensemble.members.0.{path}") is None or given and score == "predictive_variance":
            continue
        rows.append([
            f"{SCORE_NAMES[score]}: {words}", quote.estimate(f"ensemble.{path}"),
            _range(quote, [f"ensemble.members.{member}.{path}.value" for member in members]),
        ])
    return [
        Heading(2, "The ensemble of the trainings", "ensemble"),
        Table(f"Test set, whole images, with 95 % intervals of other test images; {EXPLORATORY}",
              ("measure", "ensemble", "its members, lowest to highest"), rows, words=(0, 2)),
        Paragraph(quote.fill(
            "The mean prediction of {ensemble.trainings:count} trainings." + ("" if given else
            " Its predictive variance is that between the trainings, and its mutual information what the label tells about the "
            "training; those of a member are over its own passes.")), "note"),
    ]


def _range(quote: Quotes, paths: Sequence[str]) -> Text:
    """The lowest and the highest of several numbers."""
    lowest, *_, highest = sorted(paths, key=quote.get)
    return [quote(lowest), " to ", quote(highest)]
