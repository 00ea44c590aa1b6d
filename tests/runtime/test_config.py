"""The configuration: every field is a flag, ranges are kept, presets give way, and each field says what it decides."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from runtime.config import AFTER_TRAINING, QUICK, SYNTHETIC, Config, parse_config
from runtime.errors import UserError
from runtime.records import fingerprint

#: The fields that decide no number: where things lie, how fast, how much is said, how many resamples.
NEUTRAL = {
    "data", "images", "masks", "download", "skip_bad", "cache", "data_note", "weights_from", "workers", "resamples", "study",
    "results", "fresh", "quiet", "json", "device", "quick", "margin", "trainings", "pool", "verify",
    "flips", "ensemble", "maps", "scores", "test_data", "test_images", "test_masks", "split", "groups", "model_weights",
}


def test_defaults_are_the_study_s():
    config = parse_config([], "")
    assert (config.image_size, config.width, config.passes, config.bins, config.seed) == (256, 64, 30, 15, 42)
    assert (config.dropout, config.lr, config.batch_size, config.split_seed) == (0.2, 1e-4, 16, 42)
    assert (config.test_fraction, config.validation_fraction, config.lambda_steps) == (0.2, 0.125, 10)
    assert (config.threshold, config.schedule, config.warmup, config.clip) == (0.5, "constant", 0, 0)


def test_every_field_is_a_flag_with_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], "what it does")
    text = capsys.readouterr().out
    for item in fields(Config):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"] and len(item.metadata["help"]) < 140
    assert "--margin NAME=VALUE" in text and "--pool RUN [RUN ...]" in text


def test_every_flag_sets_its_field():
    other = {
        "int": ("48", 48), "float": ("0.25", 0.25), "bool": (None, True), "str": ("x", "x"),
        "_margin": ("brier=0.25", {"brier": 0.25}),
    }
    special = {
        "ensemble": {"trainings": "2"}, "images": {"masks": "y"}, "masks": {"images": "y"},
        "test_images": {"test-masks": "y"}, "test_masks": {"test-images": "y"},
        "output": {"model": "a:b"}, "insert_dropout": {"model": "a:b"}, "model_weights": {"model": "a:b"},
    }
    for item in fields(Config):
        if "nargs" in item.metadata:  # which takes several words
            continue
        word, value = other[item.metadata["type"].__name__]
        if "choices" in item.metadata:
            word = value = item.metadata["choices"][-1]
        if item.name == "resamples":
            word, value = "480", 480
        if item.name == "target_layer":
            word = value = "bottleneck"
        if item.name.startswith("test_") and item.metadata.get("action") == "append":
            value = [value]
        flag = "--" + item.name.replace("_", "-")
        beside = [text for name, text in special.get(item.name, {}).items() for text in (f"--{name}", text)]
        config = parse_config([flag, *([] if word is None else [word]), *beside], "", {})
        assert getattr(config, item.name) == value, flag


def test_quick_is_a_preset_that_gives_way_to_flags():
    assert parse_config(["--quick"], "").width == QUICK["width"]
    assert parse_config(["--quick", "--width", "32"], "").width == 32
    assert parse_config(["--width", "64", "--quick"], "").width == 64


def test_a_preset_that_is_named_takes_the_place_of_quick_and_gives_way_too():
    config = parse_config(["--quick"], "", SYNTHETIC)
    assert {name: getattr(config, name) for name in SYNTHETIC} == SYNTHETIC
    assert (SYNTHETIC["epochs"], SYNTHETIC["batch_size"], SYNTHETIC["width"]) == (32, 8, 16)
    # a flag that says the default is a flag all the same
    assert parse_config(["--schedule", "constant"], "", SYNTHETIC).schedule == "constant"
    assert parse_config([], "", {}) == Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--passes", "1"], "--passes must be at least 2, not 1"),
        (["--image-size", "100"], "--image-size must be a multiple of 16, not 100"),
        (["--width", "5"], "--width must be even, not 5"),
        (["--dropout", "1"], "--dropout must be less than 1"),
        (["--dropout", "0"], "--dropout must be greater than 0"),
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--lr", "-1"], "--lr must be greater than 0"),
        (["--workers", "257"], "--workers must be at most 256, not 257"),
        (["--test-fraction", "1.0"], "--test-fraction must be less than 1"),
        (["--upsampling", "cubic"], "--upsampling must be one of bilinear, transposed"),
        (["--limit", "2"], "--limit must be at least 8"),
        (["--images", "x"], "--images and --masks go together"),
        (["--images", "x", "--masks", "y", "--data", "z"], "not both"),
        (["--download", "--data", "z"], "--download"),
        (["--epochs", "many"], "invalid int value"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--trainings", "0"], "--trainings must be at least 1, not 0"),
        (["--trainings", "2", "--seed", "4294967295"],
         "--trainings 2 from --seed 4294967295 on would need seed 4294967296; the largest is 4294967295"),
        (["--ensemble"], "--ensemble combines trainings: give --trainings of at least 2, or --pool"),
        (["--pool"], "--pool: expected at least one argument"),
        (["--pool", "a"], "--pool pools at least two finished runs, not a alone"),
        (["--pool", "a", "b", "--epochs", "3", "--device", "cpu"], "trains nothing; leave --epochs, --device out"),
        (["--pool", "a", "b", "--trainings", "2"], "leave --trainings out"),
        (["--maps", "v", "t", "--epochs", "3"], "--maps judges maps that are there and makes none; leave --epochs out"),
        (["--scores", "a", "b"], "--scores names arrays of --maps; give both"),
        (["--test-images", "x"], "--test-images and --test-masks go together"),
        (["--target-layer", "decoder1"], "--target-layer must be one of encoder4, bottleneck for the U-Net, not 'decoder1'"),
        (["--insert-dropout", "0.1"], "--insert-dropout is about a network of your own: name it with --model"),
        (["--model", "a:b", "--model-weights", "x", "--weights-from", "y"], "--model-weights or --weights-from, not both"),
        (["--margin", "brier"], "'brier' is not of the form NAME=VALUE, such as brier=0.001"),
        (["--margin", "brier=much"], "'brier=much' is not of the form NAME=VALUE"),
        (["--margin", "=0.1"], "'=0.1' is not of the form NAME=VALUE"),
        (["--margin", "brier=0"], "--margin brier must be a finite number greater than 0, not 0.0"),
        (["--margin", "brier=inf"], "--margin brier must be a finite number greater than 0, not inf"),
        (["--margin", "brier=nan"], "--margin brier must be a finite number greater than 0, not nan"),
        (["--pass", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(flags, "")
    assert "\n" not in str(caught.value)


def test_configuration_round_trip(tmp_path):
    for flags in (["--quick", "--limit", "50"], ["--pool", "a", "b", "--margin", "brier=0.1"]):
        config = parse_config(flags, "")
        assert Config.from_dict(json.loads(json.dumps(config.to_dict())), tmp_path) == config
    with pytest.raises(UserError, match="config.json does not hold a configuration"):
        Config.from_dict({"no such field": 1}, tmp_path / "config.json")
    with pytest.raises(UserError, match="does not hold a configuration"):
        Config.from_dict(None, tmp_path / "config.json")


def test_margins_are_repeated_and_the_last_of_one_name_counts():
    config = parse_config(["--margin", "brier=0.25", "--margin", "x=1e-3", "--margin", "brier=0.5"], "")
    assert config.margin == {"brier": 0.5, "x": 0.001}
    assert parse_config([], "").margin is None


def test_a_pool_takes_runs_and_what_concludes_from_them():
    flags = ["--pool", "a", "b", "c", "--results", "d", "--margin", "brier=0.1", "--resamples", "200", "--quiet"]
    config = parse_config(flags, "")
    assert (config.pool, config.results, config.margin, config.resamples) == (["a", "b", "c"], "d", {"brier": 0.1}, 200)


def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1


# ---------------------------------------------------------------- what each field decides


def test_every_field_decides_the_training_the_evaluation_or_nothing():
    decided = {item.name: item.metadata["decides"] for item in fields(Config)}
    assert set(decided.values()) == {"training", "evaluation", "nothing"}
    assert {name for name, what in decided.items() if what == "nothing"} == NEUTRAL


def test_seven_fields_act_after_training():
    assert set(AFTER_TRAINING) == {"passes", "target_layer", "precision", "cam_scale", "cam_score", "bins", "lambda_steps"}
    assert len(AFTER_TRAINING) == 7


def test_the_experiment_is_all_but_what_decides_nothing():
    config = Config()
    experiment = config.experiment()
    assert set(experiment) == {item.name for item in fields(Config) if item.default is not None} - NEUTRAL
    assert replace(config, limit=9).experiment() == {**experiment, "limit": 9}
    assert {"seed", "threshold", "amp", "augment", "split_seed", *AFTER_TRAINING} <= set(experiment)
    neutral = replace(config, data="x", cache="y", results="z", resamples=100, quiet=True, device="cpu", workers=2, study=True,
                      trainings=3, margin={"brier": 0.1})
    assert neutral.experiment() == experiment
    changed = replace(config, passes=4, seed=7).experiment()
    assert {name: value for name, value in changed.items() if experiment[name] != value} == {"passes": 4, "seed": 7}


def test_the_identity_of_the_default_experiment_is_what_it_was():
    """A new field that changes this makes every weight and map of every finished run be made again."""
    assert fingerprint(Config().experiment()) == "7bba811fd9d5f9bb19946bd02f480a18af44fc38397c573efd089ef30eebbf75"
