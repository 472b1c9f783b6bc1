"""Kept: statistics saved of a merge that fails after they were measured, in a node that does both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
from comfy.cli_args import args

from ...ssr_core import SaveError, SSRError
from ..calibrating.stats import Stats
from .save_path import next_path
from .stats_file import save
from .stats_folder import FOLDER, name_of


@contextmanager
def kept_if_failing(stats: Stats) -> Iterator[None]:
    """Have an error inside cost no measurement: the statistics are saved, and the error says where.

    Raises:
        SSRError: what was raised inside, with the name of the file.
    """
    if not stats.calibration.measured:  # there is nothing to lose
        yield
        return
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        try:
            path = next_path(FOLDER, "kept", "stats")
            save(stats, path, prompts=not args.disable_metadata)
        except SaveError:
            raise error from None
        raise SSRError(
            f"{error} What was measured is not lost: SSR Load Stats lists it as {name_of(path)}, for SSR Solve."
        ) from error
