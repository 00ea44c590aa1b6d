"""What a GPU would be asked for, on tensors without content: one device, no float64, nobody waits, few operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cuda_trace import (
    CUDA,
    Recorder,
    counting,
    difference,
    maps,
    pretended,
    traced,
    training_step,
    validation,
    weights,
)
from inference import masks

#: A small network and image; groups of eight images, and 8 passes in one chunk.
SHAPE = (4, 32, 8)
PRECISIONS = [{"precision": "auto", "cam_score": "predicted"}, *({"precision": name} for name in ("fp16", "fp32", "tf32"))]
#: Whether masks are applied in one sweep here.
FUSED = masks._fused() is not None


# ---------------------------------------------------------------- the trace sees what it is to see


def test_tensors_of_two_devices_are_refused():
    def mixed() -> object:
        x, y = torch.empty(3, device=CUDA), torch.empty(3)
        return lambda: x + y

    with pytest.raises(RuntimeError, match="device"):
        traced(mixed)


def test_what_waits_and_what_is_sent_is_counted():
    def prepare() -> object:
        x = torch.empty(8, device=CUDA)

        def work() -> None:
            assert float(x.sum()) == 0.5 and (x > 0).tolist() == [1] * 8  # a number that Python asks for, a copy
            x.cpu()
            torch.empty(8).to(CUDA)
            torch.empty(8).pin_memory().to(CUDA, non_blocking=True)

        return work

    trace = traced(prepare)
    assert trace.waits == {"_local_scalar_dense": 1, "copy to the CPU": 2}
    assert trace.sent == {"blocking": 1, "not blocking": 1}
    assert trace.operators["aten.sum"] == trace.operators["aten.gt"] == 1 and trace.bytes_of["aten.sum"] == 8 * 4 + 4


def test_products_and_doubles_are_counted_and_views_are_not():
    def prepare() -> object:
        x, weight = torch.empty(2, 3, 8, 8, device=CUDA), torch.empty(5, 3, 3, 3, device=CUDA)
        return lambda: torch.nn.functional.conv2d(x, weight, padding=1).view(-1)[:7].double()

    trace = traced(prepare)
    assert trace.products == 2 * 5 * 8 * 8 * 3 * 9 and trace.doubles == 7
    assert trace.operators == {"aten.convolution": 1, "aten._to_copy": 1}


def test_the_gradient_is_that_of_autograd():
    """In the pretended world each weight gets one, of its own shape."""
    with pretended():
        with CUDA:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
        with Recorder() as recorder:
            model(torch.empty(2, 3, 8, 8, device=CUDA)).square().mean().backward()
        assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]
        assert recorder.trace.operators["aten.convolution_backward"] == 2
    real = torch.ones(3, requires_grad=True)
    real.square().sum().backward()  # and outside all is as it was
    assert real.grad.tolist() == [2, 2, 2]


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("options", PRECISIONS)
def test_maps_of_the_u_net(options):
    less, more = (traced(maps(*SHAPE, images, **options)) for images in (8, 16))
    assert less.waits == {"copy to the CPU": 1}  # whether all maps are finite, once a call
    added = difference(more, less)
    assert not added.waits and added.sent == {"not blocking": 1}  # the keys of a group of images
    # the mean pairwise Dice: three operations on one number an image
    assert added.doubles <= 8 * 8
    assert "aten.upsample_bilinear2d_backward" not in more.operators  # adds atomically
    assert added.operators["inference.zero_dropped"] == 4 * FUSED
    assert added.launches / 8 < 120


def test_the_weights_are_folded_in_double_precision_once_a_call_and_nobody_waits():
    trace = traced(weights(4))
    assert trace.doubles and not trace.waits and not trace.sent["blocking"]


def test_auto_is_half_precision_for_the_u_net_alone():
    automatic, half, single = (traced(maps(*SHAPE, 8, precision=name)) for name in ("auto", "fp16", "fp32"))
    assert automatic.bytes == half.bytes < single.bytes
    other, general = (traced(maps(*SHAPE, 8, method="general", precision=name)) for name in ("auto", "fp32"))
    assert other.bytes == general.bytes


def test_the_general_path_sends_its_keys_once_an_image_and_waits_once_a_call():
    less, more = (traced(maps(*SHAPE, images, method="general")) for images in (2, 4))
    added = difference(more, less)
    assert more.waits == {"copy to the CPU": 1} and not added.waits
    assert added.sent == {"not blocking": 2} and added.doubles <= 2 * 8
    assert added.operators["aten.convolution"] == 2 * 19  # one chunk of all passes


def test_chunks_are_of_equal_size():
    """At this size 16 passes of two images fit together; 30 passes are two chunks of 15."""
    seen = traced(maps(64, 256, 30, 2, precision="fp16"))
    assert seen.operators["inference.zero_dropped"] == 8 * FUSED and seen.products == pytest.approx(2 * 996e9, rel=0.01)


# ---------------------------------------------------------------- training and counting


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_training_step(amp):
    trace = traced(training_step(4, 32, 4, amp))
    assert not trace.waits and not trace.sent and not trace.doubles
    assert "aten.upsample_bilinear2d_backward" not in trace.operators and trace.operators["aten._fused_adam_"] == 1
    assert trace.launches < 320


def test_validation_waits_at_its_end_alone():
    less, more = (traced(validation(4, 32, 4, batches)) for batches in (1, 3))
    assert less.waits == more.waits == {"copy to the CPU": 1}
    assert difference(more, less).sent == {"not blocking": 2 * 2}
    assert difference(more, less).doubles < 2 * 100  # sums and overlaps, a few numbers an image


def test_counting_asks_for_few_numbers_an_image():
    added = difference(traced(counting(32, 3)), traced(counting(32, 1)))
    assert sum(added.waits.values()) <= 2 * 40 and added.sent["blocking"] <= 2 * 3
