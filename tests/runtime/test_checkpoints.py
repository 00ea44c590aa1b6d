"""Checkpoints: read without running code, refused when they do not fit or were changed; fingerprints of weights."""

from __future__ import annotations

import hashlib
import os
import pickle
import random

import pytest
import torch

from model import UNet
from runtime.checkpoints import (
    content_checksum,
    load_checkpoint,
    load_model,
    save_checkpoint,
    state_fingerprint,
    weights_fingerprint,
)
from runtime.errors import UserError

CPU = torch.device("cpu")


class Code:
    def __reduce__(self):
        return (os.mkdir, ("must_not_exist",))


@pytest.mark.parametrize(
    "content",
    [b"", b"random bytes", random.Random(0).randbytes(5000), pickle.dumps(Code()), pickle.dumps({"model": 1})],
    ids=["empty", "short", "long", "code", "no weights"],
)
def test_checkpoints_that_are_none_are_one_line_and_run_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pth").write_bytes(content)
    with pytest.raises(UserError, match="best.pth"):
        load_model(tmp_path / "best.pth", UNet, CPU)
    assert not (tmp_path / "must_not_exist").exists()


def test_a_checkpoint_that_does_not_fit_its_options(tmp_path):
    torch.save({"model": UNet(4).state_dict(), "options": UNet(8).options}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "x.pth", UNet, CPU)
    with pytest.raises(UserError, match="run main.py first"):
        load_model(tmp_path / "none.pth", UNet, CPU)


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = UNet(4, 0.3, "transposed")
    save_checkpoint(tmp_path / "x.pth", {"model": model.state_dict(), "options": model.options})
    loaded = load_model(tmp_path / "x.pth", UNet, CPU)
    assert isinstance(loaded, UNet) and loaded.options == model.options and not loaded.training
    assert weights_fingerprint(loaded) == weights_fingerprint(model)


def test_what_must_be_sealed_is_refused_without_its_checksum(tmp_path):
    content = {"model": {"a": torch.ones(2)}, "options": {}, "log": [{"loss": 0.5}]}
    torch.save(content, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth")["log"] == [{"loss": 0.5}]
    with pytest.raises(UserError, match="x.pth was changed after a run wrote it"):
        load_checkpoint(tmp_path / "x.pth", sealed=True)
    save_checkpoint(tmp_path / "x.pth", content)
    assert load_checkpoint(tmp_path / "x.pth", sealed=True).keys() == content.keys()  # the checksum is not handed on


def test_the_checksum_tells_values_types_shapes_and_places_apart():
    contents = [
        {"a": torch.ones(4)}, {"a": torch.ones(4).double()}, {"a": torch.ones(2, 2)}, {"b": torch.ones(4)},
        {"a": torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-23])}, {"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None},
        {"a": [1, [2]]}, {"a": [[1], 2]}, {},
    ]
    assert len({content_checksum(content) for content in contents}) == len(contents)
    strided = torch.arange(4.0)[::2]
    assert content_checksum({"a": strided}) == content_checksum({"a": strided.clone()})
    assert content_checksum([1, 2]) == content_checksum((1, 2))


def test_the_fingerprint_of_weights_is_of_their_names_and_bytes():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    digest = hashlib.sha256(b"a" + state["a"].numpy().tobytes() + b"b" + state["b"].numpy().tobytes())
    assert state_fingerprint(state) == digest.hexdigest()
    torch.manual_seed(0)
    model = UNet(2)
    before = weights_fingerprint(model)
    assert before == state_fingerprint(model.state_dict())
    next(model.buffers()).add_(1)  # the statistics of batch norm count too
    assert weights_fingerprint(model) != before
