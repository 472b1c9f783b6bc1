"""SSR Quick Merge: all steps from LoRA files and prompts to a model with the merge on it, in one node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..ssr_core import DistillationSettings, LoraError, MergeSettings, SSRError
from .calibrating.case_prompts import PAIRS, combinations_of
from .calibrating.circumstances import listed_pairs
from .calibrating.collect import collect
from .calibrating.prompt import encode_lines
from .calibrating.runs import TOKENS, Sampling
from .polishing.polish import polish as polished_merge
from .reading.file_state import state_of
from .reading.lora_stack import StackedLora, read_stack
from .reading.task import Task
from .reading.training_notes import TrainingNotes
from .schema import inputs
from .schema.pickers import NONE, PICKERS, picked, picker
from .schema.sockets import ADVANCED, LoraModelSocket, LoraStackSocket, SSRTasks, ending_said, say, schema
from .wording.proposals import listed, written_or_proposed
from .wording.trigger_words import unspoken
from .writing.kept_stats import kept_if_failing
from .writing.lora_file import next_file, save_one
from .writing.lora_model import load_into
from .writing.merging import AUTO, solve

NAME = "SSR Quick Merge"


class SSRQuickMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SSRQuickMerge",
            display_name=NAME,
            description="Start here: merges two to four LoRAs, or those of a LORA_STACK, into one and puts it on the "
            "model. It is SSR Prompts, SSR Add LoRA, SSR Collect Stats, SSR Solve and SSR Apply in one node. Any "
            "change runs all of it again; to try settings quickly, use the nodes themselves.",
            search_aliases=[
                *("merge lora", "lora merge", "merge loras", "merge two loras", "lora merger"),
                *("combine loras", "multiple loras", "ssr merge", "easy merge"),
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model, with what shall stay in it (a speed LoRA, say)."),
                io.Clip.Input("clip", tooltip="The text encoder. LoRAs that change it, too, are merged there as well."),
                io.Latent.Input("latent", tooltip="An empty latent of the size you render."),
                *(one for number in range(1, PICKERS + 1) for one in _picker(number)),
                LoraStackSocket.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="LoRAs of another pack's stacker, instead of those chosen here: prompts_1 then belongs to "
                    "the first LoRA of the stack.",
                ),
                inputs.combinations(
                    "Prompts that ask for several LoRAs at once, one per line, after their numbers or names: "
                    "1+3: mochi the cat, sepia style. none: before prompts where no LoRA should speak. Empty: "
                    "some prompts of each pair are made of the LoRAs' own.",
                    optional=True,
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt you render with, for models that use one. Only with a cfg above 1.",
                ),
                inputs.references(),
                inputs.cfg("The cfg you render with, if a negative prompt is connected.", optional=True, **ADVANCED),
                inputs.sampler(optional=True, **ADVANCED),
                inputs.scheduler(optional=True, **ADVANCED),
                inputs.seed("Of the calibration samples' noise; the same for every LoRA.", optional=True, **ADVANCED),
                inputs.steps(
                    "Sampling steps per prompt while calibrating. 4 to 8 are enough. 0 merges from the LoRAs' weights "
                    "alone, in seconds and without prompts; what the model makes of them is then not known.",
                    default=8,
                    optional=True,
                    **ADVANCED,
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=-1,
                    max=4096,
                    optional=True,
                    tooltip="Size of the merged LoRA, as that of a LoRA of this rank. 0 keeps all, -1 loses less than "
                    "1 % of the effect.",
                    **ADVANCED,
                ),
                inputs.pairs(
                    "How many prompts of each pair of LoRAs are made of their own, if combinations are empty. "
                    "0 makes none: then it is quicker, and the merge may forget to do two at once.",
                    default=PAIRS,
                    optional=True,
                    **ADVANCED,
                ),
                io.Int.Input(
                    "polish",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Steps of SSR Polish, which trains the merge on what its LoRAs do: 25 to 100. It takes far "
                    "more time and memory. 0: no training.",
                    **ADVANCED,
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    optional=True,
                    placeholder="name of a file to save it to",
                    tooltip="Name of a file under output/loras, where Load LoRA lists it; a number is added. Empty: "
                    "not saved. A change merges anew; SSR Save LoRA behind this node does not.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the merged LoRA."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the merged LoRA."),
                LoraModelSocket.Output(display_name="lora", tooltip="The merged LoRA, for SSR Save LoRA."),
                io.String.Output(display_name="report", tooltip="What the merge keeps of each LoRA."),
                SSRTasks.Output(display_name="tasks", tooltip="The LoRAs and their prompts, for SSR Compare."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,  # a merge that is only saved, or only looked at, runs with nothing connected behind it
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return [state_of(folder_paths.get_full_path("loras", name), name) for name in picked(inputs)]

    @classmethod
    @ending_said
    def execute(
        cls,
        model: Any,
        clip: Any,
        latent: dict[str, Any],
        lora_stack: Any = None,
        combinations: str = "",
        negative: list[Any] | None = None,
        references: dict[str, Any] | None = None,
        cfg: float = 1.0,
        sampler_name: str = "euler",
        scheduler: str = "simple",
        seed: int = 0,
        steps: int = 8,
        rank: int = 0,
        pairs: int = PAIRS,
        polish: int = 0,
        save_as: str = "",
        **chosen: Any,
    ) -> io.NodeOutput:
        if polish and not steps:
            raise SSRError(f"{NAME}: polish learns on what was sampled, and with 0 steps nothing is; set steps to 8.")
        if is_saved := bool(save_as.strip()):
            next_file(save_as)  # a name that cannot be is said before anything is sampled
        tasks, numbers, proposed, warnings = [], [], {}, []
        for number, entry, lines in _chosen(lora_stack, chosen, PICKERS if steps else 0):
            where = f"{NAME}: prompts_{number}, for {entry.name}"
            numbers.append(number)
            task = Task(entry.name, entry.path, entry.strength, [], clip_strength=entry.clip_strength)
            if task.is_off:
                warnings.append(f"{entry.name} is off: its strength is 0.")
            elif steps:
                if references is not None and not any(map(str.strip, lines)):
                    raise SSRError(f"{where}: write what shall be done to the pictures; that cannot be proposed.")
                prompts, proposed[entry.name] = written_or_proposed(lines, entry.path, where)
                if not proposed[entry.name]:  # a person wrote them
                    warnings.append(unspoken(entry.name, TrainingNotes.read(entry.path).phrase, prompts))
                task = replace(task, conditioning=encode_lines(clip, prompts, where, references))
            tasks.append(task)
        together = combinations_of(clip, combinations, f"{NAME}: combinations", references) if steps else []
        together = [replace(one, numbers=tuple(numbers)) for one in together]
        sampling = Sampling(seed, steps, sampler_name, scheduler, cfg, tuple(negative or ()), TOKENS)
        tell = lambda text: say(cls, text)  # noqa: E731
        stats = collect(model, (*tasks, *together), latent, sampling, tell, clip=clip, pairs=pairs)
        with kept_if_failing(stats):
            lora, report = solve(stats, MergeSettings(rank=AUTO if rank < 0 else rank))
            if polish:
                polished = polished_merge(model, stats, lora, DistillationSettings(polish, seed=seed), tell)
                lora, report = polished.lora, f"{report}\n\nPolished: {polished.report}"
            saved = save_one(lora, save_as, "bfloat16", NAME)[1] if is_saved else ""
            warnings, first = [*filter(None, warnings)], report.partition("\n\n")[0]
            if shown := listed(proposed):
                report = "\n".join([report, *shown])
            tell("\n".join([*warnings, first, saved, "", *shown, *listed_pairs(stats.collections)]))
            report = "\n\n".join(filter(None, [*warnings, report, saved]))
            return io.NodeOutput(*load_into(lora, model, clip, 1.0), lora, report, (*tasks, *together))


def _picker(number: int) -> list[Any]:
    """The three inputs of one LoRA."""
    optional = number > 2
    return [
        picker(number, "A LoRA file to merge.", optional),
        io.Float.Input(
            f"strength_{number}",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.01,
            optional=optional,
            tooltip="How strong this LoRA is, alone and in the merge. 1 means what Load LoRA's 1 means.",
        ),
        io.String.Input(
            f"prompts_{number}",
            default="",
            multiline=True,
            placeholder="prompts for this LoRA, one per line, with its trigger words; empty: proposed from its file",
            dynamic_prompts=False,
            optional=optional,
            tooltip="A few prompts that show what this LoRA is for, one per line, with its trigger words. Empty: "
            "some are proposed from what the file tells of its training, and shown. None are needed with 0 steps.",
        ),
    ]


def _chosen(stack: Any, chosen: dict[str, Any], most: int) -> list[tuple[int, StackedLora, list[str]]]:
    """Each LoRA with its number among the inputs and the lines of its prompts; of a stack `most`, 0 = any number.

    Raises:
        LoraError: too few LoRAs, more than there are prompts for, or LoRAs in both places.
    """
    entries = [(name, chosen.get(f"strength_{number}", 1.0)) for number, name in enumerate(picked(chosen), 1)]
    stacked = read_stack(stack, NAME)
    if stacked and any(name != NONE for name, _ in entries):
        raise LoraError(f"{NAME}: LoRAs are chosen here and in lora_stack; choose {NONE} here, or disconnect it.")
    if most and len(stacked) > most:
        raise LoraError(
            f"{NAME}: lora_stack holds {len(stacked)} LoRAs, and there is room for the prompts of {most}; use "
            "SSR Add LoRA Stack, or set steps to 0 to merge from their weights alone."
        )
    numbered = list(enumerate(stacked, 1)) or [
        (number, read_stack([entry], NAME)[0]) for number, entry in enumerate(entries, 1) if entry[0] != NONE
    ]
    if not numbered:
        raise LoraError(f"{NAME}: there is no LoRA to merge; choose two or more.")
    if len(numbered) == 1 and not stacked:
        raise LoraError(f"{NAME}: only {numbered[0][1].name} is chosen; choose a second LoRA to merge it with.")
    places: dict[str, int] = {}
    for number, (name, _) in enumerate(entries, 1):
        if name != NONE and places.setdefault(name, number) != number:
            raise LoraError(
                f"{NAME}: lora_{places[name]} and lora_{number} are the same file, {name}; choose another, or {NONE}."
            )
    return [(number, lora, str(chosen.get(f"prompts_{number}") or "").splitlines()) for number, lora in numbered]
