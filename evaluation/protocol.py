"""The protocol: tune on validation, count both splits, compute every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Callable, Optional

from evaluation.arrays import Array
from evaluation.counting import Counters, count_scores, merge
from evaluation.fusion import Fusion, lambda_grid
from evaluation.image_maps import Split
from evaluation.names import QUANTILE_REGIONS, REGIONS
from evaluation.ranking import quantile_edges
from evaluation.study import run_study
from evaluation.summary import per_image, summarise
from evaluation.tuning import Tuned, tune

__all__ = ["Evaluation", "Gather", "Tuned", "count_splits", "evaluate", "tune", "validation_edges"]

#: From the counters of this process to those of all processes; None stands for an empty share.
Gather = Callable[[Optional[Counters]], Sequence[Optional[Counters]]]


def validation_edges(validation: Counters) -> Array:
    """The quantile bins with which the test split has to be counted, (S, Q - 1); see :func:`ranking.quantile_edges`."""
    return quantile_edges(validation.pooled["fine"], [REGIONS[region] for region in QUANTILE_REGIONS])


def _alone(counters: Counters | None) -> list[Counters | None]:
    return [counters]


def count_splits(tuned: Tuned, validation: Split, test: Split, gather: Gather | None = None) -> tuple[Counters, Counters]:
    """Count both splits, each process its share of them.

    The lambda curve of validation, counted by :func:`tune` already, is taken from there. The result does not depend
    on how the images are shared out.

    Args:
        tuned: the same in all processes.
        validation, test: the images of this process, perhaps none; each is read once.
        gather: a collective call that returns the counters of all processes to each of them; left out, this
            process is alone.

    Returns:
        Counters of the whole validation split and of the whole test split, the latter with quantile bins.

    Raises:
        ValueError: bad values in a map (named), a split without images, a validation split other than the tuned one.

    Example:
        >>> import torch
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 0.25]), "saliency_variance": torch.tensor([0.5, 0.0])}
        >>> images = [("a", maps), ("b", maps)]
        >>> validation, test = count_splits(tune(images), images, images)
        >>> test.ids, int(test.images["count"][:, 0].sum())
        (('a', 'b'), 4)
    """

    counted = count_images(validation, tuned.fusion, (), tuned.bins, gather=gather, part="validation").with_curve(tuned.curve)
    return counted, count_images(test, tuned.fusion, tuned.lambdas, tuned.bins, validation_edges(counted), gather)


def count_images(
    images: Split, fusion: Fusion, lambdas: tuple[float, ...], bins: int, edges: Array | None = None,
    gather: Gather | None = None, part: str = "test",
) -> Counters:
    """Count the images of all processes, each process its share of them.

    Args:
        images: of this process, perhaps none; read once.
        fusion: fitted on validation.
        lambdas: of the lambda curve, ascending; none leaves it out.
        bins: equal-width bins.
        edges: the quantile bins of the validation split; None leaves them out.
        gather: see :func:`count_splits`.
        part: named where there is no image at all.

    Raises:
        ValueError: bad values in a map (named), or no process has an image.
    """
    share = iter(images)
    first = next(share, None)
    counted = None if first is None else count_scores(chain([first], share), fusion, lambdas, bins, edges)
    shards = [shard for shard in (gather or _alone)(counted) if shard is not None]
    if not shards:
        raise ValueError(f"the {part} split holds no image to count")
    return merge(shards)


@dataclass
class Evaluation:
    """What :func:`evaluate` found: the fitted fusion, the counters of both splits, and the numbers."""

    fusion: Fusion
    validation: Counters
    test: Counters
    metrics: dict[str, Any]  # what ``metrics.json`` holds
    rows: list[dict[str, Any]]  # what ``per_image.csv`` holds, one per test image


def evaluate(
    validation: Split, test: Split, *,
    bins: int = 15, lambda_steps: int = 10, study: bool = False, resamples: int = 10_000, seed: int = 42,
    groups: Mapping[str, str] | None = None,
) -> Evaluation:
    """From maps to a verdict: fit on validation, count both splits, compute everything.

    Args:
        validation, test: pairs of id and maps as :mod:`evaluation.image_maps` describes; read three times and once
            (fourteen and five times with `study`).
        bins: equal-width bins of the calibration errors.
        lambda_steps: steps from lambda 0 to 1.
        study: also the other fusion rules and normalisations, and whether saliency adds anything.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        groups: by id (a patient, a lesion), what the bootstrap draws; an image without one stands for itself.

    Raises:
        ValueError: bad values in a map (named), an empty split, no foreground on validation.

    Example:
        >>> import torch
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 0.25]), "saliency_variance": torch.tensor([0.5, 0.0])}
        >>> images = [("a", maps), ("b", maps)]  # the predictive variance is high at the error alone, the other elsewhere
        >>> result = evaluate(images, images, resamples=100)
        >>> result.metrics["lambda"], result.metrics["test"]["foreground_ece"]
        (1.0, {'predictive_variance': 0.0, 'saliency_variance': 1.0, 'fused': 0.0})
        >>> round(result.rows[0]["dice"], 4)  # 2 * 1 / (1 + 2)
        0.6667
    """
    tuned = tune(validation, bins=bins, lambdas=lambda_grid(lambda_steps))
    counted, tested = count_splits(tuned, validation, test)
    metrics = summarise(counted, tested, tuned.fusion, resamples=resamples, seed=seed, groups=groups)
    if study:
        metrics["study"] = run_study(
            validation, test, bins=bins, lambdas=tuned.lambdas, resamples=resamples, seed=seed, groups=groups
        )
    return Evaluation(tuned.fusion, counted, tested, metrics, per_image(tested))
