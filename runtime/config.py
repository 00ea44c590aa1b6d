"""The configuration: one frozen dataclass, from which the command line is generated.

Each field says in its metadata which of a run's results it decides, and so what two runs must share:

- ``"training"``: the weights, and everything made with them;
- ``"evaluation"``: only what is made after training, so that runs that differ in it can share weights;
- ``"nothing"``: no map and no weight (where things lie, how fast, how much is said, how many resamples).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, NoReturn

from runtime.errors import UserError

UPSAMPLINGS = ("bilinear", "transposed")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
CAM_SCORES = ("all", "predicted")
#: The layers of the U-Net that Grad-CAM can weigh.
UNET_LAYERS = ("encoder4", "bottleneck")


def _option(
    default: Any, text: str, group: str, kind: Callable[[str], Any] = str, decides: str = "training", **limits: Any
) -> Any:
    """A dataclass field that is also a flag; ``limits`` may hold low, high, choices, above, below, and
    action, nargs, metavar as argparse knows them."""
    return field(default=default, metadata={"help": text, "group": group, "type": kind, "decides": decides, **limits})


def _setting(default: Any, text: str, group: str, kind: Callable[[str], Any] = str, **limits: Any) -> Any:
    """A field that decides neither weights nor maps."""
    return _option(default, text, group, kind, "nothing", **limits)


def _after(default: Any, text: str, group: str, kind: type = str, **limits: Any) -> Any:
    """A field that acts after training."""
    return _option(default, text, group, kind, "evaluation", **limits)


def _margin(text: str) -> tuple[str, float]:
    """Name and value of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE, such as brier=0.001") from None


