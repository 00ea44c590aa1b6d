"""Runs that are killed, stopped or starved of disk leave nothing half-made, and end like undisturbed ones.

Every run here is a real process. Starting Python with PyTorch takes seconds, so most are forked by one
server process that has imported the program already.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_FLAGS, process, write_pairs

from isic.cache import decode_pairs
from isic.decoding import decode_pair
from isic.layout import find_pairs, isic_folders
from runtime.files import Disk, disk
from runtime.lock import FolderLock
from runtime.records import WALL_CLOCK

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


# ---------------------------------------------------------------- running in a process of its own


def _child(log: str, arguments: list[str], plan: dict) -> None:
    """Run main.py's main in this forked process; ``plan`` says how the process or its world fails."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(plan.get("environment", {}))
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    import torch

    torch.set_num_threads(1)
    if "die_at_write" in plan:
        _die_at_write(plan["die_at_write"], plan["moment"])
    if "file_size" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["file_size"],) * 2)
    import threading

    from matplotlib.figure import Figure
    from tqdm import tqdm

    import main
    import reporting.galleries
    import reporting.run_pictures

    tqdm.set_lock(threading.RLock())  # its default lock is a semaphore of the system, which outlives a killed process
    if plan.get("figures", True):
        reporting.galleries.case_figure = lambda *arguments, **options: Figure((1, 1))  # the large one takes most of a tiny run
    else:
        reporting.run_pictures.draw_run = lambda run, read: [run.folder / name for name in ("report.html", "report.md")]
    code = main.main(arguments)
    sys.stdout.flush()
    # as an interpreter does that ends: a stop can hit the very moment in which a pool starts a thread and forgets it
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    os._exit(code)


def _die_at_write(count: int, moment: str) -> None:
    """kill -9 this process at its ``count``-th file: with half of it written, before its renaming, or after."""
    seen = [0]

    class Dying(Disk):
        def sync(self, file) -> None:
            seen[0] += 1
            if seen[0] == count and moment == "half":
                file.flush()
                os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            super().sync(file)

        def rename(self, source: Path, target: Path) -> None:
            if seen[0] >= count and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            super().rename(source, target)
            if seen[0] >= count and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    disk.__class__ = Dying


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts main.py in a forked process and returns the process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "main", "train", "experiment.maps", "experiment.results", "evaluation.study", "evaluation.summary",
        "reporting.run_pictures", "albumentations", "sklearn.model_selection", "matplotlib.backends.backend_agg",
        "test_interruption",
    ])
    logs = tmp_path_factory.mktemp("logs")
    numbers = iter(range(10_000))

    def start(*arguments: object, **plan: object) -> multiprocessing.Process:
        log = logs / f"{next(numbers)}.txt"
        started = context.Process(target=_child, args=(str(log), [str(a) for a in arguments], plan))
        started.start()
        started.log = log
        return started

    yield start
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _end(running, timeout: float = 120) -> str:
    """Wait for a process; returns what it printed."""
    running.join(timeout)
    assert running.exitcode is not None, "still running"
    return running.log.read_text() if running.log.exists() else ""


FLAGS = (*TINY_FLAGS, "--epochs", 3)


def _flags(root: Path, data: Path, results: str = "run") -> tuple:
    return ("--data", data, "--results", root / results, "--cache", root / "cache", *FLAGS)


@pytest.fixture(scope="module")
def reference(start, tiny, tmp_path_factory) -> Path:
    """A folder in which a run was never disturbed."""
    root = tmp_path_factory.mktemp("reference")
    running = start(*_flags(root, tiny))
    assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()
    return root


