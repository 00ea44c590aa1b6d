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
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.config import Config, Parser
from runtime.errors import UserError

# NumPy, matplotlib and PyTorch are imported by the functions below, when the command line is understood; a gallery or a
# summary is drawn from saved maps and numbers and needs no PyTorch at all.
if TYPE_CHECKING:
    import numpy as np

    from experiment.saved_run import SavedRun
    from isic.layout import Pair
    from reporting.cases import Case
    from reporting.galleries import ImageReader

GALLERIES = ("random", "best", "worst", "uncertain", "complex", "disagreement")
MAPS = ("mean_prediction", "pred_variance", "saliency_variance", "fused_score")
GALLERY_N = 6


# ---------------------------------------------------------------- a finished run


def newest_run(results: Path) -> Path:
    """The finished run (a folder with ``metrics.json``) in ``results`` that ended last; of pooled trainings one of them.

    Raises:
        UserError: there is none.
    """
    from experiment.saved_run import is_pooled

    places = ("metrics.json", "*/metrics.json", "*/seed-*/metrics.json")
    found = [path for place in places for path in Path(results).glob(place)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if not is_pooled(path.parent):
            return path.parent
    raise UserError(f"there is no finished run in {results}; run main.py first")


def run_pairs(record: Mapping[str, Any]) -> dict[str, Pair]:
    """The image-mask pairs of a run's data by id.

    Raises:
        UserError: the folders that ``config.json`` names are gone. Broken pairs are left out.
    """
    from isic.layout import find_pairs

    return {pair.id: pair for pair in find_pairs(Path(record["images"]), Path(record["masks"]), [])}


# ---------------------------------------------------------------- one case, computed


def pick(ids: Sequence[str], seed: int) -> str:
    """The id that a seed stands for; every id is equally likely."""
    import numpy as np

    return sorted(ids)[int(np.random.default_rng(seed).integers(len(ids)))]


def compute_case(
    folder: Path, pair: Pair | None, image: Path, id: str, device: str
) -> tuple[Case, Config, Mapping[str, Any]]:
    """Compute the maps of one image with the model and the fusion of a finished run.

    The masks are seeded as in the run, so the maps of a test image are those it saved.

    Args:
        folder: of the run.
        pair: of the image, where its mask is known.
        image: the file.
        id: seeds the dropout masks.
        device: as for ``--device``.

    Returns:
        The case, and the run's configuration and metrics.
    """
    import torch

    from dataset import normalise
    from evaluation.overlap import segmentation_overlap
    from experiment.maps import map_options
    from experiment.trained_run import load_trained_run
    from isic.decoding import read_image, read_mask
    from reporting.cases import Case
    from runtime.devices import resolve_device
    from uncertainty import uncertainty_maps

    run = load_trained_run(folder, resolve_device(device))
    pixels = read_image(image, run.config.image_size)
    truth = None if pair is None else read_mask(pair.mask, run.config.image_size)
    batch = normalise(torch.from_numpy(pixels)[None].to(resolve_device(device)))
    try:
        maps = uncertainty_maps(run.model, batch, image_ids=[id], **map_options(run.config, run.model))
    except ValueError as error:  # an odd picture can overflow the network
        raise UserError(f"{image}: {error}; no map of it can be drawn") from error
    tensors = {
        "mean_prediction": maps.mean_prediction, "pred_variance": maps.pred_variance,
        "saliency_variance": maps.saliency_variance, "fused_score": run.fusion(maps.pred_variance, maps.saliency_variance),
    }
    arrays = {name: values[0].cpu().numpy() for name, values in tensors.items()}
    dice = jaccard = None
    if truth is not None:
        prediction = torch.from_numpy(arrays["mean_prediction"] > run.config.threshold)
        dice, jaccard = (float(one) for one in segmentation_overlap(prediction[None], torch.from_numpy(truth > 0)[None]))
    return Case(id, pixels, arrays, truth, dice=dice, jaccard=jaccard), run.config, run.metrics


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run [the newest one in results/]")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are looked for [results]")
    parser.add_argument("--seed", type=int, help="which random test image, or images of the random gallery [drawn and printed]")
    parser.add_argument("--id", help="this image of the run's data instead of a random one")
    parser.add_argument("--image", type=Path, help="any picture instead; needs no mask")
    parser.add_argument("--gallery", metavar="RULE", help=f"test images by rule: {', '.join(GALLERIES)}")
    parser.add_argument("--n", type=int, help=f"how many images in the gallery [{GALLERY_N}]")
    parser.add_argument("--summary", action="store_true", help="draw every figure of the run and write its report again")
    parser.add_argument("--overlay", nargs="?", const="fused_score", metavar="MAP",
                        help=f"lay a map over the undecimated image: {', '.join(MAPS)} [fused_score]")
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
    if args.gallery is not None and args.gallery not in GALLERIES:
        raise UserError(f"there is no gallery {args.gallery}; choose one of {', '.join(GALLERIES)}")
    if args.overlay is not None and args.overlay not in MAPS:
        raise UserError(f"there is no map {args.overlay}; choose one of {', '.join(MAPS)}")
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
    from experiment.saved_run import is_pooled, load_pooled, load_run
    from reporting.pooled import draw_pooled
    from reporting.run_pictures import draw_run

    if is_pooled(folder):
        draw_pooled(load_pooled(folder))
        return folder / "report.html"
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
    from isic.decoding import read_image

    pairs, size = run_pairs(run.record), int(run.record["configuration"]["image_size"])

    def read(id: str) -> np.ndarray:
        if id not in pairs:
            raise UserError(f"there is no image {id} in {run.record['images']}")
        return read_image(pairs[id].image, size)

    return read


