"""The precision switches of float32 arithmetic: what holds within, and that they are put back."""

from __future__ import annotations

import pytest
import torch

from inference.precision import automatic_precision, float32_convolutions


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


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_older_switch_can_be_read_within_and_says_the_same(precision):
    before = torch.backends.cudnn.allow_tf32
    with float32_convolutions(precision):
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32") and not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("older", [True, False])
def test_whatever_a_user_has_set_is_put_back(older):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = older
        with float32_convolutions("ieee"), float32_convolutions("tf32"):
            pass
        assert torch.backends.cudnn.allow_tf32 == older
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_switches_that_contradict_each_other_are_put_back_too():
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before PyTorch 2.9 there is one switch, which cannot contradict itself
        assert len(switches()) == 2
        return
    before, older = switches(), cudnn.allow_tf32
    try:
        cudnn.conv.fp32_precision = "ieee" if older else "tf32"
        contradicting = switches()
        with float32_convolutions("ieee"):
            assert cudnn.allow_tf32 is False
        assert switches() == contradicting
    finally:
        cudnn.allow_tf32 = older
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before[:2]
    assert switches() == before and cudnn.allow_tf32 == older


def test_within_the_same_bits_come_out_each_time():
    before = torch.backends.cudnn.deterministic
    with float32_convolutions("ieee"):
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic == before


def test_auto_is_half_precision_for_the_algebra_on_cuda_alone():
    found = {
        (kind, fast): automatic_precision(torch.device(kind), fast) for kind in ("cpu", "cuda", "mps") for fast in (True, False)
    }
    assert [key for key, name in found.items() if name == "fp16"] == [("cuda", True)]
    assert set(found.values()) == {"fp16", "fp32"}
