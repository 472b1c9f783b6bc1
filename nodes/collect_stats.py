"""SSR Collect Stats: runs the model once per LoRA and measures how its signals meet those of the others."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ssr_core.lora.expansion import RANK
from ..ssr_core.measure.collector import CONTEXT
from .calibrating.case_prompts import PAIRS
from .calibrating.collect import collect
from .calibrating.runs import LAST, REFINE, TOKENS, Sampling
from .calibrating.stats import Stats
from .reading.combination import Combination
from .reading.task import Task
from .schema import inputs
from .schema.sockets import ADVANCED, SSRStats, SSRTasks, ending_said, say, schema


class SSRCollectStats(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRCollectStats",
            display_name="SSR Collect Stats",
            description="Samples each LoRA's calibration prompts with that LoRA active and measures, layer by layer, "
            "how the LoRAs' signals overlap. The model itself is not changed. Solving again needs no new statistics.",
            search_aliases=["ssr merge", "calibrate", "measure loras"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, with what shall stay in it (a speed LoRA, say)."),
                SSRTasks.Input("tasks", tooltip="The LoRAs to merge, from SSR Add LoRA, and SSR Add Combination."),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size you render. A batch gives more samples per prompt.",
                ),
                inputs.seed("Of the calibration samples' noise; the same for every LoRA."),
                inputs.steps(
                    "Sampling steps per prompt. One step sees only noise; 4 to 8 are enough. 0 runs nothing and needs "
                    "no prompts: SSR Solve then merges from the LoRAs' weights alone.",
                    default=8,
                ),
                inputs.sampler(),
                inputs.scheduler(),
                io.Int.Input(
                    "context",
                    default=CONTEXT,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="How many further directions of each layer's input the merge may look at to tell the LoRAs "
                    "apart. They do not enlarge the result. 0 is the paper's method.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "refine",
                    default=REFINE,
                    min=0,
                    max=8,
                    optional=True,
                    tooltip="How many times a first merge is tried beside each LoRA alone, so that the final one makes "
                    "up for what merging does to the layers' inputs. Each time takes as long as measuring. "
                    "Skipped below 3 steps.",
                    **ADVANCED,
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt you render with, for models that use one. Only with a cfg above 1.",
                ),
                inputs.cfg("The cfg you render with, if a negative prompt is connected.", optional=True, **ADVANCED),
                io.Int.Input(
                    "tokens",
                    default=TOKENS,
                    min=0,
                    max=2**20,
                    optional=True,
                    tooltip="At most so many tokens of each layer and step are counted, chosen at random. More change "
                    "little but the time; with one prompt and few steps, 4096 may. 0 counts all.",
                    **ADVANCED,
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, if LoRAs change it, too: then these parts are routed as well, with the "
                    "texts from SSR Prompts. Without it they are summed.",
                ),
                io.Int.Input(
                    "expand_rank",
                    default=RANK,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Adapters that are no plain LoRA (LoHa, LoKr, DoRA, full differences) become LoRAs of at "
                    "most this rank; the report tells what that keeps of them.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=LAST,
                    optional=True,
                    tooltip="The first step that this model samples, as in KSampler (Advanced): for Wan 2.2's "
                    "low-noise expert. The steps before it are not measured.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "end_at_step",
                    default=LAST,
                    min=1,
                    max=LAST,
                    optional=True,
                    tooltip="The step at which this model hands over, as in KSampler (Advanced): for Wan 2.2's "
                    "high-noise expert.",
                    **ADVANCED,
                ),
                io.Model.Input(
                    "model_before",
                    optional=True,
                    tooltip="Samples the steps before start_at_step: Wan 2.2's high-noise expert, with its own merge "
                    "on it. Without it the model itself does.",
                ),
                inputs.pairs(
                    "So that the merge obeys two LoRAs at once: where no SSR Add Combination is in the chain, "
                    "so many prompts of each pair are made of the LoRAs' own, with the words behind that all prompts "
                    "of the other share, and sampled, too; no more in all than the LoRAs have by themselves. Your own "
                    "prompts that ask for both are better. 0 makes none.",
                    default=PAIRS,
                    optional=True,
                    **ADVANCED,
                ),
                SSRStats.Input(
                    "like",
                    optional=True,
                    tooltip="Earlier statistics of the same LoRAs. The new ones are then measured in the same "
                    "directions of each layer, so that SSR Add Stats can add both. Use other prompts or another seed.",
                ),
                inputs.layers(
                    "Rules for layers that are left out before anything is read or measured, one per line, such as "
                    "drop img_in or drop text_encoder: layers of another size, or what you do not want from any LoRA. "
                    "As in SSR Solve, but drop and keep only."
                ),
            ],
            outputs=[SSRStats.Output(display_name="stats", tooltip="What was measured; for SSR Solve.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_said
    def execute(
        cls,
        model: Any,
        tasks: tuple[Task | Combination, ...],
        latent: dict[str, Any],
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        context: int = CONTEXT,
        refine: int = REFINE,
        negative: list[Any] | None = None,
        cfg: float = 1.0,
        tokens: int = TOKENS,
        clip: Any = None,
        expand_rank: int = RANK,
        start_at_step: int = 0,
        end_at_step: int = LAST,
        model_before: Any = None,
        like: Stats | None = None,
        pairs: int = PAIRS,
        layers: str = "",
    ) -> io.NodeOutput:
        sampling = Sampling(
            *(seed, steps, sampler_name, scheduler, cfg, tuple(negative or ()), tokens, start_at_step, end_at_step)
        )
        return io.NodeOutput(
            collect(
                *(model, tasks, latent, sampling, lambda text: say(cls, text)),
                *(context, refine, clip, expand_rank, model_before),
                like=like,
                pairs=pairs,
                layers=layers,
            )
        )
