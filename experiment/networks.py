"""The network that a configuration names: the U-Net, or one that a factory of the user's makes.

Made, given dropout, loaded with weights, and described for a run's identity. The code of a network comes from the
configuration alone: a checkpoint holds weights, and names no code. :mod:`experiment.network_checks` tries it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Union

import torch
from torch import Tensor, nn

from inference.layers import Call, decoder_blocks, insert_after, trace
from inference.logits import WrongOutput, selected_logits
from model import UNet
from runtime.checkpoints import load_checkpoint, misfit, not_finite, rebuilt, save_checkpoint, state_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from runtime.records import check_stored, fingerprint, write_csv
from runtime.tensor_files import check_dense
from uncertainty import mc_dropout

ROOT = Path(__file__).resolve().parent.parent
#: Keys under which a file may hold its state dictionary.
NESTINGS = ("state_dict", "model_state_dict", "model")
#: What wrappers put in front of the names of weights.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: Marks dropout that was inserted after a layer.
DROPOUT = " + dropout"
#: Where the code of PyTorch lies, which no error is blamed on.
LIBRARY = str(Path(torch.__file__).parent)

_made: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # networks that factories returned


class UserNetwork(nn.Module):
    """A network of the user's, with one logit per pixel in whatever it returns, and dropout that it does not know of.

    Its weights have the names that the network gives them: ``state_dict`` is that of the network.

    Args:
        network: maps float (B, 3, H, W) to logits, or to something that holds them.
        output: key or place of the logits; None for the logits themselves or "out".

    Attributes:
        inserted: dropout modules that act after layers of the network; see :meth:`insert_dropout`.
        sites: the paths of these layers.
    """

    #: A checkpoint of it describes nothing: the configuration names the factory.
    options: Mapping[str, Any] = {}

    def __init__(self, network: nn.Module, output: str | None = None) -> None:
        super().__init__()
        self.network, self.output = network, output
        self.inserted = nn.ModuleList()
        self.sites: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, 1, H, W)."""
        return selected_logits(self.network(images), self.output, images)

    def insert_dropout(self, sites: Sequence[str], p: float) -> None:
        """Add dropout of probability ``p`` after the layers with these paths."""
        for site in sites:
            self.inserted.append(nn.Dropout(p))
            insert_after(self.network.get_submodule(site), self.inserted[-1])
            self.sites.append(site)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the network."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`state_dict` returned."""
        return self.network.load_state_dict(state_dict, *args, **kwargs)


Network = Union[UNet, UserNetwork]


# ---------------------------------------------------------------- making a network


def build(config: Config) -> Network:
    """The network that a configuration names, on the CPU; its initial weights are drawn from ``config.seed``.

    Raises:
        UserError: the factory of ``--model`` is not there, fails or returns something else than a new network; or no
            layer was found after which dropout can be added.
    """
    if config.model is None:
        torch.manual_seed(config.seed)
        return UNet(config.width, config.dropout, config.upsampling)
    factory = _factory(config.model)
    torch.manual_seed(config.seed)
    with blamed(config.model, "the factory"):
        network = factory()
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {config.model} returned a {type(network).__name__} instead of a torch.nn.Module")
    if network in _made:
        raise UserError(f"--model {config.model} returned the same network twice; make a new one in each call")
    _made.add(network)
    user = UserNetwork(network.cpu(), config.output)
    if config.insert_dropout is not None:
        sites = decoder_blocks(traced(config, user), config.image_size, config.image_size)
        if not sites:
            raise UserError(
                f"--insert-dropout found no layer of {config.model} that returns a feature map (B, C, h, w) the logits depend "
                "on; put nn.Dropout modules into the network"
            )
        user.insert_dropout(sites, config.insert_dropout)
    return user


def _factory(name: str) -> Callable[[], Any]:
    """The function that ``package:function`` names, importable from the current directory."""
    module_name, colon, attributes = name.partition(":")
    if not (module_name and colon and attributes):
        raise UserError(f"--model {name} is not of the form package:function")
    _look_into_current_directory()
    with torch.random.fork_rng(devices=[]), blamed(name, f"importing {module_name}"):
        try:
            value: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # a module that the user's module imports
            raise UserError(
                f"--model {name}: there is no module {error.name} in {os.getcwd()} or on PYTHONPATH; start the command "
                "where the package lies"
            ) from error
    where = getattr(value, "__file__", None) or module_name
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            raise UserError(f"--model {name}: there is no {attribute} in {where}; name a function that takes no argument")
        value = getattr(value, attribute)
    if not callable(value):
        raise UserError(f"--model {name} names a {type(value).__name__}; name a function that takes no argument")
    return value  # type: ignore[no-any-return]


def _look_into_current_directory() -> None:
    """Let modules of the current directory be imported, as ``python -m`` would, but none in place of this program's own."""
    here = os.getcwd()
    if here not in sys.path and Path(here) != ROOT:
        places = [place for place, folder in enumerate(sys.path) if Path(folder or here).resolve() == ROOT]
        sys.path.insert(places[0] + 1 if places else 0, here)


