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
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Parser, check_text, output_file
from runtime.cpu import prepare_cpu
from runtime.errors import UserError
from runtime.resources import naming_shortage

# NumPy, matplotlib and PyTorch are imported by the functions below, when the command line is understood; a gallery or a
# summary is drawn from saved maps and numbers and needs no PyTorch at all.
if TYPE_CHECKING:
    from experiment.saved_run import SavedRun

GALLERIES = ("random", "best", "worst", "uncertain", "complex", "disagreement")
MAPS = ("mean_prediction", "pred_variance", "saliency_variance", "fused_score")
GALLERY_N = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run [the newest one in results/]")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are looked for [results]")
    parser.add_argument("--seed", type=int, help="which random test image, or images of the random gallery [drawn and printed]")
    parser.add_argument("--id", help="this image of the run's data, or of a test set of its own, instead of a random one")
    parser.add_argument("--test-set", metavar="NAME", help="look in this other test set of the run instead of its own images")
    parser.add_argument("--image", type=Path, help="any picture instead; needs no mask")
    parser.add_argument("--gallery", metavar="RULE", help=f"test images by rule: {', '.join(GALLERIES)}")
    parser.add_argument("--n", type=int, help=f"how many images in the gallery [{GALLERY_N}]")
    parser.add_argument("--summary", action="store_true", help="draw every figure of the run and write its report again")
    parser.add_argument("--overlay", nargs="?", const="fused_score", metavar="MAP",
                        help=f"lay a map over the undecimated image: {', '.join(MAPS)} [fused_score]")
    parser.add_argument("--output", help="file to write: .png, .jpg, .pdf or .svg [in RUN/figures]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    try:
        args = parser.parse_args(argv)
        check(args)
        args.output = None if args.output is None else output_file(args.output)
        from experiment.case_images import check_finished, newest_run
        from experiment.saved_run import blaming

        run = args.run or newest_run(args.results)
        check_finished(run)
        with naming_shortage("drawing", "close other programs, or give --device cpu"), blaming(run / "metrics.json"):
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
    for name, value in vars(args).items():
        if isinstance(value, (str, Path)):
            check_text(f"--{name.replace('_', '-')}", str(value))
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
    if args.test_set is not None and (args.image is not None or args.summary):
        raise UserError("--test-set says where an image is looked for; leave it out where --image or --summary is given")
    if args.summary and args.output is not None:
        raise UserError("--summary writes into the run's folder; leave --output out")


def summarise(folder: Path) -> Path:
    """Redraw the figures of a run and rewrite its report, from saved numbers and maps alone; returns the report.

    The galleries need the images as well: where the dataset is gone, they stay as they are, and that is said.
    """
    from experiment.case_images import NoPicture, named_set
    from experiment.saved_run import is_pooled, load_pooled, load_run
    from reporting.pooled import draw_pooled
    from reporting.run_pictures import draw_run

    if is_pooled(folder):
        draw_pooled(load_pooled(folder))
        return folder / "report.html"
    run = load_run(folder)
    images = named_set(folder, run.record, None)
    if not images.maps.is_dir():
        # where other test sets alone were measured, the run's own galleries are those of another run
        if not run.record.get("targets"):
            print(f"galleries not redrawn: there are no maps in {images.maps}")
        draw_run(run)
        return folder / "report.html"
    try:
        draw_run(run, images.reader(map_size(run), run.metrics))
    except NoPicture as error:
        print(f"galleries not redrawn: {error}")
        draw_run(run)
    return folder / "report.html"


def map_size(run: SavedRun) -> int:
    """Height and width of the maps that a run made; of given maps, which have sizes of their own, nothing depends on it."""
    return int(run.record["configuration"].get("image_size", 0))


def repeat(folder: Path, flags: Sequence[object], output: Path | None) -> None:
    """Print the command that draws the picture again."""
    command = ["python", "visualize.py", "--run", folder, *flags, *([] if output is None else ["--output", output])]
    print(f"the same picture again: {shlex.join(map(str, command))}")


def render_gallery(folder: Path, args: argparse.Namespace) -> Path:
    """Draw and save the gallery that the arguments ask for, from saved maps."""
    from experiment.case_images import named_set
    from experiment.saved_run import load_run
    from experiment.terms import terms_of
    from reporting.formats import number
    from reporting.galleries import RULES, choose
    from reporting.run_pictures import candidates_of, draw_gallery, run_seed
    from reporting.style import save_figure

    run = load_run(folder)
    images = named_set(folder, run.record, args.test_set)
    if not images.maps.is_dir() and images.name == "" and run.record.get("targets"):
        names = ", ".join(entry["name"] for entry in run.record["targets"])
        raise UserError(f"{folder} holds maps of other test sets alone; choose one with --test-set: {names}")
    run = run._replace(rows=images.rows(run.metrics))
    random = args.gallery == "random"
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31) if random else run_seed(run)
    n = args.n or GALLERY_N
    figure = draw_gallery(run, args.gallery, n, seed, images.reader(map_size(run), run.metrics), images)
    if figure is None:
        raise UserError(f"gallery {args.gallery}: the rule is defined for no test image of {folder}")
    terms, chosen = terms_of(run), choose(args.gallery, candidates_of(run, seed, images), n)
    for id, value in chosen:
        print(id if random else f"{id}   {terms(RULES[args.gallery].shown or RULES[args.gallery].title)}: {number(value)}")
    if len(chosen) < n and args.n is not None:
        ranked = "" if len(chosen) == len(run.rows) else f"; the rule is defined for {len(chosen)} of them"
        print(f"there are {len(run.rows)} test images{ranked}; --n {n} draws all of these")
    within = [] if args.test_set is None else ["--test-set", args.test_set]
    repeat(folder, ["--gallery", args.gallery, "--n", n, *(["--seed", seed] if random else []), *within], args.output)
    name = "_".join(["gallery", args.gallery, *within[1:], str(n)])
    return save_figure(figure, args.output or folder / "figures" / f"{name}.png", terms)


