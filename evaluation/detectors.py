"""Other detectors of errors on the same harness: the tempered probability, and the variance over flips.

Both are counted, recalibrated and resampled exactly as the scores of :mod:`evaluation.scores` are, on the same pixels,
beside predictive variance and the untempered ``1 - max(p, 1 - p)``, with which they are compared.

*Temperature.* With ``z = ln((1 - u) / u)``, the log-odds of the predicted label, the tempered uncertainty is
``sigmoid(-z / temperature)``. One temperature is fitted to the validation split by maximum likelihood of whether the
predicted label is right. (At the threshold 0.5 that is the likelihood of the true label.) Guo et al., ICML 2017.

Shapes: I images, S scores, A outcomes, F histogram bins, N pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from evaluation.arrays import Array, accurate_dtype, jsonable
from evaluation.calibration import confidence_sum, count_confidence
from evaluation.counting import Counters, Rows
from evaluation.fusion import Fusion
from evaluation.image_maps import ImageMaps, Split, check_variance, checked_maps, pieces
from evaluation.measures import score_table, split_region
from evaluation.names import CONFIDENCE_STEP, CORRECT, OUTCOMES, PREDICTIVE, QUANTILE_REGIONS, REFERENCE, REGIONS
from evaluation.normalisation import Linear
from evaluation.ranking import HISTOGRAM_BINS, add_histogram, bin_values, histogram_bin, quantile_edges, quantile_table

UNTEMPERED, TEMPERED, FLIPS = "one_minus_max_probability", "temperature_scaled", "flip_variance"
#: Measures that are given of every detector, raw; the first three also after recalibration.
MEASURES = ("brier", "log_loss", "ece", "auroc")
KINDS = ("raw", "isotonic", "platt")
#: How often :func:`detector_numbers` reads each validation and each test image; the former once more with flips.
DETECTOR_READS = (2, 1)
#: The temperature is sought between these.
COLDEST, HOTTEST = 0.01, 100.0

#: From the maps of an image, flattened, to scores (N,) in [0, 1] by name.
Scores = Callable[[ImageMaps], dict[str, Tensor]]

# ---------------------------------------------------------------- temperature


def fit_temperature(correct: Array, wrong: Array) -> float:
    """The temperature with the smallest log loss, from a histogram of ``1 - max(p, 1 - p)``.

    The log loss is convex in the inverse temperature, and its slope is zero where, weighted with z, as many pixels are
    wrong as the tempered probabilities say. An uncertainty below 2**-24 counts as 2**-24.

    Args:
        correct, wrong: pixels by histogram bin, (F,).

    Returns:
        The temperature, at least 0.01 (where no pixel is wrong) and at most 100 (where the probabilities say nothing);
        NaN without pixels.

    Example:
        >>> correct, wrong = np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS)
        >>> place = histogram_bin(torch.tensor(0.1))  # log-odds ln 9, but one pixel of four is wrong: log-odds ln 3
        >>> correct[place], wrong[place] = 3, 1
        >>> round(fit_temperature(correct, wrong), 3)
        2.0
    """
    used = (correct + wrong) > 0
    if not used.any():
        return float("nan")
    u = np.clip(bin_values()[used], CONFIDENCE_STEP, 0.5)
    z = np.log1p(-u) - np.log(u)
    right, errors = np.asarray(correct[used], dtype=float), np.asarray(wrong[used], dtype=float)

    def excess(inverse: float) -> float:
        """Wrong pixels minus the expected number of them, weighted with z; rises with the inverse temperature."""
        return float((z * (errors - (right + errors) / (1.0 + np.exp(np.minimum(inverse * z, 700.0))))).sum())

    low, high = 1.0 / HOTTEST, 1.0 / COLDEST
    if excess(low) >= 0.0:
        return HOTTEST
    if excess(high) <= 0.0:
        return COLDEST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return float((low * high) ** -0.5)


def temperature_of(validation: Counters) -> float:
    """The temperature of all pixels of a split, from its counters; see :func:`fit_temperature`."""
    correct, wrong = split_region(validation.pooled["fine"], "whole_image")
    score = validation.scores.index(UNTEMPERED)
    return fit_temperature(correct[score], wrong[score])


def tempered(uncertainty: Tensor, temperature: float) -> Tensor:
    """``sigmoid(logit(u) / temperature)``, with u at least 2**-24.

    Args:
        uncertainty: ``1 - max(p, 1 - p)``, in [0, 0.5].
        temperature: greater than 0; above 1 raises every uncertainty.

    Returns:
        float32 in [0, 0.5], same shape; 0.5 stays.

    Example:
        >>> tempered(torch.tensor([0.1, 0.5]), 2.0).tolist()  # 1 / (1 + 9 ** (1 / 2))
        [0.25, 0.5]
    """
    return torch.sigmoid(torch.logit(uncertainty.clamp(min=CONFIDENCE_STEP)) / temperature)


# ---------------------------------------------------------------- counting


def count_detectors(images: Split, scores_of: Scores, bins: int = 15, edges: Array | None = None) -> Counters:
    """Counters of any scores of a split, as :func:`counting.count_scores` counts the scores of the paper.

    Args:
        images: pairs of id and maps.
        scores_of: from the maps of an image, each a tensor (N,), to scores in [0, 1]; the same names for every image.
        bins: equal-width bins.
        edges: quantile bins from :func:`ranking.quantile_edges` of the validation counters; without them no pixel is
            counted by quantile bin.

    Raises:
        ValueError: bad values in a map (named), a score outside [0, 1], or no image.

    Example:
        >>> maps = {"mean_prediction": torch.tensor([[0.75, 0.25]]), "true_mask": torch.tensor([[1, 1]]),
        ...         "pred_variance": torch.zeros(1, 2), "saliency_variance": torch.zeros(1, 2)}
        >>> counters = count_detectors([("a", maps)], lambda flat: {"p": flat["mean_prediction"]}, bins=2)
        >>> counters.scores, counters.images["count"][0, 0].sum(0).tolist()  # confidences 0.25 and 0.75
        (('p',), [1, 1])
    """
    rows = Rows()
    names: tuple[str, ...] = ()
    histogram, lookup = torch.empty(0), None
    for identifier, maps in images:
        flat: dict[str, Tensor] = checked_maps(identifier, maps)
        if FLIPS in maps:
            check_variance(maps[FLIPS], f"{identifier}: {FLIPS}")
            flat[FLIPS] = maps[FLIPS].reshape(-1)
        device = flat["outcome"].device
        row: dict[str, Array] = {}
        for piece in pieces(len(flat["outcome"]), device):
            found = scores_of({name: values[piece] for name, values in flat.items()})
            scores, outcome = torch.stack(list(found.values())), flat["outcome"][piece]
            if not names:
                names = tuple(found)
                histogram = torch.zeros(len(names) * len(OUTCOMES) * HISTOGRAM_BINS, dtype=torch.int64, device=device)
                lookup = None if edges is None else quantile_table(edges).to(device)
            here = _count(scores, outcome, bins, histogram, lookup)
            row = {name: row[name] + value for name, value in here.items()} if row else here
        rows.add(identifier, row)
    pooled = {"fine": histogram.view(len(names), len(OUTCOMES), HISTOGRAM_BINS).cpu().numpy()} if names else {}
    return rows.counters(names, (), bins, pooled, edges)


def _count(scores: Tensor, outcome: Tensor, bins: int, histogram: Tensor, lookup: Tensor | None) -> dict[str, Array]:
    """Counters of scores (S, n); the pixels are added to `histogram` (S * A * F,). `lookup`: quantile bin (S, F)."""
    count, total = count_confidence(scores, outcome, len(OUTCOMES), bins)
    kind = accurate_dtype(scores.device)
    squared, loss = [], []
    for code in range(len(OUTCOMES)):
        confidence = 1.0 - scores[:, outcome == code]
        truth = confidence if code in CORRECT else 1.0 - confidence  # probability given to what is the case
        squared.append((1.0 - truth).square().sum(1, dtype=kind))
        loss.append(truth.clamp(min=CONFIDENCE_STEP).log().sum(1, dtype=kind).neg())
    found = {
        "count": count.numpy(), "confidence": confidence_sum(total).numpy(),
        "squared_error": torch.stack(squared, 1).double().cpu().numpy(), "log_loss": torch.stack(loss, 1).double().cpu().numpy(),
    }
    group = torch.arange(len(scores), device=scores.device)[:, None] * len(OUTCOMES) + outcome
    place = histogram_bin(scores)
    add_histogram(histogram, group * HISTOGRAM_BINS + place)
    if lookup is not None:
        quantiles = int(lookup.max()) + 1
        pixels = torch.zeros(len(scores) * len(OUTCOMES) * quantiles, dtype=torch.int64, device=scores.device)
        add_histogram(pixels, group * quantiles + torch.gather(lookup, 1, place))
        found["cells"] = pixels.view(len(scores), len(OUTCOMES), quantiles).to(torch.int32).cpu().numpy()
    return found


# ---------------------------------------------------------------- all numbers


def flip_scale(validation: Iterable[tuple[str, ImageMaps]]) -> Linear:
    """From the smallest to the largest variance over flips of a split: the one parameter that this detector has."""
    ranges = [torch.aminmax(maps[FLIPS]) for _, maps in validation]
    return Linear(min(float(low) for low, _ in ranges), max(float(high) for _, high in ranges))


def detector_numbers(
    validation: Split, test: Split, fusion: Fusion, *, bins: int = 15, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The tempered probability and, where the maps hold it, the variance over flips: fitted on validation, judged on test.

    Args:
        validation, test: pairs of id and maps as :mod:`evaluation.image_maps` describes, perhaps with "flip_variance";
            read three times and once.
        fusion: its scale of the predictive variance makes the score that the others are compared with.
        bins: equal-width bins of the calibration errors.
        resamples, seed, groups: of the bootstrap; the resamples are those of :func:`summary.summarise`.

    Returns:
        Plain numbers: "temperature", "flip_scale" (None without flips), and under "regions" for every region and score
        its measures and "minus_predictive_variance", and of the tempered probability "minus_one_minus_max_probability";
        each "raw" and after recalibration, an estimate with its interval. These differences are exploratory and carry no
        verdict.

    Raises:
        ValueError: bad values in a map (named), a split without images.
    """
    images = iter(validation)
    first = next(images, None)
    if first is None:
        raise ValueError("the validation split holds no image to fit a temperature to")
    with_flips = FLIPS in first[1]
    untempered = count_detectors(chain([first], images), lambda flat: {UNTEMPERED: _untempered(flat)}, bins)
    temperature = temperature_of(untempered)
    scale = flip_scale(validation) if with_flips else None

    def scores_of(flat: ImageMaps) -> dict[str, Tensor]:
        plain = _untempered(flat)
        scores = {REFERENCE: fusion.predictive(flat[PREDICTIVE]), UNTEMPERED: plain, TEMPERED: tempered(plain, temperature)}
        return scores if scale is None else {**scores, FLIPS: scale(flat[FLIPS])}

    fitted = count_detectors(validation, scores_of, bins)
    edges = quantile_edges(fitted.pooled["fine"], [REGIONS[region] for region in QUANTILE_REGIONS])
    counted = count_detectors(test, scores_of, bins, edges)
    table = score_table(fitted, counted, resamples, seed, groups)
    regions: dict[str, Any] = {}
    for region in REGIONS:
        regions[region] = {name: {} for name in table.scores}
        for name, entry in regions[region].items():
            baselines = [REFERENCE] if name != REFERENCE else []
            baselines += [UNTEMPERED] if name == TEMPERED else []
            for kind in KINDS:
                measures = [(region, kind, m) for m in MEASURES if (region, kind, m) in table.point]
                entry[kind] = {key[2]: table.estimate(key, name) for key in measures}
                for baseline in baselines:
                    differences = {key[2]: table.difference(key, name, baseline) for key in measures}
                    entry[kind][f"minus_{baseline}"] = {
                        measure: {part: found[part] for part in ("value", "interval")} for measure, found in differences.items()
                    }
    return jsonable({  # type: ignore[no-any-return]
        "temperature": temperature,
        "flip_scale": None if scale is None else [scale.low, scale.high],
        "regions": regions,
    })


def _untempered(flat: ImageMaps) -> Tensor:
    p: Tensor = flat["mean_prediction"]
    return 1.0 - torch.maximum(p, 1.0 - p)
