"""Counting pixels: from uncertainty maps, one image at a time, to counters from which all measures follow.

Maps come as iterables of ``(id, maps)``; `maps` holds (H, W) tensors on one device: `mean_prediction`,
`pred_variance`, `saliency_variance`, optionally `expected_entropy` (all float32), `true_mask` (uint8,
0 or 1), optionally the numbers `empty_cams` and `threshold` (0.5: a pixel with a larger
`mean_prediction` is predicted lesion). Images may differ in size; the memory used does not
depend on their number beyond the counters themselves, nor on their size.

Shapes: I images, S scores, L lambdas, A = 4 atoms, B bins, Q quantile cells, F fine cells, N pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from calibration import ATOMS, CORRECT, REGIONS, atoms, check_unit_interval, confidence_sum, count_confidence
from fusion import PREDICTIVE, SALIENCY, Fusion, check_variance, convex_curve, draw_pixels, fuse
from ranking import FINE_CELLS, add_histogram, fine_cell, quantile_table

SCORES = (
    "predictive_variance",
    "saliency_variance",
    "fused",
    "predictive_entropy",
    "mutual_information",
    "one_minus_max_probability",
)
LOG_LOSS_EPSILON = 2.0**-24  # the smallest step of a confidence
_MAPS = ("mean_prediction", PREDICTIVE, SALIENCY, "expected_entropy", "true_mask")


def uncertainty_scores(maps: dict, fusion: Fusion) -> dict:
    """Every score of an image as a float32 map in [0, 1]; its confidence is ``1 - score``.

    The variances are normalised as `fusion` says. The baselines keep their natural scale, in which they
    reach their bound only at their largest possible value: entropies in nats over ln 2, and
    ``1 - max(p, 1 - p)``, whose confidence is the probability of the predicted label, in [0.5, 1].
    They are read as they come, with no constant from the data, neither favoured nor handicapped by
    a rescaling; after recalibration only the ranking of the pixels matters, for all scores alike.
    Mutual information is the predictive entropy minus `expected_entropy`, at least 0 (rounding), and
    is left out where `expected_entropy` is missing.
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


def binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    """``-p ln p - (1 - p) ln(1 - p)`` in nats, 0 at p = 0 and p = 1."""
    other = 1.0 - probability
    return -(torch.special.xlogy(probability, probability) + torch.special.xlogy(other, other))


@dataclass
class Counters:
    """What is left of a split when its pixels are gone; additive over images and mergeable over shards.

    `images` (first axis I, in the order of `ids`, which is sorted):
        count (I, S, A, B) int64 and confidence (I, S, A, B) float64: pixels and confidence sums by bin;
        squared_error, log_loss (I, S, A) float64: sums of ``(c - correct)**2`` and of
        ``-ln max(P, 2**-24)``, P being c for a correct pixel and 1 - c for a wrong one;
        lambda_count, lambda_confidence (I, L, 2, B): wrong and correct pixels of the ground-truth
        foreground under convex fusion at every lambda;
        clipped (I, 2) int64: pixels of predictive and saliency variance outside the normalisation's range;
        largest (I, 2) float64: the largest predictive and saliency variance of the image;
        cells (I, S, A, Q) int32: pixels by quantile cell, where the cells were given;
        empty_cams (I,) int64, where the maps said so (-1 where they did not).
    `pooled` (summed over images):
        fine (S, A, F) int64: pixels by fine cell of the score.
    `edges` (S, Q - 1) int64: the last fine cell of every quantile cell but the last.
    """

    ids: tuple
    scores: tuple
    lambdas: tuple
    bins: int
    images: dict
    pooled: dict
    edges: np.ndarray

    def to_arrays(self) -> dict:
        """A dictionary of arrays without objects, for ``numpy.savez_compressed``, loadable without pickle."""
        arrays = {"ids": np.array(self.ids, dtype=str), "scores": np.array(self.scores, dtype=str)}
        arrays.update(lambdas=np.array(self.lambdas, dtype=float), bins=np.array(self.bins), edges=self.edges)
        arrays.update({f"image_{name}": value for name, value in self.images.items()})
        arrays.update({f"pooled_{name}": value for name, value in self.pooled.items()})
        return arrays

    @classmethod
    def from_arrays(cls, arrays) -> Counters:
        """The counters that :meth:`to_arrays` was called on."""
        groups = {prefix: {} for prefix in ("image_", "pooled_")}
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


