"""Counting pixels: from uncertainty maps, one image at a time, to counters from which all measures follow.

The memory used depends neither on the size of the images nor, beyond the counters themselves, on their number.

Shapes: I images, S scores, L lambdas, A = 8 outcomes, B bins, Q quantile bins, F histogram bins, N pixels, H and W the
sides of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from evaluation.added import error_cells_of_image
from evaluation.arrays import Array, accurate_dtype
from evaluation.calibration import confidence_sum, count_confidence
from evaluation.fusion import LAMBDAS, Fusion, convex_curve
from evaluation.image_maps import Split, checked_maps, pieces
from evaluation.joint import joint_of_image, with_other_saliency
from evaluation.names import CONFIDENCE_STEP, CORRECT, IN_BAND, OUTCOMES, PREDICTIVE, SALIENCY, SCORES
from evaluation.ranking import HISTOGRAM_BINS, add_histogram, histogram_bin, quantile_table
from evaluation.scores import largest_uncertainties, uncertainty_scores

# ---------------------------------------------------------------- counters


@dataclass
class Counters:
    """What is left of a split when its pixels are gone; additive over images and mergeable over shards.

    `images` (first axis I, in the order of `ids`, which is sorted):
        count (I, S, A, B) int64 and confidence (I, S, A, B) float64: pixels and confidence sums by bin;
        squared_error, log_loss (I, S, A) float64: sums of ``(c - correct)**2`` and of
        ``-ln max(P, 2**-24)``, P being c for a correct pixel and 1 - c for a wrong one; inside and outside the
        boundary band together are exactly the sum that all of them have;
        lambda_count, lambda_confidence (I, L, 2, B): wrong and correct pixels of the ground-truth
        foreground under convex fusion at every lambda;
        clipped (I, 2) int64: pixels of predictive and saliency variance outside the normalisation's range;
        largest (I, 2) float64: the largest predictive and saliency variance of the image;
        cells (I, S, A, Q) int32: pixels by quantile bin, where the quantile bins were given;
        joint (I, V, 4, K, K) int32, cell_sums (I, 2, K) float64: see :func:`joint.joint_of_image`;
        error_cells (I, 2, ...) int32: see :func:`added.error_cells_of_image`;
        quantile95, largest_patch (I, S) float32: see :func:`scores.largest_uncertainties`;
        empty_cams (I,) int64 and pass_dice (I,) float64, where the maps said so (-1 where they did not).
    `pooled` (summed over images):
        fine (S, A, F) int64: pixels by histogram bin of the score.
    `edges` (S, Q - 1) int64: the last histogram bin of every quantile bin but the last.
    """

    ids: tuple[str, ...]
    scores: tuple[str, ...]
    lambdas: tuple[float, ...]
    bins: int
    images: dict[str, Array]
    pooled: dict[str, Array]
    edges: Array

    def total(self, *names: str) -> dict[str, Array]:
        """Arrays of `images` (all, or those named) summed over the images."""
        return {name: self.images[name].sum(0) for name in names or self.images}

    def to_arrays(self) -> dict[str, Array]:
        """A dictionary of arrays without objects, for ``numpy.savez_compressed``, loadable without pickle."""
        arrays = {"ids": np.array(self.ids, dtype=str), "scores": np.array(self.scores, dtype=str)}
        arrays.update(lambdas=np.array(self.lambdas, dtype=float), bins=np.array(self.bins), edges=self.edges)
        arrays.update({f"image_{name}": value for name, value in self.images.items()})
        arrays.update({f"pooled_{name}": value for name, value in self.pooled.items()})
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Counters:
        """The counters that :meth:`to_arrays` was called on."""
        groups: dict[str, dict[str, Array]] = {prefix: {} for prefix in ("image_", "pooled_")}
        for name in arrays:
            for prefix, group in groups.items():
                if name.startswith(prefix):
                    group[name[len(prefix) :]] = np.asarray(arrays[name])
        return cls(
            tuple(str(identifier) for identifier in arrays["ids"]),
            tuple(str(score) for score in arrays["scores"]),
            tuple(float(lam) for lam in arrays["lambdas"]),
            int(arrays["bins"]),
            groups["image_"],
            groups["pooled_"],
            np.asarray(arrays["edges"]),
        )

    def with_curve(self, curve: Counters) -> Counters:
        """These counters with the lambda curve that :func:`count_curve` counted of the same images.

        Raises:
            ValueError: the curve is of other images or bins.
        """
        if (curve.ids, curve.bins) != (self.ids, self.bins):
            raise ValueError("the lambda curve was counted of other images or bins")
        return replace(self, lambdas=curve.lambdas, images={**curve.images, **self.images})


def merge(parts: Iterable[Counters]) -> Counters:
    """Counters of all images of several shards; the result does not depend on how they were split.

    Raises:
        ValueError: there is no shard, or shards were counted differently or share an image.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("no counters to merge")
    first = parts[0]
    for part in parts[1:]:
        same = (part.scores, part.lambdas, part.bins) == (first.scores, first.lambdas, first.bins)
        if not same or not np.array_equal(part.edges, first.edges):
            raise ValueError("counters of different scores, lambdas, bins or quantile bins cannot be merged")
    ids = [identifier for part in parts for identifier in part.ids]
    if len(set(ids)) < len(ids):
        repeated = next(identifier for index, identifier in enumerate(ids) if identifier in ids[:index])
        raise ValueError(f"image {repeated} was counted twice; give every image an id of its own")
    order = np.argsort(np.array(ids, dtype=str), kind="stable")
    in_order = np.array_equal(order, np.arange(len(ids)))
    images = {}
    for name in first.images:  # without the copies that are not needed: these arrays are what takes the memory
        values = [part.images[name] for part in parts]
        joined = values[0] if len(values) == 1 else np.concatenate(values)
        images[name] = joined if in_order else joined[order]
    pooled = {name: np.asarray(sum(part.pooled[name] for part in parts)) for name in first.pooled}
    return replace(first, ids=tuple(ids[index] for index in order), images=images, pooled=pooled)


