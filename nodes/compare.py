"""SSR Compare: the base, each LoRA, their stack and the merge side by side, at one seed, with numbers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import LoraError
from .pictures.comparison import compare
from .pictures.distances import distances, table
from .pictures.picture import image_of
from .pictures.rendering import Rendering, scenes_of
from .pictures.sheet import Sheet
from .reading.combination import Combination, parted
from .reading.task import Task
from .schema import inputs
from .schema.sockets import ADVANCED, LoraModelSocket, SSRSheet, SSRTasks, ending_said, say, schema
from .writing.lora_model import check_base


class SSRCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRCompare",
            display_name="SSR Compare",
            description="Renders each prompt with the base model, with each LoRA alone, with all of them stacked (at "
            "their strengths and at 0.7 of them) and with the merge, all from the same noise, as one labelled grid. "
            "Below each picture: how far it is from what its prompt asks for, 0 = the same, 1 = as far as the base.",
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
                    "combination. Prompts that the merge was not calibrated on show more. The numbers of the LoRAs "
                    "that a line asks for, such as 1: or 1+3:, before it bring the distances below its pictures.",
                ),
                inputs.seed("Of the noise that all pictures start from; one that no calibration saw.", default=1000),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each picture."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
                inputs.sampler("As in KSampler."),
                inputs.scheduler("As in KSampler."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="As in KSampler; without it, the empty prompt. Counts if cfg is not 1.",
                ),
                io.Latent.Input(
                    "references",
                    optional=True,
                    tooltip="For edit models: input pictures, VAE-encoded, one for each line of prompts in turn. "
                    "Calibration prompts bring their own.",
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
            outputs=[
                io.Image.Output(display_name="grid", tooltip="Rows are prompts, columns are models."),
                io.String.Output(display_name="distances", tooltip="The numbers below the pictures, and their means."),
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The pictures one by one, row by row, for a node that scores them.",
                ),
                SSRSheet.Output(display_name="sheet", tooltip="For SSR Add Scores."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @ending_said
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
        references: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        tasks, asked = parted(tasks)
        if not tasks:
            raise LoraError("SSR Compare: there is no LoRA to compare; add some with SSR Add LoRA.")
        if clip is None or vae is None:
            raise LoraError("SSR Compare: this checkpoint brings no text encoder or no VAE; connect loaders of them.")
        check_base(lora, model, "SSR Compare")
        scenes = scenes_of(prompts, (*tasks, *asked), references)
        how = Rendering(seed, steps, cfg, sampler_name, scheduler)
        tell = lambda text: say(cls, text)  # noqa: E731
        drawn = compare(model, clip, vae, tasks, lora, scenes, negative, latent, how, tell)
        found = distances(drawn.latents, drawn.wanted)
        captions = {place: f"{distance:.2f}" for place, distance in found.items()}
        sheet = Sheet(drawn.pictures, tuple(scene.label for scene in scenes), drawn.columns, cell, captions)
        said, image = table(found, scenes, drawn.columns), image_of(sheet.drawn())
        tell(said or "Done.")
        images = [image_of(drawn.pictures[place]) for place in sheet.places]
        return io.NodeOutput(image, said, images, sheet, ui=ui.PreviewImage(image))
