"""Checkpoints: written whole, read without running code, refused when something else made or changed them."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, TypeVar

import torch
from torch import Tensor, nn

from runtime.errors import UserError, one_line
from runtime.files import atomic_write
from runtime.schemas import (
    CHECKSUM,
    Check,
    Mismatch,
    anything,
    flag,
    list_of,
    mapping_of,
    nullable,
    number,
    record,
    text,
    whole,
)
from runtime.tensor_files import read_tensors

N = TypeVar("N", bound=nn.Module)


# ---------------------------------------------------------------- what a checkpoint may hold


def _state(value: Any, place: str) -> None:
    """A state dictionary: tensors by name, and what is noted of modules by their names."""
    mapping_of(_tensor)(value, place)
    mapping_of(mapping_of(anything))(getattr(value, "_metadata", {}), f"{place}._metadata")


def _tensor(value: Any, place: str) -> None:
    if not isinstance(value, Tensor):
        raise Mismatch(f"{place} is a {type(value).__name__} and not a tensor")


def _option(value: Any, place: str) -> None:
    if not isinstance(value, str):
        (flag if isinstance(value, bool) else number())(value, place)


_WEIGHTS: dict[str, Check] = {"model": _state, "options": mapping_of(_option)}
#: A file of weights, with the epoch that they are of.
CHECKPOINT = record(
    _WEIGHTS, {"identity": text(), "epoch": whole(0), "validation_dice": number(-1, 1), "checksum": text(CHECKSUM)}
)
#: How far a training has come; see :class:`runtime.training_state.Progress`.
PROGRESS = record({
    "epoch": whole(0), "best_dice": number(-1, 1), "best_epoch": whole(0), "best_weights": text(),
    "epochs_without_improvement": whole(0), "log": list_of(mapping_of(nullable(number()))),
}, others=False)
#: All that the next epoch of a training needs. What the optimiser may hold, :func:`check_resumable` says.
TRAINING_STATE = record({
    **_WEIGHTS, "identity": text(), "progress": PROGRESS, "scaler": mapping_of(number()),
    "optimizer": record({"state": anything, "param_groups": list_of(record({"params": list_of(whole(0), unique=True)}))}),
}, {"checksum": text(CHECKSUM)})


# ---------------------------------------------------------------- writing and reading


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint that loads with ``weights_only=True``, whole or not at all.

    It carries a checksum of its content, by which :func:`load_checkpoint` knows it again.
    """
    # by way of memory: on a full disk torch.save raises an error that says nothing of the disk
    buffer = io.BytesIO()
    torch.save({**content, "checksum": content_checksum(content)}, buffer)
    with atomic_write(path) as stream:
        stream.write(buffer.getbuffer())


def content_checksum(content: Any) -> str:
    """SHA-256 of nested dictionaries and lists of tensors, numbers and strings."""
    digest = hashlib.sha256()
    _digest(digest, content)
    return digest.hexdigest()