def contents(run: Path) -> dict[str, object]:
    """Every file of a run by its path: bytes, or the parsed content without wall-clock fields."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name in (".lock", "config.json", "weights/training_state.pth"):
            continue
        if name == "metrics.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in WALL_CLOCK}
        elif name == "report.md":  # the rest names folders and times
            found[name] = path.read_text().split("How it was made")[0]
        elif name == "report.html":
            found[name] = b"</html>" in path.read_bytes()
        elif name == "training_log.csv":
            found[name] = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
            assert path.read_text().splitlines()[0].endswith(",images_per_second,seconds_waited_for_data")
        else:
            found[name] = path.read_bytes()
    return found


def same(run: Path, reference: Path, figures: bool = True) -> None:
    """The two runs left the same files with the same bytes, and no others; ``figures``: pictures and report too."""
    drawn = () if figures else ("figures", "report.")
    one, two = (
        {name: content for name, content in contents(folder).items() if not name.startswith(drawn)}
        for folder in (run, reference)
    )
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


def partials(root: Path) -> list[Path]:
    return list(root.rglob(".*.partial"))


# ---------------------------------------------------------------- kill -9


def test_killed_at_writes_in_a_chain(start, reference, tiny, tmp_path):
    """Kill after kill on one folder, a few files further each time, until a run gets through."""
    kills, stages = 0, set()
    for seed in range(2):
        rng, root = random.Random(seed), tmp_path / str(seed)
        for attempt in range(40):
            # an attempt writes the configuration and the log again; its third file is the first that is progress
            count = 3 + rng.randint(0, 2) + attempt // 6
            moment = rng.choice(["half", "before", "after"])
            running = start(*_flags(root, tiny), die_at_write=count, moment=moment, figures=False)
            text = _end(running)
            if running.exitcode == 0:
                break
            assert running.exitcode == -signal.SIGKILL, text
            kills += 1
            stages.add(_stage(root / "run"))
        assert running.exitcode == 0
        same(root / "run", reference / "run", figures=False)
        assert partials(root) == []
    print(f"{kills} kills at writes, in {sorted(stages)}")
    assert kills >= 17
    assert {"training", "maps"} <= stages


def _stage(run: Path) -> str:
    if (run / "metrics.json").exists():
        return "finished"
    if (run / "calibration.npz").exists():
        return "writing"
    done = len(list(run.glob("uncertainty_maps/*/*.npz")))
    if done:
        return "fusing and evaluation" if done == 8 else "maps"
    return "training" if (run / "config.json").exists() else "decoding"


def test_killed_at_random_moments(start, reference, tiny, tmp_path):
    """Killed a random while after a file of some stage was written, resumed, killed again, and let through."""
    rng, kills = random.Random(3), 0
    stages: dict[str, int] = {}
    patterns = ["config.json"] * 2 + ["weights/*"] * 4 + ["uncertainty_maps/validation/*"] * 2 + ["uncertainty_maps/test/*"] * 3
    patterns += ["calibration.npz", "per_image.csv", "figures/*", "figures/*"]
    for pattern in patterns:
        before = _state(tmp_path / "run", pattern)
        running = start(*_flags(tmp_path, tiny), figures=pattern == "figures/*")
        _await(lambda: _state(tmp_path / "run", pattern) != before, running)  # noqa: B023 - called in this turn alone
        time.sleep(rng.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)
        running.join()
        if running.exitcode == -signal.SIGKILL:
            kills += 1
            stage = _stage(tmp_path / "run")
            stages[stage] = stages.get(stage, 0) + 1
    running = start(*_flags(tmp_path, tiny))
    assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()
    same(tmp_path / "run", reference / "run")
    assert partials(tmp_path) == []
    print(f"{kills} kills at random moments: {stages}")
    assert kills >= 8


def _state(run: Path, pattern: str) -> set:
    found = set()
    for path in run.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # a half-written neighbour that is gone by now
            found.add((path, path.stat().st_mtime_ns))
    return found


def _await(condition, running=None, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and (running is None or running.is_alive()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_stop_signals_reach_the_script(tiny, tmp_path):
    """A terminal's Ctrl-C, twice, and a SIGTERM, while two processes load data."""
    runs = {}
    for name in ("SIGINT", "SIGTERM"):
        flags = (*_flags(tmp_path / name, tiny), "--epochs", 100_000, "--patience", 100_000, "--workers", 2)
        runs[name] = process(*flags, cwd=tmp_path, start_new_session=True)
    for name, running in runs.items():
        _await(lambda: (tmp_path / name / "run/weights/training_state.pth").exists() or running.poll() is not None)  # noqa: B023
        if name == "SIGINT":
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the helpers too
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGINT)
        else:
            running.terminate()
    for name, running in runs.items():
        _, err = running.communicate(timeout=30)
        assert running.returncode == {"SIGINT": 130, "SIGTERM": 143}[name], err
        assert "Traceback" not in err
        last = err.replace("\r", "\n").strip().splitlines()[-2:]
        assert last[0].startswith(f"kept in {tmp_path / name / 'run'}: ") and "finished epochs, 0 finished maps" in last[0]
        assert last[1] == f"stopped by {name}; the same command goes on from there"
        assert partials(tmp_path) == []
        _await(lambda: _group_is_gone(running.pid), timeout=15)  # noqa: B023 - no helper outlives the run


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("SIGINT", "config.json"), ("SIGTERM", "uncertainty_maps/*/*"), ("SIGINT", "calibration.npz"), ("SIGTERM", "figures/*")],
)
def test_stopped_in_every_stage_and_resumed(start, reference, tiny, tmp_path, pattern, name):
    code = 128 + getattr(signal, name)
    running = start(*_flags(tmp_path, tiny))
    _await(lambda: any((tmp_path / "run").glob(pattern)), running)
    os.kill(running.pid, getattr(signal, name))
    text = _end(running)
    assert running.exitcode == code, text
    assert "Traceback" not in text
    assert "error" not in text
    assert f"stopped by {name}; the same command goes on from there" in text
    assert partials(tmp_path) == []
    if pattern.startswith("uncertainty"):
        running = start(*_flags(tmp_path, tiny))
        assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()
        same(tmp_path / "run", reference / "run")


