"""Batches that helper processes load: their failures are the command's one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from runtime.errors import UserError
from runtime.resources import naming_shortage
from runtime.signals import block_sigint_in_children

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


#: Open files that a helper process takes in the one that started it, the batches on their way included; that others take.
_OF_A_HELPER, _OF_OTHERS = 7, 8


def _check_open_files(helpers: int) -> None:
    """Refuse helper processes that would run out of open files, after raising the limit as far as one may.

    Raises:
        UserError: names the limit. Left to themselves the helpers would fail one by one, in pages of traces.
    """
    if resource is None or not helpers:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    needed = _OF_A_HELPER * helpers + _OF_OTHERS
    if Path("/proc/self/fd").is_dir():
        needed += len(os.listdir("/proc/self/fd"))
    if soft != resource.RLIM_INFINITY and needed > soft:
        raise UserError(
            f"{helpers} data-loading processes need {needed} open files, and {soft} are allowed; raise the limit (ulimit -n), or "
            "give --workers 0; what is finished is kept"
        )


def _about_no_half_loader(found: Any) -> None:
    """Leave out what PyTorch says about a loader that could not be started."""
    if not (isinstance(found.exc_value, AttributeError) and "DataLoaderIter" in str(found.exc_value)):
        sys.__unraisablehook__(found)


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        UserError: a process of the loader died, could not be started, or raised this very error.
    """
    try:
        with block_sigint_in_children(), naming_shortage("starting the data-loading processes", "lower --workers"):
            _check_open_files(loader.num_workers)
            hook, sys.unraisablehook = sys.unraisablehook, _about_no_half_loader
            iterator = iter(loader)
            sys.unraisablehook = hook  # kept where this fails: the half-made loader is deleted only later
        while True:
            with naming_shortage("loading training images", "lower --workers or --batch-size"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch
    except UserError as error:  # PyTorch puts the trace of a helper, escaped by now, around its line
        text = str(error)
        if not text.startswith("Caught UserError in DataLoader worker"):
            raise
        raise UserError(text.rsplit("UserError: ", 1)[1].removesuffix("\\n")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data-loading process died ({str(error).splitlines()[0]}); finished epochs are kept; "
            "run the same command again, with --workers 0 or fewer if memory is short"
        ) from error
