"""The picture command: any case with its maps, galleries chosen by rule, and all figures and the report of a run.

    python visualize.py                              a random test image of the newest run
    python visualize.py --gallery complex --n 6      test images by rule, from saved maps, without the model
    python visualize.py --summary                    every figure and the report again, from saved numbers
    python visualize.py --id ID --overlay            outlines and uncertainty over the undecimated image
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from charts import SavedRun, draw_run_figures, load_run
from checkpoints import load_model, weights_fingerprint
from config import Config, Parser, resolve_device
from dataset import find_pairs, normalise
from decoding import Pair, read_image, read_mask
from figures import COLUMNS, Case, case_figure, case_title, overlay_figure, save_figure
from formats import number
from fusion import Fusion, Linear
from gallery import RULES, ImageReader, TestImages, choose, gallery_figure
from report import write_report
from storage import UserError, fingerprint, read_json, read_sealed
from uncertainty import uncertainty_maps

ROWS = 3  # of the galleries that every run draws
GALLERY_N = 6


# ---------------------------------------------------------------- a finished run


def newest_run(results: Path) -> Path:
    """The finished run (a folder with ``metrics.json``) in ``results`` that ended last.

    Raises:
        UserError: there is none.
    """
    results = Path(results)
    runs = [path.parent for path in (*results.glob("metrics.json"), *results.glob("*/metrics.json"))]
    if not runs:
        raise UserError(f"there is no finished run in {results}; run main.py first")
    return max(runs, key=lambda path: (path / "metrics.json").stat().st_mtime)


def draw_run(run: SavedRun, read: ImageReader | None = None) -> list[Path]:
    """Draw all figures of a run and write its report; returns the files.

    Args:
        run: its saved numbers.
        read: gives the image of an id at map resolution; the galleries of every rule are drawn with it from saved
            maps. Without it the galleries that lie in the folder stay as they are.
    """
    paths = draw_run_figures(run) + ([] if read is None else draw_galleries(run, read))
    return [*paths, *write_report(run)]


def draw_galleries(run: SavedRun, read: ImageReader, names: Sequence[str] = tuple(RULES)) -> list[Path]:
    """Draw the galleries of these rules into the run's folder; one that can choose no image leaves no file."""
    paths = []
    for name in names:
        path = run.folder / "figures" / f"gallery_{name}.png"
        figure = draw_gallery(run, name, ROWS, run_seed(run), read)
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            paths.append(save_figure(figure, path))
    return paths


def draw_gallery(run: SavedRun, name: str, n: int, seed: int, read: ImageReader):
    """The gallery of one rule, or None where the rule can choose no image."""
    return gallery_figure(
        name, test_images(run, seed), n, read, threshold=float(run.record["configuration"]["threshold"]), **labels(run),
    )


def test_images(run: SavedRun, seed: int) -> TestImages:
    """The saved test images of a run, as the rules of the galleries look at them."""
    return TestImages(run.rows, run.folder / "uncertainty_maps" / "test", run.metrics["normalisation"], seed)


def run_seed(run: SavedRun) -> int:
    return int(run.record["configuration"]["seed"])


def labels(run: SavedRun, how: str = "") -> dict[str, Any]:
    """What every picture of cases says about the run: how it was made, synthetic or not, the data note."""
    made = f"T = {run.record['configuration']['passes']}, λ = {run.metrics['lambda']:g}"
    return {
        "note": f"{how}, {made}" if how else made,
        "synthetic": bool(run.metrics["synthetic"]), "data_note": run.metrics.get("data_note"),
    }


def run_pairs(record: Mapping[str, Any]) -> dict[str, Pair]:
    """The image-mask pairs of a run's data by id.

    Raises:
        UserError: the folders that ``config.json`` names are gone. Broken pairs are left out.
    """
    return {pair.id: pair for pair in find_pairs(Path(record["images"]), Path(record["masks"]), [])}


# ---------------------------------------------------------------- one case, computed


def pick(ids: Sequence[str], seed: int) -> str:
    """The id that a seed stands for; every id is equally likely."""
    return sorted(ids)[int(np.random.default_rng(seed).integers(len(ids)))]