@contextmanager
def blamed(name: str, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that says what was done, and where it was raised."""
    try:
        yield
    except UserError:
        raise
    except WrongOutput as error:
        raise UserError(f"--model {name} {error}") from error
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        at = [frame for frame in frames if not frame.filename.startswith((LIBRARY, "<"))][-1]
        lines = str(error).strip().splitlines()
        told = f": {lines[0][:300]}" if lines else ""
        told = f"{type(error).__name__}{told} ({at.filename}, line {at.lineno})"
        raise UserError(f"--model {name}: {what} raised {told}") from error


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module back afterwards, and the global random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def noise(config: Config, count: int) -> Tensor:
    """Noise of the size of the images."""
    size = config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def traced(config: Config, user: UserNetwork, passing: bool = False) -> list[Call]:
    """The calls of one forward in evaluation mode, or with dropout as in a pass; inserted dropout is named by its site."""
    layers = {path: layer for path, layer in user.network.named_modules() if path}
    layers.update({f"{site}{DROPOUT}": layer for site, layer in zip(user.sites, user.inserted)})
    with modes_kept(user), blamed(str(config.model), "a forward pass"):
        user.eval()
        if not passing:
            return trace(user, layers, noise(config, 1))
        with mc_dropout(user):
            return trace(user, layers, noise(config, 1))


def memory_layout(model: nn.Module) -> torch.memory_format:
    """Channels last, which is faster, for the U-Net; another network may look at its tensors in PyTorch's usual order."""
    return torch.channels_last if isinstance(model, UNet) else torch.contiguous_format


def target_layer(config: Config, model: Network) -> nn.Module:
    """The layer whose activations Grad-CAM weighs.

    Raises:
        UserError: the network has none of that name.
    """
    network = model.network if isinstance(model, UserNetwork) else model
    layers = dict(network.named_modules())
    if not config.target_layer or config.target_layer not in layers:
        raise UserError(f"--target-layer: there is no layer {config.target_layer!r} in {config.model or 'the U-Net'}")
    return layers[config.target_layer]


# ---------------------------------------------------------------- its weights


def load_network(path: Path, config: Config, group: ProcessGroup) -> Network:
    """The network of a configuration with the weights of a checkpoint, in every process, in evaluation mode.

    Raises:
        UserError: see :func:`runtime.checkpoints.load_model` and :func:`build`.
    """
    content = group.shared(lambda: load_checkpoint(path))
    made: Callable[..., Network] = UNet if config.model is None else partial(build, config)
    return rebuilt(content, path, made, group.device)


def load_weights(user: UserNetwork, path: Path, config: Config) -> None:
    """Load the state dictionary of ``--model-weights`` into a network.

    Raises:
        UserError: the file cannot be read, is not one of weights, does not fit, or holds NaN or infinity.
    """
    expected = user.state_dict()
    state = read_state(path, expected)
    wrong = misfit(state, expected)
    if wrong is not None:
        raise UserError(f"--model-weights {path} does not fit {config.model}: {wrong} ({len(state)} tensors for {len(expected)})")
    broken = not_finite(state)
    if broken is not None:
        raise UserError(f"--model-weights {path} holds NaN or infinity in {broken}; give another file")
    with blamed(str(config.model), f"loading {path}"):
        user.load_state_dict(state)


def read_state(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary that a file holds, without running any code it may contain.

    It may lie under one of ``NESTINGS``, and its names may begin with one of ``PREFIXES``, where none of them is known.

    Args:
        path: written by ``torch.save``.
        expected: the state dictionary of the network that it is for.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        if zipfile.is_zipfile(path):
            check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors_in(content):
            check_dense(tensor)
    except OSError as error:
        raise UserError(f"cannot read --model-weights {path}: {error.strerror or error}") from error
    except Exception as error:  # the restricted unpickler raises almost anything on foreign bytes
        raise UserError(
            f"--model-weights {path} is no file of weights alone ({type(error).__name__}); write one with "
            "torch.save(network.state_dict(), FILE)"
        ) from error
    while isinstance(content, dict) and not is_state(content):
        inner = next((key for key in NESTINGS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, dict) or not is_state(content):
        raise UserError(
            f"--model-weights {path} holds no state dictionary, by itself or under {', '.join(NESTINGS)}; write one with "
            "torch.save(network.state_dict(), FILE)"
        )
    for prefix in [*PREFIXES] * 2:
        if not content.keys() & expected.keys() and all(name.startswith(prefix) for name in content):
            content = {name[len(prefix):]: tensor for name, tensor in content.items()}
    return content


def _tensors_in(content: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in nested mappings; those elsewhere are not used."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict) and depth <= len(NESTINGS):
        for value in content.values():
            yield from _tensors_in(value, depth + 1)


def is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def take_weights(config: Config, results: Path, identity: str) -> None:
    """Save the weights of ``--model-weights`` as those of a run, whose training log is empty."""
    user = build(config)
    assert isinstance(user, UserNetwork)
    load_weights(user, Path(str(config.model_weights)), config)
    content = {"model": user.state_dict(), "options": {}, "identity": identity}
    save_checkpoint(results / "weights" / "best_model.pth", content)
    write_csv(results / "training_log.csv", [])


# ---------------------------------------------------------------- what a run's identity knows of it


def network_inputs(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on beside the settings, where ``--model`` is given; empty where it is not.

    "architecture" is a fingerprint of the network's description and of the names, shapes and types of its weights;
    "inserted_dropout" lists the layers after which dropout was inserted; "weights" is that of ``--model-weights``.
    """
    if config.model is None:
        return {}
    user = build(config)
    assert isinstance(user, UserNetwork)
    inputs: dict[str, Any] = {"architecture": architecture(user)}
    if config.insert_dropout is not None:
        inputs["inserted_dropout"] = list(user.sites)
    if config.model_weights is not None:
        load_weights(user, Path(config.model_weights), config)
        inputs["weights"] = state_fingerprint(user.state_dict())
    return inputs


def architecture(user: UserNetwork) -> str:
    """The fingerprint of a network without its weights."""
    described = re.sub(r" at 0x[0-9a-fA-F]+", "", str(user.network))  # addresses differ from process to process
    state = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in user.state_dict().items()]
    return fingerprint([described, state])
