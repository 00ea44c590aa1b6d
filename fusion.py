"""Fusing predictive and saliency variance: normalisations, fusion rules, the choice of lambda.

A normalisation maps a variance to [0, 1] with constants from the validation maps. A rule maps two
normalised variances to one uncertainty score in [0, 1]. Both are small named functions in a table.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ranking import FINE_CELLS, add_histogram, cell_values, fine_cell

PREDICTIVE = "pred_variance"
SALIENCY = "saliency_variance"


def lambda_grid(lambdas: int = 11) -> tuple[float, ...]:
    """``k / (lambdas - 1)`` for k = 0 ... lambdas - 1: 0, 0.1, ..., 1 as the Python floats nearest to them."""
    if lambdas < 2:
        raise ValueError(f"lambdas must be at least 2 (0 and 1), got {lambdas}")
    return tuple(k / (lambdas - 1) for k in range(lambdas))


def check_variance(values: torch.Tensor, name: str) -> None:
    """Raise ValueError, naming the map, unless all values are finite and not negative."""
    if values.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(values))
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"{name} holds NaN or infinite values")
    if low < 0:
        raise ValueError(f"{name} must not be negative, found {low:.6g}")


# Normalisations: fitted to validation, called with a float32 map, they return float32 in [0, 1].


@dataclass(frozen=True)
class Linear:
    """``(v - low) / (high - low)`` in float32, clipped to [0, 1]; all zeros where high equals low.

    `low` maps to 0 and `high` to 1 exactly.
    """

    low: float
    high: float

    def __call__(self, variance: torch.Tensor) -> torch.Tensor:
        if not self.high > self.low:
            return torch.zeros_like(variance)
        # A divisor in a tensor: by a plain number, some devices multiply with its rounded reciprocal,
        # and the last bit (the bin, for a value at an edge) would depend on the device.
        span = float(np.float32(self.high) - np.float32(self.low))
        divisor = torch.full((1,), span, dtype=variance.dtype, device=variance.device)
        return (variance - self.low).div_(divisor).clamp_(0.0, 1.0)

    def outside(self, variance: torch.Tensor) -> int:
        """How many pixels lie outside [low, high], that is, are clipped."""
        return int(((variance < self.low) | (variance > self.high)).sum())


@dataclass(frozen=True)
class Rank(Linear):
    """Share of the validation pixels below a value, ties counted half, to the width of a fine cell."""

    table: np.ndarray = field(default=None, repr=False, compare=False)  # (F,) float32

    def __call__(self, variance: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.table).to(variance.device)[fine_cell(variance)]


@dataclass(frozen=True)
class Distribution:
    """Of all pixels of one variance over a split: minimum, maximum, and pixels by fine cell."""

    low: float
    high: float
    fine: np.ndarray = field(repr=False)


def distributions(images) -> dict:
    """Distribution of the predictive and of the saliency variance over `images` (pairs of id and maps), one pass."""
    names = (PREDICTIVE, SALIENCY)
    low, high, fine = {}, {}, {}
    for identifier, maps in images:
        for name in names:
            check_variance(maps[name], f"{identifier}: {name}")
            if name not in fine:
                fine[name] = torch.zeros(FINE_CELLS, dtype=torch.int64, device=maps[name].device)
            smallest, largest = (float(value) for value in torch.aminmax(maps[name]))
            low[name], high[name] = min(low.get(name, np.inf), smallest), max(high.get(name, -np.inf), largest)
            add_histogram(fine[name], fine_cell(maps[name]))
    if not fine:
        raise ValueError("the validation split holds no image to take normalisation constants from")
    return {name: Distribution(low[name], high[name], fine[name].cpu().numpy()) for name in names}


def min_max(distribution: Distribution) -> Linear:
    """From the smallest validation value to the largest: the study's normalisation."""
    return Linear(distribution.low, distribution.high)


def robust_quantile(distribution: Distribution, tail: float = 0.01) -> Linear:
    """From the 1 % to the 99 % quantile of the validation pixels, so that one extreme pixel sets no scale."""
    cumulated = np.cumsum(distribution.fine) / distribution.fine.sum()
    low, high = (cell_values()[np.searchsorted(cumulated, level)] for level in (tail, 1.0 - tail))
    return Linear(float(low), float(high))


