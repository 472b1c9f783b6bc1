# SPDX-License-Identifier: Apache-2.0
"""Testbed of edits: prompts that ask for a change of a picture, which the model sees as a reference latent."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "fidelity"), str(ROOT / "demo")]

import edits  # noqa: E402
import host  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from testbed import CALIBRATION_PLACES, HELD_OUT_PLACES, LATENT, Ask, Deltas, Subject, Testbed  # noqa: E402
from torch import Tensor  # noqa: E402
from train_edits import FOLDER, METHOD, velocity_of  # noqa: E402
from training.autoencoder import latents_of, pixels_of  # noqa: E402


@dataclass(frozen=True)
class Request:
    """A text and the picture that it is said of."""

    text: str
    picture: edits.Picture


def scenes_in(places: Sequence[str], seed: int) -> list[world.Scene]:
    """Each thing once, in other colours and places by `seed`."""
    colours = list(world.COLOURS)
    return [
        world.Scene(thing, colours[(3 * n + seed) % len(colours)], places[(n + seed) % len(places)], 0, 1 - 2 * (n % 2))
        for n, thing in enumerate(world.THINGS)
    ]


def requests_for(names: Sequence[str], scenes: Sequence[world.Scene]) -> list[Request]:
    """One of each scene that asks for these edits, of one edit in all of its wordings by turns."""
    found = []
    for number, scene in enumerate(scenes):
        texts = [edits.EDITS[name].texts(scene.subject) for name in names]
        wording = number % len(texts[0]) if len(names) == 1 else 0
        found.append(Request(", ".join(lines[wording] for lines in texts), edits.Picture(scene)))
    return found


class EditBed(Testbed):
    """The demo's model, taught to edit. The reference of one edit is its LoRA alone."""

    def __init__(self) -> None:
        subjects = {
            name: Subject(
                name,
                name,
                edit.wordings[0],
                requests_for([name], scenes_in(CALIBRATION_PLACES, seed)),
                requests_for([name], scenes_in(HELD_OUT_PLACES, seed + 1)[:4]),
            )
            for seed, (name, edit) in enumerate(edits.EDITS.items())
        }
        super().__init__(FOLDER, subjects)

    def entries(self, prompt: Any) -> list[Any]:
        seen = self.patcher.model.process_latent_out(self.latents([prompt.picture]))
        options = {"reference_latents": [seen], "reference_latents_method": METHOD}
        return [[cond, {**known, **options}] for cond, known in super().entries(prompt.text)]

    def told(self, prompts: Sequence[Any]) -> tuple[Tensor, ...]:
        return (*super().told(prompts), self.latents([prompt.picture for prompt in prompts]))

    def velocity(self, x: Tensor, sigma: Tensor, *told: Tensor) -> Tensor:
        return velocity_of(self.model, x, sigma, *told)

    def asks(self, names: Sequence[str]) -> list[Ask]:
        """Each of them by itself: what several do together is judged by pictures."""
        return [(name,) for name in names]

    def prompts(self, ask: Ask, held_out: bool) -> list[Any]:
        if len(ask) == 1:
            return super().prompts(ask, held_out)
        return requests_for(ask, scenes_in(HELD_OUT_PLACES, 7)[:4] if held_out else scenes_in(CALIBRATION_PLACES, 9))

    def combinations(self, names: Sequence[str], prompts: int = 4) -> list[Any]:
        """All of them at once."""
        requests = self.prompts(tuple(names), False)[:prompts]
        return [host.nodes.combination.Combination("all", self.conditioning(requests))]

    def latents(self, pictures: Sequence[edits.Picture]) -> Tensor:
        """(n, 16, 16, 16)"""
        return torch.cat([_latent(picture) for picture in pictures])

    def edited(self, requests: Sequence[Request], seen: Tensor, deltas: Deltas) -> Tensor:
        """Latents of what the model with `deltas` makes of pictures `seen` (n, 16, 16, 16) instead of their own."""
        noise = torch.randn(len(seen), *LATENT, generator=torch.Generator().manual_seed(1001))
        with self.patched(deltas):
            return self.follow((*super().told(requests), seen), noise)[0][-1]

    def one_after_the_other(self, names: Sequence[str], scenes: Sequence[world.Scene], deltas: Deltas | None) -> Tensor:
        """What is left when each edit was made of what the one before it left: by `deltas`, or by each LoRA alone."""
        seen = self.latents([edits.Picture(scene) for scene in scenes])
        for name in names:
            plain = [Request(edits.EDITS[name].texts(scene.subject)[0], edits.Picture(scene)) for scene in scenes]
            seen = self.edited(plain, seen, self.alone(name) if deltas is None else deltas)
        return seen


@cache
def _latent(picture: edits.Picture) -> Tensor:
    return latents_of(pixels_of([picture]))


@dataclass(frozen=True)
class Verdict:
    """How pictures with several edits came out."""

    done: float  # share of edits that are there
    all_done: float  # share of pictures with all of them
    error: float  # squared, to the right picture; 0 = as the world would draw it, 1 = the picture as it was
    untouched: float  # root mean square of what changed where nothing should have, in levels of 255


class Judge:
    """Of pictures in which all of `names` were asked for."""

    EDITED, SAME = 0.06, 0.01  # difference of a pixel from which it counts as edited, and up to which as not

    def __init__(self, bed: EditBed, names: Sequence[str], scenes: Sequence[world.Scene]) -> None:
        def drawn(chosen: Sequence[str]) -> Tensor:
            return bed.space.decode(bed.latents([edits.Picture(scene, frozenset(chosen)) for scene in scenes]))

        self.space, self.before, self.right = bed.space, drawn(()), drawn(names)
        self.lacking = [drawn([other for other in names if other != name]) for name in names]
        self.serial = bed.one_after_the_other(names, scenes, None)

    def verdict(self, latents: Tensor) -> Verdict:
        found = self.space.decode(latents)
        there = torch.stack([self._there(found, lacking) for lacking in self.lacking])
        same = ((self.right - self.before).abs() < self.SAME).all(1, keepdim=True).expand_as(found)
        untouched = 255 * float((found - self.before)[same].square().mean().sqrt()) if same.any() else float("nan")
        return Verdict(
            float(there.float().mean()),
            float(there.all(0).float().mean()),
            float((found - self.right).square().mean() / (self.before - self.right).square().mean()),
            untouched,
        )

    def _there(self, found: Tensor, lacking: Tensor) -> Tensor:
        """(n,) whether each picture is nearer to the right one than to that without an edit, where the two differ."""
        differ = (self.right - lacking).abs().amax(1, keepdim=True) > self.EDITED
        near, far = (((found - one).square() * differ).sum((1, 2, 3)) for one in (self.right, lacking))
        return near < far


def judged_scenes() -> list[world.Scene]:
    """Sixteen, in places that nothing was calibrated in."""
    return list(itertools.chain.from_iterable(scenes_in(HELD_OUT_PLACES, seed) for seed in (20, 21)))
