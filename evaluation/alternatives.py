"""Alternatives to the paper's fusion: every rule under every normalisation.

Does any other way to fuse the two variances beat predictive variance alone, by its foreground calibration error?

Shapes: I images, C candidates, B bins, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evaluation.arrays import Array, jsonable
from evaluation.calibration import foreground_error
from evaluation.counting import Counters, Rows, count_foreground
from evaluation.fusion import RULES, Fusion, fuse
from evaluation.image_maps import Split, checked_maps
from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.normalisation import NORMALISATIONS, Distribution
from evaluation.resampling import bootstrap, estimate, paired_difference, units_of
from evaluation.sampling import foreground_sample

BASELINE = "predictive"  # the rule that is predictive variance alone


def candidate_fusions(validation: Split, found: Mapping[str, Distribution], lambdas: tuple[float, ...]) -> list[Fusion]:
    """Every normalisation with every rule and every parameter that the rule proposes.

    Args:
        validation: read once per normalisation.
        found: what :func:`normalisation.distributions` returns for `validation`.
        lambdas: of the convex rule, ascending.

    Returns:
        Fusions, those of one normalisation and rule next to each other.
    """
    candidates = []
    for normalisation, normalise in NORMALISATIONS.items():
        plain = Fusion(normalise(found[PREDICTIVE]), normalise(found[SALIENCY]), BASELINE, None, normalisation)
        sample = foreground_sample(validation, plain)
        for name, rule in RULES.items():
            candidates += [replace(plain, rule=name, parameter=parameter) for parameter in rule.candidates(sample, lambdas)]
    return candidates


def count_fusions(images: Split, candidates: Sequence[Fusion], bins: int = 15) -> Counters:
    """Foreground counters of every candidate: `fusion_count`, `fusion_confidence` (I, C, 2, B), wrong and correct."""
    rows = Rows()

    def scores_of(pred_variance: Tensor, saliency_variance: Tensor) -> Tensor:
        return _fused_scores(pred_variance, saliency_variance, candidates)

    for identifier, maps in images:
        count, confidence = count_foreground(checked_maps(identifier, maps), scores_of, len(candidates), bins)
        rows.add(identifier, {"fusion_count": count, "fusion_confidence": confidence})
    return rows.counters([str(index) for index in range(len(candidates))], bins=bins)


def _fused_scores(pred_variance: Tensor, saliency_variance: Tensor, candidates: Sequence[Fusion]) -> Tensor:
    """Scores (C, n); each normalisation is applied once, not once per rule."""
    normalised: dict[str, tuple[Tensor, Tensor]] = {}
    scores = []
    for candidate in candidates:
        if candidate.normalisation not in normalised:
            normalised[candidate.normalisation] = candidate.normalise(pred_variance, saliency_variance)
        scores.append(fuse(*normalised[candidate.normalisation], candidate.rule, candidate.parameter))
    return torch.stack(scores)


def fusion_table(
    candidates: Sequence[Fusion], validation: Counters, test: Counters, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row per normalisation and rule, its parameter chosen on validation, with its test ECE and paired differences.

    Args:
        candidates: see :func:`candidate_fusions`.
        validation, test: their counters, see :func:`count_fusions`.
        resamples, seed: of the bootstrap.
        groups: by id, what it draws; see :func:`resampling.units_of`.

    Returns:
        Rows of plain numbers. `minus_predictive_variance` compares with the paper's min-max normalised predictive
        variance, `minus_baseline` with the rule without saliency under the same normalisation (for a fitted rule: also
        fitted).
    """
    chosen: dict[tuple[str, str], int] = {}
    validation_errors = _fusion_errors(validation.total())
    for index, candidate in enumerate(candidates):
        key = candidate.normalisation, candidate.rule
        # A tie goes to the later candidate, that is, to the larger lambda.
        if key not in chosen or not validation_errors[index] > validation_errors[chosen[key]]:
            chosen[key] = index
    kept = list(chosen.values())
    point = _fusion_errors(test.total())[kept]
    arrays = {name: value[:, kept] for name, value in test.images.items()}
    units = units_of(test.ids, groups)
    samples = bootstrap(arrays, lambda summed: {"ece": _fusion_errors(summed)}, resamples, seed, units=units)["ece"]
    column = {key: position for position, key in enumerate(chosen)}
    rows = []
    for (normalisation, rule), index in chosen.items():
        place, baseline = column[normalisation, rule], RULES[rule].baseline
        rows.append({
            "normalisation": normalisation,
            "rule": rule,
            "parameter": candidates[index].parameter,
            "validation_foreground_ece": validation_errors[index],
            "foreground_ece": estimate(point[place], samples[:, place]),
            "minus_predictive_variance": paired_difference(point, samples, place, column["min_max", BASELINE]),
            "baseline": baseline,
            "minus_baseline": paired_difference(point, samples, place, column[normalisation, baseline]),
        })
    return jsonable(rows)  # type: ignore[no-any-return]


def _fusion_errors(summed: Mapping[str, Array]) -> Array:
    """Foreground ECE of every candidate, (..., C)."""
    return foreground_error(summed["fusion_count"], summed["fusion_confidence"])
