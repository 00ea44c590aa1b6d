"""Reading .npz files: heads are checked before memory is taken; whatever is no whole file of arrays is refused."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from runtime.npz import read_npz


def anything(headers) -> None:
    """Every array is fine."""


def test_arrays_come_back_as_they_are(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array("text"), "c": np.zeros((0, 2), np.int8), "d/e": np.array([True])}
    seen: dict = {}
    for save, stored in ((np.savez, True), (np.savez_compressed, False)):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz", seen.update, stored)
        assert found.keys() == arrays.keys() == seen.keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(found[name], values)
            assert (found[name].dtype, seen[name]) == (values.dtype, (values.shape, values.dtype))
    with pytest.raises(ValueError, match="a member is compressed"):
        read_npz(tmp_path / "x.npz", anything)


def test_the_heads_are_checked_before_anything_is_read(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))

    def refuse(headers):
        assert str(headers["a"]) == "float64 (3,)"
        raise ValueError("another shape")

    with pytest.raises(ValueError, match="another shape"):
        read_npz(tmp_path / "x.npz", refuse)


def _member(head: str, content: bytes = b"") -> bytes:
    return np.lib.format.magic(1, 0) + len(head).to_bytes(2, "little") + head.encode("latin1") + content


def _head(descr: str = "'<f8'", shape: str = "(3,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("content", [
    _member(_head(shape="(1000000000000,)")), _member(_head(shape="(-1,)")), _member(_head("'|O'")), _member(_head("'<c16'")),
    _member(_head("[('a', '<f8')]"), b"\0" * 24), _member(_head("'<M8[s]'"), b"\0" * 24), _member("{'descr': "), _member("["),
    _member(_head(), b"\0" * 24 + b"more"), _member(_head(), b"\0" * 23), b"", b"\x93NUMPY\x09\x09",
    _member(_head("'|S1000000000'")),
], ids=range(13))
@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_what_is_no_array_is_refused(tmp_path, content, kind):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", kind) as archive:
        archive.writestr("a.npy", content)
    with pytest.raises((ValueError, EOFError)):
        read_npz(tmp_path / "x.npz", anything, stored=kind == zipfile.ZIP_STORED)


def test_other_members_and_the_same_one_twice_are_refused(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    for names in (("a.txt",), ("a.npy", "a.npy")):
        with pytest.warns(UserWarning, match="Duplicate") if len(names) > 1 else pytest.MonkeyPatch.context(), \
                zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            for name in names:
                archive.writestr(name, stream.getvalue())
        with pytest.raises(ValueError, match="is no array, or there twice"):
            read_npz(tmp_path / "x.npz", anything)


def test_a_changed_byte_is_noticed(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(1000))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        read_npz(tmp_path / "x.npz", anything)