def render_gallery(folder: Path, args: argparse.Namespace) -> Path:
    """Draw and save the gallery that the arguments ask for, from saved maps."""
    from experiment.saved_run import load_run
    from reporting.formats import number
    from reporting.galleries import RULES, choose
    from reporting.run_pictures import candidates_of, draw_gallery, run_seed
    from reporting.style import save_figure

    run = load_run(folder)
    random = args.gallery == "random"
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31) if random else run_seed(run)
    n = args.n or GALLERY_N
    figure = draw_gallery(run, args.gallery, n, seed, image_reader(run))
    if figure is None:
        raise UserError(f"gallery {args.gallery}: the rule is defined for no test image of {folder}")
    for id, value in choose(args.gallery, candidates_of(run, seed), n):
        print(id if random else f"{id}   {RULES[args.gallery].shown or RULES[args.gallery].title}: {number(value)}")
    print(f"the same picture again: python visualize.py --run {folder} --gallery {args.gallery} --n {n}"
          + (f" --seed {seed}" if random else ""))
    return save_figure(figure, args.output or folder / "figures" / f"gallery_{args.gallery}_{n}.png")


class Chosen(NamedTuple):
    """The image of a case: its pair (None without a mask), file and id, and the flags that choose it again."""

    pair: Pair | None
    image: Path
    id: str
    how: str


def chosen_image(record: Mapping[str, Any], args: argparse.Namespace) -> Chosen:
    """The image that the arguments ask for: any file, one of the run's data by id, or a random test image.

    Raises:
        UserError: there is no such image, or it is no picture.
    """
    if args.image is not None:
        from isic.decoding import read_image

        try:
            read_image(args.image)
        except UserError as error:  # its advice is about pairs
            raise UserError(f"{str(error).rsplit('; ', 1)[0]}; give --image another file") from error
        return Chosen(None, args.image, args.image.stem, f"--image {args.image}")
    pairs = run_pairs(record)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    id, how = (args.id, f"--id {args.id}") if args.id else (pick(record["split"]["test"], seed), f"--seed {seed}")
    if id not in pairs:
        left_out = [entry["reason"] for entry in record.get("skipped", ()) if entry["id"] == id]
        raise UserError(
            f"image {id} was left out of the run: {left_out[0]}" if left_out
            else f"there is no image {id} in {record['images']}; give --id one of that folder"
        )
    return Chosen(pairs[id], pairs[id].image, id, how)


def render_case(folder: Path, args: argparse.Namespace) -> Path:
    """Compute, draw, save and (where there is a display) show the case that the arguments ask for."""
    from experiment.saved_run import SavedRun, read_record
    from isic.decoding import read_image, read_mask
    from reporting.cases import case_figure, case_title, overlay_figure
    from reporting.run_pictures import labels
    from reporting.style import save_figure

    record = read_record(folder)
    chosen = chosen_image(record, args)
    case, config, metrics = compute_case(folder, chosen.pair, chosen.image, chosen.id, args.device)
    if args.image is None and chosen.id not in record["split"]["test"]:  # its Dice is no test result
        part = next((name for name, ids in record["split"].items() if chosen.id in ids), "unused")
        case = case._replace(detail={"train": "training"}.get(part, part) + " image")
    shown = chosen.how if args.image is None else args.image.name
    options = labels(SavedRun(folder, metrics, record, (), ()), f"{shown}, dropout seed {config.seed}")
    if args.image is not None:  # the run's labels are about its own images
        trained = "the model was trained on SYNTHETIC LESIONS" if metrics["synthetic"] else None
        options = {**options, "synthetic": False, "data_note": trained}
    options["threshold"] = config.threshold
    if args.overlay:
        truth = None if chosen.pair is None else read_mask(chosen.pair.mask)
        original = read_image(chosen.image)
        figure = overlay_figure(case, original, truth, args.overlay, metrics["normalisation"], **options)
        name = f"overlay_{args.overlay}_{chosen.id}.png"
    else:
        figure, name = case_figure([case], metrics["normalisation"], **options), f"case_{chosen.id}.png"
    path = save_figure(figure, args.output or folder / "figures" / name)
    again = chosen.how + (f" --overlay {args.overlay}" if args.overlay else "")
    print(f"{case_title(case)}\nthe same picture again: python visualize.py --run {folder} {again}")
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