def rank(distribution: Distribution) -> Rank:
    """Empirical distribution function of the validation pixels: uniform on validation, only order matters."""
    middle = np.cumsum(distribution.fine) - 0.5 * distribution.fine
    return Rank(distribution.low, distribution.high, (middle / distribution.fine.sum()).astype(np.float32))


NORMALISATIONS = {"min_max": min_max, "robust_quantile": robust_quantile, "rank": rank}


# Fusion rules: functions of the normalised predictive and saliency variance, with values in [0, 1].
# A new one takes three lines: @rule, its name, its formula.

RULES = {}


def rule(function):
    """Enter a rule without parameter into the table `RULES` under its name."""
    RULES[function.__name__] = function
    return function


def tuned_rule(candidates, baseline="predictive"):
    """Enter a rule with a parameter; `candidates(sample, lambdas)` proposes values, validation chooses.

    `sample` is what :func:`foreground_sample` returns. `baseline` names the rule without saliency it is fair
    to compare with, beside the predictive variance itself.
    """

    def enter(function):
        function.candidates, function.baseline = candidates, baseline
        return rule(function)

    return enter


@rule
def predictive(predictive, saliency):
    """Predictive variance alone."""
    return predictive


@rule
def saliency(predictive, saliency):
    """Saliency variance alone."""
    return saliency


@tuned_rule(candidates=lambda sample, lambdas: lambdas)
def convex(predictive, saliency, lam):
    """``lam * predictive + (1 - lam) * saliency``; exactly one of the two at lam = 1 and at lam = 0.

    Computed as the nearer end plus a part of the difference: where the two variances are equal, every
    lambda gives that same number, and ties between lambdas are ties in floating point as well.
    """
    difference = predictive - saliency
    return predictive - (1.0 - lam) * difference if lam >= 0.5 else saliency + lam * difference


@rule
def product(predictive, saliency):
    """Geometric mean: high only where both are."""
    return (predictive * saliency).sqrt()


@rule
def maximum(predictive, saliency):
    """High where either is."""
    return torch.maximum(predictive, saliency)


@rule
def minimum(predictive, saliency):
    """Low where either is."""
    return torch.minimum(predictive, saliency)


@rule
def noisy_or(predictive, saliency):
    """``1 - (1 - a)(1 - b)``: either one suffices, and both together count more."""
    return 1.0 - (1.0 - predictive) * (1.0 - saliency)


@rule
def contrast(predictive, saliency):
    """``a (1 - b)``: saliency variance taken as evidence against an error."""
    return predictive * (1.0 - saliency)


def fit_logistic(features: np.ndarray, wrong: np.ndarray, weight=None) -> tuple:
    """Intercept and coefficients of the log-odds of an error, signs free; constant where only one class occurs."""
    weight = np.ones(len(wrong)) if weight is None else weight / weight.mean()
    if wrong.all() or not wrong.any():
        return (40.0 if len(wrong) and wrong.all() else -40.0,) + (0.0,) * features.shape[1]
    model = LogisticRegression(C=100.0, solver="newton-cholesky", max_iter=200)
    model.fit(features, wrong, sample_weight=weight)
    return (float(model.intercept_[0]),) + tuple(float(value) for value in model.coef_[0])


@tuned_rule(candidates=lambda sample, _: [fit_logistic(sample[0][:, :1], sample[1], sample[2])])
def logistic_predictive(predictive, saliency, coefficients):
    """Probability of an error from a logistic model of the predictive variance alone, fitted on validation."""
    return torch.sigmoid(coefficients[0] + coefficients[1] * predictive)


@tuned_rule(candidates=lambda sample, _: [fit_logistic(*sample)], baseline="logistic_predictive")
def logistic(predictive, saliency, coefficients):
    """Probability of an error from a logistic model of both variances, fitted on validation."""
    return torch.sigmoid(coefficients[0] + coefficients[1] * predictive + coefficients[2] * saliency)


