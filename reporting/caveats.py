"""What limits the numbers of a run: a table of conditions, and of what the report says where they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple

from experiment.saved_run import PooledRun, SavedRun, settings
from experiment.terms import judges_given_maps
from reporting.document import Text
from reporting.formats import count, is_number, spaced
from reporting.quotes import Quotes
from runtime.errors import printable

FEW_IMAGES = 50
FEW_TRAININGS = 10
LOW_DICE = 0.7
EXTREME = 2.0  # an image whose largest variance is this many times that of any other sets the scale alone

PARTS = ("validation", "test")
VARIANCES = {"pred_variance": "predictive variance", "saliency_variance": "saliency variance"}

# Gives the words of a template once for each time that a caveat applies to a run.
Occasions = Callable[[SavedRun], Iterable[Mapping[str, str]]]


class Caveat(NamedTuple):
    """When a sentence belongs into the report, and the sentence, a template of :mod:`reporting.quotes`."""

    occasions: Occasions
    template: str


# ---------------------------------------------------------------- conditions


def _loud_warnings(run: SavedRun) -> Iterable[Mapping[str, str]]:
    """For each warning that the run itself gave; ``$index``."""
    return ({"index": str(index)} for index in range(len(run.metrics.get("warnings", ()))))


def _where(condition: Callable[[Mapping[str, Any]], object]) -> Occasions:
    """Once, where the condition on the metrics holds."""
    return lambda run: [{}] if condition(run.metrics) else []


def _in_parts_where(condition: Callable[[Mapping[str, Any]], object]) -> Occasions:
    """For each part whose metrics fulfil the condition; ``$part``."""
    return lambda run: [{"part": part} for part in PARTS if condition(run.metrics[part])]


def _scales_of_one_image(run: SavedRun) -> Iterable[Mapping[str, str]]:
    """For each variance whose range one validation image sets alone; ``$key`` and ``$name``."""
    for key, name in VARIANCES.items():
        entry = run.metrics["validation"].get("range_set_by", {}).get(key)
        if entry and is_number(entry["largest_elsewhere"]) and entry["largest"] > EXTREME * entry["largest_elsewhere"]:
            yield {"key": key, "name": name}


def _empty_heatmaps(run: SavedRun) -> Iterable[Mapping[str, str]]:
    """For each part with empty heatmaps; ``$part``, and ``$all`` where the number of passes is known."""
    passes = run.record.get("configuration", {}).get("passes")
    for part in PARTS:
        if run.metrics[part]["empty_cams"]:
            of_all = f" of {count(run.metrics[part]['images'] * passes)}" if is_number(passes) else ""
            yield {"part": part, "all": of_all}


def _pairs_left_out(run: SavedRun) -> Iterable[Mapping[str, str]]:
    """Once, where pairs were left out; ``$number`` and ``$reasons``."""
    skipped = run.metrics.get("skipped")
    if skipped:
        reasons = "; ".join(f"{entry['id']} ({entry['reason']})" for entry in skipped)
        yield {"number": str(len(skipped)), "reasons": printable(reasons)}


def _changed_settings(run: SavedRun | PooledRun) -> Iterable[Mapping[str, str]]:
    """Once, where a setting is not the default; ``$settings``."""
    changed = [f"{spaced(name)} {value} (default: {default})" for name, value, default in settings(run) if value != default]
    if changed:
        yield {"settings": "; ".join(changed)}


def _earlier_environments(run: SavedRun) -> Iterable[Mapping[str, str]]:
    """Once, where the run went on from what other devices or versions had made; ``$others``."""
    earlier = run.record.get("earlier", [])
    if earlier:
        yield {"others": "; ".join(f"{entry['device']} with torch {entry['versions']['torch']}" for entry in earlier)}


# ---------------------------------------------------------------- the table

CAVEATS = (
    Caveat(_loud_warnings, "WARNING: {warnings.$index.text:text}"),
    Caveat(
        _where(lambda metrics: metrics["synthetic"]),
        "The images are synthetic lesions, drawn by the program. The verdict is about them, not about patients.",
    ),
    Caveat(_where(lambda metrics: metrics.get("data_note")), "About the images: {data_note:text}"),
    Caveat(
        _where(lambda metrics: metrics["test"]["images"] < FEW_IMAGES),
        "Only {test.images:count} test images: the intervals are rough.",
    ),
    Caveat(
        _where(lambda metrics: metrics["validation"]["images"] < FEW_IMAGES),
        "Only {validation.images:count} validation images, on which λ and the scales of the scores rest.",
    ),
    Caveat(
        _where(lambda metrics: is_number(metrics["test"]["dice"]) and metrics["test"]["dice"] < LOW_DICE),
        "The network segments badly (test Dice {test.dice}): its uncertainty means little.",
    ),
    Caveat(
        _in_parts_where(lambda part: part["images_without_foreground"]),
        "{$part.images_without_foreground:count} of {$part.images:count} $part images have no lesion pixel; they add nothing to "
        "the foreground errors.",
    ),
    Caveat(
        _where(lambda metrics: metrics["lambda"] == 1),
        "The tuned λ is {lambda:general}: the fused score is predictive variance alone.",
    ),
    Caveat(
        _where(lambda metrics: metrics["lambda"] == 0),
        "The tuned λ is {lambda:general}: the fused score is saliency variance alone.",
    ),
    Caveat(
        _scales_of_one_image,
        "One validation image, {validation.range_set_by.$key.image:text}, sets the scale of the $name: its largest "
        "value, {validation.range_set_by.$key.largest}, is far above that of any other, "
        "{validation.range_set_by.$key.largest_elsewhere}. The confidence of every pixel and the choice of λ rest on it.",
    ),
    Caveat(
        _where(lambda metrics: any(metrics["test"]["clipped_pixels"].values())),
        "Values outside the validation range were clipped: {test.clipped_pixels.pred_variance:count} pixels of the predictive "
        "and {test.clipped_pixels.saliency_variance:count} of the saliency variance, of {test.pixels:count} test pixels.",
    ),
    Caveat(
        _empty_heatmaps,
        "{$part.empty_cams:count}$all Grad-CAM heatmaps of the $part images were zero everywhere; they stay zero in the "
        "saliency variance.",
    ),
    Caveat(
        _in_parts_where(lambda part: part.get("precision_fallbacks")),
        "{$part.precision_fallbacks:count} $part images overflowed in half precision; their maps were made in single precision.",
    ),
    Caveat(_pairs_left_out, "Pairs left out, $number in all: $reasons."),
    Caveat(_changed_settings, "Settings other than the defaults: $settings."),
    Caveat(
        _earlier_environments,
        "Parts of what this run used again may have been made on another device or with other versions: $others.",
    ),
)


def caveats(run: SavedRun) -> list[Text]:
    """What limits the numbers of a run, one sentence each, in the order of :data:`CAVEATS`; empty where nothing does."""
    quote = Quotes(run.metrics)
    return [quote.fill(caveat.template, **words) for caveat in CAVEATS for words in caveat.occasions(run)]


def nothing(run: SavedRun) -> str:
    """What the report says of a run that nothing limits."""
    heatmaps = "" if judges_given_maps(run.record) else "no heatmap was empty, "
    return f"Nothing stands out: no value was clipped, {heatmaps}every image has a lesion, and the settings are the defaults."


# ---------------------------------------------------------------- several trainings


def pooled_caveats(run: PooledRun) -> list[Text]:
    """What limits the numbers of pooled trainings; what limits one of them stands in its own report."""
    quote, pooled = Quotes(run.metrics), run.metrics["pooled"]
    found: list[Text] = []
    if run.metrics["synthetic"]:
        found.append("The images are synthetic lesions, drawn by the program. The verdict is about them, not about patients.")
    if run.metrics.get("data_note"):
        found.append(quote.fill("About the images: {data_note:text}"))
    for index in range(len(run.metrics.get("warnings", ()))):
        found.append(quote.fill("WARNING: {warnings.$index.text:text}", index=str(index)))
    if len(pooled) < FEW_TRAININGS:
        found.append(quote.fill(
            f"Only {{conclusion.trainings:count}} trainings, fewer than {FEW_TRAININGS}: the variance between them is "
            "hardly known, and the intervals are wide for it."))
    if run.metrics["test"]["images"] < FEW_IMAGES:
        found.append(quote.fill("Only {test.images:count} test images: the intervals are rough."))
    for index, entry in enumerate(pooled):
        if is_number(entry["dice"]) and entry["dice"] < LOW_DICE:
            found.append(quote.fill(
                "Training {$path.name:text} segments badly (test Dice {$path.dice}): its uncertainty means little.",
                path=f"pooled.{index}"))
    for words in _changed_settings(run):
        found.append(f"Settings other than the defaults: {words['settings']}.")
    if len(run.record.get("environments", ())) > 1:
        found.append("The trainings were made on different devices or with different versions; see the end of this report.")
    found.append("Each training has warnings of its own, in its own report.")
    return found
