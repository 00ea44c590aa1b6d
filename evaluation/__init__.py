"""From maps to a verdict: fusion, counting, calibration, ranking, recalibration, resampling, the study.

Nothing in here reads or writes a file, draws, or knows the network that made the maps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.calibration import expected_calibration_error, reliability
    from evaluation.counting import Counters
    from evaluation.fusion import Fusion, fuse, lambda_grid, rule, tuned_rule
    from evaluation.normalisation import Linear
    from evaluation.protocol import Evaluation, count_splits, evaluate
    from evaluation.ranking import aurc, auroc
    from evaluation.study import run_study
    from evaluation.summary import per_image, summarise
    from evaluation.tuning import Tuned, tune

__all__ = [
    "Counters", "Evaluation", "Fusion", "Linear", "Tuned", "aurc", "auroc", "count_splits", "evaluate",
    "expected_calibration_error", "fuse", "lambda_grid", "per_image", "reliability", "rule", "run_study", "summarise",
    "tune", "tuned_rule",
]

#: The module that each exported name comes from; it is loaded when the name is first used.
_HOME = {
    "calibration": ("expected_calibration_error", "reliability"),
    "counting": ("Counters",),
    "fusion": ("Fusion", "fuse", "lambda_grid", "rule", "tuned_rule"),
    "normalisation": ("Linear",),
    "protocol": ("Evaluation", "count_splits", "evaluate"),
    "ranking": ("aurc", "auroc"),
    "study": ("run_study",),
    "summary": ("per_image", "summarise"),
    "tuning": ("Tuned", "tune"),
}


def __getattr__(name: str) -> Any:
    """An exported name from its module: importing the package alone loads neither torch nor scikit-learn (PEP 562)."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