def fuse(predictive: torch.Tensor, saliency: torch.Tensor, name: str = "convex", parameter=None) -> torch.Tensor:
    """Fused score of normalised variances by the rule of that name, clipped to [0, 1] against rounding."""
    if name not in RULES:
        raise ValueError(f"unknown fusion rule {name!r}; there are {', '.join(RULES)}")
    extra = () if parameter is None else (parameter,)
    return RULES[name](predictive, saliency, *extra).clamp(0.0, 1.0)


def convex_curve(predictive: torch.Tensor, saliency: torch.Tensor, lambdas: tuple) -> torch.Tensor:
    """Convex fusion at every (ascending) lambda, (L, N) from two (N,), equal bit by bit to :func:`convex`."""
    coefficient = [lam if lam < 0.5 else -(1.0 - lam) for lam in lambdas]
    coefficient = torch.tensor(coefficient, dtype=predictive.dtype, device=predictive.device)[:, None]
    nearer_saliency = sum(lam < 0.5 for lam in lambdas)
    # Multiply, then add, each rounded: a fused multiply-add would round differently at some pixels.
    curve = coefficient * (predictive - saliency)
    curve[:nearer_saliency] += saliency
    curve[nearer_saliency:] += predictive
    return curve


@dataclass(frozen=True)
class Fusion:
    """Two normalisations and a rule with its parameter: from two variance maps to one uncertainty score."""

    predictive: Linear
    saliency: Linear
    rule: str = "convex"
    parameter: float | tuple | None = 1.0  # lambda of the convex rule, coefficients of a fitted one
    normalisation: str = "min_max"  # the name of both normalisations in `NORMALISATIONS`

    def normalise(self, pred_variance: torch.Tensor, saliency_variance: torch.Tensor):
        """The two normalised variances."""
        return self.predictive(pred_variance), self.saliency(saliency_variance)

    def __call__(self, pred_variance: torch.Tensor, saliency_variance: torch.Tensor) -> torch.Tensor:
        """Fused score, float32 in [0, 1], same shape and device as the maps, which are not changed."""
        return fuse(*self.normalise(pred_variance, saliency_variance), self.rule, self.parameter)


def best_lambda(lambdas: tuple, errors: np.ndarray) -> float:
    """Lambda with the lowest error; of exactly equal ones the largest.

    Raises ValueError where no error is a number (no foreground pixel on validation).
    """
    errors = np.asarray(errors, dtype=float)
    if np.isnan(errors).all():
        raise ValueError("lambda cannot be tuned: the validation masks hold no foreground pixel")
    return max(lam for lam, error in zip(lambdas, errors) if error == np.nanmin(errors))


def draw_pixels(identifier, candidates: torch.Tensor, limit: int, seed: int) -> torch.Tensor:
    """At most `limit` of the pixel numbers `candidates`, by chance that depends on seed and id alone."""
    if len(candidates) <= limit:
        return candidates
    rng = np.random.default_rng([seed, zlib.crc32(str(identifier).encode())])
    chosen = np.sort(rng.choice(len(candidates), size=limit, replace=False))
    return candidates[torch.from_numpy(chosen).to(candidates.device)]


def foreground_sample(images, fusion: Fusion, limit: int = 512, seed: int = 42) -> tuple:
    """A sample of ground-truth foreground pixels, for fitting rules.

    Returns normalised variances (N, 2) float64, wrong (N,) bool, and weights (N,) which make up for images
    with more foreground than `limit` pixels.
    """
    features, wrong, weight = [], [], []
    for identifier, maps in images:
        inside = maps["true_mask"].reshape(-1).nonzero().view(-1)
        index = draw_pixels(identifier, inside, limit, seed)
        both = fusion.normalise(maps[PREDICTIVE].reshape(-1)[index], maps[SALIENCY].reshape(-1)[index])
        features.append(torch.stack(both, 1).cpu().double().numpy())
        wrong.append((maps["mean_prediction"].reshape(-1)[index] <= maps.get("threshold", 0.5)).cpu().numpy())
        weight.append(np.full(len(index), len(inside) / max(len(index), 1)))
    return np.concatenate(features), np.concatenate(wrong), np.concatenate(weight)
