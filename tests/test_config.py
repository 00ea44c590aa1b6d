"""The command line: every field is a flag, ranges are kept, presets give way."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from config import QUICK, Config, parse_config, resolve_device
from model import UNet
from storage import UserError
from uncertainty import AUTO_PRECISION


def test_defaults_are_the_study_s():
    config = parse_config([], "")
    assert (config.image_size, config.width, config.passes, config.bins, config.seed) == (256, 64, 30, 15, 42)
    assert (config.dropout, config.lr, config.batch_size, config.split_seed) == (0.2, 1e-4, 16, 42)
    assert (config.test_fraction, config.validation_fraction, config.lambda_steps) == (0.2, 0.125, 10)
    assert (config.threshold, config.schedule, config.warmup, config.clip) == (0.5, "constant", 0, 0)


def test_the_default_maps_are_the_study_s():
    model = UNet(4)
    options = parse_config([], "").map_options(model)
    assert options["target_layer"] is model.encoder4 and options["normalise_cam"] is True
    assert (options["passes"], options["seed"], options["precision"], AUTO_PRECISION) == (30, 42, "auto", "fp32")
    other = parse_config(["--cam-scale", "none", "--target-layer", "bottleneck"], "").map_options(model)
    assert other["target_layer"] is model.bottleneck and other["normalise_cam"] is False


def test_every_field_is_a_flag_with_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], "what it does")
    text = capsys.readouterr().out
    for item in fields(Config):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"] and len(item.metadata["help"]) < 110


def test_quick_is_a_preset_that_gives_way_to_flags():
    assert parse_config(["--quick"], "").width == QUICK["width"]
    assert parse_config(["--quick", "--width", "32"], "").width == 32
    assert parse_config(["--width", "64", "--quick"], "").width == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--passes", "1"], "--passes must be at least 2, not 1"),
        (["--image-size", "100"], "--image-size must be a multiple of 16, not 100"),
        (["--dropout", "1"], "--dropout must be less than 1"),
        (["--dropout", "0"], "--dropout must be greater than 0"),
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--lr", "-1"], "--lr must be greater than 0"),
        (["--test-fraction", "1.0"], "--test-fraction must be less than 1"),
        (["--upsampling", "cubic"], "--upsampling must be one of bilinear, transposed"),
        (["--limit", "2"], "--limit must be at least 8"),
        (["--images", "x"], "--images and --masks go together"),
        (["--images", "x", "--masks", "y", "--data", "z"], "not both"),
        (["--download", "--data", "z"], "--download"),
        (["--epochs", "many"], "invalid int value"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--pass", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(flags, "")
    assert "\n" not in str(caught.value)


def test_configuration_round_trip(tmp_path):
    config = parse_config(["--quick", "--limit", "50"], "")
    assert Config.from_dict(config.to_dict(), tmp_path) == config
    with pytest.raises(UserError, match="config.json does not hold a configuration"):
        Config.from_dict({"no such field": 1}, tmp_path / "config.json")
    with pytest.raises(UserError, match="does not hold a configuration"):
        Config.from_dict(None, tmp_path / "config.json")


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is available here"):
        resolve_device("cuda:1")
    with pytest.raises(UserError, match="must be auto, cpu"):
        resolve_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
