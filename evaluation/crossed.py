"""What may be concluded from several trainings: crossed intervals, Holm's correction, six outcomes.

The effect that is estimated is that of the *procedure*: train with one seed, fit scale and lambda on validation, measure
on test. Three things vary, then: the training seed, the validation images and the test images. All trainings share their
images, so that seeds and images are crossed, not nested. With `d_s` the paired difference of training s,

    Var(mean_s d_s) = seed / S + images,

where *seed* is the variance between trainings on the same images and *images* that of the mean over trainings when the
images of both splits are drawn again. The first is the sample variance of the `d_s`. The second comes from resamples in which
all trainings see the same draw: the variance of their mean, less the part of it that differs between trainings (the
interaction of seed and images, divided by S), which the first holds already. These are the estimators of the crossed
random-effects model of two factors (Searle, Casella & McCulloch, *Variance Components*, 1992).

Shapes: S trainings, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.arrays import Array

#: Levels of the two-sided interval and, for equivalence, of the one that two one-sided tests amount to.
LEVEL, EQUIVALENCE_LEVEL = 0.95, 0.90
MOST_TRAININGS = 1000  # further than this no advice looks


@dataclass(frozen=True)
class Estimate:
    """A mean over trainings with what is needed to judge it.

    Attributes:
        value: the mean of the trainings' differences.
        seed_variance: between trainings on the same images; NaN for a single training.
        image_variance: of the mean when validation and test images are drawn again, as far as all trainings share it.
        trainings: S.
        image_degrees: degrees of freedom of the image part, the smaller number of images less one.
    """

    value: float
    seed_variance: float
    image_variance: float
    trainings: int
    image_degrees: int

    @property
    def standard_error(self) -> float:
        """Of the value; of one training, without the variance between trainings, which is unknown."""
        return self._error_with(self.trainings, self.image_variance)

    def _error_with(self, trainings: int, image_variance: float) -> float:
        seed = 0.0 if math.isnan(self.seed_variance) else self.seed_variance
        return math.sqrt(seed / trainings + image_variance)

    def degrees_of_freedom(self, trainings: int | None = None, image_variance: float | None = None) -> float:
        """Satterthwaite's, of the sum of the two variances (Biometrics Bulletin, 1946)."""
        trainings = trainings or self.trainings
        image = self.image_variance if image_variance is None else image_variance
        seed = 0.0 if math.isnan(self.seed_variance) else self.seed_variance / trainings
        below = image**2 / max(self.image_degrees, 1) + (seed**2 / (trainings - 1) if trainings > 1 else 0.0)
        return (image + seed) ** 2 / below if below > 0 else math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided interval by Student's distribution."""
        half = _quantile(0.5 + level / 2, self.degrees_of_freedom()) * self.standard_error
        return self.value - half, self.value + half

    def p_value(self) -> float:
        """Two-sided, of no difference; 1 where every training and resample is exactly 0."""
        from scipy.stats import t  # SciPy takes a second to load

        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * t.sf(abs(self.value) / self.standard_error, self.degrees_of_freedom()))


def _quantile(probability: float, degrees: float) -> float:
    from scipy.stats import norm, t  # SciPy takes a second to load

    return float(norm.ppf(probability) if math.isinf(degrees) else t.ppf(probability, degrees))


