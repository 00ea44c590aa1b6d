"""A network of the user's, tried on noise before anything expensive begins: its logits, its dropout, its target layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiment.networks import (
    DROPOUT,
    UserNetwork,
    blamed,
    build,
    is_state,
    load_weights,
    modes_kept,
    noise,
    target_layer,
    traced,
)
from inference.layers import Call, target_candidates
from inference.logits import are_probabilities
from runtime.config import Config
from runtime.errors import UserError
from uncertainty import active_dropout, uncertainty_maps

#: Passes of a network that is tried, and the variance that heatmaps have by rounding alone.
TRIED, ROUNDING = 4, 1e-12


class Description(NamedTuple):
    """What is said of a network of the user's before the run.

    Attributes:
        name: the factory.
        parameters: how many numbers they are.
        target: the layer that Grad-CAM weighs, with its shape.
        sites: the layers after which dropout was inserted.
        behind: whether some dropout lies behind the target layer.
    """

    name: str
    parameters: int
    target: str
    sites: list[str]
    behind: bool

    def __str__(self) -> str:
        dropout = f", dropout inserted after {', '.join(self.sites)}" if self.sites else ""
        where = "" if self.behind else ", all dropout in front of it"
        return f"{self.name}, {self.parameters:,} parameters, Grad-CAM at {self.target}{where}{dropout}"


def check_network(config: Config) -> Description:
    """Try a network of the user's on noise: what it returns, its dropout and its target layer.

    Initial weights that are all zero, as those of a last layer may be, count as noise, so that they hide no gradient;
    weights of ``--model-weights`` count as they are.

    Args:
        config: names a network in ``model``.

    Raises:
        UserError: it is not what a run needs; the line says what is wrong.
    """
    name, user = str(config.model), build(config)
    assert isinstance(user, UserNetwork)
    if not is_state(user.state_dict()):
        raise UserError(f"--model {name} keeps something else than tensors in its state_dict, or nothing; it cannot be saved")
    if config.model_weights is not None:
        load_weights(user, Path(config.model_weights), config)
    elif not any(parameter.requires_grad for parameter in user.parameters()):
        raise UserError(f"--model {name} has no parameter to train; give --model-weights, or make it trainable")
    else:
        _fill_zeros(user)
    with modes_kept(user):
        if config.model_weights is None:
            _finite(config, user.train(), "in training mode")
        logits = _finite(config, user.eval(), "in evaluation mode")
        if are_probabilities(logits):
            raise UserError(f"--model {name} returns probabilities, as its last step is a sigmoid; return the logits before it")
        if not torch.equal(_finite(config, user, "in evaluation mode"), logits):
            raise UserError(
                f"--model {name} draws random numbers of its own in evaluation mode (functional dropout?); use nn.Dropout "
                "modules, whose masks are drawn from the seed"
            )
    try:
        active_dropout(user)
    except ValueError as error:
        advice = "" if config.insert_dropout else "; --insert-dropout P adds nn.Dropout after the blocks of the decoder"
        raise UserError(f"--model {name}: {str(error).replace('UserNetwork', 'the network')}{advice}") from error
    calls = traced(config, user, passing=True)
    target = _checked_target(config, user, calls)
    behind = _checked_dropout(config, user, calls, target)
    _check_variation(config, user, calls)
    return Description(name, sum(map(Tensor.numel, user.parameters())), str(target), user.sites, behind)


def _fill_zeros(user: UserNetwork) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in user.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)


def _finite(config: Config, user: UserNetwork, mode: str) -> Tensor:
    """Logits of noise, after checking that they are logits."""
    name = str(config.model)
    with blamed(name, f"a forward pass of images {(2, 3, config.image_size, config.image_size)} {mode}"):
        logits = user(noise(config, 2))
    if not logits.isfinite().all():
        raise UserError(f"--model {name} returned logits that are NaN or infinite {mode}; look at its weights")
    return logits


def _checked_target(config: Config, user: UserNetwork, calls: Sequence[Call]) -> Call:
    """The newest call of the target layer, after checking that Grad-CAM can weigh it."""
    path = config.target_layer
    newest = {call.path: call for call in calls}
    found = newest.get(path)
    paths = {name for name, _ in user.network.named_modules() if name}
    if path not in paths:
        wrong = f"there is no layer {path!r} in {config.model}"
    elif found is None:
        wrong = f"the layer {path} of {config.model} is not called, or does not return one tensor"
    elif len(found.shape) != 3:
        shape = ", ".join(map(str, ("B", *found.shape)))
        wrong = f"the layer {path} of {config.model} returns ({shape}), but feature maps (B, C, h, w) are needed"
    elif found.gradient == "none":
        wrong = f"the logits of {config.model} do not depend on the layer {path}"
    elif found.gradient == "zero":
        wrong = f"the gradient of the logits at the layer {path} of {config.model} is zero everywhere: what follows it is dead"
    else:
        return found
    raise _no_target(config, user, calls, wrong)


def _no_target(config: Config, user: UserNetwork, calls: Sequence[Call], wrong: str) -> UserError:
    """The error of a target layer that will not do, with those that may."""
    paths = dict(user.network.named_modules())
    candidates = ", ".join(map(str, target_candidates([c for c in calls if c.path in paths and c.gradient == "some"])))
    if not candidates:
        return UserError(f"{wrong}, nor on any other; --model must return what its layers make of the images")
    return UserError(f"{wrong}; give --target-layer one of {candidates}")


def _check_variation(config: Config, user: UserNetwork, calls: Sequence[Call]) -> None:
    """Refuse a target layer whose heatmap no dropout changes: what is in front of it and behind it is the same in all passes."""
    with blamed(str(config.model), "making maps of noise"):
        maps = uncertainty_maps(user, noise(config, 1), target_layer=target_layer(config, user), passes=TRIED)
    if int(maps.empty_cams) < TRIED and float(maps.saliency_variance.max()) < ROUNDING:
        wrong = f"no dropout of {config.model} changes the heatmap at the layer {config.target_layer}"
        raise _no_target(config, user, calls, f"{wrong}: it is the same in all passes")


def _checked_dropout(config: Config, user: UserNetwork, calls: Sequence[Call], target: Call) -> bool:
    """Whether some dropout lies behind the target layer, after checking that some reaches the logits at all."""
    names = {module: path for path, module in user.network.named_modules()}
    active = {names[module] for module in active_dropout(user) if module in names}
    active |= {f"{site}{DROPOUT}" for site in user.sites}
    reaching = [place for place, call in enumerate(calls) if call.path in active and call.gradient != "none"]
    if not reaching:
        raise UserError(
            f"--model {config.model}: its dropout does not reach the logits, so that all passes would be the same; put dropout "
            "in front of the output" + ("" if config.insert_dropout else ", or give --insert-dropout P")
        )
    return reaching[-1] > max(place for place, call in enumerate(calls) if call is target)
