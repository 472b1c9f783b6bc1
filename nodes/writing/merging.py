"""Merging: from all that SSR Collect Stats gives to one LoRA and its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...ssr_core import Case, Merge, MergeSettings, Report, Rule, SSRError, check_rules, merge, treatment_of
from ..calibrating.metadata import with_settings
from ..calibrating.stats import Stats
from ..calibrating.text_encoder import merge_text, summed, with_common_names
from ..reading.network import GENERIC
from .lora_model import LoraModel, state_dict

AUTO = 0.99  # share of each layer's effect that an automatic rank keeps


def solve(stats: Stats, settings: MergeSettings) -> tuple[LoraModel, str]:
    """The merged LoRA and what a person wants to know of it, with a progress bar and open to interrupts.

    Raises:
        SSRError: settings that cannot be meant, rules that match nothing, or a merge that cannot be made.
    """
    check_rules(settings.rules, _modules(stats))
    bar = comfy.utils.ProgressBar(len(stats.calibration.subspaces))

    def on_site(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done + 1, total)

    merged = merge(stats.calibration, settings, on_site)
    text, text_strengths = _merged_text(stats, settings, merged.report.strengths)
    report = merged.report.with_notes(*_notes(stats, merged.report, settings.rules), *_text_notes(text))
    tensors = _tensors(stats, settings, merged, text, text_strengths)
    return LoraModel(tensors, with_settings(stats.provenance, settings, report)), str(report)


def _tensors(
    stats: Stats, settings: MergeSettings, merged: Merge, text: Merge | None, text_strengths: Sequence[float]
) -> dict[str, Tensor]:
    rules = settings.rules
    tensors = state_dict(merged.updates, [one.model for one in stats.loras], merged.report.strengths, rules, "")
    parts = [one.text for one in stats.loras]
    if not stats.with_clip:
        parts = with_common_names(parts)
    encoder = text.updates if text else summed(parts, text_strengths)
    encoder = {site: update for site, update in encoder.items() if treatment_of(site.module, rules) != "drop"}
    tensors |= state_dict(encoder, parts, text_strengths, rules, _text_prefix(stats))
    if not tensors:
        raise SSRError("SSR Solve: the rules for layers leave out every layer, so nothing is left to merge.")
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


def _merged_text(
    stats: Stats, settings: MergeSettings, strengths: Sequence[float]
) -> tuple[Merge | None, tuple[float, ...]]:
    """The merge of the text encoder's parts, if it was measured, and the strengths of these parts."""
    tasks = [lora.task for lora in stats.loras]
    scaled = tuple(
        strength * task.text_strength / task.strength if task.strength else task.text_strength
        for strength, task in zip(strengths, tasks, strict=True)
    )
    if stats.text is None:
        return None, scaled
    return merge_text(stats.text, replace(settings, strengths=scaled)), scaled


def _text_notes(text: Merge | None) -> Iterator[str]:
    if text is not None:
        yield f"\nText encoder: {text.report}\n"


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
    if any(heard.is_glued for one in stats.collections for heard in one.combinations):
        yield (
            "Prompts that ask for two LoRAs at once were made of the LoRAs' own. Prompts of yours that ask for both "
            "are better: add them with SSR Add Combination."
        )
    if stats.silent:
        yield f"{len(stats.silent)} layers never ran while collecting, such as {stats.silent[0]}."


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
