"""Never a silent null: what would make a result void is an error, and what would make it doubtful a loud warning.

A model whose dropout does nothing, a variance that is the same everywhere, a network that segments nothing: each of them
lets the experiment run to its end and yields numbers that look like a finding of no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.names import PREDICTIVE, SALIENCY
from runtime.errors import UserError
from uncertainty import UncertaintyMaps

#: Smallest and largest value of a map over a part.
Range = tuple[float, float]
#: "code" names the kind of warning, "text" is what a person reads.
LoudWarning = dict[str, str]

PARTS = ("validation", "test")
#: A larger share of empty heatmaps, or of images that are predicted all alike, is warned of.
MOST = 0.5
#: Below this test Dice the network is no segmentation.
LOW_DICE = 0.5
#: What two computations of one map may differ by beyond the CPU, where sums have no fixed order: a share of its largest value.
ROUNDING = 1e-3

_VARIANCES = {PREDICTIVE: "predictive variance", SALIENCY: "saliency variance", "flip_variance": "variance over flips"}


# ---------------------------------------------------------------- errors


def check_first_image(maps: UncertaintyMaps, again: UncertaintyMaps, id: str) -> None:
    """Refuse a model that is random by itself, and one whose passes are all the same.

    On the CPU the two computations must agree in every bit; elsewhere but for rounding.

    Args:
        maps: of a batch; its first image is looked at.
        again: of that image alone, made a second time.
        id: of the image.

    Raises:
        UserError: says which of the two, and what to look for.
    """
    for first, second in zip(maps, again):
        if not agree(first[:1], second, exact=first.device.type == "cpu"):
            raise UserError(
                f"{id}: maps differ when made twice: the model draws random numbers of its own (functional dropout?); "
                "use nn.Dropout modules, whose masks are drawn from the seed"
            )
    if float(maps.pred_variance[0].max()) > 0:
        return
    low, high = (float(value) for value in torch.aminmax(maps.mean_prediction[0]))
    if low == high:
        raise UserError(
            f"{id}: the network predicts {low:g} in every pixel of every pass, so that every variance is zero: the weights "
            "behind the target layer are dead; train longer, or with another --lr"
        )
    raise UserError(
        f"{id}: all passes are identical, so that every variance is zero: the dropout of the model does not reach its "
        "logits; put dropout between the target layer and the output"
    )


def agree(first: Tensor, second: Tensor, exact: bool) -> bool:
    """Whether two computations of one thing are the same: in every bit, or up to ``ROUNDING`` of the largest value.

    Example:
        >>> one = torch.tensor([0.5, 0.25])
        >>> agree(one, one + 1e-6, exact=False), agree(one, one + 1e-6, exact=True)
        (True, False)
    """
    if exact or not first.is_floating_point():
        return torch.equal(first, second)
    return bool((first - second).abs().max() <= ROUNDING * first.abs().max())


def check_predictive_range(part: str, ranges: Mapping[str, Range]) -> None:
    """Refuse a part whose predictive variance is the same everywhere.

    Args:
        part: "validation" or "test".
        ranges: of its variances, by name of the map.

    Raises:
        UserError: says the value.
    """
    low, high = ranges[PREDICTIVE]
    if low == high:
        raise UserError(
            f"the predictive variance is {low:g} in every pixel of the {part} images: nothing can be said about uncertainty; "
            "look at the dropout of the model, and at its predictions"
        )


# ---------------------------------------------------------------- warnings


def warnings_of(
    metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], passes: int, ranges: Mapping[str, Mapping[str, Range]]
) -> list[LoudWarning]:
    """What a reader of a run must hear before its numbers; empty for a good run.

    Args:
        metrics: what ``metrics.json`` holds, for "validation" and "test" at least.
        rows: what ``per_image.csv`` holds.
        passes: T.
        ranges: of the variances by part and name of the map, from :meth:`experiment.maps.SavedMaps.ranges`.

    Returns:
        Dictionaries of a "code" and a "text", in the order of their weight.

    Example:
        >>> part = {"images": 2, "pixels": 8, "empty_cams": 0, "dice": 0.25}
        >>> ranges = {"validation": {"saliency_variance": (0.0, 0.1)}, "test": {"saliency_variance": (0.0, 0.0)}}
        >>> rows = [{"predicted_pixels": 3}, {"predicted_pixels": 0}]
        >>> [entry["code"] for entry in warnings_of({"validation": part, "test": part}, rows, 30, ranges)]
        ['low_dice', 'constant_saliency_variance']
    """
    found = [*_of_the_segmentation(metrics["test"], rows)]
    for part in PARTS:
        for name, (low, high) in ranges.get(part, {}).items():
            if low == high:
                found.append(_warning(f"constant_{name}", _constant(name, low, part)))
        empty, all_of_them = metrics[part].get("empty_cams"), metrics[part]["images"] * passes
        if empty is not None and empty > MOST * all_of_them:
            found.append(_warning(
                "empty_heatmaps",
                f"{empty} of {all_of_them} Grad-CAM heatmaps of the {part} images are zero everywhere: the saliency variance "
                "says how often a heatmap is empty more than where the network looks.",
            ))
    return found


def _warning(code: str, text: str) -> LoudWarning:
    return {"code": code, "text": text}


def _constant(name: str, value: float, part: str) -> str:
    """What a map that is the same everywhere means."""
    text = f"The {_VARIANCES[name]} is {value:g} in every pixel of the {part} images"
    if name != SALIENCY:
        return f"{text}: it ranks nothing."
    if part == "validation":
        return (
            f"{text}: its scale has no range, it counts as zero, and the fused score is a multiple of the predictive variance. "
            "Only lambda = 1 says anything; a lower one is no finding about saliency."
        )
    return f"{text}: the fused score knows nothing of saliency, whatever lambda is."


def _of_the_segmentation(test: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[LoudWarning]:
    """What is wrong with the predicted lesions of the test images; all images of a run are of one size."""
    found = []
    dice, predicted = test["dice"], [row["predicted_pixels"] for row in rows]
    if dice is not None and dice < LOW_DICE:
        found.append(_warning(
            "low_dice", f"The test Dice is {dice:.3f}: the network hardly segments, and its uncertainty means nothing."
        ))
    whole = test["pixels"] / test["images"]
    for code, pixels, what in (("no_lesion", 0, "no lesion"), ("all_lesion", whole, "nothing but lesion")):
        count = predicted.count(pixels)
        if count > MOST * len(rows):
            found.append(_warning(code, f"The network predicts {what} in {count} of {len(rows)} test images."))
    return found
