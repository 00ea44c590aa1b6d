"""The maps of one image, computed with the network and the fusion of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import normalise
from evaluation.overlap import segmentation_overlap
from experiment.case_images import Chosen
from experiment.map_files import IMAGE, picture_of
from experiment.maps import map_options
from experiment.trained_run import load_trained_run
from isic.decoding import read_image, read_mask
from runtime.devices import resolve_device
from runtime.errors import UserError
from runtime.resources import naming_shortage
from uncertainty import uncertainty_maps


class ComputedCase(NamedTuple):
    """What a picture of a case shows.

    Attributes:
        image: uint8 (H, W, 3), at the resolution of the maps.
        maps: "mean_prediction", both variances and "fused_score", float32 (H, W).
        truth: uint8 (H, W), nonzero inside the lesion; None where no mask is known.
        dice, jaccard: None where no mask is known.
        has_image: whether ``image`` is the image, and not the mean prediction in its place.
    """

    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    truth: np.ndarray | None
    dice: float | None
    jaccard: float | None
    has_image: bool = True


@naming_shortage("maps", "give --device cpu, or close other programs")
def compute_case(folder: Path, chosen: Chosen, device: str) -> ComputedCase:
    """Compute the maps of one image with the model and the fusion of a finished run.

    The masks are seeded as in the run, so the maps of a test image are those it saved.

    Args:
        folder: of the run.
        chosen: the image; its id seeds the dropout masks.
        device: as for ``--device``.

    Raises:
        UserError: a file of the run or of the image is missing or broken, or the network overflows.
    """
    assert chosen.file is not None
    run, place = load_trained_run(folder, resolve_device(device)), resolve_device(device)
    pixels = read_image(chosen.file, run.config.image_size)
    truth = None if chosen.pair is None else read_mask(chosen.pair.mask, run.config.image_size)
    batch = normalise(torch.from_numpy(pixels)[None].to(place))
    try:
        maps = uncertainty_maps(run.model, batch, image_ids=[chosen.id], **map_options(run.config, run.model))
    except ValueError as error:  # an odd picture can overflow the network
        raise UserError(f"{chosen.file}: {error}; no map of it can be drawn") from error
    tensors = {
        "mean_prediction": maps.mean_prediction, "pred_variance": maps.pred_variance,
        "saliency_variance": maps.saliency_variance, "fused_score": run.fusion(maps.pred_variance, maps.saliency_variance),
    }
    arrays = {name: values[0].cpu().numpy() for name, values in tensors.items()}
    return _case(pixels, arrays, truth, run.config.threshold)


def saved_case(chosen: Chosen, threshold: float, metrics: Mapping[str, Any]) -> ComputedCase:
    """The case of maps that were given: all of it is in the map file.

    Args:
        chosen: the image.
        threshold: predicted lesion where the mean prediction exceeds it.
        metrics: of the run.

    Raises:
        UserError: the file is missing or broken, or is that of another image or run.
    """
    assert chosen.images is not None
    need = ("mean_prediction", "pred_variance", "saliency_variance", "fused_score", "true_mask")
    maps = chosen.images.saved_maps(chosen.id, need, metrics)
    return _case(picture_of(maps), maps, maps["true_mask"], threshold)._replace(has_image=IMAGE in maps)


def _case(
    image: np.ndarray, maps: Mapping[str, np.ndarray], truth: np.ndarray | None, threshold: float
) -> ComputedCase:
    if truth is None:
        return ComputedCase(image, maps, None, None, None)
    prediction = torch.from_numpy(maps["mean_prediction"] > threshold)
    dice, jaccard = (float(one) for one in segmentation_overlap(prediction[None], torch.from_numpy(truth > 0)[None]))
    return ComputedCase(image, maps, truth, dice, jaccard)
