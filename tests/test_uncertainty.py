"""The uncertainty maps: three independent ways to the same numbers, invariants, conventions, errors."""

from __future__ import annotations

import doctest
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from constructed_networks import HEIGHT, MAPS, WIDTH, numpy_mask, pictures, relative_error, unet
from device import DEVICE
from torch import nn

import inference.flips
import inference.logits
import inference.masks
import inference.moments
import inference.unet_passes
import model as model_module
import runtime.config
import uncertainty
from inference.unet_passes import UNetPasses
from model import UNet
from uncertainty import (
    active_dropout,
    capture_activations,
    grad_cam,
    mc_dropout,
    uncertainty_maps,
)

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- an independent reference


def reference(
    model: UNet, images: torch.Tensor, target: str, passes: int, seed: int, ids: list[str], cam_score: str = "all"
):
    """The definition in float64, pass by pass, with autograd through the whole network.

    Returns the maps, the empty heatmaps, the mean pairwise Dice of the passes, and the margin: the smallest value
    that any ReLU in front of which dropout acts, or the predicted lesion, had to decide by its sign,
    relative to the root mean square of its map. The gradient jumps there, so
    float32 can be held to it only where its rounding decides no sign.
    """
    twin = UNet(**model.options).double().to(DEVICE)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    margins = []
    for block in (twin.bottleneck, twin.decoder4, twin.decoder3, twin.decoder2, twin.decoder1):
        for module in block.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_pre_hook(
                    lambda _, inputs: margins.append((inputs[0].abs().min() / inputs[0].square().mean().sqrt()).item())
                )
    columns = []
    for image, image_id in zip(images.double(), ids):
        probabilities, heatmaps, entropies, empty = [], [], [], 0
        for t in range(passes):
            site = 0

            def drop(x: torch.Tensor, p: float) -> torch.Tensor:
                nonlocal site
                mask = numpy_mask(seed, image_id, t, site, tuple(x.shape[1:]), p)  # noqa: B023 - used at once
                site += 1
                return x * mask / (1 - p)

            skips = [twin.encoder1(image[None])]
            for block in (twin.encoder2, twin.encoder3, twin.encoder4):
                skips.append(block(skips[-1]))
            target_map = skips[-1]
            x = twin.bottleneck(target_map)
            if target == "bottleneck":
                target_map = x
            x = drop(x, model.dropout.p)
            for name in ("decoder4", "decoder3", "decoder2", "decoder1"):
                block = getattr(twin, name)
                x = block.convolutions(torch.cat([skips.pop(), block.up(x)], 1))
                if name != "decoder1":
                    x = drop(x, block.dropout.p)
            logits = twin.head(x)
            margins.append((logits.abs().min() / logits.square().mean().sqrt()).item())
            score = logits.sum() if cam_score == "all" else logits[logits > 0].sum()
            (gradient,) = torch.autograd.grad(score, target_map)
            cam = F.relu((gradient.mean((2, 3), keepdim=True) * target_map).sum(1, keepdim=True))
            empty += int(cam.max() == 0)
            cam = cam / cam.max() if cam.max() > 0 else cam
            heatmaps.append(F.interpolate(cam, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0])
            p = torch.sigmoid(logits)[0, 0]
            probabilities.append(p)
            entropies.append(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)))
        p, cam = torch.stack(probabilities).detach(), torch.stack(heatmaps).detach()
        lesions = [one > 0.5 for one in p]
        shared = sum(2 * int((a & b).sum()) for a, b in combinations(lesions, 2))
        size = sum(int(a.sum() + b.sum()) for a, b in combinations(lesions, 2))
        columns.append((
            p.mean(0), ((p - p.mean(0)) ** 2).mean(0), ((cam - cam.mean(0)) ** 2).mean(0),
            torch.stack(entropies).detach().mean(0), torch.tensor(empty, device=DEVICE),
            torch.tensor(shared / size if size else 1.0, dtype=torch.float64, device=DEVICE),
        ))
    return [torch.stack(column) for column in zip(*columns)], min(margins)


