"""SSR Propose Prompts: calibration prompts from what LoRA files tell of their training, for a person to improve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..ssr_core import LoraError
from .calibrating.case_prompts import PAIRS
from .reading.file_state import state_of
from .reading.training_notes import TRIGGER, TrainingNotes
from .schema import inputs
from .schema.pickers import NONE, PICKERS, picked, picker
from .schema.sockets import say, schema
from .wording.proposals import PROMPTS, propose, propose_pairs
from .wording.trigger_words import namesakes, phrases

NAME = "SSR Propose Prompts"


class SSRProposePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRProposePrompts",
            display_name=NAME,
            description="Proposes calibration prompts from what LoRA files tell of their training (trigger words, "
            "tags, captions), and prompts that ask for two at once. Look at them, improve them, connect or paste them.",
            search_aliases=["trigger words", "lora prompts", "tag frequency", "captions", "ssr merge"],
            is_output_node=True,
            inputs=[
                *(picker(number, "A LoRA file.", number > 1) for number in range(1, PICKERS + 1)),
                io.Int.Input(
                    "count",
                    default=PROMPTS,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Prompts for each LoRA. Four to eight are a good number.",
                ),
                inputs.pairs(
                    "Prompts for each pair of LoRAs, made of their own. 0 makes none.", default=PAIRS, optional=True
                ),
            ],
            outputs=[
                *(_output(number) for number in range(1, PICKERS + 1)),
                io.String.Output(
                    display_name="combinations",
                    tooltip="Prompts that ask for two at once, as combinations of SSR Quick Merge takes them.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **chosen: Any) -> list[str]:
        return [state_of(folder_paths.get_full_path("loras", name), name) for name in picked(chosen)]

    @classmethod
    def execute(cls, count: int = PROMPTS, pairs: int = PAIRS, **chosen: Any) -> io.NodeOutput:
        files = {
            number: Path(folder_paths.get_full_path_or_raise("loras", name))
            for number, name in enumerate(picked(chosen))
            if name != NONE
        }
        if not files:
            raise LoraError(f"{NAME}: choose a LoRA to propose prompts for.")
        notes = {number: TrainingNotes.read(file) for number, file in files.items()}
        prompts = {number: propose(found, count) for number, found in notes.items()}
        together = propose_pairs(list(prompts.values()), pairs)
        called = [phrases({TRIGGER: notes[number].phrase}, prompts[number]) for number in files]
        say(cls, "\n\n".join(_shown(files, prompts, [*together, *namesakes([f.stem for f in files.values()], called)])))
        lines = ["\n".join(prompts.get(number, ())) for number in range(PICKERS)]
        return io.NodeOutput(*lines, "\n".join(together))


def _output(number: int) -> io.String.Output:
    return io.String.Output(
        display_name=f"prompts_{number}",
        tooltip="One per line, for SSR Prompts or SSR Quick Merge; empty if nothing is known.",
    )


def _shown(files: dict[int, Path], prompts: dict[int, list[str]], more: list[str]) -> list[str]:
    """A paragraph for each LoRA, and one for what concerns several."""
    unknown = "its file does not tell what it was trained on. Write prompts with its trigger words."
    told = [
        f"{file.stem}: {unknown}" if not prompts[number] else "\n".join([f"{file.stem}:", *prompts[number]])
        for number, file in files.items()
    ]
    return [*told, "\n".join(more)] if more else told
