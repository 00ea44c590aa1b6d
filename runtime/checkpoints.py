"""Checkpoints: written whole, read without running code, refused when something else made or changed them."""

from __future__ import annotations

import hashlib
import io
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
from runtime.records import check_stored

N = TypeVar("N", bound=nn.Module)


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


def load_checkpoint(path: Path, sealed: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running any code it may contain.

    Args:
        path: the file.
        sealed: whether it must carry the checksum that :func:`save_checkpoint`
            adds; a checksum that is there must always be right.

    Raises:
        UserError: it is missing, damaged, holds more than weights, or was
            changed since it was written.
    """
    try:
        check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; run main.py first") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as a checkpoint ({error}); delete it and run again") from error
    except Exception as error:  # the restricted unpickler raises almost anything on foreign bytes
        raise UserError(
            f"{path} is not a checkpoint of this program ({type(error).__name__}); delete it and run again"
        ) from error
    if not isinstance(content, dict) or not {"model", "options"} <= content.keys():
        raise UserError(f"{path} lacks the model or its options; delete it and run again")
    checksum = content.pop("checksum", None)
    if checksum is None and sealed or checksum not in (None, content_checksum(content)):
        raise UserError(f"{path} was changed after a run wrote it; put the original back, or delete it and run again")
    return content


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
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
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
