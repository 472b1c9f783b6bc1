"""SSR Solve: turns statistics into one LoRA. Quick, so that settings can be tried without collecting again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..ssr_core import (
    Merge,
    MergeSettings,
    Report,
    Ridge,
    Rule,
    SSRError,
    check_rules,
    merge,
    parse_rules,
    treatment_of,
)
from .lora_model import state_dict
from .network import GENERIC
from .provenance import with_settings
from .sockets import ADVANCED, CATEGORY, LoraModel, LoraModelSocket, SSRStats, Stats, schema
from .text_encoder import merge_text, summed, with_common_names

AUTO = 0.99  # share of each layer's effect that an automatic rank keeps


class SSRSolve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSolve",
            display_name="SSR Solve",
            category=CATEGORY,
            description="Merges the LoRAs into one that gives each of them its own signals. "
            "Change a setting and only this node runs again.",
            search_aliases=["merge lora", "lora merge", "ssr merge", "route"],
            inputs=[
                SSRStats.Input("stats", tooltip="From SSR Collect Stats."),
                io.Float.Input(
                    "ridge",
                    default=0.01,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="How far the calibration is distrusted. More pulls the merge towards the LoRAs' mean; "
                    "raise it after short calibrations. 0.001 to 0.1 are usual.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=-1,
                    max=4096,
                    tooltip="Size of the merged LoRA, as that of a LoRA of this rank; layers that need more take from "
                    "those that need less. 0 keeps all, which is the sum of the LoRAs' ranks. -1 finds, layer by "
                    "layer, the smallest rank that loses less than 1 % of the effect.",
                ),
                io.Float.Input(
                    "routing",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 = the LoRAs simply stacked, 1 = fully routed.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="Strength of each LoRA in the merge, in their order, such as 1, 0.8, 1. "
                    "Empty: as given in SSR Add LoRA.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    optional=True,
                    tooltip="Rules for layers, one per line; later ones overrule earlier ones. keep: routed, as all "
                    "are without a rule. stack: summed, not routed. drop: left out. Then what: all, attention, mlp, "
                    "modulation, text, image, text_encoder, or part of a name, such as drop single_blocks.0-9.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="lora", tooltip="The merged LoRA."),
                io.String.Output(display_name="report", tooltip="What the merge keeps of each LoRA."),
            ],
        )

    @classmethod
    def execute(
        cls, stats: Stats, ridge: float, rank: int, routing: float, strengths: str, layers: str = ""
    ) -> io.NodeOutput:
        settings = MergeSettings(
            ridge=Ridge(relative=ridge),
            rank=AUTO if rank < 0 else rank,
            routing=routing,
            strengths=_numbers(strengths) or None,
            rules=parse_rules(layers),
        )
        check_rules(settings.rules, _modules(stats))
        bar = comfy.utils.ProgressBar(len(stats.calibration.subspaces))

        def on_site(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done + 1, total)

        merged = merge(stats.calibration, settings, on_site)
        text, text_strengths = _merged_text(stats, settings, merged.report.strengths)
        report = merged.report.with_notes(*_notes(stats, merged.report, settings.rules), *_text_notes(text))
        return io.NodeOutput(
            LoraModel(
                _tensors(stats, settings, merged, text, text_strengths),
                with_settings(stats.provenance, settings, report),
            ),
            str(report),
        )


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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in re.split(r"[\s,;]+", text.strip()) if part)
    except ValueError as error:
        raise SSRError(f"SSR Solve: strengths are {text!r}; give one number per LoRA, such as 1, 0.8, 1.") from error


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
    if stats.silent:
        yield f"{len(stats.silent)} layers never ran while collecting, such as {stats.silent[0]}."
