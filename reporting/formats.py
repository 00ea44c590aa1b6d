"""Numbers as people read them: one rounding for figures, report and console, and the names of what they measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from typing import TypeGuard

MISSING = "not defined"
SYNTHETIC_NOTE = "SYNTHETIC LESIONS: not patient data"

SCORE_NAMES = {
    "predictive_variance": "predictive variance",
    "saliency_variance": "saliency variance",
    "fused": "fused score",
    "predictive_entropy": "predictive entropy",
    "mutual_information": "mutual information",
    "one_minus_max_probability": "one minus maximum probability",
}
REGION_NAMES = {
    "foreground": "inside the true lesions",
    "predicted_foreground": "inside the predicted lesions",
    "union": "inside either",
    "whole_image": "whole images",
    "predicted_background": "outside the predicted lesions",
    "boundary_band": "along the predicted boundaries",
}
METHOD_NAMES = {"isotonic": "isotonic", "platt": "Platt"}
AGGREGATE_NAMES = {
    "whole_image": "mean of the image",
    "predicted_foreground": "mean of the predicted lesion",
    "quantile95": "95 % quantile of the pixels",
    "largest_patch": "largest mean of a patch",
}


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite value; None and NaN stand for a quantity that is not defined."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Four decimals, as in the verdict sentence."""
    return f"{value:.4f}" if is_number(value) else MISSING


def signed(value: float | None) -> str:
    """A difference: four decimals and always a sign; one digit and its power of ten where those would be zeros."""
    if not is_number(value):
        return MISSING
    return f"{value:+.4f}" if value == 0 or abs(value) >= 5e-5 else f"{value:+.0e}"


def general(value: float) -> str:
    """As few digits as the value needs, at most six: for settings and for the weight λ."""
    return f"{value:g}"


def count(value: float | None) -> str:
    """A whole number with separators between thousands."""
    return f"{int(value):,}" if is_number(value) else MISSING


def percent(share: float | None) -> str:
    """A share of one, in per cent with one decimal."""
    return f"{100 * share:.1f} %" if is_number(share) else MISSING


def span(interval: Sequence[float | None] | None) -> str:
    """An interval (low, high)."""
    return _span(interval, number)


def signed_span(interval: Sequence[float | None] | None) -> str:
    """The interval of a difference."""
    return _span(interval, signed)


def _span(interval: Sequence[float | None] | None, shown: Callable[[float | None], str]) -> str:
    if interval is None or not all(is_number(bound) for bound in interval):
        return MISSING
    return f"{shown(interval[0])} to {shown(interval[1])}"


def bounds(pair: Sequence[float]) -> str:
    """A range (low, high) in six significant digits: four decimals would show most variances as zero."""
    return f"{pair[0]:.6g} to {pair[1]:.6g}"


def spaced(name: str) -> str:
    """A name of the program in words: underscores become spaces."""
    return name.replace("_", " ")


def sentence_case(text: str) -> str:
    """The text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]