@pytest.mark.parametrize("cam_score", ["all", "predicted"])
@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
@pytest.mark.parametrize("target", ["encoder4", "bottleneck"])
def test_fast_path_is_general_path_is_slow_float64_loop(upsampling, target, cam_score):
    model, images, ids = unet(upsampling), pictures(), ["0", "1"]
    expected, margin = reference(model, images, target, 4, 42, ids, cam_score)
    assert margin > 1e-6
    assert expected[1].max() > 1e-4 and expected[2].max() > 1e-3  # else the errors below say nothing
    for method in ("general", "fast"):
        maps = uncertainty_maps(
            model, images, target_layer=getattr(model, target), passes=4, image_ids=ids, method=method, cam_score=cam_score
        )
        for name, value in zip(MAPS, expected):
            assert relative_error(getattr(maps, name), value) < 1e-5, (method, name)
        assert torch.equal(maps.empty_cams, expected[4])
        assert not maps.fallbacks.any()
        assert torch.equal(maps.pass_dice, expected[5]) and (maps.pass_dice < 0.999).all()


# ---------------------------------------------------------------- the score of the predicted lesion


def shifted(model: UNet, images: torch.Tensor, passes: int, share: float) -> UNet:
    """The model with the head's bias such that about a share of the passes of the first image predicts some lesion."""
    with mc_dropout(model, 42) as source, torch.no_grad():
        source.start("0", range(passes))
        peaks = model(images[:1].expand(passes, -1, -1, -1)).amax((1, 2, 3)).sort().values
    model.head.bias.data -= peaks[round((1 - share) * passes) - 1 : round((1 - share) * passes) + 1].mean()
    return model


@pytest.mark.parametrize("method", ["general", "fast"])
@pytest.mark.parametrize("target", ["encoder4", "bottleneck"])
def test_a_pass_that_predicts_nothing_has_an_empty_heatmap(method, target):
    model, images = shifted(unet(), pictures(), 8, 0.5), pictures()
    expected, margin = reference(model, images, target, 8, 42, ["0", "1"], "predicted")
    assert margin > 1e-7 and expected[4][0] >= 4  # half of the passes at least
    maps = uncertainty_maps(
        model, images, target_layer=getattr(model, target), passes=8, method=method, cam_score="predicted"
    )
    assert torch.equal(maps.empty_cams, expected[4]) and torch.equal(maps.pass_dice, expected[5])
    assert relative_error(maps.saliency_variance[:1], expected[2][:1]) < 1e-5
    model.head.bias.data -= 100  # nobody predicts a lesion: no heatmap, and all passes agree
    maps = uncertainty_maps(
        model, images, target_layer=getattr(model, target), passes=8, method=method, cam_score="predicted"
    )
    assert maps.empty_cams.tolist() == [8, 8] and not maps.saliency_variance.any() and maps.pass_dice.tolist() == [1, 1]


@pytest.mark.parametrize("method", ["general", "fast"])
def test_where_all_is_lesion_both_scores_are_the_same_bits(method):
    model = unet()
    model.head.bias.data += 1000
    options = {"target_layer": model.encoder4, "passes": 4, "method": method}
    every, predicted = (uncertainty_maps(model, pictures(), cam_score=score, **options) for score in ("all", "predicted"))
    assert all(torch.equal(a, b) for a, b in zip(every, predicted)) and every.saliency_variance.max() > 0


