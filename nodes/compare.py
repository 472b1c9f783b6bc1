"""SSR Compare: the base, each LoRA, their stack and the merge side by side, at one seed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import LoraError
from .calibrating.progress import show_steps
from .pictures.candidates import candidates, names
from .pictures.grid import grid
from .pictures.picture import image_of
from .pictures.rendering import Rendering, render, scenes_of
from .reading.combination import Combination, parted
from .reading.task import Task
from .schema import inputs
from .schema.sockets import ADVANCED, LoraModelSocket, SSRTasks, say, schema


class SSRCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRCompare",
            display_name="SSR Compare",
            description="Renders each prompt with the base model, with each LoRA alone, with all of them stacked (at "
            "their strengths and at 0.7 of them) and with the merge, all from the same noise, as one labelled grid.",
            search_aliases=["compare lora", "xy plot", "grid", "side by side", "ssr merge"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model, without any of the LoRAs."),
                io.Clip.Input("clip", tooltip="The text encoder; LoRAs that change it, too, are loaded onto it."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                SSRTasks.Input("tasks", tooltip="The LoRAs with their strengths, from SSR Add LoRA."),
                LoraModelSocket.Input("lora", tooltip="Their merge, from SSR Solve."),
                io.Latent.Input("latent", tooltip="An empty latent of the size to render; of a batch the first."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One per line, a row each. Empty: the first calibration prompt of each LoRA and "
                    "combination. Prompts that the merge was not calibrated on show more.",
                ),
                inputs.seed("Of the noise that all pictures start from."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each picture."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
                inputs.sampler("As in KSampler."),
                inputs.scheduler("As in KSampler."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="As in KSampler; without it, the empty prompt. Counts if cfg is not 1.",
                ),
                io.Int.Input(
                    "cell",
                    default=256,
                    min=64,
                    max=2048,
                    step=8,
                    optional=True,
                    tooltip="The longer side of each picture in the grid, in pixels.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="Rows are prompts, columns are models.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        tasks: tuple[Task | Combination, ...],
        lora: Any,
        latent: dict[str, Any],
        prompts: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        negative: list[Any] | None = None,
        cell: int = 256,
    ) -> io.NodeOutput:
        tasks, together = parted(tasks)
        if not tasks:
            raise LoraError("SSR Compare: there is no LoRA to compare; add some with SSR Add LoRA.")
        if clip is None or vae is None:
            raise LoraError("SSR Compare: this checkpoint brings no text encoder or no VAE; connect loaders of them.")
        scenes, columns = scenes_of(prompts, (*tasks, *together)), names(tasks)
        how = Rendering(seed, steps, cfg, sampler_name, scheduler)
        on_step = show_steps(model, len(columns) * len(scenes) * steps)
        pictures = {}
        for column, candidate in enumerate(candidates(model, clip, tasks, lora)):
            say(cls, f"{column + 1} of {len(columns)}: {candidate.name}")
            for row, picture in enumerate(render(candidate, scenes, negative, latent, vae, how, on_step)):
                pictures[row, column] = picture
        sheet = image_of(grid(pictures, [scene.label for scene in scenes], columns, len(columns) - 1, cell))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet))
