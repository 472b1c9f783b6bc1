"""A LoRA file as ComfyUI reads it, parted into what is routed and what is summed, every tensor accounted for.

Which key means which weight is ComfyUI's to say, not ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...ssr_core import LoraError, LowRankUpdate, ModelMismatchError, Rule, Site, check_rules, treatment_of
from ...ssr_core.files.lora_file import find_pairs
from ...ssr_core.lora.expansion import RANK
from ...ssr_core.lora.site import sum_by_site
from . import adapters
from .keys import ADAPTER, TEXT_ENCODER, owner
from .loaded_lora import LoadedLora, Part, Patch
from .lora_file import read_with_notes
from .network import GENERIC, NamesOnly, Network
from .place import Place
from .spellings import cause, respelled
from .task import Task, is_off
from .tensor_account import LEFT_OUT, Account, Expanded, Fate, fates_of


def read_tasks(
    tasks: Sequence[Task], model: Any, clip: Any = None, rank: int = RANK, rules: Sequence[Rule] = ()
) -> list[LoadedLora]:
    """Read the LoRAs of all tasks for `model`, a ModelPatcher, and `clip` if there is one.

    Args:
        rank: the highest of what adapters other than plain LoRA are expanded to.
        rules: layers that are dropped are not read, of whichever size or kind they are.

    Raises:
        LoraError: damaged, half a pair, or an adapter that cannot be merged.
        ModelMismatchError: nothing in it names a weight of this model, or most sizes differ.
        SSRError: a rule that matches no layer.
    """
    network, encoder = Network.of_model(model), None if clip is None else Network.of_text_encoder(clip)
    how = _How(rank, rules)
    # the text encoder's parts first: what cannot be done without clip is known before minutes of expanding
    begun = [_begin(task, network, encoder, how) for task in tasks]
    loaded = [_finish(one, network, encoder, how) for one in begun]
    check_rules(rules, how.modules)
    return loaded


@dataclass(frozen=True)
class _How:
    """How files are read."""

    rank: int
    rules: Sequence[Rule]
    modules: set[str] = field(default_factory=set)  # that they name

    def drops(self, module: str) -> bool:
        self.modules.add(module)
        return treatment_of(module, self.rules) == "drop"


def read_task(task: Task, model: Any, clip: Any = None, rank: int = RANK) -> LoadedLora:
    """`read_tasks` of one."""
    return read_tasks([task], model, clip, rank)[0]


@dataclass(frozen=True, eq=False)
class _Begun:
    """A file that is read, and what the text encoder gets of it."""

    task: Task
    source: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    known: Mapping[str, Any]  # names of both networks
    text: _Reading
    notes: tuple[str, ...]


def _begin(task: Task, network: Network, connected: Network | None, how: _How) -> _Begun:
    tensors, source, notes = read_with_notes(task)
    if not tensors:
        raise LoraError(f"{task.name} holds no tensors; the file is empty. Save or download it again.")
    tensors, told = respelled(tensors, network.key_map)
    encoder = connected or _names_only(tensors, network)
    known = {**network.key_map, **encoder.key_map}
    # first: ComfyUI passes over a lone down in silence, and stumbles over a lone up
    find_pairs({key: value for key, value in tensors.items() if owner(key, known)}, task.name)
    prefix = "" if connected is None else GENERIC
    text = _Reader(task.name, encoder, task.text_strength, how, prefix).read(tensors)
    notes = (*notes, f"read with {told}, which Load LoRA would not do.") if told else notes
    return _Begun(task, source, tensors, known, text, notes)


def _finish(begun: _Begun, network: Network, connected: Network | None, how: _How) -> LoadedLora:
    task, of_text = begun.task, begun.text
    of_model = _Reader(task.name, network, task.strength, how).read(begun.tensors)
    if not task.is_off:  # as a whole it may be in statistics from a file, which SSR Solve then leaves out
        of_model, of_text = _off(of_model, task.strength), _off(of_text, task.text_strength)
    fates = fates_of(begun.tensors, begun.known, of_model.fates, of_text.fates, summed_text=connected is None)
    account = Account(fates, (*of_model.expanded, *of_text.expanded), begun.notes)
    loaded = LoadedLora(task, begun.source, of_model.part, of_text.part, account)
    _refuse_what_does_not_fit(loaded, network, connected, begun.tensors)
    return loaded


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one network gets of one file."""

    part: Part
    fates: Mapping[int, Fate]  # by the identity of the tensors that ComfyUI took
    expanded: Sequence[Expanded]


def _off(reading: _Reading, strength: float) -> _Reading:
    """Nothing of a part that is at strength 0: as if the file had none."""
    return _Reading(Part({}, {}), dict.fromkeys(reading.fates, Fate.OFF), ()) if is_off(strength) else reading


