"""Records: strict JSON, sealed JSON, CSV, npz, and fingerprints of content."""

from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest

from runtime.errors import UserError
from runtime.records import check_stored, fingerprint, read_json, read_sealed, seal, write_csv, write_json, write_npz


def test_json_is_strict_and_broken_json_is_named(tmp_path):
    write_json(tmp_path / "x.json", {"a": 0.1, "b": None})
    assert read_json(tmp_path / "x.json") == {"a": 0.1, "b": None}
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 0.1,\n  "b": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        read_json(tmp_path / "x.json")
    for number in ("NaN", "-Infinity"):
        (tmp_path / "x.json").write_text(f'{{"a": {number}}}')
        with pytest.raises(UserError, match=f"{number} is no JSON number"):
            read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json")


def test_what_is_sealed_reads_back(tmp_path):
    write_json(tmp_path / "x.json", seal({"b": (1, 2.5), "minutes": 3.0}))
    assert read_sealed(tmp_path / "x.json")["b"] == [1, 2.5]
    content = read_json(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {**content, "minutes": 4.0})  # wall-clock time is not sealed
    read_sealed(tmp_path / "x.json")
    write_json(tmp_path / "x.json", {**content, "b": [1, 2.6]})
    with pytest.raises(UserError, match="x.json was changed"):
        read_sealed(tmp_path / "x.json")
    del content["checksum"]
    write_json(tmp_path / "x.json", content)
    with pytest.raises(UserError, match="x.json was changed"):
        read_sealed(tmp_path / "x.json")


def test_csv(tmp_path):
    write_csv(tmp_path / "x.csv", [{"id": "a, b", "dice": 0.5}, {"id": "c", "dice": 1.0}])
    assert (tmp_path / "x.csv").read_text() == 'id,dice\n"a, b",0.5\nc,1.0\n'
    write_csv(tmp_path / "x.csv", [])
    assert (tmp_path / "x.csv").read_text() == ""


def test_fingerprint_depends_on_content_and_not_on_order():
    assert fingerprint({"a": 1, "b": [2.0]}) == fingerprint(json.loads('{"b": [2.0], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()


def test_arrays_are_written_without_compression(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "identity": np.array("x")}
    write_npz(tmp_path / "x.npz", arrays)
    check_stored(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
        assert set(content.files) == {"a", "identity"}
        np.testing.assert_array_equal(content["a"], arrays["a"])


def test_a_zip_file_that_grows_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("a", b"\0" * 1000)
    with pytest.raises(ValueError, match="a member is compressed"):
        check_stored(path)
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("a", b"\0" * 1000)
    check_stored(path)
    stored = path.read_bytes()
    directory = stored.rindex(b"PK\x01\x02")
    size = (1000).to_bytes(4, "little")
    path.write_bytes(stored[:directory] + stored[directory:].replace(size, (10**6).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="larger than the file"):
        check_stored(path)
    path.write_bytes(b"no zip")
    with pytest.raises(zipfile.BadZipFile):
        check_stored(path)