class Rows:
    """Arrays of one image after the other, kept in blocks of many images.

    Kept one by one, they would lie scattered between the temporaries of the counting, which then find no
    room among them: the memory of the process would grow several times faster than the counters.
    """

    BLOCK = 256

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.blocks: dict[str, list[Array]] = {}

    def add(self, identifier: str, row: Mapping[str, object]) -> None:
        """Append the arrays of one image; the names and shapes are those of the first one."""
        place = len(self.ids) % self.BLOCK
        self.ids.append(str(identifier))
        for name, item in row.items():
            value = np.asarray(item)
            blocks = self.blocks.setdefault(name, [])
            if place == 0:
                blocks.append(np.empty((self.BLOCK,) + value.shape, dtype=value.dtype))
            blocks[-1][place] = value

    def counters(
        self, scores: Sequence[str] = (), lambdas: Sequence[float] = (), bins: int = 0,
        pooled: dict[str, Array] | None = None, edges: Array | None = None,
    ) -> Counters:
        """All of them as counters, once: the blocks are given up.

        Raises:
            ValueError: there is no image, or one was added twice.
        """
        if not self.ids:
            raise ValueError("no image to count")
        last = (len(self.ids) - 1) % self.BLOCK + 1
        images = {}
        for name in tuple(self.blocks):
            blocks = self.blocks.pop(name)
            images[name] = np.concatenate(blocks[:-1] + [blocks[-1][:last]])
        edges = np.zeros((0, 0), dtype=np.int64) if edges is None else edges
        return merge([Counters(tuple(self.ids), tuple(scores), tuple(lambdas), bins, images, pooled or {}, edges)])


# ---------------------------------------------------------------- the foreground


def count_foreground(
    flat: Mapping[str, Tensor], scores_of: Callable[[Tensor, Tensor], Tensor], scores: int, bins: int, check: bool = True
) -> tuple[Array, Array]:
    """Count the ground-truth foreground of an image under several scores of its two variances.

    Args:
        flat: maps (N,) as :func:`image_maps.checked_maps` gives them.
        scores_of: from predictive and saliency variance (n,) to scores (S, n).
        scores: how many S.
        bins: equal-width bins B.
        check: whether to verify the range of the scores.

    Returns:
        Wrong and correct pixels by bin (S, 2, B) int64, and sums of their confidence (S, 2, B) float64.
    """
    inside = flat["true_mask"].nonzero().view(-1)
    predictive, saliency, predicted = (flat[name].index_select(0, inside) for name in (PREDICTIVE, SALIENCY, "predicted"))
    correct = predicted.to(torch.int32)  # the truth is 1 everywhere
    count = torch.zeros(scores, 2, bins, dtype=torch.int64)
    total = torch.zeros_like(count)
    for piece in pieces(len(inside), inside.device):
        here = scores_of(predictive[piece], saliency[piece])
        piece_count, piece_total = count_confidence(here, correct[piece], 2, bins, check)
        count += piece_count
        total += piece_total
    return count.numpy(), confidence_sum(total).numpy()


