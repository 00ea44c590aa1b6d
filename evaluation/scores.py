"""Every uncertainty score of an image, from its maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from evaluation.fusion import Fusion, fuse
from evaluation.image_maps import ImageMaps
from evaluation.names import PREDICTIVE, SALIENCY


def uncertainty_scores(maps: ImageMaps, fusion: Fusion) -> dict[str, Tensor]:
    """Every score of an image; its confidence is ``1 - score``.

    The variances are normalised as `fusion` says. The baselines keep their natural scale, in which they
    reach their bound only at their largest possible value: entropies in nats over ln 2, and
    ``1 - max(p, 1 - p)``, whose confidence is the probability of the predicted label, in [0.5, 1].
    They are read as they come, with no constant from the data, neither favoured nor handicapped by
    a rescaling; after recalibration only the ranking of the pixels matters, for all scores alike.

    Args:
        maps: as :mod:`evaluation.image_maps` describes, of any shape.
        fusion: fitted on validation.

    Returns:
        float32 maps in [0, 1] by the names of `names.SCORES`, in that order. Mutual information is the predictive
        entropy minus `expected_entropy`, at least 0 (rounding), and is left out where `expected_entropy` is missing.

    Example:
        >>> from evaluation.normalisation import Linear
        >>> maps = {"mean_prediction": torch.tensor([0.5, 0.5]), "pred_variance": torch.tensor([0.25, 0.0]),
        ...         "saliency_variance": torch.tensor([0.0, 0.0])}
        >>> for name, score in uncertainty_scores(maps, Fusion(Linear(0.0, 0.25), Linear(0.0, 1.0), "convex", 0.5)).items():
        ...     print(name, score.tolist())
        predictive_variance [1.0, 0.0]
        saliency_variance [0.0, 0.0]
        fused [0.5, 0.0]
        predictive_entropy [1.0, 1.0]
        one_minus_max_probability [0.5, 0.5]
    """
    probability = maps["mean_prediction"]
    predictive, saliency = fusion.normalise(maps[PREDICTIVE], maps[SALIENCY])
    entropy = binary_entropy(probability)
    scores = {
        "predictive_variance": predictive,
        "saliency_variance": saliency,
        "fused": fuse(predictive, saliency, fusion.rule, fusion.parameter),
        "predictive_entropy": (entropy / np.log(2.0)).clamp_(0.0, 1.0),
    }
    if "expected_entropy" in maps:
        scores["mutual_information"] = ((entropy - maps["expected_entropy"]) / np.log(2.0)).clamp_(0.0, 1.0)
    scores["one_minus_max_probability"] = 1.0 - torch.maximum(probability, 1.0 - probability)
    return scores


def binary_entropy(probability: Tensor) -> Tensor:
    """``-p ln p - (1 - p) ln(1 - p)`` in nats, 0 at p = 0 and p = 1.

    Example:
        >>> [round(value, 4) for value in binary_entropy(torch.tensor([0.0, 0.5, 1.0])).abs().tolist()]
        [0.0, 0.6931, 0.0]
    """
    other = 1.0 - probability
    negative: Tensor = torch.special.xlogy(probability, probability) + torch.special.xlogy(other, other)
    return -negative
