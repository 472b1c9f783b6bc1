"""SSR Save Stats: keeps what SSR Collect Stats measured, so that it need not be measured again."""

from __future__ import annotations

from comfy.cli_args import args
from comfy_api.latest import io, ui

from .calibrating.stats import Stats
from .schema.sockets import SSRStats, schema
from .writing.save_path import next_path
from .writing.stats_file import save
from .writing.stats_folder import FOLDER, name_of


class SSRSaveStats(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRSaveStats",
            display_name="SSR Save Stats",
            description="Saves statistics under output/ssr_stats, for SSR Load Stats: solving again then needs no new "
            "calibration. The LoRAs themselves are not in the file; keep them.",
            search_aliases=["save statistics", "save calibration", "export statistics", "ssr merge"],
            is_output_node=True,
            inputs=[
                SSRStats.Input("stats", tooltip="From SSR Collect Stats or SSR Add Stats."),
                io.String.Input(
                    "filename_prefix", default="stats", tooltip="Name of the file; a number is added to it."
                ),
                io.Boolean.Input(
                    "keep_prompts",
                    default=True,
                    tooltip="Whether the calibration prompts are written into the file. They are not needed to merge; "
                    "switch it off before you share a file whose prompts are nobody's business.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The name under which SSR Load Stats lists it.")],
        )

    @classmethod
    def execute(cls, stats: Stats, filename_prefix: str, keep_prompts: bool) -> io.NodeOutput:
        path = next_path(FOLDER, filename_prefix, "stats")
        save(stats, path, keep_prompts and not args.disable_metadata)
        name = name_of(path)
        return io.NodeOutput(name, ui=ui.PreviewText(f"Saved {name} ({path.stat().st_size / 2**20:.1f} MiB)"))
