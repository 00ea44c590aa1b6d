"""Tuning the fusion on validation: the scale of both variances, and lambda."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from evaluation.arrays import Array
from evaluation.calibration import foreground_error
from evaluation.counting import Counters, count_curve
from evaluation.fusion import LAMBDAS, Fusion, best_lambda
from evaluation.image_maps import Split
from evaluation.names import PREDICTIVE, SALIENCY
from evaluation.normalisation import distributions, min_max
from runtime.errors import UserError


@dataclass(frozen=True)
class Tuned:
    """What validation has decided, and with what the splits have to be counted."""

    fusion: Fusion
    curve: Counters  # of the validation split: its lambda curve alone
    bins: int
    lambdas: tuple[float, ...]


def tune(validation: Split, *, bins: int = 15, lambdas: tuple[float, ...] = LAMBDAS) -> Tuned:
    """Take min-max constants and the lambda with the lowest foreground ECE from the validation split.

    Args:
        validation: all of it; read twice.
        bins: equal-width bins of the ECE.
        lambdas: ascending; of equally good ones the largest is taken.

    Returns:
        The fusion and the counts behind its lambda; can be pickled.

    Raises:
        UserError: the predictive variance is the same in every pixel (a constant saliency variance counts as zero), or no
            pixel is foreground.
        ValueError: bad values in a map (named), no image.

    Example:
        >>> import torch
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 0.25]), "saliency_variance": torch.tensor([0.5, 0.0])}
        >>> tuned = tune([("a", maps)])  # the predictive variance is high at the error alone
        >>> tuned.fusion.parameter, tuned.fusion.predictive
        (1.0, Linear(low=0.0, high=0.25))
        >>> lambda_errors(tuned.curve.total())[[0, -1]].tolist()
        [1.0, 0.0]
    """
    found = distributions(validation)
    if found[PREDICTIVE].flat:
        raise UserError(
            f"the predictive variance is {found[PREDICTIVE].low:g} in every validation pixel, so that it has no scale and says "
            "nothing; look at the dropout of the model, and at its predictions"
        )
    fusion = Fusion(min_max(found[PREDICTIVE]), min_max(found[SALIENCY]))
    curve = count_curve(validation, fusion, lambdas, bins)
    errors = lambda_errors(curve.total())
    if bool(np.isnan(errors).all()):
        raise UserError(
            "the validation masks hold no foreground pixel, so that lambda cannot be tuned; look at the masks of the validation "
            "images, or give another --split-seed or --split"
        )
    return Tuned(replace(fusion, parameter=best_lambda(lambdas, errors)), curve, bins, lambdas)


def lambda_errors(summed: Mapping[str, Array]) -> Array:
    """Foreground ECE at every lambda, (..., L), from summed `lambda_count` and `lambda_confidence` (..., L, 2, B)."""
    return foreground_error(summed["lambda_count"], summed["lambda_confidence"])