def fusion_of(metrics: Mapping[str, Any], source: Path) -> Fusion:
    """The fusion that a run tuned.

    Raises:
        UserError: ``metrics`` does not describe one; the line names ``source``.
    """
    try:
        scales = metrics["normalisation"]
        ranges = [Linear(*(float(bound) for bound in scales[key])) for key in ("pred_variance", "saliency_variance")]
        weight = float(metrics["lambda"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} lacks a valid normalisation or lambda; delete it and run main.py again") from error
    if not 0 <= weight <= 1:
        raise UserError(f"{source}: lambda is {weight}, outside 0 to 1; delete it and run main.py again")
    return Fusion(*ranges, "convex", weight)


def compute_case(run: Path, pair: Pair | None, image: Path, id: str, device: torch.device) -> tuple[Case, Config, dict]:
    """Compute the maps of one image with the model and the fusion of a finished run.

    The masks are seeded as in the run, so the maps of a test image are those it saved.
    """
    record, metrics = read_json(run / "config.json"), read_sealed(run / "metrics.json")
    config = Config.from_dict(record.get("configuration"), run / "config.json")
    decides = record.get("decides") or {}
    same = all(key == "amp" or decides.get(key, value) == value for key, value in config.experiment().items())  # amp: resolved
    if not same or record.get("identity") != fingerprint(decides):
        raise UserError(f"{run / 'config.json'} was changed after the run wrote it; run main.py again")
    fusion = fusion_of(metrics, run / "metrics.json")
    model = load_model(run / "weights" / "best_model.pth", device)
    if metrics.get("identity") != fingerprint([record.get("identity"), weights_fingerprint(model)]):
        raise UserError(f"{run / 'metrics.json'} was not made from the weights and config.json beside it; run main.py again")
    pixels = read_image(image, config.image_size)
    truth = None if pair is None else read_mask(pair.mask, config.image_size)
    batch = normalise(torch.from_numpy(pixels)[None].to(device))
    try:
        maps = uncertainty_maps(model, batch, image_ids=[id], **config.map_options(model))
    except ValueError as error:  # an odd picture can overflow the network
        raise UserError(f"{image}: {error}; no map of it can be drawn") from error
    arrays = {
        "mean_prediction": maps.mean_prediction[0], "pred_variance": maps.pred_variance[0],
        "saliency_variance": maps.saliency_variance[0],
        "fused_score": fusion(maps.pred_variance[0], maps.saliency_variance[0]),
    }
    case = Case(id, pixels, {name: value.cpu().numpy() for name, value in arrays.items()}, truth)
    return case, config, metrics


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run [the newest one in results/]")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are looked for [results]")
    parser.add_argument("--seed", type=int, help="which random test image, or images of the random gallery [drawn and printed]")
    parser.add_argument("--id", help="this image of the run's data instead of a random one")
    parser.add_argument("--image", type=Path, help="any picture instead; needs no mask")
    parser.add_argument("--gallery", metavar="RULE", help=f"test images by rule: {', '.join(RULES)}")
    parser.add_argument("--n", type=int, help=f"how many images in the gallery [{GALLERY_N}]")
    parser.add_argument("--summary", action="store_true", help="draw every figure of the run and write its report again")
    parser.add_argument("--overlay", nargs="?", const="fused_score", metavar="MAP",
                        help=f"lay a map over the undecimated image: {', '.join(COLUMNS)} [fused_score]")
    parser.add_argument("--output", type=Path, help="file to write: .png, .jpg, .pdf or .svg [in RUN/figures]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    try:
        args = parser.parse_args(argv)
        check(args)
        run = args.run or newest_run(args.results)
        if not (run / "metrics.json").is_file():
            raise UserError(f"{run} holds no finished run (no metrics.json); run main.py first")
        path = summarise(run) if args.summary else render_gallery(run, args) if args.gallery else render_case(run, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"saved {path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        UserError: names the flags.
    """
    if args.id is not None and args.image is not None:
        raise UserError("give --id or --image, not both")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    if args.n is not None and args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    if args.n is not None and args.gallery is None:
        raise UserError("--n says how many images a --gallery shows; give both")
    if args.gallery is not None and args.gallery not in RULES:
        raise UserError(f"there is no gallery {args.gallery}; choose one of {', '.join(RULES)}")
    if args.overlay is not None and args.overlay not in COLUMNS:
        raise UserError(f"there is no map {args.overlay}; choose one of {', '.join(COLUMNS)}")
    modes = [flag for flag in ("gallery", "summary", "overlay") if getattr(args, flag)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} do not go together")
    if modes in (["gallery"], ["summary"]) and (args.id is not None or args.image is not None):
        raise UserError(f"--{modes[0]} is about the whole run; leave --id and --image out")
    if args.seed is not None and (args.id is not None or args.image is not None or modes == ["summary"]):
        raise UserError("--seed chooses among the test images; leave it out where --id, --image or --summary says what to draw")
    if args.summary and args.output is not None:
        raise UserError("--summary writes into the run's folder; leave --output out")


def summarise(folder: Path) -> Path:
    """Redraw the figures of a run and rewrite its report, from saved numbers and maps alone; returns the report.

    The galleries need the images as well: where the dataset is gone, they stay as they are, and that is said.
    """
    run = load_run(folder)
    try:
        draw_run(run, image_reader(run))
    except UserError as error:
        print(f"galleries not redrawn: {error}")
        draw_run(run)
    return folder / "report.html"


def image_reader(run: SavedRun) -> ImageReader:
    """Reads the images of a run's data at map resolution.

    Raises:
        UserError: the dataset is not where the run found it.
    """
    pairs, size = run_pairs(run.record), int(run.record["configuration"]["image_size"])

    def read(id: str) -> np.ndarray:
        if id not in pairs:
            raise UserError(f"there is no image {id} in {run.record['images']}")
        return read_image(pairs[id].image, size)

    return read


def render_gallery(folder: Path, args: argparse.Namespace) -> Path:
    """Draw and save the gallery that the arguments ask for, from saved maps."""
    run = load_run(folder)
    random = args.gallery == "random"
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31) if random else run_seed(run)
    n = args.n or GALLERY_N
    figure = draw_gallery(run, args.gallery, n, seed, image_reader(run))
    if figure is None:
        raise UserError(f"gallery {args.gallery}: the rule is defined for no test image of {folder}")
    for id, value in choose(args.gallery, test_images(run, seed), n):
        print(id if random else f"{id}   {RULES[args.gallery].shown or RULES[args.gallery].title}: {number(value)}")
    print(f"the same picture again: python visualize.py --run {folder} --gallery {args.gallery} --n {n}"
          + (f" --seed {seed}" if random else ""))
    return save_figure(figure, args.output or folder / "figures" / f"gallery_{args.gallery}_{n}.png")


def render_case(folder: Path, args: argparse.Namespace) -> Path:
    """Compute, draw, save and (where there is a display) show the case that the arguments ask for."""
    record = read_json(folder / "config.json")
    device = resolve_device(args.device)
    if args.image is not None:
        pair, image, id, how = None, args.image, args.image.stem, f"--image {args.image}"
        try:
            read_image(image)
        except UserError as error:  # its advice is about pairs
            raise UserError(f"{str(error).rsplit('; ', 1)[0]}; give --image another file") from error
    else:
        pairs = run_pairs(record)
        seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
        id, how = (args.id, f"--id {args.id}") if args.id else (pick(record["split"]["test"], seed), f"--seed {seed}")
        if id not in pairs:
            left_out = [entry["reason"] for entry in record.get("skipped", ()) if entry["id"] == id]
            raise UserError(
                f"image {id} was left out of the run: {left_out[0]}" if left_out
                else f"there is no image {id} in {record['images']}; give --id one of that folder"
            )
        pair, image = pairs[id], pairs[id].image
    case, config, metrics = compute_case(folder, pair, image, id, device)
    if args.image is None and id not in record["split"]["test"]:  # its Dice is no test result
        part = next((name for name, ids in record["split"].items() if id in ids), "unused")
        case = case._replace(detail={"train": "training"}.get(part, part) + " image")
    shown = how if args.image is None else args.image.name
    options = labels(SavedRun(folder, metrics, record, (), ()), f"{shown}, dropout seed {config.seed}")
    if args.image is not None:  # the run's labels are about its own images
        trained = "the model was trained on SYNTHETIC LESIONS" if metrics["synthetic"] else None
        options = {**options, "synthetic": False, "data_note": trained}
    options["threshold"] = config.threshold
    if args.overlay:
        truth = None if pair is None else read_mask(pair.mask)
        figure = overlay_figure(case, read_image(image), truth, args.overlay, metrics["normalisation"], **options)
        name = f"overlay_{args.overlay}_{id}.png"
    else:
        figure, name = case_figure([case], metrics["normalisation"], **options), f"case_{id}.png"
    path = save_figure(figure, args.output or folder / "figures" / name)
    again = how + (f" --overlay {args.overlay}" if args.overlay else "")
    print(f"{case_title(case, config.threshold)}\nthe same picture again: python visualize.py --run {folder} {again}")
    if has_display():
        show(path)
    return path


def has_display() -> bool:
    """Whether somebody is there and a window can be opened."""
    windows = sys.platform.startswith(("win", "darwin")) or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(windows) and sys.stdout.isatty()


def show(path: Path) -> None:
    """Open a saved PNG or JPEG in a window; other formats are for other programs."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return
    from matplotlib import pyplot

    picture = pyplot.imread(str(path))
    pyplot.figure(figsize=(14, 14 * picture.shape[0] / picture.shape[1]))
    pyplot.imshow(picture)
    pyplot.axis("off")
    pyplot.tight_layout(pad=0)
    pyplot.show()


if __name__ == "__main__":
    sys.exit(main())
