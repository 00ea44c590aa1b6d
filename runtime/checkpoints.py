"""Checkpoints: written whole, read without running code, refused when something else made or changed them."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.records import check_stored


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


def load_model(path: Path, build: Callable[..., nn.Module], device: torch.device) -> nn.Module:
    """Rebuild the network that a checkpoint describes, in evaluation mode.

    Args:
        path: the checkpoint.
        build: makes a network from the keyword arguments that the checkpoint holds under "options".
        device: where the network goes.

    Raises:
        UserError: see :func:`load_checkpoint`, or the weights do not fit the options.
    """
    content = load_checkpoint(path)
    try:
        with torch.device("meta"):  # shapes alone: options that claim a huge model must not allocate it
            expected = build(**content["options"]).state_dict()
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in content["model"].items()}
        if found != {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}:
            raise ValueError("other names, shapes or types")
        model = build(**content["options"])
        model.load_state_dict(content["model"])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit the model it describes; delete it and run again") from error
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are NaN or infinite; delete it and run again")
    return model.to(device).eval()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of every weight and statistic of a model: equal weights, equal fingerprint."""
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """:func:`weights_fingerprint` of a model's ``state_dict()``."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
