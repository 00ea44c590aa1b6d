"""Beyond the paper's fusion: every rule, whether saliency adds anything, and what one validation image decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from evaluation.added_value import added_value, count_error_models, fit_error_models, model_edges
from evaluation.alternatives import candidate_fusions, count_fusions, fusion_table
from evaluation.arrays import jsonable
from evaluation.counting import count_curve
from evaluation.error_trees import added_value_of_trees
from evaluation.fusion import LAMBDAS
from evaluation.image_maps import ImageMaps, Split
from evaluation.names import REFERENCE, SALIENCY
from evaluation.normalisation import distributions
from evaluation.resampling import paired_difference
from evaluation.summary import lambda_samples, widest
from evaluation.tuning import lambda_errors, tune

#: How often :func:`run_study` reads each validation and each test image.
STUDY_READS = (11, 4)


def run_study(
    validation: Split, test: Split, *,
    bins: int = 15, lambdas: tuple[float, ...] = LAMBDAS, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All tables of the study.

    Args:
        validation, test: pairs of id and maps; read eleven and four times.
        bins: equal-width bins of the calibration errors.
        lambdas: of the convex rule, ascending.
        resamples: of the bootstrap.
        seed: of the draws, the trees and the bootstrap.
        groups: by id, what the bootstrap draws; see :func:`resampling.units_of`.

    Returns:
        "rules" (a list, see :func:`alternatives.fusion_table`), "added_value" and "added_value_of_trees" (see
        :func:`added_value.compare_models`), and "without_widest_image" (see :func:`without_widest_image`).

    Raises:
        ValueError: bad values in a map (named), an empty split, no foreground on validation.

    Example:
        >>> import torch
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 0.25]), "saliency_variance": torch.tensor([0.5, 0.0])}
        >>> study = run_study([("a", maps), ("b", maps)], [("c", maps)], resamples=100)
        >>> for row in study["rules"][:2]:  # the predictive variance is high at the error alone, the other elsewhere
        ...     print(row["normalisation"], row["rule"], row["foreground_ece"]["value"])
        min_max predictive 0.0
        min_max saliency 1.0
    """
    found = distributions(validation)
    candidates = candidate_fusions(validation, found, lambdas)
    counted, tested = (count_fusions(split, candidates, bins) for split in (validation, test))
    models = fit_error_models(validation, found)
    edges = model_edges(count_error_models(validation, models))
    return {
        "rules": fusion_table(candidates, counted, tested, resamples, seed, groups),
        "added_value": added_value(models, count_error_models(test, models, edges), resamples, seed, groups),
        "added_value_of_trees": added_value_of_trees(validation, test, resamples, seed, groups),
        "without_widest_image": without_widest_image(
            validation, test, bins=bins, lambdas=lambdas, resamples=resamples, seed=seed, groups=groups
        ),
    }


class _Without:
    """A split without one of its images."""

    def __init__(self, images: Split, left_out: str) -> None:
        self.images, self.left_out = images, left_out

    def __iter__(self) -> Iterator[tuple[str, ImageMaps]]:
        return ((identifier, maps) for identifier, maps in self.images if identifier != self.left_out)


def without_widest_image(
    validation: Split, test: Split, *,
    bins: int = 15, lambdas: tuple[float, ...] = LAMBDAS, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """What would have been chosen and found without the validation image that has the largest saliency variance.

    Min-max constants are the extremes of all validation pixels. One image can set them, and with them the mean
    confidence of every pixel of every image, the foreground ECE, and lambda. A bootstrap that keeps the constants does
    not show that; leaving the image out does.

    Args:
        validation, test: pairs of id and maps; read three times and once.
        bins, lambdas, resamples, seed, groups: as for :func:`run_study`.

    Returns:
        "image", "largest" and "largest_elsewhere" as :func:`summary.widest`; "lambda"; on test, "foreground_ece" by
        score and "foreground_ece_difference" from predictive variance, paired. None where there is only one validation
        image.
    """
    ids, largest = zip(*((identifier, float(maps[SALIENCY].max())) for identifier, maps in validation))
    if len(ids) == 1:
        return None
    found = widest(ids, np.array(largest))
    fusion = tune(_Without(validation, found["image"]), bins=bins, lambdas=lambdas).fusion
    curve = count_curve(test, fusion, lambdas, bins)
    errors, samples = lambda_errors(curve.total()), lambda_samples(curve, resamples, seed, groups)
    # the three scores are points of the curve
    place = {REFERENCE: len(lambdas) - 1, "saliency_variance": 0, "fused": lambdas.index(fusion.parameter)}
    differences = {
        f"{name}_minus_{REFERENCE}": paired_difference(errors, samples, place[name], place[REFERENCE])
        for name in ("fused", "saliency_variance")
    }
    return jsonable({  # type: ignore[no-any-return]
        **found, "lambda": fusion.parameter, "foreground_ece": {name: errors[index] for name, index in place.items()},
        "foreground_ece_difference": differences,
    })
