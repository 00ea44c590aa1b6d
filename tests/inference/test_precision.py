"""The precision switches of float32 arithmetic: what holds within, and that they are put back."""

from __future__ import annotations

import pytest
import torch

from inference.precision import float32_convolutions


def switches() -> list[object]:
    """The state of convolutions and matrix products."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        return [kind.fp32_precision for kind in (
            backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul
        )]
    return [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]  # before PyTorch 2.9


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_convolutions_alone_may_round(precision):
    before = switches()
    with float32_convolutions(precision):
        if len(before) == 5:
            assert switches() == [precision, precision, "ieee", "ieee", "ieee"]
        else:
            assert switches() == [precision == "tf32", False]
    assert switches() == before


def test_an_error_within_puts_them_back_too():
    before = switches()
    with pytest.raises(ZeroDivisionError), float32_convolutions("tf32"):
        raise ZeroDivisionError
    assert switches() == before


def test_they_nest():
    with float32_convolutions("ieee"):
        outer = switches()
        with float32_convolutions("tf32"):
            assert switches() != outer
        assert switches() == outer
