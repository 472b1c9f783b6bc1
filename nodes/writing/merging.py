"""Merging: from all that SSR Collect Stats gives to one LoRA and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...ssr_core import Case, Merge, MergeSettings, Report, Rule, SSRError, check_rules, merge, treatment_of
from ...ssr_core import split as core_split
from ..calibrating.circumstances import listed_pairs
from ..calibrating.memory import check_result, result_bytes
from ..calibrating.metadata import of_part, with_settings
from ..calibrating.stats import FEW, Stats
from ..calibrating.text_encoder import merge_text, summed, text_settings, with_common_names
from ..reading.network import GENERIC
from ..reading.task import is_off
from ..wording.trigger_words import namesakes, phrases
from .lora_model import LoraModel, state_dict

AUTO = 0.99  # share of each layer's effect that an automatic rank keeps


def solve(stats: Stats, settings: MergeSettings) -> tuple[LoraModel, str]:
    """The merged LoRA and what a person wants to know of it, with a progress bar and open to interrupts.

    Raises:
        SSRError: settings that cannot be meant, rules that match nothing, or a merge that cannot be made.
    """
    check_rules(settings.rules, _modules(stats))
    settings.check(len(stats.loras))
    given = settings.strengths or tuple(lora.strength for lora in stats.calibration.loras)
    on, left, off = _without_off(stats, given)
    chosen = replace(settings, strengths=_chosen(settings.strengths, left), weights=_chosen(settings.weights, left))
    check_result(result_bytes(on.calibration, settings.rank))
    merged = merge(on.calibration, chosen, _progress(on))
    scaled = _text_strengths(on, merged.report.strengths)
    text = None if on.text is None else merge_text(on.text, replace(chosen, strengths=scaled))
    report = merged.report.with_notes(*off, *_notes(on, merged.report, settings.rules), *_text_notes(text))
    tensors = _tensors(on, settings.rules, merged, text, range(len(on.loras)))
    told = [one if task in left else 0.0 for task, one in enumerate(given)]
    return LoraModel(tensors, with_settings(stats.provenance, settings, report, told)), _told(report, on)


def _told(report: Report, stats: Stats) -> str:
    """The report; below its two sentences, what makes them say less than they seem to."""
    few = stats.with_few_prompts
    if not few:
        return str(report)
    summary, _, details = str(report).partition("\n\n")
    caution = (
        f"Few prompts: {', '.join(few)}. What is told here is of these prompts, and on others much less may be kept. "
        f"Give {FEW} to 8 that differ."
    )
    return f"{summary}\n{caution}\n\n{details}"


def _chosen(values: tuple[float, ...] | None, left: Sequence[int]) -> tuple[float, ...] | None:
    return None if values is None else tuple(values[task] for task in left)


def _without_off(stats: Stats, strengths: Sequence[float]) -> tuple[Stats, list[int], list[str]]:
    """The statistics as if LoRAs at strength 0 had never been there, which are left, and what the report says of it.

    Raises:
        SSRError: all are.
    """
    names = stats.calibration.names
    pairs = zip(strengths, _text_strengths(stats, strengths), strict=True)
    off = [task for task, pair in enumerate(pairs) if all(map(is_off, pair))]
    left = [task for task in range(len(names)) if task not in off]
    if not off:
        return stats, left, []
    listed = ", ".join(names[task] for task in off)
    if len(off) == len(names):
        raise SSRError(f"All LoRAs are at strength 0 ({listed}), so nothing is left to merge. Give one a strength.")
    for task in reversed(off):
        stats = stats.without(task)
    return stats, left, [f"Left out, as if not there, being at strength 0: {listed}."]


def split(stats: Stats, settings: MergeSettings) -> tuple[list[LoraModel], str]:
    """The merge as one LoRA for each that it is made of, in their order, and what a person wants to know of them.

    Raises:
        SSRError: as solve() does, or there is one LoRA only.
    """
    check_rules(settings.rules, _modules(stats))
    check_result(result_bytes(stats.calibration, settings.rank))
    found = core_split(stats.calibration, settings, _progress(stats))
    reports = [part.report for part in found.parts]
    scaled = _text_strengths(stats, reports[0].strengths)
    text = None if stats.text is None else core_split(stats.text, text_settings(replace(settings, strengths=scaled)))
    parts = [
        LoraModel(
            _tensors(stats, settings.rules, part, text.parts[task] if text else None, [task]),
            of_part(with_settings(stats.provenance, settings, part.report), task),
        )
        for task, part in enumerate(found.parts)
    ]
    about_text = [] if text is None else [f"\nText encoder: {text}\n"]
    return parts, "\n".join([str(found), *_notes(stats, reports[0], settings.rules), *about_text])


def _progress(stats: Stats) -> Callable[[int, int], None]:
    """A bar over the sites, at which the work can be stopped."""
    bar = comfy.utils.ProgressBar(len(stats.calibration.subspaces))

    def on_site(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done + 1, total)

    return on_site


def _tensors(
    stats: Stats, rules: Sequence[Rule], merged: Merge, text: Merge | None, which: Sequence[int]
) -> dict[str, Tensor]:
    """What a merge writes, and what else the LoRAs of these numbers change, at their strengths.

    Raises:
        SSRError: nothing is left of it.
    """
    strengths = merged.report.strengths
    scaled = [_text_strengths(stats, strengths)[task] for task in which]
    tensors = state_dict(
        merged.updates, [stats.loras[task].model for task in which], [strengths[task] for task in which], rules, ""
    )
    parts = [one.text for one in stats.loras]
    if not stats.with_clip:
        parts = with_common_names(parts)
    parts = [parts[task] for task in which]
    encoder = text.updates if text else summed(parts, scaled)
    encoder = {site: update for site, update in encoder.items() if treatment_of(site.module, rules) != "drop"}
    tensors |= state_dict(encoder, parts, scaled, rules, _text_prefix(stats))
    if not tensors:
        names = ", ".join(stats.loras[task].task.name for task in which)
        raise SSRError(f"The rules for layers leave out every layer of {names}, so nothing is left of it to merge.")
    return tensors


def _modules(stats: Stats) -> set[str]:
    """Everything that a rule can name."""
    text = stats.text.subspaces if stats.text else {}
    return {site.module for site in (*stats.calibration.subspaces, *text)} | _summed_modules(stats)


def _summed_modules(stats: Stats) -> set[str]:
    """What LoRAs change that was not measured."""
    prefix = _text_prefix(stats)
    modules: set[str] = set()
    for lora in stats.loras:
        modules |= {key.rpartition(".")[0] for key in lora.model.patches}
        modules |= {prefix + key.rpartition(".")[0] for key in lora.text.patches}
        modules |= set() if stats.with_clip else {site.module for site in lora.text.updates}
    return modules


def _text_prefix(stats: Stats) -> str:
    """Of the weight keys in the LoRAs' text parts: with a CLIP they are its own, else as in the files."""
    return GENERIC if stats.with_clip else ""