class _Reader:
    """Takes the patches that ComfyUI makes of a file apart."""

    def __init__(self, name: str, network: Network | NamesOnly, strength: float, how: _How, prefix: str = "") -> None:
        """`prefix`: before names of the network's layers where people write rules."""
        self.name, self.network, self.strength, self.how, self.prefix = name, network, strength, how, prefix
        self.pieces: list[tuple[Site, LowRankUpdate]] = []
        self.patches: dict[str, Patch] = {}
        self.expanded: list[Expanded] = []

    def read(self, tensors: Mapping[str, Tensor]) -> _Reading:
        fates: dict[int, Fate] = {}
        try:
            patches = comfy.lora.load_lora(tensors, self.network.key_map, log_missing=False)
        except KeyError as error:
            raise LoraError(f"{self.name} has no {error}, which an adapter in it needs; it is incomplete.") from error
        except (RuntimeError, ValueError) as error:  # an alpha that is not one number
            raise LoraError(f"{self.name} cannot be read ({error}); the file is damaged.") from error
        misfits: list[ModelMismatchError] = []
        bar = comfy.utils.ProgressBar(len(patches))
        for key, patch in patches.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            place = Place.of(key, self.network)
            try:
                fate = Fate.UNMATCHED if place is None else self._take(place, patch)
            except ModelMismatchError as error:
                misfits.append(error)
                fate = Fate.MISFIT
            fates.update((id(value), fate) for value in _tensors(patch))
            bar.update(1)
        if 2 * len(misfits) > len(patches):  # of a few, Load LoRA leaves the weight as it is, and so do we
            raise misfits[0]
        return _Reading(Part(sum_by_site(self.pieces), self.patches), fates, self.expanded)

    def _take(self, place: Place, patch: Any) -> Fate:
        where = f"{self.name}: {place.key}"
        if self.how.drops(self.prefix + place.key.rpartition(".")[0]):
            return Fate.DROPPED
        if isinstance(patch, tuple) and patch[0] == "set":
            if place.shape and place.slice_shape != place.shape:
                raise LoraError(f"{where} replaces a slice of a weight, which cannot be merged; leave this LoRA out.")
            self.patches[place.key] = patch
            return Fate.REPLACES
        kind = adapters.kind(patch)
        target = self._target(place, kind, where)
        flat = isinstance(patch, tuple) and patch[1][0].ndim < 2
        if flat or not self.network.can_be_routed(place.key):
            return self._sum(place, adapters.dense(patch, target).cpu())
        found = adapters.low_rank(patch, target, self.how.rank)
        update = self._fitted(place, found.update, where)
        if not (update.up.any() and update.down.any()):
            return Fate.DORMANT
        self.pieces.append((place.site(update.out_features), update))
        if kind == "LoRA":
            return Fate.ROUTED
        size = update.squared_norm() / max(found.kept, 1e-12)
        layer = place.key.removesuffix(".weight")
        self.expanded.append(Expanded(kind, layer, update.rank, found.kept, size, adapters.needs_base(patch)))
        return Fate.EXPANDED

    def _target(self, place: Place, kind: str, where: str) -> adapters.Target:
        def base() -> Tensor:
            return place.narrowed(self.network.weight(place.key, f"{where} is a {kind}, which")).clone()

        return adapters.Target(place.slice_shape, place.rows, base, self.strength, self.network.device, where)

    def _fitted(self, place: Place, update: LowRankUpdate, where: str) -> LowRankUpdate:
        if not place.shape:
            return update
        out, *inputs = place.slice_shape
        if update.out_features != out or update.down[0].numel() != torch.Size(inputs).numel():
            raise ModelMismatchError(
                f"{where} has {out} outputs and inputs {tuple(inputs)} in this model, but {update.out_features} "
                f"and {update.in_shape} in the LoRA; it was trained for another variant of the base."
            )
        return place.widened(update.with_in_shape(inputs, where))

    def _sum(self, place: Place, difference: Tensor) -> Fate:
        if not difference.any():
            return Fate.DORMANT
        whole = place.embedded(difference)
        if place.key in self.patches:
            whole = whole + self.patches[place.key][1][0]
        self.patches[place.key] = ("diff", (whole,))
        return Fate.SUMMED


def _names_only(tensors: Mapping[str, Tensor], network: Network) -> NamesOnly:
    """The text encoder's part of a file, by its own names: nobody knows here what they mean."""
    keys = [key for key in tensors if key.startswith(TEXT_ENCODER) and not owner(key, network.key_map)]
    found = (ADAPTER.fullmatch(key) for key in keys)
    return NamesOnly({match["name"]: f"{match['name']}.weight" for match in found if match})


def _tensors(patch: Any) -> Iterator[Tensor]:
    held = patch[1] if isinstance(patch, tuple) else patch.weights
    return (value for value in held if isinstance(value, Tensor))


def _refuse_what_does_not_fit(
    loaded: LoadedLora, network: Network, encoder: Network | None, tensors: Mapping[str, Tensor]
) -> None:
    name, fates = loaded.task.name, loaded.account.fates
    if loaded.model.updates or loaded.model.patches:
        return
    left = [key for key, fate in fates.items() if fate in LEFT_OUT and not key.startswith(TEXT_ENCODER)]
    if set(fates.values()) <= {Fate.OFF, Fate.DROPPED}:
        raise LoraError(f"{name} changes only what is at strength 0 or dropped by the rules for layers. Leave it out.")
    if left or not (loaded.text.updates or loaded.text.patches or set(fates.values()) == {Fate.DORMANT}):
        raise ModelMismatchError(
            f"{name} does not fit this model ({network.name}): none of its {len(left) or len(fates)} tensors "
            f"matched, such as {(left or list(fates))[0]}. {cause(tensors)}"
        )
    if set(fates.values()) == {Fate.DORMANT}:
        raise LoraError(f"{name} changes nothing: all its updates are zero, or their alpha is. Leave it out.")
    if encoder is None and Fate.OFF not in fates.values():
        raise ModelMismatchError(
            f"{name} changes only the text encoder; connect clip to SSR Collect Stats to merge it."
        )
