"""Checkpoints: written whole, read without running code, refused when something else made or changed them."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import UNet
from storage import UserError, check_stored, fingerprint, read_json, read_sealed, whole_file


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint that loads with ``weights_only=True``, whole or not at all.

    It carries a checksum of its content, by which :func:`load_checkpoint` knows it again.
    """
    # by way of memory: on a full disk torch.save raises an error that says nothing of the disk
    buffer = io.BytesIO()
    torch.save({**content, "checksum": content_checksum(content)}, buffer)
    with whole_file(path) as stream:
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


def load_model(path: Path, device: torch.device) -> UNet:
    """Rebuild the U-Net that a checkpoint describes, in evaluation mode.

    Raises:
        UserError: see :func:`load_checkpoint`, or the weights do not fit the options.
    """
    content = load_checkpoint(path)
    try:
        with torch.device("meta"):  # shapes alone: options that claim a huge model must not allocate it
            expected = UNet(**content["options"]).state_dict()
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in content["model"].items()}
        if found != {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}:
            raise ValueError("other names, shapes or types")
        model = UNet(**content["options"])
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


def save_best(path: Path, content: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    """Save the weights of the best epoch so far, with its number and validation Dice."""
    best = {key: content[key] for key in ("model", "options", "identity")}
    save_checkpoint(path, {**best, "epoch": done["best_epoch"], "validation_dice": done["best"]})


def finished_weights(source: Path, decides: Mapping[str, Any], free: Collection[str]) -> str:
    """The fingerprint of the weights of a finished run that another run wants to take.

    Args:
        source: results folder of the finished run.
        decides: the settings and the data of the other run.
        free: those of them in which the two may differ.

    Raises:
        UserError: there is no finished run, its weights are not those it was
            evaluated with, or it was trained in another way or on other data.
    """
    if not (source / "metrics.json").is_file():
        raise UserError(f"--weights-from {source} holds no finished run (no metrics.json); finish it, or name another folder")
    metrics, record = read_sealed(source / "metrics.json"), read_json(source / "config.json")
    best = source / "weights" / "best_model.pth"
    weights = state_fingerprint(load_checkpoint(best)["model"])
    if metrics.get("identity") != fingerprint([record.get("identity"), weights]):
        raise UserError(f"{best} does not hold the weights that {source / 'metrics.json'} is about; finish that run first")
    before = record.get("decides", {})
    changed = [
        f"{key} is {before.get(key)!r} there and {decides.get(key)!r} here"
        for key in sorted({*before, *decides} - {*free, "weights"}) if before.get(key) != decides.get(key)
    ]
    if changed:
        raise UserError(f"{source} was trained otherwise: {'; '.join(changed)}; give the same, or leave --weights-from out")
    return weights


def copy_weights(source: Path, results: Path) -> None:
    """Copy the best weights and the training log of one results folder into another."""
    for name in ("weights/best_model.pth", "training_log.csv"):
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {source / name}: {error.strerror or error}") from error
        with whole_file(results / name) as stream:
            stream.write(content)


def resumable_state(state_path: Path, best_path: Path, identity: str) -> dict[str, Any] | None:
    """The state to go on from, with the best weights in place; None where training starts over.

    It starts over where a file is missing or was made by another configuration.

    Raises:
        UserError: a file is damaged, or the best weights are not those that
            the state says were the best.
    """
    if not state_path.exists():
        return None
    state = load_checkpoint(state_path, sealed=True)
    if state.get("identity") != identity:
        return None
    done = state["done"]
    if done["best_epoch"] == done["epoch"]:
        # a run that died between the two files left an older best, or none; this epoch's weights are the best
        found = load_checkpoint(best_path) if best_path.exists() else {}
        if found.get("identity") != identity or found.get("epoch") != done["epoch"]:
            save_best(best_path, state, done)
    if not best_path.exists():
        return None
    best = load_checkpoint(best_path)
    if best.get("identity") != identity or state_fingerprint(best["model"]) != done["best_weights"]:
        raise UserError(
            f"{best_path} does not hold the weights of this run's best epoch ({done['best_epoch']}); "
            f"put the original back, or delete {best_path.parent} to train again"
        )
    return state
