"""The saved numbers of a run: read back, checked, and its settings beside the defaults."""

from __future__ import annotations

import math
import shutil

import pytest

from experiment.saved_run import Setting, load_run, read_table, settings
from runtime.config import IDENTITY_FIELDS, NETWORK_FIELDS, UNET_FIELDS
from runtime.errors import UserError


def test_a_table_has_numbers_texts_for_ids_and_nan_for_empty_cells(tmp_path):
    (tmp_path / "t.csv").write_text("id,dice,epoch\n007,0.5,\nISIC_1,1e-3,2\n", encoding="utf-8")
    first, second = read_table(tmp_path / "t.csv")
    assert first["id"] == "007" and first["dice"] == 0.5 and math.isnan(first["epoch"])
    assert second == {"id": "ISIC_1", "dice": 0.001, "epoch": 2.0}


@pytest.mark.parametrize("text", ["id,dice\na,good\n", "id,dice\na,0.5,0.6\n"])
def test_a_table_of_something_else_is_an_error(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match="t.csv is not a table of this program"):
        read_table(tmp_path / "t.csv")


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot read .*t.csv: No such file or directory; run main.py again"):
        read_table(tmp_path / "t.csv")


def test_a_run_is_read_whole_or_the_file_that_lacks_is_named(saved, tmp_path):
    run = load_run(saved)
    assert [row["id"] for row in run.rows] == [f"test_{index:04d}" for index in range(6)]
    assert [row["epoch"] for row in run.log] == [1, 2, 3]
    assert run.metrics["test"]["images"] == len(run.rows)
    for name in ("metrics.json", "config.json", "per_image.csv", "training_log.csv"):
        copy = tmp_path / name
        shutil.copytree(saved, copy, ignore=shutil.ignore_patterns(name, "figures", "uncertainty_maps"))
        with pytest.raises(UserError, match=name):
            load_run(copy)


def test_settings_are_those_that_decide_the_numbers(saved):
    run = load_run(saved)
    found = {setting.name: setting for setting in settings(run)}
    assert found["image_size"] == Setting("image_size", 32, 256)
    assert found["passes"] == Setting("passes", 30, 30)
    assert not found.keys() & {"device", "quiet", "resamples", "synthetic_images"}  # no number depends on them
    # nor is anything to be said of the networks that the run does not use
    assert list(found) == [name for name in IDENTITY_FIELDS if name not in ("synthetic_images", *NETWORK_FIELDS)]
    assert settings(run._replace(record={})) == []
    assert settings(run._replace(record={"configuration": {"width": 4, "gone": 1}})) == [Setting("width", 4, 64)]


def test_settings_of_a_network_of_the_user_s(saved):
    run = load_run(saved)
    configuration = {**run.record["configuration"], "model": "nets:net", "insert_dropout": 0.25}
    inputs = {"inserted_dropout": ["bottom", "up2"]}
    found = settings(run._replace(record={**run.record, "configuration": configuration, "decides": inputs}))
    assert not {setting.name for setting in found} & set(UNET_FIELDS)
    assert Setting("model", "nets:net", None) in found and Setting("insert_dropout", 0.25, None) in found
    assert found[-1] == Setting("dropout_inserted_after", "bottom, up2", None)