def count_curve(images: Split, fusion: Fusion, lambdas: tuple[float, ...] = LAMBDAS, bins: int = 15) -> Counters:
    """Counters of the lambda curve alone: ground-truth foreground, convex fusion of the normalised variances.

    Args:
        images: pairs of id and maps.
        fusion: its normalisations are used, its rule is not.
        lambdas: ascending.
        bins: equal-width bins B.

    Raises:
        ValueError: see :func:`image_maps.checked_maps`; or there is no image.

    Example:
        >>> from evaluation.normalisation import Linear
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 1.0]), "saliency_variance": torch.tensor([1.0, 1.0])}
        >>> unit = Linear(0.0, 1.0)
        >>> curve = count_curve([("a", maps)], Fusion(unit, unit), lambdas=(0.0, 1.0), bins=2)
        >>> curve.total()["lambda_count"].tolist()  # by lambda, wrong and correct, bin
        [[[1, 0], [1, 0]], [[1, 0], [0, 1]]]
    """
    rows = Rows()
    for identifier, maps in images:
        rows.add(identifier, _curve_of_image(checked_maps(identifier, maps), fusion, lambdas, bins))
    return rows.counters((), lambdas, bins)


def _curve_of_image(flat: Mapping[str, Tensor], fusion: Fusion, lambdas: tuple[float, ...], bins: int) -> dict[str, Array]:
    def curve(pred_variance: Tensor, saliency_variance: Tensor) -> Tensor:
        return convex_curve(*fusion.normalise(pred_variance, saliency_variance), lambdas)

    count, confidence = count_foreground(flat, curve, len(lambdas), bins, check=False)
    return {"lambda_count": count, "lambda_confidence": confidence}


# ---------------------------------------------------------------- all scores


def count_scores(
    images: Split, fusion: Fusion, lambdas: tuple[float, ...] = LAMBDAS, bins: int = 15, edges: Array | None = None
) -> Counters:
    """All counters of a split, or of a shard of one.

    Args:
        images: pairs of id and maps.
        fusion: fitted on validation; its rule makes the score "fused".
        lambdas: of the lambda curve, ascending; none leaves the curve out.
        bins: equal-width bins B.
        edges: quantile bins from :func:`ranking.quantile_edges` of the validation counters, if wanted.

    Raises:
        ValueError: NaN, an infinite value or one out of range, or maps of different shapes, naming image and map;
            `expected_entropy` in some images only; no image.

    Example:
        >>> from evaluation.normalisation import Linear
        >>> maps = {"mean_prediction": torch.tensor([0.75, 0.25]), "true_mask": torch.tensor([1, 1]),
        ...         "pred_variance": torch.tensor([0.0, 1.0]), "saliency_variance": torch.tensor([1.0, 1.0])}
        >>> counters = count_scores([("a", maps)], Fusion(Linear(0.0, 1.0), Linear(0.0, 1.0)))
        >>> counters.scores.index("predictive_variance")
        0
        >>> found = dict(zip(OUTCOMES, counters.images["count"][0, 0].sum(-1).tolist()))
        >>> {outcome: pixels for outcome, pixels in found.items() if pixels}
        {'false_negative': 1, 'true_positive': 1}
    """
    rows = Rows()
    names: tuple[str, ...] = ()
    for identifier, maps, other in with_other_saliency(images):
        flat = checked_maps(identifier, maps)
        present = tuple(name for name in SCORES if name != "mutual_information" or "expected_entropy" in flat)
        if not rows.ids:
            names = present
            if edges is not None and len(edges) != len(names):
                raise ValueError(f"{identifier}: expected_entropy has to be present in both splits or in neither")
            device = flat["mean_prediction"].device
            histogram = torch.zeros(len(names) * len(OUTCOMES) * HISTOGRAM_BINS, dtype=torch.int64, device=device)
            lookup = None if edges is None else quantile_table(edges).to(device)
            quantiles = 0 if edges is None else edges.shape[1] + 1
        elif names != present:
            raise ValueError(f"{identifier}: expected_entropy is present in some images only")
        row = _curve_of_image(flat, fusion, lambdas, bins) if lambdas else {}
        counted, scores = _scores_of_image(flat, fusion, bins, histogram, lookup, quantiles)
        row.update(counted)
        row.update(largest_uncertainties(scores, maps["mean_prediction"].shape))
        row.update(joint_of_image(identifier, flat, other, fusion))
        row["error_cells"] = error_cells_of_image(flat, fusion)
        row["empty_cams"] = np.asarray(maps.get("empty_cams", -1), dtype=np.int64)
        row["pass_dice"] = np.asarray(maps.get("pass_dice", -1.0), dtype=np.float64)
        rows.add(identifier, row)
    pooled = {"fine": histogram.view(len(names), len(OUTCOMES), HISTOGRAM_BINS).cpu().numpy()} if rows.ids else {}
    return rows.counters(names, lambdas, bins, pooled, edges)


