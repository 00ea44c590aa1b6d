"""Making maps where memory is short: first the same computation with more room, then fewer passes at a time."""

from __future__ import annotations

import gc
from typing import Callable, TypeVar

import torch

from runtime.errors import UserError
from runtime.progress import complain
from runtime.resources import shortage, shortage_line

T = TypeVar("T")
#: Passes at a time that are tried one after the other; None is the rule of :func:`uncertainty.uncertainty_maps`.
CHUNKS = (None, 4, 2, 1)


class PassMemory:
    """How many passes are computed at a time, for all images that follow.

    Where memory runs out, what can be read again is let go of and the same is tried once more: the maps are the same in
    every bit. Only then fewer passes are computed at a time, by which the maps change in the rounding of the convolutions,
    and that is said.

    Args:
        release: lets go of what is kept in memory for speed alone.

    Attributes:
        chunk: passes at a time; None is the rule.
    """

    def __init__(self, release: Callable[[], object]):
        self.release, self.released = release, False
        self._step = 0

    @property
    def chunk(self) -> int | None:
        return CHUNKS[self._step]

    def run(self, make: Callable[[int | None], T], what: str) -> T:
        """Call ``make`` with the number of passes at a time, again with fewer until the memory suffices.

        Args:
            make: the computation.
            what: it makes, for the lines.

        Raises:
            UserError: one pass at a time is too much.
        """
        while True:
            try:
                return make(self.chunk)
            except (MemoryError, RuntimeError) as error:
                if shortage(error) != "memory":
                    raise
                if self.released and self._step + 1 == len(CHUNKS):
                    remedy = "lower --image-size, --width or --batch-size"
                    raise UserError(shortage_line(what, "memory", remedy, error)) from error
            # behind the handler, where the failed computation is let go of
            self._make_room(what)

    def _make_room(self, what: str) -> None:
        if self.released:
            self._step += 1
            complain(
                f"warning: {what}: not enough memory; from here on {self.chunk} passes are computed at a time, "
                "which changes maps by the rounding of the convolutions"
            )
        self.released = True
        self.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
