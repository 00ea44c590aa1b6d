"""The ensemble of several trainings: their saved maps combined image by image, and what it is worth as a detector of errors.

Lakshminarayanan, Pritzel, Blundell, "Simple and scalable predictive uncertainty estimation using deep ensembles",
NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.image_maps import ImageMaps
from evaluation.protocol import evaluate
from evaluation.scores import binary_entropy
from experiment.checks import PARTS
from experiment.maps import MEASURED, SavedMaps
from experiment.saved_run import maps_are_sealed, read_metrics, read_record
from inference.moments import Moments, PassDice
from runtime.errors import UserError

CPU = torch.device("cpu")


class EnsembleMaps:
    """The combined maps of one part, one image at a time; can be iterated any number of times.

    Of each image, over the trainings:

    ======================  =============================================================================
    `mean_prediction`       mean of the mean predictions
    `pred_variance`         population variance of the mean predictions: the trainings alone, no dropout
    `expected_entropy`      mean of the entropies of the mean predictions, so that predictive entropy minus
                            it is what the label tells about the training
    `saliency_variance`     mean of the saliency variances
    `true_mask`             the same in all
    `empty_cams`            sum
    `pass_dice`             mean pairwise Dice of the trainings' predicted lesions, as a ratio of sums
    ======================  =============================================================================

    Args:
        members: the saved maps of the same part by each training, of the same images in the same order.
        identities: of the runs that the maps must be of.

    Raises:
        UserError: the trainings have other images, or a single one is given.
    """

    def __init__(self, members: Sequence[SavedMaps], identities: Sequence[str]) -> None:
        if len(members) < 2:
            raise UserError(f"an ensemble needs at least two trainings, not {len(members)}")
        for member in members[1:]:
            if member.ids != members[0].ids or member.threshold != members[0].threshold:
                raise UserError(f"{member.folder} and {members[0].folder} are not of the same images and threshold")
        self.members, self.identities = list(members), list(identities)

    def __len__(self) -> int:
        return len(self.members[0].ids)

    def __iter__(self) -> Iterator[tuple[str, ImageMaps]]:
        """Yield (id, combined maps).

        Raises:
            UserError: a map file is missing, damaged, of another run, or shows another mask.
        """
        for row in zip(*self.members):
            id = row[0][0]
            for member, identity in zip(self.members, self.identities):
                if member.facts(id).identity != identity:
                    raise UserError(f"{member.path(id)} was not made by the run that is in its folder; run main.py again")
            yield id, self._combined(id, [maps for _, maps in row])

    def _combined(self, id: str, maps: Sequence[ImageMaps]) -> dict[str, Any]:
        mask = maps[0]["true_mask"]
        for member, other in zip(self.members, maps):
            if not torch.equal(mask, other["true_mask"]):
                raise UserError(f"{member.path(id)} and {self.members[0].path(id)} have different masks")
        prediction, entropy, saliency = Moments(), Moments(), Moments()
        probabilities = torch.stack([one["mean_prediction"] for one in maps])
        prediction.update(probabilities)
        entropy.update(binary_entropy(probabilities))
        saliency.update(torch.stack([one["saliency_variance"] for one in maps]))
        agreement = PassDice()
        agreement.update((probabilities > self.members[0].threshold)[:, None])
        return {
            "mean_prediction": prediction.mean, "pred_variance": prediction.variance(),
            "saliency_variance": saliency.mean, "expected_entropy": entropy.mean.clamp_(min=0), "true_mask": mask,
            "empty_cams": sum(one["empty_cams"] for one in maps), "pass_dice": float(agreement.value()),
            "threshold": self.members[0].threshold,
        }


def ensemble_of(folders: Sequence[Path], device: torch.device = CPU) -> dict[str, EnsembleMaps]:
    """The combined maps of the validation and of the test images of finished trainings.

    Args:
        folders: their results folders; that they differ in the seed alone is for the caller to see to.
        device: of the tensors.

    Raises:
        UserError: a training is not finished, or they have other images.
    """
    records = [(folder, read_metrics(folder), read_record(folder)) for folder in folders]
    identities = [str(metrics.get("identity")) for _, metrics, _ in records]
    found = {}
    for part in PARTS:
        members = [
            SavedMaps(
                folder / "uncertainty_maps" / part, record["split"][part], device,
                float(record["configuration"]["threshold"]), memory=0,  # of many trainings, too much would stay
            )
            for folder, _, record in records
        ]
        for member, (_, _, record) in zip(members, records):
            member.sealed = maps_are_sealed(record)
        for member in members:  # given maps may have no entropy of the passes, which says nothing about an ensemble
            member.names = tuple(name for name in MEASURED if name != "expected_entropy")
        found[part] = EnsembleMaps(members, identities)
    return found


def ensemble_numbers(
    folders: Sequence[Path], *, device: torch.device = CPU, bins: int = 15, resamples: int = 10_000, seed: int = 42
) -> dict[str, Any]:
    """The ensemble of finished trainings on the harness of a run, beside its members.

    Scales are fitted on the ensemble's own validation maps. There is one ensemble, so that the intervals are those of
    other test images, and not of other trainings.

    Args:
        folders: results folders of at least two finished trainings of the same experiment.
        device: that counts the pixels.
        bins, resamples, seed: see :func:`evaluation.protocol.evaluate`.

    Returns:
        Plain numbers: "trainings", how many; those of :func:`headline`; and under "members" the same of each training,
        in the order of the folders.

    Raises:
        UserError: see :func:`ensemble_of` and :class:`EnsembleMaps`.
    """
    parts = ensemble_of(folders, device)
    metrics = evaluate(parts["validation"], parts["test"], bins=bins, resamples=resamples, seed=seed).metrics
    members = [read_metrics(folder) for folder in folders]
    return {
        "trainings": len(folders),
        **headline(metrics),
        "members": [headline(member) for member in members],
    }


#: What is quoted: measure by score, over the whole image.
HEADLINES = (
    ("predictive_entropy", "brier"),
    ("predictive_entropy", "auroc"),
    ("predictive_variance", "auroc"),
    ("mutual_information", "auroc"),
    ("one_minus_max_probability", "brier"),
)


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers of a run that an ensemble is compared by.

    Args:
        metrics: what ``metrics.json`` holds.

    Returns:
        "images", "dice", "dice_interval" of the test split, and under "whole_image" the estimates of ``HEADLINES``,
        by score and measure; None where a number is undefined.
    """
    scores = metrics["test"]["regions"]["whole_image"]["scores"]
    whole: dict[str, dict[str, Any]] = {}
    for score, measure in HEADLINES:
        whole.setdefault(score, {})[measure] = scores[score][measure] if score in scores else None
    return {**{name: metrics["test"][name] for name in ("images", "dice", "dice_interval")}, "whole_image": whole}
