"""Fusing predictive and saliency variance: fusion rules, and the choice of lambda.

A rule maps two normalised variances to one uncertainty score in [0, 1]. Rules are small named functions in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.arrays import Array
from evaluation.normalisation import Linear

#: Of a rule: lambda of the convex one, the coefficients of a fitted one, None of one without parameter.
Parameter = Union[float, tuple[float, ...], None]
Formula = Callable[..., Tensor]


def lambda_grid(steps: int = 10) -> tuple[float, ...]:
    """The lambdas ``k / steps`` for k = 0 ... steps, each the nearest Python float.

    Raises:
        ValueError: `steps` is smaller than 1.

    Example:
        >>> lambda_grid(4)
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    if steps < 1:
        raise ValueError(f"the steps from lambda 0 to 1 must be at least 1, got {steps}")
    return tuple(k / steps for k in range(steps + 1))


#: The lambdas of the paper: 0, 0.1, ..., 1.
LAMBDAS = lambda_grid()


def best_lambda(lambdas: Sequence[float], errors: npt.ArrayLike) -> float:
    """Lambda with the lowest error; of exactly equal ones the largest.

    Args:
        lambdas: (L,).
        errors: (L,), NaN where there is none.

    Raises:
        ValueError: no error is a number (no foreground pixel on validation).

    Example:
        >>> best_lambda((0.0, 0.5, 1.0), [0.25, 0.125, 0.125])
        1.0
    """
    errors = np.asarray(errors, dtype=float)
    if np.isnan(errors).all():
        raise ValueError("lambda cannot be tuned: the validation masks hold no foreground pixel")
    return max(lam for lam, error in zip(lambdas, errors) if error == np.nanmin(errors))


# ---------------------------------------------------------------- rules

# Functions of the normalised predictive and saliency variance, with values in [0, 1].
# A new one takes three lines: @rule, its name, its formula.


class Sample(NamedTuple):
    """Pixels of the ground-truth foreground to which rules are fitted; see :func:`sampling.foreground_sample`."""

    features: Array  # (N, 2) float64: normalised predictive and saliency variance
    wrong: Array  # (N,) bool
    weight: Array  # (N,): the number of pixels that each one stands for


Candidates = Callable[[Sample, tuple[float, ...]], Sequence[Parameter]]


def _no_parameter(sample: Sample, lambdas: tuple[float, ...]) -> Sequence[Parameter]:
    return (None,)


@dataclass(frozen=True)
class Rule:
    """An entry of the table: a formula, the parameters validation chooses from, and a rule to compare with."""

    formula: Formula
    candidates: Candidates = _no_parameter
    baseline: str = "predictive"

    def __call__(self, predictive: Tensor, saliency: Tensor, parameter: Parameter = None) -> Tensor:
        """The fused score."""
        return self.formula(predictive, saliency, *(() if parameter is None else (parameter,)))


#: All rules by name.
RULES: dict[str, Rule] = {}


def rule(function: Formula) -> Formula:
    """Enter a rule without parameter into the table `RULES` under its name; a decorator.

    Args:
        function: of the normalised predictive and saliency variance, float32 tensors of one shape.

    Returns:
        The function itself.

    Example:
        >>> @rule
        ... def quadratic_mean(predictive, saliency):
        ...     return ((predictive.square() + saliency.square()) / 2).sqrt()
        >>> fuse(torch.tensor([1.0]), torch.tensor([1.0]), "quadratic_mean").tolist()
        [1.0]
        >>> del RULES["quadratic_mean"]
    """
    RULES[function.__name__] = Rule(function)
    return function


def tuned_rule(candidates: Candidates, baseline: str = "predictive") -> Callable[[Formula], Formula]:
    """Enter a rule with a parameter into the table `RULES` under its name; a decorator.

    Args:
        candidates: from a :class:`Sample` and the lambdas to the parameters of which validation chooses one.
        baseline: the rule without saliency it is fair to compare with, beside the predictive variance itself.

    Example:
        >>> @tuned_rule(candidates=lambda sample, lambdas: (1.0, 2.0))
        ... def power(predictive, saliency, exponent):
        ...     return predictive * saliency**exponent
        >>> fuse(torch.tensor([1.0]), torch.tensor([0.5]), "power", 2.0).tolist()
        [0.25]
        >>> del RULES["power"]
    """

    def enter(function: Formula) -> Formula:
        RULES[function.__name__] = Rule(function, candidates, baseline)
        return function

    return enter