POOL = """
import sys
from runtime.signals import StopSignals
from isic.synthetic import write_synthetic_dataset
def main():
    try:
        with StopSignals():
            write_synthetic_dataset(sys.argv[1], 400, progress=lambda: None)
    except KeyboardInterrupt:
        sys.exit(130)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("how", ["terminal", "kill -9"])
def test_the_drawing_processes_end_with_the_run(tmp_path, how):
    (tmp_path / "pool.py").write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py"), str(tmp_path / "d")], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )
    _await(lambda: any(tmp_path.glob("d/*/*.jpg")) or running.poll() is not None)
    os.killpg(running.pid, signal.SIGINT) if how == "terminal" else running.kill()
    if how == "terminal":
        assert running.communicate(timeout=30)[1] == ""
        assert running.returncode == 130
        assert partials(tmp_path) == []
    running.wait()
    running.stderr.close()
    _await(lambda: _group_is_gone(running.pid), timeout=15)
    assert len(list(tmp_path.glob("d/*/*.jpg"))) < 400


# ---------------------------------------------------------------- no room


def _is_one_error(running, message: str) -> None:
    text = _end(running)
    assert running.exitcode == 2, text
    assert "Traceback" not in text
    errors = [line for line in text.replace("\r", "\n").splitlines() if "rror" in line]
    assert len(errors) == 1, text
    assert errors[0].startswith("error: ")
    assert message in errors[0]


@pytest.mark.parametrize("size", [3_000, 40_000, 150_000])
def test_a_limit_on_file_size_is_one_line_and_loses_nothing(start, reference, tiny, tmp_path, size):
    # 3,000 bytes stop the cache, 40,000 a little later too, 150,000 the training state
    _is_one_error(start(*_flags(tmp_path, tiny), file_size=size, figures=False), "File too large")
    assert partials(tmp_path) == []
    running = start(*_flags(tmp_path, tiny), figures=False)
    assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()
    same(tmp_path / "run", reference / "run", figures=False)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a file system of its own needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", ["200k", "500k"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_room_is_made(start, reference, tiny, tmp_path, size):
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        cache = ("--cache", tmp_path / "cache")
        _is_one_error(start(*_flags(disk, tiny), *cache, figures=False), "No space left on device")
        assert partials(disk) == []
        kept = contents(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        running = start(*_flags(disk, tiny), *cache, figures=False)
        assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()
        after = contents(disk / "run")
        assert all(after[name] == kept[name] for name in kept if name.endswith("npz"))
        same(disk / "run", reference / "run", figures=False)


def test_a_full_disk_under_the_cache(start, tiny, tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        _is_one_error(start(*_flags(tmp_path, tiny), "--cache", disk / "cache"), "make room, or give --cache another folder")


def test_a_read_only_folder(start, tiny, tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        _is_one_error(start(*_flags(disk, tiny), "--cache", tmp_path / "cache"), "Read-only file system; choose another")
        _is_one_error(start(*_flags(tmp_path, tiny), "--cache", disk / "c"), "Read-only file system; give --cache another folder")


def test_a_cache_that_is_complete_may_be_read_only(start, reference, tiny, tmp_path):
    with mounted(tmp_path / "disk", "size=5m") as disk:
        shutil.copytree(reference / "cache", disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        running = start(*_flags(tmp_path, tiny), "--cache", disk / "cache", "--epochs", 1, figures=False)
        assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()


# ---------------------------------------------------------------- two at once


def test_the_second_run_on_a_folder_is_refused(start, tiny, tmp_path):
    first = start(*_flags(tmp_path, tiny), "--epochs", 100_000, "--patience", 100_000)
    _await(lambda: (tmp_path / "run/weights/best_model.pth").exists(), first)
    _is_one_error(start(*_flags(tmp_path, tiny)), f"is in use by another run (process {first.pid} on ")
    assert first.is_alive()
    first.terminate()
    assert (_end(first), first.exitcode)[1] == 143


def test_a_killed_run_s_helpers_do_not_keep_the_folder(start, tiny, tmp_path):
    first = start(*_flags(tmp_path, tiny), "--epochs", 100_000, "--patience", 100_000, "--workers", 2)
    _await(lambda: (tmp_path / "run/weights/best_model.pth").exists(), first)
    first.kill()
    first.join()
    # its data loaders may live a moment longer; another run need not wait for them
    running = start(*_flags(tmp_path, tiny), "--fresh", figures=False)
    assert (_end(running), running.exitcode)[1] == 0, running.log.read_text()


def test_two_runs_share_a_cache(start, tmp_path):
    """Both wait for a third that decodes; then one decodes what changed, and the other uses it."""
    data = write_pairs(tmp_path / "d", 24)
    pairs = find_pairs(*isic_folders(data))
    decode_pairs(pairs, 32, tmp_path / "cache")
    others = write_pairs(tmp_path / "others", 24, seed=1)
    shutil.rmtree(data)
    others.rename(data)
    (folder,) = (tmp_path / "cache").iterdir()
    flags = ("--data", data, "--cache", tmp_path / "cache", *FLAGS, "--epochs", 1)
    with FolderLock(folder):
        both = [start(*flags, "--results", tmp_path / name, figures=False) for name in "ab"]
        for running in both:
            _await(lambda: running.log.exists() and "waiting for it" in running.log.read_text(), running)  # noqa: B023
    texts = [_end(running) for running in both]
    assert [running.exitcode for running in both] == [0, 0], texts
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab"]
    assert metrics[0]["checksum"] == metrics[1]["checksum"]
    index = json.loads((folder / "index.json").read_text())
    records = np.fromfile(folder / "pairs.uint8", np.uint8).reshape(-1, 4 * 32 * 32)
    assert len(records) == 24 + 24  # changed pairs get new places, and none was decoded twice
    for pair in pairs:
        image, mask = decode_pair(pair, 32)
        np.testing.assert_array_equal(records[index["pairs"][pair.id]["slot"]], np.concatenate([image.ravel(), mask.ravel()]))