def crossed_estimate(values: Sequence[float] | Array, samples: Array, images: int) -> Estimate:
    """The mean effect of a procedure over trainings that share their images.

    Args:
        values: the difference that each training shows, (S,).
        samples: the same of resampled validation and test images, all trainings on the same draw, (R, S).
        images: the smaller number of images (or groups of images) that were drawn from.

    Returns:
        The estimate. Any NaN among the values, as of an empty region, makes all of it NaN. Of a single training the part
        of the images cannot be divided, and all of it counts.

    Example:
        >>> found = crossed_estimate([0.01, 0.03], np.array([[0.01, 0.03], [0.03, 0.05]]), images=50)
        >>> round(found.value, 4), round(found.seed_variance, 6), round(found.image_variance, 6)  # both move alike
        (0.02, 0.0002, 0.0002)
        >>> opposite = crossed_estimate([0.01, 0.03], np.array([[0.01, 0.05], [0.03, 0.03]]), images=50)
        >>> opposite.image_variance  # the images move the trainings apart, and their mean not at all
        0.0
    """
    values, samples = np.asarray(values, float), np.asarray(samples, float)
    known = samples[~np.isnan(samples).any(1)]
    image_variance = float(known.mean(1).var(ddof=1)) if len(known) > 1 else math.nan
    seed_variance = float(values.var(ddof=1)) if len(values) > 1 else math.nan
    if len(values) > 1 and len(known) > 1:
        apart = known - known.mean(1, keepdims=True)
        interaction = float(apart.var(0, ddof=1).sum()) / (len(values) - 1)
        image_variance = max(image_variance - interaction / len(values), 0.0)
    return Estimate(float(values.mean()), seed_variance, image_variance, len(values), max(images - 1, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in their order (Holm, Scandinavian Journal of Statistics, 1979).

    The smallest is multiplied by the number of tests, the next by one less, and so on; none falls below one before it.
    NaN stays NaN and is not counted.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


#: What each outcome says; "worse" and "equivalent" are null results, "undecided" is none.
OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent within the margin",
    "different but negligible": "different, but by less than the margin",
    "undecided": "undecided",
    "identical": "identical: the fused score is predictive variance",
    "not defined": "not defined",
}


def outcome(estimate: Estimate, margin: float, p_value: float, lower_is_better: bool, identical: bool = False) -> str:
    """One of six outcomes, from the difference, a corrected p-value and two one-sided tests at 5 %.

    Args:
        estimate: of the difference.
        margin: the largest difference that does not matter, above 0.
        p_value: of no difference, corrected for the number of endpoints.
        lower_is_better: whether a negative difference is an improvement.
        identical: the two scores are the same in every training.

    Returns:
        A key of ``OUTCOMES``; "not defined" where the difference is not a number.

    Example:
        >>> sure = Estimate(0.0, 1e-8, 1e-8, trainings=10, image_degrees=500)
        >>> outcome(sure, 0.005, sure.p_value(), lower_is_better=True)
        'equivalent'
        >>> clear = Estimate(0.02, 1e-6, 1e-6, trainings=10, image_degrees=500)
        >>> outcome(clear, 0.005, clear.p_value(), lower_is_better=True)
        'worse'
    """
    if identical:
        return "identical"
    if not (math.isfinite(estimate.value) and math.isfinite(estimate.standard_error)):
        return "not defined"
    low, high = estimate.interval(EQUIVALENCE_LEVEL)
    inside, different = -margin < low and high < margin, p_value < 1 - LEVEL
    if different and inside:
        return "different but negligible"
    if different:
        return "better" if (estimate.value < 0) == lower_is_better else "worse"
    return "equivalent" if inside else "undecided"


def needed(estimate: Estimate, margin: float, tests: float = 1.0) -> dict[str, Any]:
    """About how many trainings, or how many times the images, would decide, if the value stayed what it is.

    Decided means that the corrected p-value falls below 5 %, or that the 90 % interval lies inside the margin.

    Args:
        estimate: of an undecided difference.
        margin: the largest difference that does not matter.
        tests: what the correction multiplies the p-value by.

    Returns:
        "trainings": with the same images; "images_factor": with the same trainings; None where more of that kind alone
        would not decide.

    Example:
        >>> needed(Estimate(0.004, 1e-4, 1e-9, trainings=3, image_degrees=500), 0.005)["images_factor"] is None
        True
    """
    def decided(trainings: int, image_variance: float) -> bool:
        error = estimate._error_with(trainings, image_variance)
        degrees = estimate.degrees_of_freedom(trainings, image_variance)
        different = abs(estimate.value) > _quantile(1 - (1 - LEVEL) / (2 * tests), degrees) * error
        return different or abs(estimate.value) + _quantile(0.5 + EQUIVALENCE_LEVEL / 2, degrees) * error < margin

    trainings = None
    if estimate.trainings > 1 and decided(MOST_TRAININGS, estimate.image_variance):
        enough = (n for n in range(estimate.trainings, MOST_TRAININGS + 1) if decided(n, estimate.image_variance))
        trainings = next(enough)
    factors = (1.25**k for k in range(32))
    factor = next((f for f in factors if decided(estimate.trainings, estimate.image_variance / f)), None)
    return {"trainings": trainings, "images_factor": None if factor is None else round(factor, 1)}
