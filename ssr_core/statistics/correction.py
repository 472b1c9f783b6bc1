"""Correction: what one site learns from the merged model's own inputs.

Layers after the first see inputs that the merge has already changed. Statistics of each LoRA alone do not know of that;
a second run does, in which the merged model walks beside the LoRA alone. Data of both runs together (Ross et al. 2011,
"DAgger") keep the second solution from overshooting, though all layers are corrected at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..lora.subspace import Subspace
from .case import Case
from .grams import NOTHING, Grams, sum_of_present

NOT_RUN = torch.zeros(0, 0)  # the target of a case that was not run


@dataclass(frozen=True, eq=False)
class Correction:
    """Sums over pairs of tokens: what the merged model saw, and what would have led to the LoRA's own output.

    With W the layer's weight, x what it sees under the LoRAs S of a case alone and x' what it sees under the merge, the
    merge should write t = (W + sum over S of up_k down_k) x - W x' where it sees z' = down x'.
    """

    grams: Grams  # (C, R, R), sum of z' z'^T
    targets: tuple[Tensor, ...]  # (C,) each (out, R), sum of t z'^T, in bfloat16 where they are large; (0, 0): not run
    fingerprint: str  # of the subspace they were measured in
    strengths: tuple[float, ...]  # (K,) of the LoRAs while measuring: t depends on them
    is_folded: bool = False  # whether a sum over cases is in it, of which nobody knows any more who was to write what

    @property
    def gram(self) -> Tensor:
        """(C, R, R) float64, unpacked at every call."""
        return self.grams.dense()

    @property
    def target(self) -> Tensor:
        """(C, out, R) float32, with zeros where a case was not run."""
        shape = max((found.shape for found in self.targets), key=torch.Size.numel)
        return torch.stack([found.float() if found.numel() else torch.zeros(shape) for found in self.targets])

    def __add__(self, other: Correction) -> Correction:
        """The pairs of both runs together."""
        if (self.fingerprint, self.strengths) != (other.fingerprint, other.strengths):
            raise StatisticsError(
                "These corrections were measured with other LoRAs or strengths and cannot be added; collect them again."
            )
        pairs = zip_longest(self.targets, other.targets, fillvalue=NOT_RUN)
        targets = tuple(sum_of_present(a, b) for a, b in pairs)
        folded = self.is_folded or other.is_folded
        return replace(self, grams=self.grams + other.grams, targets=targets, is_folded=folded)

    def padded(self, cases: int) -> Correction:
        """With so many cases; those that are new were not run."""
        targets = self.targets + (NOT_RUN,) * (cases - len(self.targets))
        return replace(self, grams=self.grams.padded(cases), targets=targets)

    def folded(self, factors: Sequence[float]) -> Correction:
        """All cases summed into the first, each times its factor: w_c / w_0 of the weights that a merge will give them.

        One matrix instead of C, and the same solution at these weights.
        """
        pairs = list(zip(self.targets, self.grams.packed, factors, strict=True))
        target, gram = NOT_RUN, NOTHING
        for one, packed, factor in pairs:
            target = sum_of_present(target, one if factor == 1 else one * factor)
            gram = sum_of_present(gram, packed if factor == 1 else packed * factor)
        absent = len(pairs) - 1
        grams = Grams(self.grams.size, (gram, *(NOTHING,) * absent))
        return replace(self, grams=grams, targets=(target, *(NOT_RUN,) * absent), is_folded=absent > 0)

    def chosen(
        self, cases: Sequence[int | None], rows: Tensor, fingerprint: str, strengths: tuple[float, ...]
    ) -> Correction:
        """Of these cases (None: one that was not run) and of these rows, in the subspace with that fingerprint."""
        targets = (NOT_RUN if case is None else self.targets[case] for case in cases)
        kept = tuple(target[:, rows] if target.numel() else target for target in targets)
        return Correction(self.grams.chosen(cases, rows), kept, fingerprint, strengths, self.is_folded)

    def share(self, task: int, scaled: Subspace, cases: Sequence[Case]) -> Correction:
        """What of it LoRA `task` should write; the shares of all LoRAs that are at the site add up to it.

        Where it speaks that is its own part, up_k down_k x'. What is left of t makes up for what the merge did before:
        in equal parts a matter of those that speak and are here, or, if none of these is, of all that are here.

        Args:
            scaled: the subspace with each LoRA at the strength of the correction.
            cases: (C,) who speaks.
        """
        targets = []
        for target, gram, case in zip(self.targets, self.grams, cases, strict=True):
            speakers = [one for one in case.speakers if scaled.ranks[one]]
            takers = speakers or scaled.present
            if task not in takers or not target.numel():
                targets.append(NOT_RUN)
                continue
            blocks = {one: scaled.blocks[one] for one in speakers}
            own = {one: scaled.up[:, block].double() @ gram[block] for one, block in blocks.items()}
            rest = target.double() - sum(own.values())
            targets.append(rest / len(takers) + own.get(task, 0))
        return replace(self, targets=tuple(targets))

    def check(self, subspace: Subspace, site: object) -> None:
        """Raise StatisticsError unless this was measured in `subspace` and is finite."""
        if self.fingerprint != subspace.fingerprint:
            raise StatisticsError(f"{site}: the correction was measured with other LoRAs; collect it again.")
        if not (self.grams.is_finite() and all(bool(torch.isfinite(found).all()) for found in self.targets)):
            raise StatisticsError(f"{site}: activations of the merged model were NaN or infinite while correcting.")
