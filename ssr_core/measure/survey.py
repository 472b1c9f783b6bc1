"""Survey: what the layers' inputs look like before anything is measured, which gives the context rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..parallel import each
from ..statistics.sufficient_statistics import not_finite
from .recording import Recording
from .sketch import principal_rows


class Survey:
    """The sum of short runs of all LoRAs, all cases alike.

    Attributes:
        sketches: of each module, C Omega (in, rows + oversampling) of its inputs; see Sketch.
        shared: modules that have the input of another one in all runs, and that other one.
        rows: how many context rows the runs looked for.
    """

    def __init__(self) -> None:
        self.sketches: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.rows = 0

    def add(self, recording: Recording, rows: int) -> None:
        """What a finished recording surveyed.

        Raises:
            StatisticsError: activations were not finite; nothing is added.
        """
        found = dict(recording.sketches())
        for module, sketched in found.items():
            if not torch.isfinite(sketched).all():
                raise StatisticsError(not_finite(module))
        for module, sketched in found.items():
            known = self.sketches.get(module)
            self.sketches[module] = sketched.float() if known is None else known + sketched.float()
        followers = recording.followers
        again = {m: leader for m, leader in followers.items() if self.shared.get(m) == leader}
        self.shared = again if self.rows else followers
        self.rows = max(self.rows, rows)

    def spend(self, modules: Iterable[str], rows: int) -> dict[str, Tensor]:
        """The first context rows of each of these modules, at most (rows, in). The sketches are gone then."""
        leaders = {module: self.shared.get(module, module) for module in modules}
        seen = [leader for leader in dict.fromkeys(leaders.values()) if leader in self.sketches]
        rows = min(rows, self.rows)
        # a sketch is large, and goes as soon as its rows are found
        found = each(lambda leader: principal_rows(self.sketches.pop(leader).double(), rows), seen)
        of_leader = dict(zip(seen, found, strict=True))
        self.sketches.clear()
        return {module: of_leader[leader] for module, leader in leaders.items() if leader in of_leader}
