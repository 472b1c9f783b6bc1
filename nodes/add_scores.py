"""SSR Add Scores: what another node thinks of each picture of a comparison, below it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..ssr_core import SSRError
from .pictures.picture import image_of
from .pictures.sheet import Sheet
from .schema.sockets import SSRSheet, schema


class SSRAddScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRAddScores",
            display_name="SSR Add Scores",
            description="Writes a score below each picture of SSR Compare, from any node that gives a number for an "
            "image, such as how like a face it is, or how beautiful.",
            search_aliases=["face similarity", "aesthetic score", "identity score", "score images", "ssr merge"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                SSRSheet.Input("sheet", tooltip="From SSR Compare."),
                io.Float.Input(
                    "scores",
                    force_input=True,
                    tooltip="One number for each of the images of SSR Compare, in their order.",
                ),
                io.String.Input("label", default="score", tooltip="What stands before each number."),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The grid with a further line below each picture."),
                SSRSheet.Output(display_name="sheet", tooltip="For further scores."),
            ],
        )

    @classmethod
    def execute(cls, sheet: list[Sheet], scores: list[float], label: list[str]) -> io.NodeOutput:
        try:
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise SSRError(
                f"SSR Add Scores: scores are no numbers ({error}); connect a node that gives FLOAT."
            ) from error
        scored = sheet[0].with_scores(label[0], numbers)
        image = image_of(scored.drawn())
        return io.NodeOutput(image, scored, ui=ui.PreviewImage(image))
