from __future__ import annotations

import warnings
from math import isnan, nan

import numpy as np
import torch

from evaluation.arrays import accurate_dtype, divide, jsonable


def test_jsonable():
    value = {"a": np.float64(0.1), "b": [np.int64(3), nan, (np.inf,)], 5: np.array([1.5, nan]), "t": torch.tensor([1, 2])}
    assert jsonable(value) == {"a": 0.1, "b": [3, None, [None]], "5": [1.5, None], "t": [1, 2]}
    assert jsonable({"x": np.bool_(True), "y": "text", "z": None}) == {"x": True, "y": "text", "z": None}


def test_division_by_zero_is_not_a_number_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = divide(np.array([0, 3, 1]), np.array([0, 0, 4]))
    assert isnan(found[0]) and found[1] == np.inf and found[2] == 0.25
    assert divide(1, 3) == 1 / 3 and divide(np.float32(1), 3).dtype == np.float64


def test_only_metal_computes_in_single_precision():
    assert accurate_dtype(torch.device("cpu")) == accurate_dtype(torch.device("cuda")) == torch.float64
    assert accurate_dtype(torch.device("mps")) == torch.float32
