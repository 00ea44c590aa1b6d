"""What a command takes from the run whose weights it takes: settings, split, groups, and whether its numbers suffice."""

from __future__ import annotations

import pytest
from saved_runs import RECORD

from experiment.source_run import finished_record, numbers_suffice, settings_from, taken_from
from isic.tables import Fixed
from runtime.config import IDENTITY_FIELDS, QUICK, SYNTHETIC, Config, parse_config
from runtime.errors import UserError
from runtime.records import write_json

MADE = Config(**QUICK, seed=7, passes=4, limit=40, data_note="cropped", resamples=300, margin={"brier": 0.5})


def make_run(folder, config=MADE, **record):
    """As much of a finished run as is looked at."""
    write_json(folder / "metrics.json", {})
    write_json(folder / "config.json", {
        "configuration": config.to_dict(), "images": "/there/images", "masks": "/there/masks",
        "split": {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}, "skipped": [], **record,
    })
    return folder


def parsed(*flags):
    return parse_config([str(flag) for flag in flags], "", settings_from)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def other(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "other" / name).mkdir(parents=True)
    return tmp_path / "other"


# ---------------------------------------------------------------- settings


def test_what_is_not_given_is_as_the_run_was_made(run, other):
    config = parsed("--weights-from", run, "--test-data", other)
    assert all(getattr(config, name) == getattr(MADE, name) for name in IDENTITY_FIELDS)
    assert (config.data_note, config.resamples, config.margin) == ("cropped", 300, {"brier": 0.5})
    assert (config.images, config.masks, config.data) == ("/there/images", "/there/masks", None)
    assert (config.results, config.study, config.trainings) == (None, False, 1)


def test_what_is_given_wins(run):
    config = parsed("--weights-from", run, "--passes", 9, "--resamples", 500, "--data", "elsewhere")
    assert (config.passes, config.resamples, config.seed) == (9, 500, 7)
    assert (config.data, config.images) == ("elsewhere", None)
    assert parsed("--weights-from", make_run(run, Config(seed=7)), "--quick").width == QUICK["width"]


def test_without_a_run_the_defaults_stand(run):
    assert settings_from({"passes": 4}) is None
    assert parsed("--passes", 4) == Config(passes=4)
    assert parsed("--quick") == Config(quick=True, **QUICK)
    assert parse_config([], "", SYNTHETIC) == Config(**SYNTHETIC)


def test_a_field_that_another_version_knew_is_left_alone(run):
    make_run(run, used_to_be=3)
    record = finished_record(run)
    write_json(run / "config.json", {**record, "configuration": {**record["configuration"], "used_to_be": 3}})
    assert parsed("--weights-from", run).seed == 7


def test_trainings_give_their_settings_and_their_number(tmp_path):
    folder = tmp_path / "several"
    for seed in (5, 6):
        make_run(folder / f"seed-{seed}", Config(seed=seed, passes=4))
    entries = [{"name": f"seed-{seed}", "folder": f"seed-{seed}"} for seed in (6, 5)]
    write_json(folder / "config.json", {"configuration": {}, "pooled": entries})
    config = parsed("--weights-from", folder)
    assert (config.trainings, config.seed, config.passes) == (2, 5, 4)
    (folder / "config.json").unlink()  # not pooled yet
    assert parsed("--weights-from", folder, "--trainings", 2, "--seed", 5).passes == 4
    write_json(folder / "config.json", {"configuration": {}, "pooled": [*entries, {"name": "seed-7", "folder": "/far/away"}]})
    with pytest.raises(UserError, match="pools runs that are not its own seeds in a row; name one of them: seed-6, seed-5, /far"):
        parsed("--weights-from", folder)


@pytest.mark.parametrize(("record", "message"), [
    (None, "holds no finished run .no metrics.json.; finish it, or name another folder"),
    ({"configuration": {}, "pooled": [{"name": "seed-1", "folder": "seed-1"}]},
     "pools several trainings; name one of them: seed-1"),
    ({"maps": {}, "configuration": {}, "split": RECORD["split"]}, "judged maps that were made elsewhere and has no weights"),
    ({**RECORD, "configuration": None}, "config.json.configuration is None and not a mapping"),
])
def test_a_folder_without_weights_is_one_line(tmp_path, record, message):
    if record is not None:
        write_json(tmp_path / "metrics.json", {})
        write_json(tmp_path / "config.json", record)
    with pytest.raises(UserError, match=message):
        finished_record(tmp_path)


# ---------------------------------------------------------------- split and numbers


def test_the_split_is_that_of_the_run_and_what_it_left_out_is_looked_at_again(run):
    assert taken_from(Config()) is None
    parts = {"a": "train", "b": "train", "c": "validation", "d": "test"}
    assert taken_from(Config(weights_from=str(run))) == Fixed(parts, None)
    make_run(run, skipped=[{"id": "e", "file": "e.png", "reason": "broken"}], groups={"a": "p"})
    assert taken_from(Config(weights_from=str(run))) == Fixed({**parts, "e": "train"}, {"a": "p"})


def test_numbers_suffice_where_nothing_but_other_test_sets_is_asked_for(run, other):
    base = ("--weights-from", run, "--test-data", other)
    assert numbers_suffice(parsed(*base))
    assert numbers_suffice(parsed(*base, "--resamples", 999, "--margin", "brier=1", "--workers", 0, "--cache", "x"))
    assert numbers_suffice(parsed(*base, "--passes", 4))  # as the run was made
    assert not numbers_suffice(Config())
    assert not numbers_suffice(parsed("--weights-from", run))  # then its own images are what is to be measured
    for flags in (("--passes", 5), ("--study",), ("--flips",), ("--data", "x"), ("--split", "x"), ("--cam-scale", "none")):
        assert not numbers_suffice(parsed(*base, *flags)), flags


def test_numbers_do_not_suffice_where_the_groups_of_measured_images_are_new(run, other, tmp_path):
    table = tmp_path / "groups.csv"
    for text, suffice in (("id,group\nx,1\n", True), ("id,group\na,1\n", True), ("id,group\nd,1\n", False)):
        table.write_text(text)
        assert numbers_suffice(parsed("--weights-from", run, "--test-data", other, "--groups", table)) is suffice
