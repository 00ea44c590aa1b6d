"""Files of tensors: read as ``torch.load`` reads them, and refused before anything large is made."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import UNet
from runtime.checkpoints import check_resumable, load_checkpoint, load_training_state, save_checkpoint
from runtime.errors import UserError
from runtime.tensor_files import check_dense, check_plain, read_tensors


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24.0)
    content = {
        "view": base.view(4, 6)[1:3, ::2], "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 3), "flags": torch.tensor([True, False]),
        "half": torch.ones(3).bfloat16(), "plain": [1, 2.5, None, True, ("a", {"b": OrderedDict(c=-7)})],
        "big": 2**62, "model": UNet(2).state_dict(),
    }
    content["tied"] = content["view"]
    torch.save(content, tmp_path / "x.pth")
    found, expected = read_tensors(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True)
    assert found.keys() == expected.keys() and found["plain"] == expected["plain"] and found["big"] == 2**62
    pairs = [(found[name], expected[name]) for name in ("view", "last", "scalar", "empty", "flags", "half", "tied")]
    for one, other in [*pairs, *zip(found["model"].values(), expected["model"].values())]:
        assert torch.equal(one, other) and (one.dtype, one.stride(), one.shape) == (other.dtype, other.stride(), other.shape)


class Code:
    def __reduce__(self):
        return (print, ("must not run",))


HOSTILE = {
    "sparse": lambda: torch.eye(3).to_sparse(), "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(3, device="meta"), "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "complex": lambda: torch.ones(3, dtype=torch.complex64), "expanded": lambda: torch.ones(1).expand(10**6, 10**6),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)), "code": Code, "bytes": lambda: bytearray(10), "set": lambda: {1, 2},
    "module": lambda: torch.nn.Linear(1, 1), "dtype": lambda: torch.float32, "array": lambda: np.ones(3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_no_dense_tensor_is_refused(tmp_path, name, capsys):
    torch.save({"model": {"a": HOSTILE[name]()}, "options": {}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth is not a checkpoint of this program"):
        load_checkpoint(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["sparse", "csr", "meta", "conjugate", "expanded", "quantised"])
def test_a_tensor_that_is_not_dense_is_told_by_itself(name):
    with pytest.raises(ValueError, match="a tensor"):
        check_dense(HOSTILE[name]())


def test_parts_that_refer_to_each_other_again_and_again():
    nested: list = []
    for _ in range(12):
        nested = [nested] * 10  # 10^12 parts in a few bytes
    loop: list = []
    loop.append(loop)
    deep: list = []
    for _ in range(100):
        deep = [deep]
    tensor = torch.ones(1000)
    for content in (nested, loop, deep, ["x" * 1000] * 1000, [tensor] * 1000):
        with pytest.raises(ValueError, match="again and again|parts within parts"):
            check_plain(content, 1000)
    check_plain({"a": [tensor, 1, None]}, 10_000)


def _program(path, change):
    """A file whose pickle was edited."""
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.ones(4)}, "options": {}}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            target.writestr(member.filename, change(content) if member.filename.endswith("data.pkl") else content)


@pytest.mark.parametrize("noted", [None, [], {"a": 1}, {1: {}}])
def test_odd_notes_about_modules_are_left_out(tmp_path, noted):
    state = UNet(2).state_dict()
    save_checkpoint(tmp_path / "x.pth", {"model": state, "options": {}})
    assert load_checkpoint(tmp_path / "x.pth")["model"]._metadata == state._metadata
    state._metadata = noted
    save_checkpoint(tmp_path / "x.pth", {"model": state, "options": {}})
    assert not hasattr(load_checkpoint(tmp_path / "x.pth")["model"], "_metadata")


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"K\x04t", b"J\x00\x00\x00\x40t"),  # a storage of 2^30 numbers in 16 bytes
    lambda text: text.replace(b"K\x04\x85", b"J\x00\x00\x00\x40\x85"),  # a tensor of 2^30 numbers
    lambda text: text.replace(b"FloatStorage", b"LongStorage\n"),
    lambda text: text.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
    lambda text: b"\x80\x02" + b"r\xff\xff\xff\xff" + text[2:], lambda text: text[:-20], lambda text: b"",
    lambda text: pickle.dumps({"model": {}, "options": {}, "x": slice(1)}, 2),
], ids=range(8))
def test_edited_programs_are_refused(tmp_path, change):
    _program(tmp_path / "x.pth", change)
    with pytest.raises(UserError, match="x.pth"):
        load_checkpoint(tmp_path / "x.pth")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_of_the_program_may_change(tmp_path, data):
    def change(content):
        found = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
        return bytes(found)

    _program(tmp_path / "x.pth", change)
    try:
        load_checkpoint(tmp_path / "x.pth")
    except UserError as error:
        assert str(error).isprintable()


# ---------------------------------------------------------------- states of a training


@pytest.fixture
def training():
    model = UNet(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(training, **changes):
    model, optimizer = training
    progress = {"epoch": 1, "best_dice": 0.5, "best_epoch": 1, "best_weights": "w", "epochs_without_improvement": 0,
                "log": [{"epoch": 1}]}
    state = {"model": model.state_dict(), "options": model.options, "optimizer": optimizer.state_dict(), "scaler": {},
             "identity": "i", "progress": progress}
    return {**state, **changes}


def test_a_state_fits_the_training_that_it_is_of(tmp_path, training):
    save_checkpoint(tmp_path / "s.pth", state_of(training))
    check_resumable(load_training_state(tmp_path / "s.pth"), tmp_path / "s.pth", *training, {})


def _edited(training, edit):
    state = pickle.loads(pickle.dumps(state_of(training)))
    edit(state)
    return state


@pytest.mark.parametrize("edit", [
    lambda state: state.pop("progress"), lambda state: state["progress"].pop("best_dice"),
    lambda state: state["progress"].update(epoch=2), lambda state: state["progress"].update(epoch="1"),
    lambda state: state["progress"].update(log=None), lambda state: state["progress"].update(extra=1),
    lambda state: state["progress"].update(best_dice=2.0), lambda state: state.update(optimizer=None),
    lambda state: state["optimizer"].update(param_groups=[{"params": ["a"]}]), lambda state: state.update(scaler={"scale": "x"}),
    lambda state: state.update(identity=None), lambda state: state["progress"].update(best_epoch=7),
], ids=range(12))
def test_a_state_that_makes_no_sense_is_refused(tmp_path, training, edit):
    save_checkpoint(tmp_path / "s.pth", _edited(training, edit))
    with pytest.raises(UserError, match="s.pth"):
        load_training_state(tmp_path / "s.pth")


def first_moments(state):
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize("edit", [
    lambda state: state["model"].popitem(), lambda state: state["model"].update({"head.bias": torch.ones(7)}),
    lambda state: state["model"].update({"head.bias": torch.tensor([float("nan")])}),
    lambda state: first_moments(state).update(exp_avg=torch.ones(3)), lambda state: first_moments(state).pop("exp_avg"),
    lambda state: first_moments(state).update(step=torch.ones(2)), lambda state: first_moments(state).update(step=3),
    lambda state: first_moments(state).update(exp_avg=first_moments(state)["exp_avg"].double()),
    lambda state: state["optimizer"]["state"].update({999: {}}), lambda state: state["optimizer"]["param_groups"].clear(),
    lambda state: state["optimizer"]["param_groups"][0].update(eps="x"),
    lambda state: state["optimizer"]["param_groups"][0].update(lr=-1),
    lambda state: state["optimizer"]["param_groups"][0]["params"].pop(), lambda state: state.update(scaler={"scale": 2.0}),
    lambda state: state["optimizer"].update(state=[1]),
], ids=range(15))
def test_a_state_of_another_training_is_refused(tmp_path, training, edit):
    save_checkpoint(tmp_path / "s.pth", _edited(training, edit))
    state = load_training_state(tmp_path / "s.pth")
    with pytest.raises(UserError, match="s.pth does not fit the training that it is of"):
        check_resumable(state, tmp_path / "s.pth", *training, {})
