"""The text encoder's part: prompts encoded with each LoRA active on it, its layers measured as the model's are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import comfy.model_management

from ...ssr_core import Calibration, LowRankUpdate, Merge, MergeSettings, Site, SSRError, StatisticsCollector, merge
from ...ssr_core.lora.site import sum_by_site
from ..reading.encoder_names import Layer, meanings
from ..reading.loaded_lora import LoadedLora, Part
from ..reading.network import GENERIC
from .case_prompts import CasePrompts
from .prompt import PROMPT

T = TypeVar("T")

CONTEXT = 32  # context rows of a text encoder's layer: a prompt has few tokens
# Of the penalty for what was seldom seen. It was chosen for models that see one prompt at a few noise levels of many;
# a text encoder knows no noise, and a prompt shows it dozens of tokens.
SCARCITY = 0.01


def calibrate_text(
    clip: Any,
    loras: Sequence[LoadedLora],
    cases: Sequence[CasePrompts],
    negative: Sequence[Any] = (),
    like: Calibration | None = None,
) -> tuple[list[CasePrompts], Calibration | None]:
    """Encode the prompts of each case again, its LoRAs active on the text encoder, and measure there.

    So is `negative`, CONDITIONING for all cases, where its text is known. With statistics that these shall be `like`,
    they are measured in the same subspaces.

    Returns the cases with these encodings, which is what the model will see, and the statistics of the text encoder;
    None if no LoRA changes it.

    Raises:
        SSRError: a prompt whose text is not known.
    """
    if clip is None or not any(lora.text.updates or lora.text.patches for lora in loras):
        return list(cases), None
    for one in cases:
        _check_texts(one)
    if not any(lora.text.updates for lora in loras):
        return [_encoded(clip, loras, one, negative) for one in cases], None
    text_loras = [lora.text_lora for lora in loras]
    earlier = None if like is None else own_names(like).ordered_as(text_loras)
    collector = StatisticsCollector(text_loras, None if earlier is None else earlier.subspaces)
    encoded: list[CasePrompts] = []
    for survey in (0,) if earlier else (CONTEXT, 0):  # first for the context rows, then to measure with them
        encoded = []
        for one in cases:
            with collector.recording(one.case.speakers, survey) as recording:
                recording.attach(clip.cond_stage_model)
                encoded.append(_encoded(clip, loras, one, negative))
        if survey:
            collector.see(survey)
    return encoded, spelt_out(collector.calibration())


def spelt_out(calibration: Calibration) -> Calibration:
    """Of a text encoder, with sites named as in files, which is how people know them."""
    return _renamed(calibration, lambda module: GENERIC + module)


def own_names(calibration: Calibration) -> Calibration:
    """`spelt_out` undone: sites named as the text encoder names its modules."""
    return _renamed(calibration, lambda module: module.removeprefix(GENERIC))


def _renamed(calibration: Calibration, name: Callable[[str], str]) -> Calibration:
    def renamed(values: Mapping[Site, T]) -> dict[Site, T]:
        return {replace(site, module=name(site.module)): value for site, value in values.items()}

    return replace(calibration, subspaces=renamed(calibration.subspaces), statistics=renamed(calibration.statistics))


def merge_text(calibration: Calibration, settings: MergeSettings) -> Merge:
    """The merge of the text encoder's parts from what was measured, or else from their weights."""
    return merge(calibration, text_settings(settings) if calibration.measured else settings)


def text_settings(settings: MergeSettings) -> MergeSettings:
    """Settings for the model, as they are good for the text encoder."""
    return replace(settings, ridge=replace(settings.ridge, scarcity=SCARCITY * settings.ridge.scarcity))


def with_common_names(parts: Sequence[Part]) -> list[Part]:
    """Parts of files that name the text encoder's layers in several ways, with one name for each: the first one's.

    Raises:
        LoraError: a name may mean either of two layers.
    """
    modules = [site.module for part in parts for site in part.updates]
    modules += [key.rpartition(".")[0] for part in parts for key in part.patches]
    layers, names = meanings(modules), dict[Layer, str]()

    def named(module: str) -> str:
        return names.setdefault(layers[module], module)

    def moved(key: str) -> str:
        module, dot, kind = key.rpartition(".")
        return named(module) + dot + kind

    return [
        Part(
            sum_by_site((replace(site, module=named(site.module)), update) for site, update in part.updates.items()),
            {moved(key): patch for key, patch in part.patches.items()},
        )
        for part in parts
    ]


def summed(parts: Sequence[Part], strengths: Sequence[float]) -> dict[Site, LowRankUpdate]:
    """The plain sum of the text encoder's updates, for want of statistics."""
    return sum_by_site(
        (site, update.scaled(strength))
        for part, strength in zip(parts, strengths, strict=True)
        for site, update in part.updates.items()
    )


def _check_texts(one: CasePrompts) -> None:
    if any(PROMPT not in options for _, options in one.conditioning):
        raise SSRError(
            f"{one.name}: clip is connected, but the text of its calibration prompts is not known. Encode them with "
            "SSR Prompts, or disconnect clip from SSR Collect Stats to have the text encoder's parts summed."
        )


def _encoded(clip: Any, loras: Sequence[LoadedLora], one: CasePrompts, negative: Sequence[Any]) -> CasePrompts:
    """The case with its prompts as its own LoRAs make the text encoder read them."""
    patched = [loras[task] for task in one.case.speakers if loras[task].text.patches]
    clip = clip.clone() if patched else clip
    for lora in patched:
        clip.add_patches(dict(lora.text.patches), lora.task.text_strength)
    positive, other = ([encode_anew(clip, entry) for entry in entries] for entries in (one.conditioning, negative))
    return replace(one, conditioning=positive, negative=other)


def encode_anew(clip: Any, entry: Sequence[Any]) -> list[Any]:
    """An entry of CONDITIONING encoded again, if its text is known and its tensor is still what the text gave.

    Whatever other nodes did to it is kept: to its options as well as, then unread, to its tensor.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    cond, options = entry
    if PROMPT not in options:
        return [cond, options]
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(options[PROMPT].text))
    begins = options.get("clip_start_percent")  # of a schedule, the part that this entry is for
    own, found = next((one for one in encoded if one[1].get("clip_start_percent") == begins), encoded[0])
    return [own, {**options, **found}] if cond is options[PROMPT].encoded else [cond, options]
