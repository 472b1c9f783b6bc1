"""Subspace: the joint low-rank subspace of all tasks at one site, in which activations are measured and routed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import LoraError
from .lora import Lora, with_common_names
from .low_rank_update import LowRankUpdate, concatenate
from .site import Site, align_rows


@dataclass(frozen=True, eq=False)
class Subspace:
    """LoRAs concatenated along the rank (paper, section 3: A_comb and B_comb).

    `down` may have more rows than `up` has columns: the last `context` rows belong to no task. They write nothing, but
    the router may read them.
    """

    down: Tensor  # (rank + context, in, *kernel)
    up: Tensor  # (out, rank)
    ranks: tuple[int, ...]  # (K,) 0 where a task has no LoRA at this site

    @classmethod
    def join(cls, updates: Sequence[LowRankUpdate | None], name: str = "this layer") -> Subspace:
        """Join the updates of K tasks at one site; None where a task has none there."""
        present = [update for update in updates if update is not None]
        joint = concatenate(_same_layout(present, name))
        return cls(joint.down, joint.up, tuple(0 if update is None else update.rank for update in updates))

    def with_context(self, rows: Tensor) -> Subspace:
        """The same subspace seeing more: `rows` (context, in) become further rows of `down`.

        For a convolution they look at the centre of the kernel. They are rounded to the precision of `down`.
        """
        if self.context:
            raise LoraError("This subspace has context rows already; statistics in it cannot be given others.")
        kernel = self.down.shape[2:]
        wide = rows.new_zeros(*rows.shape, kernel.numel())
        wide[..., kernel.numel() // 2] = rows
        wide = wide.reshape(*rows.shape, *kernel)
        return Subspace(torch.cat([self.down, wide.to(self.down.dtype)]), self.up, self.ranks)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def context(self) -> int:
        return self.down.shape[0] - self.rank

    @property
    def context_rows(self) -> Tensor:
        """(context, in): what `with_context` was given."""
        rows = self.down[self.rank :]
        return rows.reshape(*rows.shape[:2], -1)[..., rows[0, 0].numel() // 2] if self.context else rows

    @cached_property
    def blocks(self) -> tuple[slice, ...]:
        """(K,) the rows of `down` and columns of `up` that belong to each task."""
        return tuple(slice(a, b) for a, b in pairwise((0, *accumulate(self.ranks))))

    @property
    def present(self) -> tuple[int, ...]:
        """The tasks that have a LoRA at this site."""
        return tuple(task for task, rank in enumerate(self.ranks) if rank)

    @property
    def is_shared(self) -> bool:
        """Whether two or more tasks have a LoRA here."""
        return len(self.present) > 1

    @property
    def is_routed(self) -> bool:
        """Whether there is something to route: tokens of other tasks pass here too, be it that only one has a LoRA."""
        return len(self.ranks) > 1

    def task(self, task: int) -> LowRankUpdate:
        """Task `task`'s own update."""
        block = self.blocks[task]
        return LowRankUpdate(self.down[block], self.up[:, block])

    def plain_stack(self) -> LowRankUpdate:
        """The sum of all tasks' updates."""
        return LowRankUpdate(self.down[: self.rank], self.up)

    def scaled(self, strengths: Sequence[float]) -> Subspace:
        """The same subspace with each task's update at its strength; the fingerprint does not change."""
        columns = torch.tensor([s for s, r in zip(strengths, self.ranks, strict=True) for _ in range(r)])
        scaled = Subspace(self.down, self.up.float() * columns.to(self.up.device), self.ranks)
        columns = columns.double()
        scaled.__dict__["energy"] = self.energy * columns * columns[:, None]  # what it would compute again
        return scaled

    def without(self, task: int) -> Subspace:
        """As if task `task` had never been there."""
        return Subspace(
            self.down[self.rows_without(task)],
            torch.cat([self.up[:, : self.blocks[task].start], self.up[:, self.blocks[task].stop :]], dim=1),
            self.ranks[:task] + self.ranks[task + 1 :],
        )

    def reordered(self, order: Sequence[int]) -> Subspace:
        """The tasks in another order: the new k-th is the old order[k]."""
        rows = self.rows_reordered(order)
        ranks = tuple(self.ranks[task] for task in order)
        return Subspace(self.down[rows], self.up[:, rows[: self.rank]], ranks)

    def rows_reordered(self, order: Sequence[int]) -> Tensor:
        """Indices of the rows of `down` with the tasks in another order; context rows stay last."""
        rows = torch.arange(self.down.shape[0])
        return torch.cat([*(rows[self.blocks[task]] for task in order), rows[self.rank :]])

    def rows_without(self, task: int) -> Tensor:
        """Indices of the rows of `down` that are not task `task`'s."""
        rows = torch.arange(self.down.shape[0])
        return torch.cat([rows[: self.blocks[task].start], rows[self.blocks[task].stop :]])

    @cached_property
    def energy(self) -> Tensor:
        """E = up^T up, (rank, rank) float64 on the CPU: |up c|^2 = c^T E c"""
        up = self.up.double()
        return (up.mT @ up).cpu()

    @cached_property
    def fingerprint(self) -> str:
        """Of what statistics are measured with: `down` and the ranks. Alpha and strength live in `up`, outside."""
        digest = hashlib.sha256(repr(self.ranks).encode())
        digest.update(self.down.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


def join_loras(loras: Sequence[Lora]) -> dict[Site, Subspace]:
    """The joint subspaces of all LoRAs, for every site that at least one of them writes to.

    Raises:
        LoraError: two LoRAs disagree about the size of a layer.
    """
    loras = with_common_names(loras)
    _check_agreement(loras)
    aligned = align_rows([lora.updates for lora in loras])
    sites = sorted({site for updates in aligned for site in updates})
    return {site: Subspace.join([updates.get(site) for updates in aligned], str(site)) for site in sites}


def _same_layout(updates: Sequence[LowRankUpdate], name: str) -> list[LowRankUpdate]:
    # a 1x1 convolution may come as (r, in) and as (r, in, 1, 1): the fuller spelling wins
    in_shape = max((update.in_shape for update in updates), key=len)
    return [update.with_in_shape(in_shape, name) for update in updates]


def _check_agreement(loras: Sequence[Lora]) -> None:
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for lora in loras:
        for site, update in lora.updates.items():
            size = (site.out_features, update.down[0].numel())
            known, owner = seen.setdefault(site.module, (size, lora.name))
            if known != size:
                raise LoraError(
                    f"{lora.name} and {owner} were trained on different models: at {site.module} one has "
                    f"{size[1]} inputs and {size[0]} outputs, the other {known[1]} and {known[0]}. "
                    "Merge only LoRAs of the same base model."
                )