def _scores_of_image(
    flat: Mapping[str, Tensor], fusion: Fusion, bins: int, histogram: Tensor, lookup: Tensor | None, quantiles: int
) -> tuple[dict[str, Array], Tensor]:
    """Counters of one image, and its scores (S, N).

    Its pixels are added to `histogram` (S * A * F,). `lookup`: quantile bin (S, F).
    """
    device = flat["mean_prediction"].device
    sums: dict[str, Tensor] = {}
    all_scores = []
    for piece in pieces(len(flat["mean_prediction"]), device):
        part = {name: values[piece] for name, values in flat.items()}
        scores = torch.stack(list(uncertainty_scores(part, fusion).values()))  # (S, n)
        all_scores.append(scores)
        outcome = part["outcome"]
        count, total = count_confidence(scores, outcome, len(OUTCOMES), bins)
        losses = _losses(scores, outcome)  # (2, 2, S, 4): squared error and log loss; anywhere and in the band
        here = {"count": count, "confidence": confidence_sum(total), "losses": losses.cpu().double()}
        place = histogram_bin(scores)
        add_histogram(histogram, _counter_index(place, outcome, HISTOGRAM_BINS))
        if lookup is not None:
            pixels = torch.zeros(len(scores) * len(OUTCOMES) * quantiles, dtype=torch.int64, device=device)
            add_histogram(pixels, _counter_index(torch.gather(lookup, 1, place), outcome, quantiles))
            here["cells"] = pixels.view(len(scores), len(OUTCOMES), quantiles).to(torch.int32).cpu()
        sums = {name: sums[name] + value for name, value in here.items()} if sums else here
    squared_error, log_loss = (split_exactly(*both) for both in sums.pop("losses").numpy())
    clipped = [fusion.predictive.outside(flat[PREDICTIVE]), fusion.saliency.outside(flat[SALIENCY])]
    counted = {
        **{name: value.numpy() for name, value in sums.items()},
        "squared_error": squared_error,
        "log_loss": log_loss,
        "clipped": np.array(clipped, dtype=np.int64),
        "largest": np.array([float(flat[name].max()) for name in (PREDICTIVE, SALIENCY)]),
    }
    return counted, torch.cat(all_scores, 1)


def _counter_index(place: Tensor, outcome: Tensor, bins: int) -> Tensor:
    """Where in counters (S, A, bins) the pixels belong, (S, n) int64, from their bins (S, n) and outcomes (n,)."""
    first = torch.arange(len(place), device=place.device) * (len(OUTCOMES) * bins)
    return (place + outcome.to(torch.int64) * bins).add_(first[:, None])


def _losses(scores: Tensor, outcome: Tensor) -> Tensor:
    """Sums over pixels of the squared error and of the log loss of the confidence.

    Args:
        scores: (S, n).
        outcome: codes of `names.OUTCOMES`, (n,).

    Returns:
        (2, 2, S, 4): squared error and log loss; anywhere and in the boundary band; by score; by outcome.
    """
    dtype = accurate_dtype(scores.device)
    losses = torch.zeros(2, 2, len(scores), IN_BAND, dtype=dtype, device=scores.device)
    label, band = outcome % IN_BAND, outcome >= IN_BAND
    for code in range(IN_BAND):
        chosen = (label == code).nonzero().view(-1)
        confidence = 1.0 - scores.index_select(1, chosen)
        truth = confidence if code in CORRECT else 1.0 - confidence  # probability given to what is the case; exact
        inside = band[chosen].nonzero().view(-1)
        squared = (1.0 - truth).square_()
        loss = truth.clamp_(min=CONFIDENCE_STEP).log_().neg_()
        for place, values in enumerate((squared, loss)):
            losses[place, 0, :, code] = values.sum(1, dtype=dtype)
            losses[place, 1, :, code] = values.index_select(1, inside).sum(1, dtype=dtype)
    return losses


def split_exactly(whole: Array, part: Array) -> Array:
    """Sums outside and inside the boundary band that add up to the sum of all pixels without rounding.

    Args:
        whole: sums over all pixels, (S, 4) float64, not negative.
        part: sums over those in the band, the same shape.

    Returns:
        (S, 8): what is left of `whole`, then `part` to within a unit in the last place of `whole`.

    Example:
        >>> both = split_exactly(np.array([[0.3]]), np.array([[0.1]]))
        >>> float(both.sum()) == 0.3, 0.1 + 0.2 == 0.3
        (True, False)
    """
    unit = np.spacing(whole)
    inside = np.minimum(np.rint(part / unit) * unit, whole)  # a multiple of the unit, as is the difference
    return np.concatenate([whole - inside, inside], 1)