@rule
def predictive(predictive: Tensor, saliency: Tensor) -> Tensor:
    """Predictive variance alone."""
    return predictive


@rule
def saliency(predictive: Tensor, saliency: Tensor) -> Tensor:
    """Saliency variance alone."""
    return saliency


@tuned_rule(candidates=lambda sample, lambdas: lambdas)
def convex(predictive: Tensor, saliency: Tensor, lam: float) -> Tensor:
    """``lam * predictive + (1 - lam) * saliency``; exactly one of the two at lam = 1 and at lam = 0.

    Computed as the nearer end plus a part of the difference: where the two variances are equal, every
    lambda gives that same number, and ties between lambdas are ties in floating point as well.
    """
    difference = predictive - saliency
    return predictive - (1.0 - lam) * difference if lam >= 0.5 else saliency + lam * difference


@rule
def product(predictive: Tensor, saliency: Tensor) -> Tensor:
    """Geometric mean: high only where both are."""
    return (predictive * saliency).sqrt()


@rule
def maximum(predictive: Tensor, saliency: Tensor) -> Tensor:
    """High where either is."""
    return torch.maximum(predictive, saliency)


@rule
def minimum(predictive: Tensor, saliency: Tensor) -> Tensor:
    """Low where either is."""
    return torch.minimum(predictive, saliency)


@rule
def noisy_or(predictive: Tensor, saliency: Tensor) -> Tensor:
    """``1 - (1 - a)(1 - b)``: either one suffices, and both together count more."""
    return 1.0 - (1.0 - predictive) * (1.0 - saliency)


@rule
def contrast(predictive: Tensor, saliency: Tensor) -> Tensor:
    """``a (1 - b)``: saliency variance taken as evidence against an error."""
    return predictive * (1.0 - saliency)


def fit_logistic(features: Array, wrong: Array, weight: Array | None = None) -> tuple[float, ...]:
    """Logistic model of an error by (nearly unpenalised) maximum likelihood.

    It is fitted to standardised features, so that no unit of theirs matters: a variance a thousand times as small gets a
    coefficient a thousand times as large, and the same prediction. The penalty that keeps separable data finite is one of
    standardised coefficients, ``|b|^2 / 200`` in all against a loss of the order of N.

    Args:
        features: (N, D).
        wrong: (N,) bool.
        weight: (N,), in any unit; None weights all pixels alike.

    Returns:
        Intercept and D coefficients of the log-odds of the features as they were given, their signs free; 0 for a feature
        that does not vary. Where only one class occurs, a constant: log-odds of 40 if all pixels are wrong, else of -40.

    Example:
        >>> features, wrong = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([False, True, False, True])
        >>> (_, large), (_, small) = fit_logistic(features, wrong), fit_logistic(features / 1000, wrong)
        >>> round(small / large, 6)
        1000.0
        >>> fit_logistic(np.array([[0.5], [1.0]]), np.array([False, False]))
        (-40.0, 0.0)
    """
    if wrong.all() or not wrong.any():
        return (40.0 if len(wrong) and wrong.all() else -40.0, *(0.0 for _ in range(features.shape[1])))
    from sklearn.linear_model import LogisticRegression  # here, as loading scikit-learn takes seconds

    weight = np.ones(len(wrong)) if weight is None else weight / weight.mean()
    mean = np.average(features, axis=0, weights=weight)
    spread = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weight))
    # what rounding alone makes of a constant is no variation
    constant = spread <= 1e-12 * np.abs(features).max(0)
    scale = np.where(constant, 1.0, spread)
    model = LogisticRegression(C=100.0, solver="newton-cholesky", max_iter=200)
    model.fit(np.where(constant, 0.0, (features - mean) / scale), wrong, sample_weight=weight)
    coefficients = model.coef_[0] / scale
    return float(model.intercept_[0] - coefficients @ mean), *map(float, coefficients)


