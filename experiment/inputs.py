"""The images that a command works on: those of the source, and other test sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import Data, prepare_data
from experiment.results import check_weights_from
from experiment.source_run import finished_record, first_run, numbers_suffice, taken_from
from experiment.targets import FittedOn, TargetSet, prepare_targets
from experiment.trainings import configurations
from isic.source import Source, find_source
from runtime.config import Config
from runtime.processes import ProcessGroup
from runtime.progress import stage
from runtime.reading import real_path


class Inputs(NamedTuple):
    """What a run is made from.

    Attributes:
        source: where the images lie.
        data: the images; None where the run whose weights are taken has measured them as is asked for here, so that only
            other test sets are left.
        targets: the other test sets.
    """

    source: Source
    data: Data | None
    targets: list[TargetSet]

    @property
    def records(self) -> list[dict[str, Any]]:
        """What ``config.json`` says of the other test sets."""
        return [target.record() for target in self.targets]

    def picture(self, id: str) -> np.ndarray:
        """An image of the source, uint8 (H, W, 3)."""
        assert self.data is not None
        return np.array(self.data.pairs.image(id))


def source_of(config: Config, device: torch.device) -> Source:
    """Where the images of the source lie, after a check of the run whose weights are taken, if any.

    Raises:
        UserError: see :func:`isic.source.find_source` and :func:`experiment.results.check_weights_from`.
    """
    if config.weights_from is None:
        return find_source(config)
    for one in configurations(config, Path()) if config.trainings > 1 else [config]:
        check_weights_from(one, device)
    record, name = finished_record(first_run(config)), real_path(config.weights_from).name
    if numbers_suffice(config):
        return Source(name, Path(record["images"]), Path(record["masks"]), bool(record["synthetic"]))
    source = find_source(config)
    return source._replace(name=name) if config.images == record["images"] else source


def prepare_inputs(config: Config, source: Source, group: ProcessGroup) -> Inputs:
    """Decode the images of the source, where they are needed, and those of the other test sets.

    Raises:
        UserError: see :func:`dataset.prepare_data` and :func:`experiment.targets.prepare_targets`.
    """
    if group.shared(lambda: numbers_suffice(config)):
        stage("data", f"none of the source; its numbers are those of {config.weights_from}")
        record = group.shared(lambda: finished_record(first_run(config)))
        return Inputs(source, None, prepare_targets(config, FittedOn.of_record(record), group))
    taken = group.shared(lambda: taken_from(config))
    data = prepare_data(config, source, group, taken)
    return Inputs(source, data, prepare_targets(config, FittedOn.of_data(data), group))
