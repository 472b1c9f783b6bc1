"""SSR Collect Stats: runs the model once per LoRA and measures how its signals meet those of the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..ssr_core import Calibration, LoraError, Requirement, SSRError
from ..ssr_core.collect import CONTEXT
from ..ssr_core.expansion import RANK
from .calibrate import calibrate
from .patches import read_tasks
from .provenance import describe
from .room import size
from .runs import LAST, REFINE, TOKENS, Sampling, plan
from .sockets import ADVANCED, CATEGORY, FIXED, SSRStats, SSRTasks, Stats, Task, say, schema
from .text_encoder import calibrate_text


class SSRCollectStats(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRCollectStats",
            display_name="SSR Collect Stats",
            category=CATEGORY,
            description="Samples each LoRA's calibration prompts with that LoRA active and measures, layer by layer, "
            "how the LoRAs' signals overlap. The model itself is not changed. Solving again needs no new statistics.",
            search_aliases=["merge lora", "lora merge", "ssr merge", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, with what shall stay in it (a speed LoRA, say)."),
                SSRTasks.Input("tasks", tooltip="The LoRAs to merge, from SSR Add LoRA."),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size you render. A batch gives more samples per prompt.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=FIXED,
                    tooltip="Of the calibration samples' noise; the same for every LoRA.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=10000,
                    tooltip="Sampling steps per prompt. One step sees only noise; 4 to 8 are enough.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampler you render with.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="The scheduler you render with.",
                ),
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
                    "up for what merging does to the layers' inputs. Each time takes twice as long as measuring. "
                    "Skipped below 3 steps.",
                    **ADVANCED,
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt you render with, for models that use one. Only with a cfg above 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="The cfg you render with, if a negative prompt is connected.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "tokens",
                    default=TOKENS,
                    min=0,
                    max=2**20,
                    optional=True,
                    tooltip="At most so many tokens of each layer and step are counted, chosen at random. More than a "
                    "few thousand change nothing but the time; 0 counts all.",
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
            ],
            outputs=[SSRStats.Output(display_name="stats", tooltip="What was measured; for SSR Solve.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        tasks: tuple[Task, ...],
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
    ) -> io.NodeOutput:
        started = time.perf_counter()
        if not tasks:
            raise LoraError("SSR Collect Stats: there is no LoRA to merge; add some with SSR Add LoRA.")
        sampling = Sampling(
            *(seed, steps, sampler_name, scheduler, cfg, tuple(negative or ()), tokens, start_at_step, end_at_step)
        )
        _check(sampling, model_before)
        loras = read_tasks(tasks, model, clip, expand_rank)
        if not any(lora.model.updates for lora in loras):
            raise LoraError(
                f"None of {', '.join(task.name for task in tasks)} changes a layer of the model that can be routed; at "
                "least one must. Load them with Load LoRA instead."
            )
        encoded, text = calibrate_text(clip, loras, sampling.negative)
        runs = plan(encoded, sampling, context, refine)
        calibration, silent = calibrate(
            *(model, loras, runs, latent, context),
            on_step=_progress(model, sum(run.steps + run.unseen for run in runs)),
            on_run=lambda number: say(
                cls, f"{number + 1} of {len(runs)}: {runs[number].kind.value}, {runs[number].task.name}"
            ),
            on_need=lambda need: say(cls, _needs(need, model.load_device)),
            before=model_before,
        )
        say(cls, _summary(calibration, tasks, time.perf_counter() - started))
        provenance = describe(model, loras, sampling, context, refine)
        return io.NodeOutput(Stats(tuple(loras), calibration, text, clip is not None, silent, provenance))


def _check(sampling: Sampling, before: Any) -> None:
    """Raise SSRError for what cannot be meant, before any LoRA is read."""
    if sampling.cfg > 1 and not sampling.negative:
        raise SSRError("SSR Collect Stats: cfg needs a negative prompt; connect one, or set cfg to 1.")
    if sampling.seen < 1:
        raise SSRError(
            f"SSR Collect Stats: there is no step from start_at_step {sampling.start} to end_at_step {sampling.stop} "
            f"among {sampling.steps} steps."
        )
    if before is not None and not sampling.start:
        raise SSRError(
            "SSR Collect Stats: model_before is connected, but start_at_step is 0, so it has no step to sample. Set "
            "start_at_step to where it hands over."
        )


def _progress(model: Any, total: int) -> Callable[[torch.Tensor], None]:
    """One bar over all LoRAs, prompts and steps, with ComfyUI's own preview."""
    bar = comfy.utils.ProgressBar(total)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def on_step(x0: torch.Tensor) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        bar.update_absolute(min(bar.current + 1, total), total, preview)

    return on_step


def _needs(need: Requirement, device: torch.device) -> str:
    there = f"{size(need.device)} on {device} beside the model, " if device.type != "cpu" else ""
    text = f"Collecting takes about {there}{size(need.host)} of memory."
    logging.info("SSR Collect Stats: %s", text)
    return text


def _summary(calibration: Calibration, tasks: tuple[Task, ...], seconds: float) -> str:
    prompts = sum(len(task.conditioning) for task in tasks)
    return (
        f"{len(tasks)} LoRAs, {len(calibration.subspaces)} sites. "
        f"{prompts} prompts, {min(calibration.tokens, default=0):,} tokens a LoRA. {seconds:.1f} s."
    )