@tuned_rule(candidates=lambda sample, _: [fit_logistic(sample.features[:, :1], sample.wrong, sample.weight)])
def logistic_predictive(predictive: Tensor, saliency: Tensor, coefficients: tuple[float, float]) -> Tensor:
    """Probability of an error from a logistic model of the predictive variance alone, fitted on validation."""
    return torch.sigmoid(coefficients[0] + coefficients[1] * predictive)


@tuned_rule(candidates=lambda sample, _: [fit_logistic(*sample)], baseline="logistic_predictive")
def logistic(predictive: Tensor, saliency: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Probability of an error from a logistic model of both variances, fitted on validation."""
    return torch.sigmoid(coefficients[0] + coefficients[1] * predictive + coefficients[2] * saliency)


# ---------------------------------------------------------------- fusing


def fuse(predictive: Tensor, saliency: Tensor, name: str = "convex", parameter: Parameter = None) -> Tensor:
    """Fused score of two normalised variances, clipped to [0, 1] against rounding.

    Args:
        predictive, saliency: float32 in [0, 1], of one shape.
        name: of a rule in `RULES`.
        parameter: of the rule; None for a rule without one.

    Returns:
        float32 in [0, 1], same shape.

    Raises:
        ValueError: no rule has that name.

    Example:
        >>> fuse(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]), "convex", 0.75).tolist()
        [0.75, 0.5]
        >>> fuse(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]), "noisy_or").tolist()
        [1.0, 0.75]
    """
    if name not in RULES:
        raise ValueError(f"unknown fusion rule {name!r}; there are {', '.join(RULES)}")
    return RULES[name](predictive, saliency, parameter).clamp(0.0, 1.0)


def convex_curve(predictive: Tensor, saliency: Tensor, lambdas: Sequence[float]) -> Tensor:
    """Convex fusion at every lambda, equal bit by bit to :func:`convex`.

    Args:
        predictive, saliency: normalised variances (N,).
        lambdas: (L,), ascending.

    Returns:
        Scores (L, N).

    Example:
        >>> convex_curve(torch.tensor([1.0]), torch.tensor([0.5]), (0.0, 0.5, 1.0)).tolist()
        [[0.5], [0.75], [1.0]]
    """
    weights = [lam if lam < 0.5 else -(1.0 - lam) for lam in lambdas]
    coefficient = torch.tensor(weights, dtype=predictive.dtype, device=predictive.device)[:, None]
    nearer_saliency = sum(lam < 0.5 for lam in lambdas)
    # Multiply, then add, each rounded: a fused multiply-add would round differently at some pixels.
    curve = coefficient * (predictive - saliency)
    curve[:nearer_saliency] += saliency
    curve[nearer_saliency:] += predictive
    return curve


@dataclass(frozen=True)
class Fusion:
    """Two normalisations and a rule with its parameter: from two variance maps to one uncertainty score.

    Its ``repr`` identifies it in saved maps.

    Example:
        >>> fusion = Fusion(Linear(0.0, 0.25), Linear(0.0, 0.5), "convex", 0.5)
        >>> fusion(torch.tensor([0.125, 1.0]), torch.tensor([0.5, 0.0])).tolist()  # (0.5 + 1) / 2 and (1 + 0) / 2
        [0.75, 0.5]
    """

    predictive: Linear
    saliency: Linear
    rule: str = "convex"
    parameter: Parameter = 1.0
    normalisation: str = "min_max"  # the name of both normalisations in `NORMALISATIONS`

    def normalise(self, pred_variance: Tensor, saliency_variance: Tensor) -> tuple[Tensor, Tensor]:
        """The two normalised variances, float32 in [0, 1]."""
        return self.predictive(pred_variance), self.saliency(saliency_variance)

    def __call__(self, pred_variance: Tensor, saliency_variance: Tensor) -> Tensor:
        """Fused score, float32 in [0, 1], same shape and device as the maps, which are not changed."""
        return fuse(*self.normalise(pred_variance, saliency_variance), self.rule, self.parameter)