def _digest(digest: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        values = content.detach().cpu().contiguous()
        digest.update(f"tensor {values.dtype} {list(values.shape)};".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    elif isinstance(content, Mapping):
        digest.update(f"mapping {len(content)};".encode())
        for key, value in content.items():
            _digest(digest, key)
            _digest(digest, value)
    elif isinstance(content, (list, tuple)):
        digest.update(f"list {len(content)};".encode())
        for value in content:
            _digest(digest, value)
    elif isinstance(content, float):
        digest.update(b"float;" + struct.pack("<d", content))
    else:
        digest.update(f"{type(content).__name__} {content!r};".encode())


def load_checkpoint(path: Path, sealed: bool = False, schema: Check = CHECKPOINT) -> dict[str, Any]:
    """Read a checkpoint without running any code it may contain.

    Args:
        path: the file.
        sealed: whether it must carry the checksum that :func:`save_checkpoint`
            adds; a checksum that is there must always be right.
        schema: what it may hold.

    Raises:
        UserError: it is missing, damaged, holds more than weights, or was
            changed since it was written.
    """
    try:
        content = read_tensors(path)
        schema(content, "the file")
        checksum = content.pop("checksum", None)
        found = content_checksum(content)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; run main.py first") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as a checkpoint ({error}); delete it and run again") from error
    except Mismatch as error:
        raise UserError(f"{path} is not a checkpoint of this program: {error}; delete it and run again") from error
    except Exception as error:  # an unpickler raises almost anything on foreign bytes
        raise UserError(
            f"{path} is not a checkpoint of this program ({type(error).__name__}: {one_line(error)}); delete it and run again"
        ) from error
    if checksum is None and sealed or checksum not in (None, found):
        raise UserError(f"{path} was changed after a run wrote it; put the original back, or delete it and run again")
    return content


def load_training_state(path: Path) -> dict[str, Any]:
    """Read the state of a training, which must be sealed and make sense by itself; errors as of :func:`load_checkpoint`."""
    state = load_checkpoint(path, sealed=True, schema=TRAINING_STATE)
    progress = state["progress"]
    counts = (progress["best_epoch"], progress["epochs_without_improvement"])
    if len(progress["log"]) != progress["epoch"] or max(counts) > progress["epoch"]:
        raise UserError(f"{path}: the log does not have a row for each epoch; delete it and run again")
    return state


def check_resumable(
    state: Mapping[str, Any], path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Mapping[str, Any]
) -> dict[str, Any]:
    """Refuse the state of a training that this network and this optimiser cannot go on from.

    An optimiser may be fused on one device and not on another, which decides nothing but rounding.

    Args:
        state: of the training.
        path: its file.
        model, optimizer: as they are set up.
        scaler: the state of the gradient scaler that was set up.

    Returns:
        The state of the optimiser, fused where this one is.

    Raises:
        UserError: says what does not fit.
    """
    try:
        weights = model.state_dict()
        wrong = misfit(state["model"], weights, types=True) or not_finite(state["model"])
        if wrong is not None:
            raise Mismatch(wrong)
        if state["scaler"].keys() != scaler.keys():
            raise Mismatch("the scaler is another one")
        groups = zip(state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
        if len(state["optimizer"]["param_groups"]) != len(optimizer.param_groups):
            raise Mismatch("the optimiser has other groups")
        for found, own in groups:
            number(0, math.inf)(found.get("lr"), "the learning rate")
            changed = [key for key in own if key not in ("lr", "fused") and key in found and not _same(found[key], own[key])]
            if changed:
                raise Mismatch(f"the optimiser has another {changed[0]}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [place for group in state["optimizer"]["param_groups"] for place in group["params"]]
        _check_moments(state["optimizer"]["state"], dict(zip(numbers, parameters)))
        fused = optimizer.defaults.get("fused")
        return {**state["optimizer"], "param_groups": [{**group, "fused": fused} for group in state["optimizer"]["param_groups"]]}
    except Mismatch as error:
        raise UserError(f"{path} does not fit the training that it is of ({error}); delete it and run again") from error


def _same(one: Any, other: Any) -> bool:
    """Whether two settings of an optimiser are equal; lists and tuples may stand for each other."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return not isinstance(one, Tensor) and bool(one == other)


def _check_moments(state: Any, parameters: Mapping[int, Tensor]) -> None:
    """What Adam remembers of each parameter: its steps, and two tensors of the parameter's shape."""
    if not isinstance(state, Mapping) or not state.keys() <= parameters.keys():
        raise Mismatch("the optimiser has a state of other parameters")
    for place, moments in state.items():
        of = f"the optimiser's state of parameter {place}"
        record(dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), _tensor), others=False)(moments, of)
        parameter = parameters[place]
        expected = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
        wrong = misfit({name: moments[name] for name in expected}, expected, types=True) or not_finite(moments)
        if wrong is not None or moments["step"].shape != () or moments["step"].dtype != torch.float32:
            raise Mismatch(f"{of}: {wrong or 'step is no number'}")


# ---------------------------------------------------------------- networks


def load_model(path: Path, build: Callable[..., N], device: torch.device) -> N:
    """Read a checkpoint and rebuild the network that it describes, in evaluation mode.

    Args:
        path: the checkpoint.
        build: makes a network from the keyword arguments that the checkpoint holds under "options".
        device: where the network goes.

    Raises:
        UserError: see :func:`load_checkpoint` and :func:`rebuilt`.
    """
    return rebuilt(load_checkpoint(path), path, build, device)


def rebuilt(content: Mapping[str, Any], path: Path, build: Callable[..., N], device: torch.device) -> N:
    """The network that a checkpoint describes, in evaluation mode; see :func:`load_model`.

    Args:
        content: of the checkpoint.
        path: of the checkpoint, for the error's line.
        build, device: as for :func:`load_model`.

    Raises:
        UserError: the weights do not fit the options, or are not finite.
    """
    options, state = content["options"], content["model"]
    try:
        # shapes alone: options that claim a huge model must not allocate it; where there are none, nothing is claimed
        with torch.device("meta") if options else nullcontext():
            model = build(**options)
        wrong = misfit(state, model.state_dict(), types=True)
        if wrong is not None:
            raise ValueError(wrong)
        model = build(**options) if options else model
        model.load_state_dict(state)
    except (ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit the model it describes ({one_line(error)}); delete it and run again") from error
    broken = not_finite(model.state_dict())
    if broken is not None:
        raise UserError(f"{path} holds weights that are NaN or infinite, in {broken}; delete it and run again")
    return model.to(device).eval()


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], types: bool = False) -> str | None:
    """The first way in which a state dictionary is not that of a network; None where it fits.

    Args:
        found: the state dictionary.
        expected: that of the network.
        types: whether the types must be the same as well.

    Example:
        >>> misfit({"weight": torch.ones(2)}, {"weight": torch.ones(2), "bias": torch.ones(1)})
        'bias is missing'
    """
    for name in expected:
        if name not in found:
            return f"{name} is missing"
    for name, tensor in found.items():
        if name not in expected:
            return f"{name} is unexpected"
        if tensor.shape != expected[name].shape:
            return f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        if types and tensor.dtype != expected[name].dtype:
            return f"{name} is {tensor.dtype} instead of {expected[name].dtype}"
    return None


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinity; None where all are finite."""
    return next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of every weight and statistic of a model: equal weights, equal fingerprint."""
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """:func:`weights_fingerprint` of a model's ``state_dict()``."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
