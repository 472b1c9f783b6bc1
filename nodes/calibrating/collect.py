"""Collecting: the LoRAs are read, the text encoder and the model sample with each of them, and all is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...ssr_core import (
    Calibration,
    LoraError,
    Requirement,
    Rule,
    SSRError,
    StatisticsError,
    parse_rules,
    weight_calibration,
)
from ...ssr_core.lora.expansion import RANK
from ...ssr_core.measure.collector import CONTEXT
from ...ssr_core.solve.likeness import alike
from ..reading.combination import Combination, parted, without_off
from ..reading.loaded_lora import LoadedLora
from ..reading.patches import read_tasks
from ..reading.task import Task
from ..reading.training_notes import TRIGGER
from ..wording.trigger_words import namesakes, phrases, unspoken
from .case_prompts import PAIRS, CasePrompts, cases_of, without_pictures
from .circumstances import Circumstances
from .diffusion_model import calibrate
from .memory import size
from .metadata import describe
from .progress import show_steps
from .prompt import texts
from .runs import REFINE, Sampling, plan
from .stats import Sampled, Stats
from .text_encoder import calibrate_text, spelt_out


def collect(
    model: Any,
    tasks: Sequence[Task | Combination],
    latent: dict[str, Any],
    sampling: Sampling,
    tell: Callable[[str], None],
    context: int = CONTEXT,
    refine: int = REFINE,
    clip: Any = None,
    expand_rank: int = RANK,
    before: Any = None,
    like: Stats | None = None,
    pairs: int = PAIRS,
    layers: str = "",
) -> Stats:
    """Sample each case's prompts with its LoRAs active, and measure. With 0 steps nothing is run or measured.

    Args:
        tell: is told what happens, in words.
        before: the model that samples the steps before the first that is looked at.
        pairs: where no combination is asked for, how many prompts of each pair are made of their own.
        layers: rules for layers; what they drop is neither read nor measured.
        like: earlier statistics of the same LoRAs; these are then measured in the same subspaces, and add up with them.

    Raises:
        SSRError: settings that cannot be meant, or LoRAs and models that do not fit.
        StatisticsError: `like` is of other LoRAs or of another model.
    """
    started = time.perf_counter()
    tasks, asked, off = without_off(*parted(tasks))
    if not sampling.steps:
        return _unmeasured(model, tasks, sampling, tell, clip, expand_rank, like, layers, off)
    _check(tasks, sampling, before)
    cases = cases_of(tasks, asked, pairs)
    loras = _read(tasks, model, clip, expand_rank, _drops(layers))
    blind = list(filter(None, [without_pictures(cases)]))
    if warnings := [*blind, *(line for lora in loras for line in lora.account.warnings(lora.task.name))]:
        logging.warning("SSR Collect Stats: %s", " ".join(warnings))
        tell(" ".join(warnings))
    collection = Circumstances.of(model, tasks, cases, sampling, context, refine, expand_rank, layers)
    if like is not None:
        _check_likeness(like, collection, clip)
    earlier = None if like is None else like.calibration.ordered_as([lora.lora for lora in loras])
    encoded, text = calibrate_text(clip, loras, cases, sampling.negative, None if like is None else like.text)
    runs = plan(encoded, sampling, 0 if like is not None else context, refine)
    calibration, silent, notes = calibrate(
        *(model, loras, runs, latent, 0 if like is not None else context),
        on_step=show_steps(model, sum(run.steps + run.unseen for run in runs)),
        on_run=lambda number: tell(f"{number + 1} of {len(runs)}: {runs[number].kind.value}, {runs[number].case.name}"),
        on_need=lambda need, groups: tell(_needs(need, model.load_device, groups)),
        before=before,
        earlier=earlier,
    )
    tell(
        "\n".join([_summary(calibration, cases, time.perf_counter() - started), *blind, *_warnings(calibration, loras)])
    )
    sampled = (Sampled.of(runs, latent),)
    return _stats(model, loras, calibration, text, clip, silent, collection, sampled, (*off, *blind, *notes))


def _unmeasured(
    model: Any,
    tasks: Sequence[Task],
    sampling: Sampling,
    tell: Callable[[str], None],
    clip: Any,
    expand_rank: int,
    like: Stats | None,
    layers: str,
    off: Sequence[str],
) -> Stats:
    """What the LoRAs' weights alone let one expect; prompts and combinations are not looked at."""
    _check_any(tasks)
    if like is not None:
        raise SSRError("Statistics are connected to like, but with 0 steps nothing is measured; disconnect them.")
    loras = _read(tasks, model, clip, expand_rank, _drops(layers))
    collection = Circumstances.of(model, tasks, cases_of(tasks, (), 0), sampling, 0, 0, expand_rank, layers)
    of_text = [lora.text_lora for lora in loras] if clip is not None else []
    text = weight_calibration(of_text) if any(lora.updates for lora in of_text) else None
    calibration = weight_calibration([lora.lora for lora in loras])
    tell(f"{len(loras)} LoRAs, {len(calibration.subspaces)} sites. 0 steps: only their weights are known.")
    text = None if text is None else spelt_out(text)
    return _stats(model, loras, calibration, text, clip, (), collection, (), off)


