"""SSR Add Stats: statistics of several runs or machines as one."""

from __future__ import annotations

from comfy_api.latest import io

from ..ssr_core import Calibration, StatisticsError
from ..ssr_core.lora.lora import find_order
from .calibrating.metadata import with_collections
from .calibrating.stats import Stats
from .schema.sockets import SSRStats, schema


class SSRAddStats(io.ComfyNode):
    """Why no LoRA can be added this way: its signal on the tokens of the others' prompts was never measured, and could
    only be computed from all that the layers saw there, x x^T of every layer, gigabytes for each LoRA. A sketch of it
    leaves out the directions of small variance, which LoRAs like to read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddStats",
            display_name="SSR Add Stats",
            description="Adds statistics of the same LoRAs: more prompts, another seed, another machine. Connect the "
            "first to like of the SSR Collect Stats that makes the second. A further LoRA cannot be added this way: "
            "what it makes of the other LoRAs' prompts was never measured. Collect all again, or merge it with their "
            "finished merge, as a LoRA of its own.",
            search_aliases=["add statistics", "combine statistics", "more prompts", "ssr merge"],
            inputs=[
                SSRStats.Input(
                    "stats_a", tooltip="Statistics; the result keeps the order and strengths of their LoRAs."
                ),
                SSRStats.Input("stats_b", tooltip="Statistics of the same LoRAs, collected with stats_a as like."),
            ],
            outputs=[SSRStats.Output(display_name="stats", tooltip="Both together; for SSR Solve.")],
        )

    @classmethod
    def execute(cls, stats_a: Stats, stats_b: Stats) -> io.NodeOutput:
        return io.NodeOutput(add(stats_a, stats_b))


def add(a: Stats, b: Stats) -> Stats:
    """Both together, with the LoRAs of `a`.

    Raises:
        StatisticsError: they are of other LoRAs or models, or were not measured in the same subspaces.
    """
    if a.model != b.model:
        raise StatisticsError(f"stats_a was measured on {a.model} and stats_b on {b.model}; these do not add up.")
    if a.with_clip != b.with_clip:
        less = "stats_b" if a.with_clip else "stats_a"
        raise StatisticsError(f"{less} was collected without clip and the other with it; connect clip to both.")
    lora_order = _order(a, b)
    calibration = _sum(a.calibration, b.calibration.reordered(lora_order, a.calibration.loras))
    text = None
    if a.text is not None and b.text is not None:
        text = _sum(a.text, b.text.reordered(lora_order, a.text.loras))
    collections = (*a.collections, *(one.reordered(lora_order) for one in b.collections))
    sampled = (*a.sampled, *(one.reordered(lora_order) for one in b.sampled))
    return Stats(
        *(a.loras, calibration, text, a.with_clip, tuple(sorted({*a.silent} & {*b.silent}))),
        *(with_collections(a.provenance, collections), collections, sampled),
        notes=tuple(dict.fromkeys((*a.notes, *b.notes))),
    )


def _order(a: Stats, b: Stats) -> tuple[int, ...]:
    """For each LoRA of `a`, where it stands in `b`."""
    try:
        fingerprints = [lora.lora.fingerprint for lora in b.loras]
        return find_order([lora.task.name for lora in b.loras], fingerprints, [lora.lora for lora in a.loras])
    except StatisticsError as error:
        raise StatisticsError(f"stats_b was {error}") from None


def _sum(a: Calibration, b: Calibration) -> Calibration:
    if any(seen.fingerprint != b.statistics[site].fingerprint for site, seen in a.statistics.items()):
        raise StatisticsError(
            "stats_a and stats_b were measured in different directions of the layers (their context), because each was "
            "collected by itself, so they do not add up. Connect one to like of the SSR Collect Stats that makes the "
            "other, or collect both with context 0."
        )
    strengths = [{c.strengths for c in one.corrections.values()} for one in (a, b)]
    if all(strengths) and strengths[0] != strengths[1]:
        (one,), (other,) = strengths
        raise StatisticsError(
            f"stats_a was refined at the strengths {_listed(one)} and stats_b at {_listed(other)}. Collect both at the "
            "same strengths, or one of them with refine 0."
        )
    return a + b


def _listed(strengths: tuple[float, ...]) -> str:
    return ", ".join(f"{strength:g}" for strength in strengths)