def render_case(folder: Path, args: argparse.Namespace) -> Path:
    """Draw, save and (where there is a display) show the case that the arguments ask for.

    Its maps are computed, with the network of the run; where the run judged given maps, they are those it saved.
    """
    from experiment.case_images import any_picture, choose_image
    from experiment.computed_case import compute_case, saved_case
    from experiment.saved_run import SavedRun, check_belongs, read_metrics, read_record
    from experiment.terms import judges_given_maps, terms_of
    from isic.decoding import read_image, read_mask
    from reporting.cases import Case, case_figure, case_title, overlay_figure
    from reporting.run_pictures import labels
    from reporting.style import save_figure, short_name

    record = read_record(folder)
    given = judges_given_maps(record)
    if given and args.image is not None:
        raise UserError(f"--image needs a network, and {folder} judged maps that were given; leave it out, or give another --run")
    if args.image is not None:
        chosen = any_picture(args.image)
    else:
        chosen = choose_image(folder, record, args.id, args.seed, args.test_set)
    run = SavedRun(folder, read_metrics(folder), record, (), ())
    check_belongs(folder, run.metrics, record)
    threshold = float(record["configuration"]["threshold"])
    made = saved_case(chosen, threshold, run.metrics) if given else compute_case(folder, chosen, args.device)
    case = Case(chosen.id, made.image, made.maps, made.truth, made.dice, made.jaccard, chosen.detail)
    shown = " ".join(chosen.how) if args.image is None else args.image.name
    options = labels(run, shown if given else f"{shown}, dropout seed {record['configuration']['seed']}")
    if args.image is not None:  # the run's labels are about its own images
        trained = "the model was trained on SYNTHETIC LESIONS" if run.metrics["synthetic"] else None
        options = {**options, "synthetic": False, "data_note": trained}
    elif chosen.images is not None and chosen.images.name:
        options = {**options, "synthetic": False, "data_note": None}
    options["threshold"] = threshold
    if args.overlay:
        truth = case.truth if given else None if chosen.pair is None else read_mask(chosen.pair.mask)
        original = case.image if chosen.file is None else read_image(chosen.file)
        figure = overlay_figure(case, original, truth, args.overlay, run.metrics["normalisation"], **options)
        name = f"overlay_{args.overlay}_{chosen.id}.png"
    else:
        figure, name = case_figure([case], run.metrics["normalisation"], **options), f"case_{chosen.id}.png"
    if chosen.images is not None and chosen.images.name:
        name = f"{chosen.images.name}_{name}"
    path = save_figure(figure, args.output or folder / "figures" / short_name(name), terms_of(run))
    print(case_title(case))
    if given and chosen.images is not None and not made.has_image:
        print("the maps of this image came without it; the mean prediction, in grey, stands in its place")
    repeat(folder, [*chosen.how, *(["--overlay", args.overlay] if args.overlay else [])], args.output)
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
    prepare_cpu()  # before PyTorch loads
    sys.exit(main())
