"""SSR Solve: turns statistics into one LoRA. Quick, so that settings can be tried without collecting again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence, Sized

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..ssr_core import MergeSettings, Report, Ridge, SSRError, merge
from .patches import lora_state_dict
from .provenance import with_settings
from .sockets import CATEGORY, Carried, LoraModel, LoraModelSocket, SSRStats, Stats, schema

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
            ],
            outputs=[
                LoraModelSocket.Output(display_name="lora", tooltip="The merged LoRA."),
                io.String.Output(display_name="report", tooltip="What the merge keeps of each LoRA."),
            ],
        )

    @classmethod
    def execute(cls, stats: Stats, ridge: float, rank: int, routing: float, strengths: str) -> io.NodeOutput:
        settings = MergeSettings(
            ridge=Ridge(relative=ridge),
            rank=AUTO if rank < 0 else rank,
            routing=routing,
            strengths=_numbers(strengths) or None,
        )
        bar = comfy.utils.ProgressBar(len(stats.calibration.subspaces))

        def on_site(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done + 1, total)

        merged = merge(stats.calibration, settings, on_site)
        report = merged.report.with_notes(*_notes(stats, merged.report))
        tensors = lora_state_dict(merged.updates, stats.carried, report.strengths)
        return io.NodeOutput(LoraModel(tensors, with_settings(stats.provenance, settings, report)), str(report))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in re.split(r"[\s,;]+", text.strip()) if part)
    except ValueError as error:
        raise SSRError(f"SSR Solve: strengths are {text!r}; give one number per LoRA, such as 1, 0.8, 1.") from error


def _notes(stats: Stats, report: Report) -> Iterator[str]:
    """What the numbers of the report do not show: parts that were not routed."""
    for label, counts in (
        ("text encoder layers", _count(stats.carried, lambda one: one.text_encoder)),
        ("norm, bias and full-weight differences", _count(stats.carried, lambda one: one.patches)),
    ):
        if any(counts):
            yield f"Summed at their strengths, not routed: {label} ({_by_name(report.names, counts)})."
    for name, one in zip(report.names, stats.carried, strict=True):
        if one.unmatched:
            yield f"{name}: {len(one.unmatched)} tensors name nothing in this model, such as {one.unmatched[0]!r}."
    corrections = stats.calibration.corrections.values()
    if any(correction.strengths != report.strengths for correction in corrections):
        yield "The refinement was measured at other strengths and is left out; collect at these to have it."
    if stats.silent:
        yield f"{len(stats.silent)} layers never ran while collecting, such as {stats.silent[0]}."


def _count(carried: Sequence[Carried], part: Callable[[Carried], Sized]) -> list[int]:
    return [len(part(one)) for one in carried]


def _by_name(names: Sequence[str], counts: Sequence[int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in zip(names, counts, strict=True) if count)