def merge(parts) -> Counters:
    """Counters of all images of several shards; the result does not depend on how they were split.

    Raises ValueError where shards were counted differently or share an image.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("no counters to merge")
    first = parts[0]
    for part in parts[1:]:
        same = (part.scores, part.lambdas, part.bins) == (first.scores, first.lambdas, first.bins)
        if not same or not np.array_equal(part.edges, first.edges):
            raise ValueError("counters of different scores, lambdas, bins or cells cannot be merged")
    ids = [identifier for part in parts for identifier in part.ids]
    if len(set(ids)) < len(ids):
        repeated = next(identifier for index, identifier in enumerate(ids) if identifier in ids[:index])
        raise ValueError(f"image {repeated} was counted twice")
    order = np.argsort(np.array(ids, dtype=str), kind="stable")
    in_order = np.array_equal(order, np.arange(len(ids)))
    images = {}
    for name in first.images:  # without the copies that are not needed: these arrays are what takes the memory
        values = [part.images[name] for part in parts]
        joined = values[0] if len(values) == 1 else np.concatenate(values)
        images[name] = joined if in_order else joined[order]
    pooled = {name: sum(part.pooled[name] for part in parts) for name in first.pooled}
    return Counters(tuple(ids[index] for index in order), first.scores, first.lambdas, first.bins, images, pooled, first.edges)


def count_curve(images, fusion: Fusion, lambdas: tuple, bins: int = 15) -> Counters:
    """Counters of the lambda curve alone: ground-truth foreground, convex fusion of the normalised variances."""
    rows = Rows()
    for identifier, maps in images:
        rows.add(identifier, _curve_of_image(checked_maps(identifier, maps), fusion, lambdas, bins))
    return rows.counters((), lambdas, bins)


def count_scores(images, fusion: Fusion, lambdas: tuple, bins: int = 15, edges: np.ndarray | None = None) -> Counters:
    """All counters of a split, or of a shard of one.

    Args:
        images: iterable of (id, maps).
        fusion: fitted on validation; its rule makes the score "fused".
        lambdas: of the lambda curve.
        bins: equal-width bins B.
        edges: quantile cells from :func:`ranking.quantile_edges` of the validation counters, if wanted.

    Raises:
        ValueError: NaN, an infinite value or one out of range, naming image and map; different shapes.
    """
    rows, fine, names, lookup = Rows(), None, (), None
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        row = _curve_of_image(flat, fusion, lambdas, bins)
        present = tuple(name for name in SCORES if name != "mutual_information" or "expected_entropy" in flat)
        if not names:
            names = present
            device = flat["mean_prediction"].device
            fine = torch.zeros(len(names) * len(ATOMS) * FINE_CELLS, dtype=torch.int64, device=device)
            if edges is not None:
                lookup = quantile_table(edges).to(device)
        elif names != present:
            raise ValueError(f"{identifier}: expected_entropy is present in some images only")
        row.update(_scores_of_image(flat, fusion, bins, fine, lookup, 0 if edges is None else edges.shape[1] + 1))
        row["empty_cams"] = np.int64(maps.get("empty_cams", -1))
        rows.add(identifier, row)
    pooled = {} if fine is None else {"fine": fine.view(len(names), len(ATOMS), FINE_CELLS).cpu().numpy()}
    return rows.counters(names, lambdas, bins, pooled, edges)


class Rows:
    """Arrays of one image after the other, kept in blocks of many images.

    Kept one by one, they would lie scattered between the temporaries of the counting, which then find no
    room among them: the memory of the process would grow several times faster than the counters.
    """

    BLOCK = 256

    def __init__(self):
        self.ids = []
        self.blocks = {}

    def add(self, identifier, row: dict) -> None:
        """Append the arrays of one image; the names and shapes are those of the first one."""
        place = len(self.ids) % self.BLOCK
        self.ids.append(str(identifier))
        for name, value in row.items():
            value = np.asarray(value)
            blocks = self.blocks.setdefault(name, [])
            if place == 0:
                blocks.append(np.empty((self.BLOCK,) + value.shape, dtype=value.dtype))
            blocks[-1][place] = value

    def counters(self, scores=(), lambdas=(), bins=0, pooled=None, edges=None) -> Counters:
        """All of them as counters, once: the blocks are given up. ValueError where there is none."""
        if not self.ids:
            raise ValueError("no image to count")
        last = (len(self.ids) - 1) % self.BLOCK + 1
        images = {}
        for name in tuple(self.blocks):
            blocks = self.blocks.pop(name)
            images[name] = np.concatenate(blocks[:-1] + [blocks[-1][:last]])
        edges = np.zeros((0, 0), dtype=np.int64) if edges is None else edges
        return merge([Counters(tuple(self.ids), tuple(scores), tuple(lambdas), bins, images, pooled or {}, edges)])


def checked_maps(identifier, maps: dict) -> dict:
    """The maps flattened to (N,), after checks of shape and range, and "predicted": 1 where p > threshold, else 0."""
    shape = maps["mean_prediction"].shape
    flat = {}
    for name in _MAPS:
        if name not in maps and name == "expected_entropy":
            continue
        if maps[name].shape != shape:
            raise ValueError(f"{identifier}: {name} is {tuple(maps[name].shape)}, mean_prediction {tuple(shape)}")
        flat[name] = maps[name].reshape(-1) if name == "true_mask" else maps[name].reshape(-1).to(torch.float32)
    check_unit_interval(flat["mean_prediction"], f"{identifier}: mean_prediction")
    for name in (PREDICTIVE, SALIENCY, "expected_entropy"):
        if name in flat:
            check_variance(flat[name], f"{identifier}: {name}")
    mask = flat["true_mask"]
    if mask.numel() and int(mask.max()) > 1:
        raise ValueError(f"{identifier}: true_mask holds values other than 0 and 1")
    flat["predicted"] = (flat["mean_prediction"] > maps.get("threshold", 0.5)).to(torch.uint8)
    return flat


def pieces(pixels: int, device: torch.device):
    """Slices of the pixels, so that temporaries stay small (and in cache, on a CPU) for images of any size."""
    step = 15 * 1024 if device.type == "cpu" else 1 << 19
    return [slice(first, min(first + step, pixels)) for first in range(0, pixels, step)]


def drawn_pixels(images, limit: int, seed: int) -> dict:
    """A sample of the pixels of every region, for fitting models.

    Args:
        limit: pixels drawn at most from each image and region, by chance that depends on `seed` and the id alone.

    Returns:
        Per region a list with one entry an image, in their order: mean prediction, both variances and "predicted"
        by name (n,), on the CPU; wrong (n,) bool; weight (n,), the number of pixels that each drawn one stands for.
    """
    drawn = {region: [] for region in REGIONS}
    for identifier, maps in images:
        flat = checked_maps(identifier, maps)
        atom = atoms(flat["predicted"], flat["true_mask"])
        for region, members in REGIONS.items():
            inside = sum(atom == member for member in members).nonzero().view(-1)
            index = draw_pixels(identifier, inside, limit, seed)
            values = {name: flat[name][index].cpu() for name in ("mean_prediction", PREDICTIVE, SALIENCY, "predicted")}
            wrong = ((atom[index] == 1) | (atom[index] == 2)).cpu().numpy()
            drawn[region].append((values, wrong, np.full(len(index), len(inside) / max(len(index), 1))))
    return drawn


def _curve_of_image(flat: dict, fusion: Fusion, lambdas: tuple, bins: int) -> dict:
    inside = flat["true_mask"].nonzero().view(-1)
    predictive, saliency = fusion.normalise(flat[PREDICTIVE].index_select(0, inside), flat[SALIENCY].index_select(0, inside))
    correct = flat["predicted"].index_select(0, inside).to(torch.int32)
    count = torch.zeros(len(lambdas), 2, bins, dtype=torch.int64)
    total = torch.zeros_like(count)
    for piece in pieces(len(inside), inside.device):
        curve = convex_curve(predictive[piece], saliency[piece], lambdas)
        piece_count, piece_total = count_confidence(curve, correct[piece], 2, bins, check=False)
        count += piece_count
        total += piece_total
    return {"lambda_count": count.numpy(), "lambda_confidence": confidence_sum(total).numpy()}


def _scores_of_image(flat: dict, fusion: Fusion, bins: int, fine: torch.Tensor, lookup, cells: int) -> dict:
    device = flat["mean_prediction"].device
    accurate = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
    clipped = [fusion.predictive.outside(flat[PREDICTIVE]), fusion.saliency.outside(flat[SALIENCY])]
    sums = None
    for piece in pieces(len(flat["mean_prediction"]), device):
        part = {name: values[piece] for name, values in flat.items()}
        scores = torch.stack(list(uncertainty_scores(part, fusion).values()))  # (S, n)
        atom = atoms(part["predicted"], part["true_mask"])  # (n,)
        count, total = count_confidence(scores, atom, len(ATOMS), bins)
        here = {"count": count, "confidence": confidence_sum(total)}
        losses = [_losses(scores[:, atom == index], index in CORRECT, accurate) for index in range(len(ATOMS))]
        here["squared_error"] = torch.stack([loss[0] for loss in losses], 1).cpu().double()
        here["log_loss"] = torch.stack([loss[1] for loss in losses], 1).cpu().double()
        row = torch.arange(len(scores), device=device)[:, None]
        cell = fine_cell(scores)
        add_histogram(fine, (row * len(ATOMS) + atom) * FINE_CELLS + cell)
        if cells:
            quantile = torch.gather(lookup, 1, cell)
            histogram = torch.zeros(len(scores) * len(ATOMS) * cells, dtype=torch.int64, device=device)
            add_histogram(histogram, (row * len(ATOMS) + atom) * cells + quantile)
            here["cells"] = histogram.view(len(scores), len(ATOMS), cells).to(torch.int32).cpu()
        sums = here if sums is None else {name: sums[name] + here[name] for name in here}
    result = {name: value.numpy() for name, value in sums.items()}
    result["clipped"] = np.array(clipped, dtype=np.int64)
    result["largest"] = np.array([float(flat[name].max()) for name in (PREDICTIVE, SALIENCY)])
    return result


def _losses(scores: torch.Tensor, correct: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over pixels (S,) of the squared error and of the log loss of the confidence."""
    confidence = 1.0 - scores
    truth = confidence if correct else 1.0 - confidence  # probability given to what is the case; exact
    squared = (1.0 - truth).square_().sum(1, dtype=dtype)
    return squared, truth.clamp_(min=LOG_LOSS_EPSILON).log_().sum(1, dtype=dtype).neg_()