def _text_strengths(stats: Stats, strengths: Sequence[float]) -> tuple[float, ...]:
    """(K,) of the LoRAs' parts for the text encoder, where those for the model have these."""
    tasks = [lora.task for lora in stats.loras]
    return tuple(
        strength * task.text_strength / task.strength if task.strength else task.text_strength
        for strength, task in zip(strengths, tasks, strict=True)
    )


def _text_notes(text: Merge | None) -> Iterator[str]:
    if text is not None:
        yield f"\nText encoder:\n{text.report.details}\n"


def _notes(stats: Stats, report: Report, rules: Sequence[Rule]) -> Iterator[str]:
    """What the numbers of the report do not show: what became of every tensor, and parts that were not routed."""
    for name, lora in zip(report.names, stats.loras, strict=True):
        yield from lora.account.lines(name)
    if left := [module for module in _summed_modules(stats) if treatment_of(module, rules) == "drop"]:
        yield f"Of what is summed, {len(left)} layers are left out as asked, such as {min(left)}."
    if stacked := [site.site for site in report.sites if treatment_of(site.site.module, rules) == "stack"]:
        yield f"{len(stacked)} sites are stacked as asked, not routed, such as {stacked[0]}."
    corrections = stats.calibration.corrections.values()
    if any(correction.strengths != report.strengths for correction in corrections):
        yield "The refinement was measured at other strengths and is left out; collect at these to have it."
    yield from _heard_at_other_strengths(stats, report)
    yield from listed_pairs(stats.collections)
    yield from _called_alike(stats)
    yield from stats.notes
    if stats.silent:
        yield f"{len(stats.silent)} layers never ran while collecting, such as {stats.silent[0]}, and are summed."


def _called_alike(stats: Stats) -> Iterator[str]:
    """A warning of LoRAs that share their trigger words, as far as these are known."""
    told = [[one.prompts[task] for one in stats.collections if one.prompts] for task in range(len(stats.loras))]
    called = [phrases(lora.source, sum(texts, ())) for lora, texts in zip(stats.loras, told, strict=True)]
    return namesakes(stats.calibration.names, called)


def _heard_at_other_strengths(stats: Stats, report: Report) -> Iterator[str]:
    """Combinations whose LoRAs are merged in another proportion than they were heard in."""
    for one in stats.collections:
        moved = [
            Case(heard.speakers).label(report.names)
            for heard in one.combinations
            if _proportions(heard.speakers, one.strengths) != _proportions(heard.speakers, report.strengths)
        ]
        if moved:
            yield (
                f"Heard together at other strengths than they are merged at: {', '.join(moved)}. This holds for small "
                "changes; for large ones collect again at these strengths."
            )


def _proportions(speakers: Sequence[int], strengths: Sequence[float]) -> list[float]:
    """To the strongest of them."""
    most = max((abs(strengths[task]) for task in speakers), default=0.0) or 1.0
    return [round(strengths[task] / most, 6) for task in speakers]