@pytest.mark.parametrize("method", ["general", "fast"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_predicted_score_in_half_precision_stays_close(method, precision):
    model, images = unet(), pictures()
    options = {"target_layer": model.encoder4, "passes": 8, "cam_score": "predicted"}
    exact = uncertainty_maps(model, images, **options)
    half = uncertainty_maps(model, images, method=method, precision=precision, **options)
    pairs = torch.stack([half.saliency_variance.flatten(), exact.saliency_variance.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.9 and not half.fallbacks.any()


def test_the_predicted_score_changes_the_saliency_alone():
    model = unet()
    every, predicted = (
        uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=4, cam_score=score)
        for score in ("all", "predicted")
    )
    for name in every._fields:
        assert torch.equal(getattr(every, name), getattr(predicted, name)) == (name not in ("saliency_variance",)), name


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("method", ["general", "fast"])
def test_maps_do_not_depend_on_order_company_or_chunks(method):
    model, images = unet(), pictures()
    options = {"target_layer": model.encoder4, "passes": 4, "method": method}
    maps = uncertainty_maps(model, images, image_ids=["0", "1"], **options)
    turned = uncertainty_maps(model, images.flip(0), image_ids=["1", "0"], **options)
    alone = uncertainty_maps(model, images[1:], image_ids=["1"], **options)
    for whole, other, one in zip(maps, turned, alone):  # promised bit for bit
        assert torch.equal(whole, other.flip(0))
        assert torch.equal(whole[1:], one)
    for chunk in (1, 3):  # the same masks; rounding is the convolution library's affair
        chunked = uncertainty_maps(model, images, image_ids=["0", "1"], chunk=chunk, **options)
        for name in MAPS:
            assert relative_error(getattr(chunked, name), getattr(maps, name)) < 1e-5
    for name in ("pred_variance", "saliency_variance"):  # the id alone changes the masks
        other = uncertainty_maps(model, images[1:], image_ids=["2"], **options)
        assert not torch.equal(getattr(other, name), getattr(alone, name))


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_maps_do_not_depend_on_the_number_of_threads(threads):
    model, images = unet(), pictures()
    options = {"target_layer": model.encoder4, "passes": 20, "method": "fast"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = uncertainty_maps(model, images, **options)
        torch.set_num_threads(threads)
        together = uncertainty_maps(model, images, **options)
    finally:
        torch.set_num_threads(before)
    for name in MAPS:
        assert torch.equal(getattr(together, name), getattr(alone, name))


def test_two_processes_agree_bit_for_bit():
    program = (
        "import sys, hashlib, torch; sys.path[:0] = sys.argv[1:]\n"
        "torch.set_num_threads(1)\n"
        "from constructed_networks import unet, pictures\n"
        "from uncertainty import uncertainty_maps\n"
        "m = unet()\n"
        "for method in ('general', 'fast'):\n"
        "    maps = uncertainty_maps(m, pictures(), target_layer=m.encoder4, passes=3, method=method)\n"
        "    print(hashlib.sha256(b''.join(x.cpu().numpy().tobytes() for x in maps)).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(Path(__file__).parent)]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": s})
        for s in ("1", "2")
    ]
    first, second = (process.stdout.split() for process in outputs)
    assert len(first) == 2 and first == second


@pytest.mark.parametrize("method", ["general", "fast"])
def test_nothing_is_left_behind(method):
    model, images = unet(), pictures()
    model.decoder3.train()
    model.head.weight.requires_grad_(False)
    before = images.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    uncertainty_maps(model, images, target_layer=model.bottleneck, passes=2, method=method)
    assert torch.equal(images, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks or m._backward_hooks or "forward" in vars(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


def test_an_error_leaves_nothing_behind_either():
    model = unet()
    with pytest.raises(ValueError, match="does not reach"):
        uncertainty_maps(model, pictures(), target_layer=nn.Conv2d(1, 1, 1), passes=2)
    assert not any(m.training or m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- degenerate input


@pytest.mark.parametrize("method", ["general", "fast"])
def test_one_pass_has_no_variance(method):
    model = unet()
    maps = uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=1, method=method)
    assert not maps.pred_variance.any() and not maps.saliency_variance.any()
    assert ((maps.mean_prediction > 0) & (maps.mean_prediction < 1)).all()
    assert maps.pass_dice.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["general", "fast"])
def test_constant_predictions_have_zero_variance(method):
    """A head without weights gives logits that are its bias, and no gradient at all."""
    model = unet()
    nn.init.zeros_(model.head.weight)
    nn.init.constant_(model.head.bias, 0.5)
    maps = uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=4, method=method)
    assert not maps.pred_variance.any() and not maps.saliency_variance.any()
    torch.testing.assert_close(maps.mean_prediction, torch.full((2, HEIGHT, WIDTH), 1 / (1 + math.exp(-0.5)), device=DEVICE))
    assert maps.empty_cams.tolist() == [4, 4]


@pytest.mark.parametrize("method", ["general", "fast"])
def test_a_negative_head_empties_the_cams_it_should(method):
    """The heatmaps of S and -S cannot both be positive everywhere: counted, zero, never not a number."""
    model = unet(seed=24)
    for _ in range(2):
        model.head.weight.data.neg_()
        maps = uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=4, method=method)
        assert all(torch.isfinite(x.double()).all() for x in maps)
        expected, _ = reference(model, pictures(), "encoder4", 4, 42, ["0", "1"])
        assert torch.equal(maps.empty_cams, expected[4])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", ["general", "fast"])
def test_scaling_the_score_changes_no_heatmap(method, scale):
    model = unet()
    options = {"target_layer": model.encoder4, "passes": 4, "method": method}
    maps = uncertainty_maps(model, pictures(), **options)
    model.head.weight.data.mul_(scale)
    scaled = uncertainty_maps(model, pictures(), **options)
    assert maps.saliency_variance.max() > 0
    assert relative_error(scaled.saliency_variance, maps.saliency_variance) < 1e-5
    assert torch.equal(scaled.empty_cams, maps.empty_cams)


def test_grad_cam_by_hand():
    activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # 1, C = 2, h = 1, w = 2
    weights = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]])
    cam, empty = grad_cam(activations, weights)
    # 1 + 3, 2 + 0 over 4; relu(1 - 3), 2 - 0 over 2; both negative; no weights at all
    assert cam[:, 0].tolist() == [[1.0, 0.5], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert empty.tolist() == [False, False, True, True]
    raw, _ = grad_cam(activations, weights, normalise=False)
    assert raw[:, 0].tolist() == [[4.0, 2.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_capturing_cuts_the_graph_and_leaves_no_hook():
    """y = b(a(x)): the gradient of sum(y) at a(x) is b's weight, summed over outputs; nothing reaches a or x."""
    a, b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    with capture_activations(a) as captured:
        b(a(x)).sum().backward()
        assert len(captured) == 1
        torch.testing.assert_close(captured[0].grad[0, :, 0, 0], b.weight.detach().sum(0).flatten())
        a(2 * x)
        assert len(captured) == 1 and torch.equal(captured[0], a(2 * x).detach())  # the newest alone
    assert x.grad is None and a.weight.grad is None and not a._forward_hooks


def test_what_follows_a_captured_layer_may_work_in_place():
    layer, after = nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = layer(x).detach()
    with capture_activations(layer) as captured:
        score = after(layer(x)).sum()
    assert torch.equal(captured[0], expected)
    assert torch.equal(torch.autograd.grad(score, captured)[0], (expected > 0).float())


def test_other_hooks_of_a_captured_layer_act_behind_it():
    layer = nn.Conv2d(1, 2, 1)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    with capture_activations(layer) as captured:
        score = layer(torch.ones(1, 1, 4, 4)).sum()
    assert torch.autograd.grad(score, captured)[0].unique().tolist() == [3.0]


# ---------------------------------------------------------------- against pytorch-grad-cam


@pytest.mark.parametrize("target", ["encoder4", "bottleneck"])
def test_grad_cam_is_that_of_pytorch_grad_cam(target):
    """With dropout off.

    That library rescales every map twice, before and after it is upsampled: it
    subtracts the minimum and divides by 1e-7 plus the maximum.
    """

    def rescaled(x: torch.Tensor) -> torch.Tensor:
        return (x - x.min()) / (1e-7 + (x - x.min()).max())

    library = pytest.importorskip("pytorch_grad_cam")
    model, images = unet(dropout=0.0), pictures(1)
    layer = getattr(model, target)
    theirs = library.GradCAM(model, [layer])(images, targets=[lambda output: output.sum()])[0]  # H, W
    model.zero_grad(set_to_none=True)
    with capture_activations(layer) as seen:
        score = model(images).sum()
        (gradient,) = torch.autograd.grad(score, seen[0])
    activations = seen[0].detach()
    # without dropout the engine has no site, and one pass is the plain network
    engine = UNetPasses(model, layer)
    _, weights = engine(engine.encode(images), 1, lambda x, site, first: None)
    for a in (gradient.mean((2, 3)), weights):
        cam, _ = grad_cam(activations, a, normalise=False)
        ours = F.interpolate(rescaled(cam)[None], (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0, 0]
        ours = rescaled(ours)
        np.testing.assert_allclose(ours.cpu(), theirs, atol=1e-4)
        assert ours.max() > 0.5


# ---------------------------------------------------------------- precision


def test_half_precision_stays_close_and_moments_are_float32():
    model, images = unet(), pictures()
    options = {"target_layer": model.encoder4, "passes": 8}
    exact = uncertainty_maps(model, images, **options)
    for method in ("general", "fast"):
        half = uncertainty_maps(model, images, method=method, precision="bf16", **options)
        assert all(getattr(half, name).dtype == torch.float32 for name in MAPS)
        assert 0 < relative_error(half.mean_prediction, exact.mean_prediction) < 0.1
        pairs = torch.stack([half.pred_variance.flatten(), exact.pred_variance.flatten()])
        assert torch.corrcoef(pairs)[0, 1] > 0.95


@pytest.mark.parametrize("method", ["general", "fast"])
def test_overflow_in_half_precision_falls_back_for_that_image_and_is_counted(method):
    model, images = unet(), pictures()
    images[1] *= 1e6  # float16 ends at 65504
    options = {"target_layer": model.encoder4, "passes": 3, "method": method}
    exact = uncertainty_maps(model, images, **options)
    half = uncertainty_maps(model, images, precision="fp16", **options)
    assert half.fallbacks.tolist() == [0, 1] and exact.fallbacks.tolist() == [0, 0]
    for name in MAPS:
        assert torch.equal(getattr(half, name)[1], getattr(exact, name)[1])
        assert not torch.equal(getattr(half, name)[0], getattr(exact, name)[0])


@pytest.mark.parametrize("method", ["general", "fast"])
def test_a_gradient_that_overflows_is_no_empty_heatmap(method):
    model, images = unet(), pictures()
    model.head.weight.data.mul_(1e6)
    options = {"target_layer": model.encoder4, "passes": 2, "method": method}
    exact = uncertainty_maps(model, images, **options)
    half = uncertainty_maps(model, images, precision="fp16", **options)
    assert half.fallbacks.tolist() == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(half[:5], exact[:5]))


def test_precision_switches_are_put_back():
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        name = "fp32_precision"
        switches = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul]
    else:  # before PyTorch 2.9
        name, switches = "allow_tf32", [backends.cudnn, backends.cuda.matmul]
    model = unet()
    before = [getattr(switch, name) for switch in switches]
    for precision in ("fp32", "tf32"):
        uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=1, precision=precision)
        assert [getattr(switch, name) for switch in switches] == before


# ---------------------------------------------------------------- errors


class Functional(nn.Module):
    """Dropout as a function, which no module's mode turns on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5, self.training)


@pytest.mark.parametrize("model", [UNet(width=2, dropout=0.0), nn.Sequential(nn.Conv2d(3, 1, 1), nn.Dropout(0.0)), Functional()])
def test_no_active_dropout_is_an_error(model):
    with pytest.raises(ValueError, match="no dropout module with p > 0"):
        uncertainty_maps(model, pictures(), target_layer=next(model.children()), passes=2)
    with pytest.raises(ValueError), mc_dropout(model):
        pass


@pytest.mark.parametrize("options,message", [
    ({"passes": 0}, "passes must be"), ({"image_ids": ["a"]}, "2 images but 1 ids"),
    ({"method": "quick"}, "method must be"), ({"precision": "fp8"}, "precision must be"),
    ({"cam_score": "lesion"}, "cam_score must be"),
])
def test_arguments_out_of_range(options, message):
    model = unet()
    with pytest.raises(ValueError, match=message):
        uncertainty_maps(model, pictures(), target_layer=model.encoder4, **options)


def test_certain_or_foreign_dropout_is_an_error():
    for layer, message in ((nn.Dropout(1.0), "p = 1"), (nn.AlphaDropout(0.5), "AlphaDropout")):
        with pytest.raises(ValueError, match=message):
            active_dropout(nn.Sequential(nn.Conv2d(3, 1, 1), layer))


def test_not_finite_logits_are_an_error():
    model = unet()
    model.head.bias.data.fill_(math.nan)
    for method, precision in (("general", "fp32"), ("fast", "fp32"), ("general", "bf16"), ("fast", "bf16")):
        with pytest.raises(ValueError, match="image 0 are not finite"):
            uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=2, method=method, precision=precision)


class Aside(nn.Module):
    """A network whose logits leave the output of one of its layers aside."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut, self.used, self.aside, self.dropout = cut, nn.Conv2d(3, 1, 1), nn.Conv2d(3, 2, 1), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        aside = self.aside(x)
        return self.dropout(self.used(x)) + (0 * aside.detach().sum() if self.cut else 0)


@pytest.mark.parametrize("cut", [True, False])
def test_a_target_that_the_logits_do_not_depend_on_is_an_error(cut):
    model = Aside(cut).to(DEVICE)
    with pytest.raises(ValueError, match="do not depend on the output of the target layer"):
        uncertainty_maps(model, pictures(), target_layer=model.aside, passes=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_fast_path_is_for_the_unmodified_network():
    model = unet()
    model.decoder2.convolutions[2] = nn.LeakyReLU()
    with pytest.raises(ValueError, match="unmodified UNet"):
        uncertainty_maps(model, pictures(), target_layer=model.encoder4, method="fast")
    maps = uncertainty_maps(model, pictures(), target_layer=model.encoder4, passes=2)  # general, by itself
    assert maps.pred_variance.max() > 0


def test_sites_with_other_rates_and_none():
    """Each site's own p, and a site with p = 0, which takes no mask."""
    model, images = unet(), pictures()
    model.dropout.p, model.decoder4.dropout.p, model.decoder3.dropout.p = 0.4, 0.0, 0.1
    general, fast = (
        uncertainty_maps(model, images, target_layer=model.encoder4, passes=4, method=m) for m in ("general", "fast")
    )
    for name in MAPS:
        assert relative_error(getattr(fast, name), getattr(general, name)) < 1e-5


# ---------------------------------------------------------------- any model


def test_another_librarys_network_works():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=1, aux_loss=None
    ).to(DEVICE)
    for module in model.modules():  # one look at some data, or an untrained network's signal dies out
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(pictures(4, 64, 64, seed=2))
    model.eval()
    images = pictures(1, 64, 64)
    options = {"target_layer": model.backbone["16"], "passes": 5}
    maps = uncertainty_maps(model, images, chunk=2, **options)
    with mc_dropout(model, 42) as source, torch.no_grad():  # the same masks, pass by pass
        passes = []
        for t in range(5):
            source.start("0", range(t, t + 1))
            passes.append(torch.sigmoid(model(images)["out"][0, 0].double()))
    expected = torch.stack(passes)
    assert relative_error(maps.mean_prediction, expected.mean(0)[None]) < 1e-5
    assert relative_error(maps.pred_variance, expected.var(0, unbiased=False)[None]) < 1e-3
    assert maps.saliency_variance.max() > 0
    assert "out" in model(images) and not any(m.training for m in model.modules())


# ---------------------------------------------------------------- one truth


def test_the_command_line_offers_the_same_precisions():
    assert uncertainty.PRECISIONS == runtime.config.PRECISIONS
    assert uncertainty.CAM_SCORES == runtime.config.CAM_SCORES


@pytest.mark.parametrize("module", [
    uncertainty, inference.flips, inference.logits, inference.masks, inference.moments, inference.unet_passes, model_module,
])
def test_the_examples_in_the_docstrings_hold(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0 and attempted > 0
