"""Maps of networks that others wrote, against a slow loop in float64 that knows nothing of how they are made here.

Of the project it uses the written rule of the masks alone (``numpy_mask``, in NumPy) and the places where dropout was
inserted. One pass at a time, the gradient by a whole backward pass, every map kept and its variance taken at the end.
"""

from __future__ import annotations

import dataclasses

import interop_networks
import pytest
import torch
import torch.nn.functional as F
from constructed_networks import numpy_mask, pictures, relative_error
from interop_networks import CASES, Case
from torch import Tensor, nn

from experiment.network_checks import check_network
from experiment.networks import UserNetwork, build, target_layer
from runtime.config import Config
from uncertainty import uncertainty_maps

SEED, PASSES, P, SIZE = 1, 5, 0.2, (64, 96)


def configured(case: Case) -> Config:
    return Config(
        model=f"interop_networks:{case.factory}", target_layer=case.target, image_size=64, passes=PASSES, seed=SEED,
        insert_dropout=P if case.sites else None,
    )


def slow_maps(network: nn.Module, case: Case, image: Tensor, id: str) -> dict[str, Tensor]:
    """The maps of one image (C, H, W), in float64."""
    network = network.double().eval()
    probabilities, heatmaps = [], []
    site, t, seen = 0, 0, []

    def dropped(x: Tensor, p: float, channels: bool) -> Tensor:
        nonlocal site
        shape = (x.shape[1], 1, 1) if channels else tuple(x.shape[1:])
        mask = numpy_mask(SEED, id, t, site, shape, p)
        site += 1
        return x * mask / (1 - p)

    handles = [network.get_submodule(case.target).register_forward_hook(lambda m, i, output: seen.append(output))]
    for path in case.sites:
        handles.append(network.get_submodule(path).register_forward_hook(lambda m, i, output: dropped(output, P, False)))
    for module in network.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0:
            channels = isinstance(module, nn.Dropout2d)
            handles.append(module.register_forward_hook(lambda m, i, output, c=channels: dropped(i[0], m.p, c)))
    for t in range(PASSES):  # noqa: B007
        site = 0
        seen.clear()
        output = network(image.double()[None])
        logits = output["out"] if isinstance(output, dict) else output
        (gradient,) = torch.autograd.grad(logits.sum(), seen)
        heat = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True).clamp_min(0).detach()
        heat = heat / heat.max() if heat.max() > 0 else heat
        heatmaps.append(F.interpolate(heat, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0])
        probabilities.append(torch.sigmoid(logits[0, 0]).detach())
    for handle in handles:
        handle.remove()
    predicted, saliency = torch.stack(probabilities), torch.stack(heatmaps)
    return {
        "mean_prediction": predicted.mean(0), "pred_variance": predicted.var(0, unbiased=False),
        "saliency_variance": saliency.var(0, unbiased=False),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.factory}{'+dropout' if case.sites else ''}")
def test_maps_are_those_of_the_slow_loop(case, capsys):
    config = configured(case)
    network = build(config)
    assert isinstance(network, UserNetwork) and tuple(network.sites) == case.sites
    check_network(config)
    with torch.no_grad():  # statistics of batch norm that are nobody's special case
        network.train()
        for seed in range(4):
            network(pictures(4, *SIZE, seed=10 + seed))
    plain = getattr(interop_networks, case.factory)()
    plain.load_state_dict(network.state_dict())
    images, ids = pictures(2, *SIZE), ["one", "two"]
    slow = [slow_maps(plain, case, image, id) for image, id in zip(images, ids)]
    largest = []
    for precision in (torch.float64, torch.float32):
        maps = uncertainty_maps(
            network.to(precision), images.to(precision), target_layer=target_layer(config, network), passes=PASSES, seed=SEED,
            image_ids=ids,
        )
        assert float(maps.pred_variance.amax((1, 2)).min()) > 0 and float(maps.saliency_variance.amax((1, 2)).min()) > 0
        errors = {name: relative_error(getattr(maps, name), torch.stack([one[name] for one in slow])) for name in slow[0]}
        largest.append(max(errors.values()))
    with capsys.disabled():
        where = f"dropout after {len(case.sites)} layers" if case.sites else "its own dropout"
        print(f"\n{case.factory:<24} at {case.target:<42} {where:<23} largest relative difference {largest[0]:.1e}, "
              f"in float32 {largest[1]:.1e}", end="")
    # the same mathematics; in float32 instance norm lets the mean gradient cancel almost to nothing
    assert largest[0] < 1e-9 and largest[1] < 1e-2


def test_weights_fit_with_and_without_inserted_dropout():
    for case in CASES:
        config = configured(case)
        without = dataclasses.replace(config, insert_dropout=None)
        assert list(build(config).state_dict()) == list(build(without).state_dict())
