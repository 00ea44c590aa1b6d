"""The tables of the study's two pages, each from the numbers of :mod:`docs.study.numbers` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable

from docs.study.numbers import ABLATIONS, EXTERNAL, LARGER, REGIONS, SEEDS
from reporting import exploratory
from reporting.document import Block, Table, Text
from reporting.endpoints import EXPLORATORY, controls_table, endpoints_table, short_name
from reporting.formats import METHOD_NAMES, REGION_NAMES, SCORE_NAMES, general, number, percent, signed, span
from reporting.quotes import Quotes

Runs = Mapping[str, Mapping[str, Any]]

SCORES = tuple(SCORE_NAMES)
#: Shown of every score by region: what the paper measures, and the best of what comes with the same passes.
COMPARED = ("predictive_variance", "saliency_variance", "fused", "one_minus_max_probability")
TEN = "means over the ten trainings (lowest to highest)"


# ---------------------------------------------------------------- cells


def spread(runs: Runs, path: str, shown: Callable[[Any], str] = number) -> Text:
    """The mean over the ten trainings, the lowest and the highest; empty where a training has no such number."""
    try:
        quotes = [Quotes(runs[seed]) for seed in SEEDS]
        if Quotes(runs["mean"]).get(path) is None:
            return ""
        low, *_, high = sorted(quotes, key=lambda quote: quote.get(path))
    except KeyError:
        return ""
    return [Quotes(runs["mean"])(path, shown), " (", low(path, shown), " to ", high(path, shown), ")"]


def each(runs: Runs, names: Sequence[str], path: str, shown: Callable[[Any], str] = number) -> Text:
    """The numbers of several runs, one after the other."""
    pieces: list[Any] = []
    for name in names:
        pieces += [", ", Quotes(runs[name])(path, shown)]
    return pieces[1:]


def seed_of(name: str) -> str:
    """The seed in the name of a run."""
    return name.split("-")[1]


def _pooled(draw: Callable[[Quotes], Table | list[Block]], caption: str, external: bool = False) -> Callable[[Runs], Table]:
    """A table of the reports, of the ten trainings together, on ISIC or on the external set, with a caption of its own."""

    def table(runs: Runs) -> Table:
        drawn = draw(Quotes(runs["pooled"]["targets"][EXTERNAL] if external else runs["pooled"]))
        first = drawn if isinstance(drawn, Table) else next(block for block in drawn if isinstance(block, Table))
        return first._replace(caption=caption)

    return table


# ---------------------------------------------------------------- the ten trainings


def by_training(runs: Runs) -> Table:
    rows: list[Sequence[Text]] = []
    for seed in SEEDS:
        quote = Quotes(runs[seed])
        external = f"targets.{EXTERNAL}.test"
        rows.append([
            seed_of(seed), quote("training.best_epoch", general), quote("test.dice"), quote("lambda", general),
            *(quote(f"test.foreground_ece.{score}") for score in SCORES[:3]),
            quote(f"{external}.dice"), *(quote(f"{external}.foreground_ece.{score}") for score in SCORES[:3]),
        ])
    scores = ("predictive variance", "saliency variance", "fused score")
    header = ("seed", "epoch kept", "Dice", "λ", *(f"ECE, {score}" for score in scores), f"Dice, {EXTERNAL}",
              *(f"ECE, {score}, {EXTERNAL}" for score in scores))
    return Table("Each training: test Dice, the chosen λ, and the foreground ECE of the three scores", header, rows)


def differences_by_training(runs: Runs) -> Table:
    quote = Quotes(runs["pooled"])
    found = quote.get("conclusion.endpoints")
    rows: list[Sequence[Text]] = [
        [seed_of(seed), *(quote(f"conclusion.endpoints.{place}.by_training.{index}", signed) for place in range(len(found)))]
        for index, seed in enumerate(SEEDS)
    ]
    rows.append(["standard deviation", *(quote(f"conclusion.endpoints.{place}.seed_sd") for place in range(len(found)))])
    return Table("Each training: fused minus predictive variance, every endpoint on ISIC 2018",
                 ("seed", *map(short_name, found)), rows)


def gaps(runs: Runs) -> Table:
    base = "test.regions.foreground"
    rows: list[Sequence[Text]] = [["accuracy, the same for all", spread(runs, f"{base}.accuracy"), "", ""]]
    for score in COMPARED:
        rows.append([SCORE_NAMES[score], spread(runs, f"{base}.scores.{score}.mean_confidence"),
                     spread(runs, f"{base}.scores.{score}.ece.value"),
                     spread(runs, f"{base}.scores.{score}.signed_gap.value", signed)])
    return Table(f"Inside the true lesions: {TEN}", ("score", "mean confidence", "ECE", "signed gap"), rows)


def detectors(runs: Runs) -> Table:
    rows: list[Sequence[Text]] = []
    for score in COMPARED:
        rows.append([SCORE_NAMES[score], *(spread(runs, f"test.regions.{region}.scores.{score}.auroc.value")
                                           for region in REGIONS if region != "union")])
    header = ("score", *(REGION_NAMES[region] for region in REGIONS if region != "union"))
    return Table(f"AUROC of errors on ISIC 2018: {TEN}", header, rows)


def other_detectors(runs: Runs) -> Table:
    base = "detectors.regions.whole_image"
    rows: list[Sequence[Text]] = []
    for score, kinds in runs["mean"]["detectors"]["regions"]["whole_image"].items():
        for kind in kinds:
            name = exploratory.DETECTOR_NAMES.get(score, score)
            name += "" if kind == "raw" else f", {METHOD_NAMES.get(kind, kind)}"
            rows.append([name, *(spread(runs, f"{base}.{score}.{kind}.{measure}.value") for measure in exploratory.MEASURES)])
    return Table(f"Other detectors of errors, whole images of ISIC 2018: {TEN}; {EXPLORATORY}",
                 ("detector", *exploratory.MEASURES.values()), rows)


POOLED_TABLES = {
    "endpoints": _pooled(
        endpoints_table, "ISIC 2018, ten trainings: fused minus predictive variance; lower is better where nothing else is said"),
    "endpoints_external": _pooled(endpoints_table, f"{EXTERNAL}, the same ten trainings, nothing fitted to it", external=True),
    "controls": _pooled(
        controls_table, "Is it saliency? ISIC 2018, ten trainings: fused minus each control, with 95 % intervals"),
    "controls_external": _pooled(controls_table, f"Fused minus each control on {EXTERNAL}, with 95 % intervals", external=True),
    "added": _pooled(
        exploratory.added, "What each variance adds to a model of errors, ten trainings; higher is better"),
    "recalibrated": _pooled(
        exploratory.recalibrated,
        f"Fused minus predictive variance after isotonic recalibration, ten trainings; lower is better; {EXPLORATORY}"),
    "ensemble": _pooled(exploratory.ensemble, f"The mean prediction of the ten trainings, whole images; {EXPLORATORY}"),
}


# ---------------------------------------------------------------- other settings, a larger network


def ablations(runs: Runs) -> Table:
    rows: list[Sequence[Text]] = []
    for name, words in {"pooled": "main study, ten trainings", **ABLATIONS}.items():
        if name not in runs:
            continue
        quote = Quotes(runs[name])
        places = {entry["name"]: index for index, entry in enumerate(quote.get("conclusion.endpoints"))}
        rows.append([
            words, _list(quote, "conclusion.lambda"), quote("conclusion.measures.predictive_variance.foreground_ece.value"),
            *(quote.estimate(f"conclusion.endpoints.{places[endpoint]}", True)
              for endpoint in ("foreground_ece", "brier", "error_auroc", "added_auroc_whole_image")),
        ])
    header = ("setting", "λ", "ECE, predictive variance", "fused − predictive: foreground ECE", "Brier score",
              "AUROC of errors (higher is better)", "AUROC that saliency adds (higher is better)")
    return Table(f"One setting changed, seeds 42 to 44 each, with 95 % intervals; {EXPLORATORY}", header, rows, (0, 1))


def _list(quote: Quotes, path: str) -> Text:
    pieces: list[Any] = []
    for place in range(len(quote.get(path))):
        pieces += [", ", quote(f"{path}.{place}", general)]
    return pieces[1:]


LARGER_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("test Dice", "test.dice", number),
    ("tuned λ", "lambda", general),
    ("foreground ECE, predictive variance", "test.foreground_ece.predictive_variance", number),
    ("foreground ECE, saliency variance", "test.foreground_ece.saliency_variance", number),
    ("foreground ECE, fused", "test.foreground_ece.fused", number),
    ("foreground ECE, fused − predictive", "test.foreground_ece_difference.fused_minus_predictive_variance.value", signed),
    *((f"AUROC of errors, {words}, {SCORE_NAMES[score]}", f"test.regions.{region}.scores.{score}.auroc.value", number)
      for region, words in (("foreground", "true lesions"), ("predicted_foreground", "predicted lesions"),
                            ("whole_image", "whole images"))
      for score in ("predictive_variance", "saliency_variance", "one_minus_max_probability")),
)


def larger(runs: Runs) -> Table:
    rows: list[Sequence[Text]] = [
        [words, spread(runs, path, shown), *(Quotes(runs[name])(path, shown) for name in LARGER)]
        for words, path, shown in LARGER_ROWS
    ]
    header = ("what", "ten trainings: mean (lowest to highest)", *(f"larger, seed {seed_of(name)}" for name in LARGER))
    return Table("The ten trainings beside three of a larger network (128 px, width 32, 30 epochs)", header, rows)


def _scores_of_regions() -> list[tuple[str, str, str]]:
    """The region in words, the score, and the path of its numbers."""
    return [(REGION_NAMES[region], score, f"test.regions.{region}.scores.{score}") for region in REGIONS for score in SCORES]


def segmentation(runs: Runs) -> Table:
    rows: list[Sequence[Text]] = []
    for name in LARGER:
        quote = Quotes(runs[name])
        estimates: list[Text] = [
            [quote(f"{part}.{key}"), " (", quote(f"{part}.{key}_interval", span), ")"]
            for part, key in (("validation", "dice"), ("test", "dice"), ("test", "jaccard"))
        ]
        rows.append([seed_of(name), quote("training.best_epoch", general), *estimates])
    header = ("seed", "epoch kept", "validation Dice", "test Dice", "test Jaccard")
    return Table("Larger network: segmentation, means over images with 95 % intervals", header, rows)


def calibration(runs: Runs) -> Table:
    quote, rows = Quotes(runs[LARGER[0]]), []
    for words, score, base in _scores_of_regions():
        row: list[Text] = [words, SCORE_NAMES[score], quote(f"{base}.mean_confidence"), quote.estimate(f"{base}.ece")]
        same = score == SCORES[0]
        for kind in ("", ".recalibrated.isotonic", ".recalibrated.platt"):
            if kind:
                row.append(quote.estimate(f"{base}{kind}.ece"))
            row.append("reference" if same else quote.estimate(f"{base}{kind}.minus_predictive_variance.ece", True))
        log_loss = f"{base}.recalibrated.isotonic.minus_predictive_variance.log_loss"
        rows.append([*row, "reference" if same else quote.estimate(log_loss, True)])
    header = ("region", "score", "mean confidence", "ECE", "− predictive", "ECE, isotonic", "− predictive", "ECE, Platt",
              "− predictive", "log loss, isotonic, − predictive")
    return Table("Larger network, seed 42: calibration of every score on test before and after recalibration on validation, "
                 "with 95 % intervals", header, rows, (0, 1))


def rules(runs: Runs) -> Table:
    quote, rows = Quotes(runs[LARGER[0]]), []
    for index, rule in enumerate(quote.get("study.rules")):
        base = f"study.rules.{index}"
        label = rule["rule"].replace("_", " ") + (f" (λ = {rule['parameter']:g})" if rule["rule"] == "convex" else "")
        row: list[Text] = [rule["normalisation"].replace("_", "-"), label, quote.estimate(f"{base}.foreground_ece")]
        if (rule["normalisation"], rule["rule"]) == ("min_max", "predictive"):
            row += ["reference", ""]
        else:
            row += [quote.estimate(f"{base}.minus_predictive_variance", True),
                    each(runs, LARGER[1:], f"{base}.minus_predictive_variance.value", signed)]
        row.append("reference" if rule["rule"] == rule["baseline"] else quote.estimate(f"{base}.minus_baseline", True))
        rows.append(row)
    header = ("normalisation", "rule", "ECE", "− min-max predictive", "the same, seeds 43 and 44", "− own rule without saliency")
    return Table("Larger network, seed 42: foreground ECE on test of every normalisation and fusion rule, with 95 % intervals",
                 header, rows, (0, 1))


def _error_models(runs: Runs, key: str, words: str) -> Table:
    quote, rows = Quotes(runs[LARGER[0]]), []
    for region in REGIONS:
        for kind, known in (("", "unknown"), ("label_", "known")):
            models = f"study.{key}.{region}.models"
            pair = f"study.{key}.{region}.difference.{kind}with_minus_{kind}without"
            rows.append([REGION_NAMES[region], known, quote.estimate(f"{models}.{kind}without.auroc"),
                         quote.estimate(f"{models}.{kind}with.auroc"), quote.estimate(f"{pair}.auroc", True),
                         each(runs, LARGER[1:], f"{pair}.auroc.value", signed), quote.estimate(f"{pair}.log_loss", True)])
    header = ("region", "predicted label", "AUROC without saliency", "AUROC with", "gain", "gain, seeds 43 and 44",
              "change of log loss, nats")
    return Table(f"Larger network, seed 42: {words}, fitted on validation and read on test, with 95 % intervals",
                 header, rows, (0, 1))


def trees(runs: Runs) -> Table:
    return _error_models(runs, "added_value_of_trees", "boosted trees that predict a pixel's error")


def logistic(runs: Runs) -> Table:
    return _error_models(runs, "added_value", "logistic models that predict a pixel's error")


def scales(runs: Runs) -> Table:
    """What sets the scale of each variance: the largest value of validation, and the largest without its image."""
    rows: list[Sequence[Text]] = []
    for name in (*SEEDS, *LARGER):
        quote, base = Quotes(runs[name]), "validation.range_set_by"
        words = f"larger, {seed_of(name)}" if name in LARGER else seed_of(name)
        rows.append([words, *(quote(f"{base}.{variance}.{key}") for variance in ("pred_variance", "saliency_variance")
                              for key in ("largest", "largest_elsewhere")),
                     quote("validation.lambda_selection.share.10", percent)])
    header = ("seed", *(f"{score} variance, {what}" for score in ("predictive", "saliency")
                        for what in ("largest", "without that image")), "λ = 1 in resamples")
    return Table("What sets the min-max scales on validation", header, rows)


TABLES: dict[str, Callable[[Runs], Table]] = {**POOLED_TABLES, **{function.__name__: function for function in (
    by_training, differences_by_training, gaps, detectors, other_detectors, ablations, larger, segmentation, calibration, rules,
    trees, logistic, scales,
)}}
#: Those that need the larger networks.
OF_LARGER = ("larger", "segmentation", "calibration", "rules", "trees", "logistic", "scales")
