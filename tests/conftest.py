"""What the tests share: a small dataset on disk and a way to run the commands."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.saved_run import SavedRun  # noqa: E402
from isic.layout import ISIC_IMAGES, ISIC_MASKS  # noqa: E402
from runtime.records import seal, write_json  # noqa: E402

torch.set_num_threads(1)  # sums in the same order in every process
os.environ.pop("DISPLAY", None)


def write_pairs(root: Path, count: int, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
    """``count`` tiny discs on noise in the ISIC layout; ids ISIC_0000000 and on."""
    images, masks = root / ISIC_IMAGES, root / ISIC_MASKS
    images.mkdir(parents=True)
    masks.mkdir()
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    for index in range(count):
        cy, cx, r = rng.uniform(0.3, 0.7) * size[1], rng.uniform(0.3, 0.7) * size[0], rng.uniform(6, 14)
        mask = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        image = np.where(mask[..., None], [90, 60, 50], [220, 180, 170]) + rng.normal(0, 12, (*mask.shape, 3))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(images / f"ISIC_{index:07d}.jpg", quality=95)
        Image.fromarray((mask * 255).astype(np.uint8)).save(masks / f"ISIC_{index:07d}_segmentation.png")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tiny pairs; tests do not change them."""
    return write_pairs(tmp_path_factory.mktemp("tiny"), 24)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum that is right, whatever was edited in it."""
    write_json(path, seal({name: value for name, value in content.items() if name != "checksum"}))


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, cwd: Path, script: str = "main.py") -> Outcome:
    """Call a script's ``main`` in this process (starting Python anew costs seconds) in folder ``cwd``."""
    main = importlib.import_module(script[:-3]).main
    before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def process(*arguments: object, cwd: Path, script: str = "main.py", **options: object) -> subprocess.Popen:
    """Start a script as a user would, in ``cwd``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    environment.pop("DISPLAY", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no figures and write no report, which would take most of the seconds of a tiny run."""
    import reporting.run_pictures

    def write_nothing(run: SavedRun, read: object) -> list[Path]:
        return [run.folder / "report.html", run.folder / "report.md"]

    monkeypatch.setattr(reporting.run_pictures, "draw_run", write_nothing)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of constructed maps with its study, figures and report, but no weights; tests that change it copy it first."""
    from saved_runs import make_run

    folder = make_run(tmp_path_factory.mktemp("saved"), study=True, synthetic=True, data_note="tiny discs")
    outcome = command("--run", folder, "--summary", script="visualize.py", cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    return folder


#: Flags of a run of seconds on the tiny pairs.
TINY_FLAGS = ("--quick", "--image-size", 32, "--width", 4, "--epochs", 2, "--passes", 3, "--batch-size", 4, "--resamples", 200,
              "--device", "cpu")


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a finished run on the tiny pairs; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = command("--data", tiny, "--results", folder / "run", "--cache", folder / "cache", *TINY_FLAGS, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    (folder / "stdout.txt").write_text(outcome.stdout)
    return folder / "run"