def _stats(
    model: Any,
    loras: Sequence[LoadedLora],
    calibration: Calibration,
    text: Calibration | None,
    clip: Any,
    silent: tuple[str, ...],
    collection: Circumstances,
    sampled: tuple[Sampled, ...],
    notes: Sequence[str],
) -> Stats:
    of_text = (None,) * len(loras) if text is None else text.loras
    shared = (lora.sharing(own, other) for lora, own, other in zip(loras, calibration.loras, of_text, strict=True))
    return Stats(
        *(tuple(shared), calibration, text, clip is not None, silent),
        *(describe(model, loras, [collection]), (collection,), sampled, tuple(notes)),
    )


def _check_any(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise LoraError("There is no LoRA to merge; add some with SSR Add LoRA.")


def _check(tasks: Sequence[Task], sampling: Sampling, before: Any) -> None:
    """Raise SSRError for what cannot be meant, before any LoRA is read."""
    _check_any(tasks)
    files = [task.lora for task in tasks if isinstance(task.lora, Path)]
    if twice := [file.name for number, file in enumerate(files) if file in files[:number]]:
        raise LoraError(f"{twice[0]} is added twice; add it once, at the strength it shall have.")
    if bare := [task.name for task in tasks if not task.conditioning]:
        raise LoraError(
            f"{', '.join(bare)}: there is no calibration prompt; connect SSR Prompts to SSR Add LoRA. Or set steps "
            "to 0, to merge from the LoRAs' weights alone."
        )
    if sampling.cfg > 1 and not sampling.negative:
        raise SSRError("cfg needs a negative prompt; connect one, or set cfg to 1.")
    if sampling.seen < 1:
        raise SSRError(
            f"There is no step from start_at_step {sampling.start} to end_at_step {sampling.stop} "
            f"among {sampling.steps} steps."
        )
    if before is not None and not sampling.start:
        raise SSRError(
            "model_before is connected, but start_at_step is 0, so it has no step to sample. Set "
            "start_at_step to where it hands over."
        )


def _drops(layers: str) -> tuple[Rule, ...]:
    """Raise SSRError for rules that belong to SSR Solve."""
    rules = parse_rules(layers)
    if stacked := [str(rule) for rule in rules if rule.treatment == "stack"]:
        raise SSRError(f"{stacked[0]!r} is a rule for SSR Solve; layers of SSR Collect Stats takes drop and keep only.")
    return rules


def _read(tasks: Sequence[Task], model: Any, clip: Any, expand_rank: int, rules: Sequence[Rule]) -> list[LoadedLora]:
    loras = read_tasks(tasks, model, clip, expand_rank, rules)
    if not any(lora.model.updates for lora in loras):
        raise LoraError(
            f"None of {', '.join(task.name for task in tasks)} changes a layer of the model that can be routed; at "
            "least one must. Load them with Load LoRA instead."
        )
    return loras


def _needs(need: Requirement, device: torch.device, groups: int) -> str:
    there = f"{size(need.device)} on {device} beside the model" if device.type != "cpu" else ""
    if groups > 1:
        text = f"Refining goes through the layers in {groups} parts, one after the other, of {there} each."
    else:
        text = f"Collecting takes about {there}{', ' if there else ''}{size(need.host)} of memory."
    logging.info("SSR Collect Stats: %s", text)
    return text


def _summary(calibration: Calibration, cases: Sequence[CasePrompts], seconds: float) -> str:
    prompts, loras = sum(len(one.conditioning) for one in cases), len(calibration.loras)
    joint = sum(len(one.conditioning) for one in cases[loras:])
    made = " (made of the LoRAs' own)" if any(one.is_glued for one in cases) else ""
    together = f", {joint} of them for several LoRAs at once{made}" if joint else ""
    return (
        f"{loras} LoRAs, {len(calibration.subspaces)} sites. "
        f"{prompts} prompts{together}, {min(calibration.tokens, default=0):,} tokens a LoRA. {seconds:.1f} s."
    )


def _warnings(calibration: Calibration, loras: Sequence[LoadedLora]) -> list[str]:
    """Of LoRAs that nothing can tell apart, as they are one and the same, or that their prompts do not call."""
    names, told = calibration.names, [texts(lora.task.conditioning) for lora in loras]
    called = [phrases(lora.source, prompts) for lora, prompts in zip(loras, told, strict=True)]
    found = [one.advice(names) for one in alike(calibration.subspaces)] + list(namesakes(names, called))
    for lora, prompts in zip(loras, told, strict=True):
        found += filter(None, [unspoken(lora.task.name, str(lora.source.get(TRIGGER) or ""), prompts)])
    for line in found:
        logging.warning("SSR Collect Stats: %s", line)
    return found


def _check_likeness(like: Stats, collection: Circumstances, clip: Any) -> None:
    """Raise StatisticsError if what is collected now could not be added to `like` afterwards."""
    if like.model != collection.model:
        raise StatisticsError(
            f"The statistics at like were collected on {like.model}, but this model is {collection.model}; "
            "statistics of different models cannot be added."
        )
    if like.with_clip != (clip is not None):
        remedy = "connect clip here, too" if like.with_clip else "disconnect clip"
        raise StatisticsError(
            f"The statistics at like were collected with{'' if like.with_clip else 'out'} clip; {remedy}, or they "
            "cannot be added."
        )