@dataclass(frozen=True)
class Config:
    """Every constant of the experiment; the defaults are the paper's.

    Raises:
        UserError: a value is outside its range; the line names the flag.
    """

    # fmt: off
    data: str | None = _setting(None, "folder in the ISIC 2018 Task 1 layout [data/ISIC2018, or synthetic lesions where that is absent]", "data")
    images: str | None = _setting(None, "folder of images with any names; needs --masks", "data")
    masks: str | None = _setting(None, "folder of masks named like --images, or with _segmentation, _lesion or _mask added", "data")
    download: bool = _setting(False, "fetch the two official ISIC 2018 Task 1 archives into data/ISIC2018 first", "data", bool)
    maps: list[str] | None = _setting(None, "judge maps instead of training: two folders of .npz, of validation and of test images; see docs/OWN_MAPS.md", "data", nargs=2, metavar=("VALIDATION", "TEST"))
    scores: list[str] | None = _setting(None, "with --maps: the arrays that hold the two scores, the one that is judged and the one that may add to it [pred_variance saliency_variance]", "data", nargs=2, metavar=("FIRST", "SECOND"))
    test_data: list[str] | None = _setting(None, "another test set, a folder in the ISIC 2018 layout or with images/ and masks/, on which nothing is fitted; may be repeated", "data", action="append", metavar="DIR")
    test_images: list[str] | None = _setting(None, "another test set: folder of images with any names; needs --test-masks; may be repeated", "data", action="append", metavar="DIR")
    test_masks: list[str] | None = _setting(None, "folder of the masks of each --test-images, in the same order", "data", action="append", metavar="DIR")
    split: str | None = _setting(None, "CSV file with the columns id and part (training, validation or test) instead of a split by chance", "data", metavar="FILE")
    groups: str | None = _setting(None, "CSV file with the columns id and group (patient, lesion): no group is split, and resamples draw groups", "data", metavar="FILE")
    limit: int | None = _option(None, "use only N images, evenly spaced over the sorted ids", "data", int, low=8)
    skip_bad: bool = _setting(False, "leave out pairs that are broken or incomplete, and list them; the split of the others stays", "data", bool)
    cache: str | None = _setting(None, "folder for the decoded-image cache [data/cache]", "data")
    data_note: str | None = _setting(None, "what a reader must know about the images ('centre-cropped'), for every figure and the report", "data")
    image_size: int = _option(256, "height and width in pixels after resizing; a multiple of 16", "data", int, low=32, high=4096)
    test_fraction: float = _option(0.2, "share of all images that is the test set, rounded up to whole images", "data", float, low=1e-6, below=1)
    validation_fraction: float = _option(0.125, "share of the rest that is the validation set, rounded up to whole images", "data", float, low=1e-6, below=1)
    split_seed: int = _option(42, "seed of the split", "data", int, low=0, high=2**32 - 1)
    synthetic_images: int = _option(320, "how many synthetic lesions, where those are used", "data", int, low=8, high=100_000)

    width: int = _option(64, "channels of the first encoder block; the others have 2, 4 and 8 times as many", "model", int, low=2, high=1024)
    dropout: float = _option(0.2, "dropout probability", "model", float, above=0, below=1)
    model: str | None = _option(None, "another network: package:function, a factory that takes no argument and returns an nn.Module; see docs/EXTENDING.md", "model", metavar="PACKAGE:FUNCTION")
    output: str | None = _option(None, "with --model: the key or the index of the logits in what the network returns [the logits themselves, or 'out']", "model", metavar="KEY")
    insert_dropout: float | None = _option(None, "with --model: add dropout of this probability after the blocks of the decoder", "model", float, above=0, below=1, metavar="P")
    model_weights: str | None = _setting(None, "with --model: file of a state dictionary; the network is evaluated as it is instead of trained", "model", metavar="FILE")
    upsampling: str = _option("bilinear", "how the decoder upsamples", "model", choices=UPSAMPLINGS)

    epochs: int = _option(50, "most epochs to train", "training", int, low=1, high=10**6)
    patience: int = _option(10, "stop after this many epochs without a better validation Dice", "training", int, low=1, high=10**6)
    batch_size: int = _option(16, "images per training step", "training", int, low=2, high=10**6)
    lr: float = _option(1e-4, "learning rate of Adam", "training", float, above=0, high=1e30)
    schedule: str = _option("constant", "learning-rate schedule", "training", choices=("constant", "cosine"))
    warmup: float = _option(0.0, "epochs of linear warm-up of the learning rate", "training", float, low=0, high=1e6)
    clip: float = _option(0.0, "largest norm of the gradient; 0 does not clip", "training", float, low=0)
    amp: str = _option("auto", "precision of training; auto: bf16 where it is native", "training", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = _option(False, "compile the network for training (torch.compile)", "training", bool)
    augment: str = _option("full", "augmentation of the training split; flips: with quarter turns", "training", choices=("full", "flips", "none"))
    weights_from: str | None = _setting(None, "results folder of a finished run, or of finished --trainings, whose weights to take instead of training", "training")
    workers: int = _setting(-1, "data-loading processes; -1 chooses by device", "training", int, low=-1, high=256)

    passes: int = _after(30, "stochastic forward passes per image (T)", "uncertainty", int, low=2, high=10**6)
    target_layer: str = _after("encoder4", "layer whose activations Grad-CAM weighs: encoder4 or bottleneck of the U-Net, the path of a module with --model", "uncertainty", metavar="LAYER")
    precision: str = _after("auto", "precision of the maps; auto: fp16 for the U-Net on CUDA, else fp32", "uncertainty", choices=PRECISIONS)
    cam_scale: str = _after("maximum", "each heatmap is divided by its maximum, or not", "uncertainty", choices=("maximum", "none"))
    cam_score: str = _after("all", "logits that the score of Grad-CAM sums: all, or those of the lesion that the pass predicts", "uncertainty", choices=CAM_SCORES)
    flips: bool = _setting(False, "also save how the prediction varies over flips and quarter turns, and judge it as a detector of errors", "uncertainty", bool)
    threshold: float = _option(0.5, "predicted lesion where the mean prediction exceeds this", "calibration", float, above=0, below=1)
    bins: int = _after(15, "equal-width confidence bins", "calibration", int, low=1, high=10_000)
    lambda_steps: int = _after(10, "lambda is chosen from k / STEPS, k = 0 to STEPS", "calibration", int, low=1, high=1000)
    resamples: int = _setting(10_000, "bootstrap resamples of the images", "calibration", int, low=100, high=10**8)
    study: bool = _setting(False, "also compare all fusion rules and normalisations, and ask what saliency adds", "calibration", bool)
    margin: dict[str, float] | None = _setting(None, "equivalence margin of an endpoint of the conclusion, such as brier=0.001; may be repeated", "calibration", _margin, action="append", metavar="NAME=VALUE")

    ensemble: bool = _setting(False, "also judge the ensemble of the pooled trainings, from their saved maps", "calibration", bool)

    results: str | None = _setting(None, "folder for everything this run writes [results/<dataset>, with -quick, -trainings added]", "run")
    trainings: int = _setting(1, "train seeds SEED, SEED+1, ..., each in RESULTS/seed-<seed>, and pool them", "run", int, low=1, high=1000)
    pool: list[str] | None = _setting(None, "pool these finished runs, which differ in the seed alone, and train nothing", "run", nargs="+", metavar="RUN")
    seed: int = _option(42, "seed of training and of the dropout masks", "run", int, low=0, high=2**32 - 1)
    fresh: bool = _setting(False, "delete what another configuration left in the results folder and start over", "run", bool)
    quiet: bool = _setting(False, "no progress bars and no line per stage: only the result, warnings and errors", "run", bool)
    json: bool = _setting(False, "print the content of metrics.json to standard output, and everything else to standard error", "run", bool)
    device: str = _setting("auto", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps", "run")
    verify: bool = _setting(False, "check all that the finished run in the results folder left, and came from, and change nothing; --results is enough", "run", bool)
    quick: bool = _setting(False, "CPU-sized preset: 128 pixels, width 16, 20 epochs, cosine from 1e-3; flags given beside it win", "run", bool)
    # fmt: on

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.image_size % 16:
            raise UserError(f"--image-size must be a multiple of 16, not {self.image_size}")
        if self.width % 2:
            raise UserError(f"--width must be even, not {self.width}")
        if (self.images is None) != (self.masks is None):
            raise UserError("--images and --masks go together: give both or neither")
        if self.images is not None and self.data is not None:
            raise UserError("give either --data or --images with --masks, not both")
        if self.download and (self.images is not None or self.data is not None):
            raise UserError("--download fetches into data/ISIC2018; leave --data, --images and --masks out")
        if self.model is None:
            needless = [_flag_name(name) for name in NETWORK_FIELDS if getattr(self, name) is not None]
            if needless:
                raise UserError(f"{needless[0]} is about a network of your own: name it with --model package:function")
            if self.target_layer not in UNET_LAYERS:
                raise UserError(f"--target-layer must be one of {', '.join(UNET_LAYERS)} for the U-Net, not {self.target_layer!r}")
        if self.model_weights is not None and self.weights_from is not None:
            raise UserError("give --model-weights or --weights-from, not both")
        if self.model_weights is not None and self.trainings > 1:
            raise UserError("--model-weights trains nothing; leave --trainings out, and --pool runs of other weights and seeds")
        if len(self.test_images or ()) != len(self.test_masks or ()):
            raise UserError("--test-images and --test-masks go together: give as many of one as of the other")
        if self.scores is not None and self.maps is None:
            raise UserError("--scores names arrays of --maps; give both")
        if self.pool is not None and len(self.pool) < 2:
            raise UserError(f"--pool pools at least two finished runs, not {self.pool[0] if self.pool else 'none'} alone")
        if self.ensemble and self.pool is None and self.trainings < 2:
            raise UserError("--ensemble combines trainings: give --trainings of at least 2, or --pool")
        last, most = self.seed + self.trainings - 1, 2**32 - 1
        if last > most:
            raise UserError(f"--trainings {self.trainings} from --seed {self.seed} on would need seed {last}; the largest is {most}")
        for name, value in (self.margin or {}).items():
            if not 0 < value < math.inf:
                raise UserError(f"--margin {name} must be a finite number greater than 0, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields and their values, as written to ``config.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: Path) -> Config:
        """The configuration that ``config.json`` records.

        Raises:
            UserError: ``values`` does not describe one; the line names ``source``.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"{source} does not hold a configuration of this version ({error}); run main.py again with --fresh"
            ) from error

    def experiment(self) -> dict[str, Any]:
        """The fields that decide the numbers: what two runs must share to share results.

        One that is None decides nothing and is left out, so that a run keeps its identity when a version adds a field.
        """
        values = {name: getattr(self, name) for name in IDENTITY_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


#: The flags that say something where finished runs are pooled.
POOL_FLAGS = ("pool", "results", "margin", "resamples", "ensemble", "quiet", "json", "verify")
#: The flags that say something where maps are judged that something else made.
MAPS_FLAGS = (
    "maps", "scores", "groups", "data_note", "threshold", "bins", "lambda_steps", "resamples", "study", "margin", "results",
    "seed", "fresh", "quiet", "json", "device", "verify",
)
#: The fields about the U-Net of this program, and those about a network of the user's.
UNET_FIELDS, NETWORK_FIELDS = ("width", "dropout", "upsampling"), ("model", "output", "insert_dropout", "model_weights")
#: The fields that decide the numbers.
IDENTITY_FIELDS = tuple(item.name for item in fields(Config) if item.metadata["decides"] != "nothing")
#: The fields that act after training: runs that differ in these alone can share weights.
AFTER_TRAINING = tuple(item.name for item in fields(Config) if item.metadata["decides"] == "evaluation")

#: What ``--quick`` changes. A narrow network and few epochs want a faster learning rate that decays.
QUICK = {"image_size": 128, "width": 16, "epochs": 20, "lr": 1e-3, "schedule": "cosine"}
#: What synthetic lesions change: there are few, so that training needs smaller batches and more epochs.
SYNTHETIC = {**QUICK, "epochs": 32, "batch_size": 8}


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_text(flag: str, value: str) -> None:
    """Refuse what no file can be called and no JSON can hold: nothing at all, NUL, and bytes that are no text.

    Raises:
        UserError: names the flag.
    """
    if not value:
        raise UserError(f"{flag} is empty; give it a value, or leave it out")
    if "\0" in value:
        raise UserError(f"{flag} {value!r} holds a NUL byte; give another name")
    try:
        value.encode()
    except UnicodeEncodeError:  # how Python stands in for bytes that are no UTF-8
        raise UserError(f"{flag} {value!r} holds bytes that are no text; rename it") from None


def _check_texts(flag: str, value: Any) -> None:
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
        if isinstance(text, str):
            check_text(flag, text)


def output_file(text: str) -> Path:
    """The picture that ``--output`` names.

    Raises:
        UserError: it is no name of a file.

    Example:
        >>> output_file("figures/")
        Traceback (most recent call last):
        runtime.errors.UserError: --output figures/ is a folder; give a file in it, such as figures/case.png
    """
    check_text("--output", text)
    name = os.path.basename(text)
    if name in ("", ".", "..") or os.path.isdir(text):
        raise UserError(f"--output {text} is a folder; give a file in it, such as {os.path.join(text, 'case.png')}")
    return Path(text)


def _check(item: Field[Any], value: Any) -> None:
    limits, flag = item.metadata, _flag_name(item.name)
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"{flag} must be one of {', '.join(limits['choices'])}, not {value!r}")
    if value:  # a run of an earlier version may have an empty one
        _check_texts(flag, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} must be a finite number, not {value}")
    for key, words, fine in (
        ("low", "at least", lambda v, bound: v >= bound),
        ("high", "at most", lambda v, bound: v <= bound),
        ("above", "greater than", lambda v, bound: v > bound),
        ("below", "less than", lambda v, bound: v < bound),
    ):
        if key in limits and not fine(value, limits[key]):
            raise UserError(f"{flag} must be {words} {limits[key]}, not {value}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are the one-line user error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_config(
    argv: Sequence[str] | None, description: str | None,
    preset: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
) -> Config:
    """Turn the command line into a configuration.

    Args:
        argv: the arguments; those of the process if None.
        description: the first line of the help.
        preset: values in place of the defaults, where no flag says otherwise, or a function from the values of the flags
            to them; ``--quick`` gives ``QUICK`` if None.

    Raises:
        UserError: an unknown flag or a value out of range.
    """
    parser = Parser(description=description, allow_abbrev=False)
    groups: dict[str, Any] = {}
    for item in fields(Config):
        limits = item.metadata
        if limits["group"] not in groups:
            groups[limits["group"]] = parser.add_argument_group(limits["group"])
        text = limits["help"].replace("%", "%%")
        if limits["type"] is bool:
            extra: dict[str, Any] = {"action": "store_true"}
        else:
            extra = {"type": limits["type"], "metavar": limits["type"].__name__.upper()}
            if "choices" in limits:
                extra["metavar"] = "{" + ",".join(limits["choices"]) + "}"
            extra.update((key, limits[key]) for key in ("action", "nargs", "metavar") if key in limits)
            if item.default not in (None, -1):
                text += f" [{item.default}]"
        groups[limits["group"]].add_argument(
            _flag_name(item.name), default=argparse.SUPPRESS, help=text, **extra
        )
    given = vars(parser.parse_args(argv))
    if "margin" in given:
        given["margin"] = dict(given["margin"])
    idle = [_flag_name(name) for name in given if name not in POOL_FLAGS]
    if "pool" in given and idle:
        raise UserError(f"--pool reads finished runs and trains nothing; leave {', '.join(idle)} out")
    idle = [_flag_name(name) for name in given if name not in MAPS_FLAGS]
    if "maps" in given and idle:
        raise UserError(f"--maps judges maps that are there and makes none; leave {', '.join(idle)} out")
    idle = [_flag_name(name) for name in UNET_FIELDS if name in given]
    if "model" in given and idle:
        raise UserError(f"{', '.join(idle)} would change the U-Net; with --model leave it out, and let the factory decide")
    for name, value in given.items():  # before any of them is looked for
        _check_texts(_flag_name(name), value)
    if callable(preset):
        preset = preset(given)
    if preset is None:
        preset = QUICK if given.get("quick") else {}
    return Config(**{**preset, **given})
