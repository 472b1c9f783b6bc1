"""Comparisons: workflows that merge, and draw the same pictures with the plain stack beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import bases
from .bases import Base
from .graph import Group, Node, note
from .parts import (
    AMBER,
    ANNA,
    ANNA_INKWASH,
    BERT,
    BLUE,
    COAT,
    GREEN,
    GREY,
    INKWASH,
    MOCHI,
    MOCHI_SEPIA,
    PURPLE,
    ROBO,
    ROBO_SEPIA,
    SEPIA,
    TEAL,
    YOURS,
    Joint,
    Lora,
    Shot,
    chain,
    collect,
    merging,
    pictures,
    report,
    save,
    size,
    solve,
    stack,
    stack_with_clip,
    with_note,
)

SWITCH = (
    "The group below loads the same LoRAs one after the other, with the same prompts and seeds. It is bypassed: select "
    "its nodes (Ctrl+drag around them) and press Ctrl+B to switch it on."
)


def two_characters_flux() -> list[Group]:
    return merge_and_compare(
        bases.flux(),
        (replace(ANNA, what="character one", file="character_one.safetensors"), BERT),
        (
            Shot("character one", "photo of anna1 woman riding a bicycle in the rain"),
            Shot(
                "both",
                "photo of anna1 woman and bert2 man playing chess at a table, anna1 woman on the left, "
                "bert2 man on the right",
            ),
        ),
        "two-characters",
        start=(
            "Two LoRAs of people or characters become one that draws either of them with its own features. Choose "
            "your models here and your two LoRAs at the right.",
            "Calibration costs about as much as 200 sampling steps: two LoRAs, four prompts each, eight steps, three "
            "times over.",
        ),
        yours=YOURS.format(words="`anna1 woman` and `bert2 man` stand for yours")
        + " Keep the guidance the same in all FluxGuidance nodes.",
        expect="Expect each character alone to look like its own LoRA. The merge does not decide who stands where, so "
        "in a picture of both, features can still wander.",
    )


def style_and_character_sdxl() -> list[Group]:
    return merge_and_compare(
        bases.sdxl(),
        (replace(INKWASH), ANNA),
        (Shot("style and character", "inkwash style, anna1 woman standing on a bridge in the rain"),),
        "style-and-character",
        joints=(ANNA_INKWASH,),
        start=(
            "A style LoRA and a character LoRA become one that does either, and both at once. Choose your SDXL "
            "checkpoint here and your LoRAs at the right.",
            "SDXL renders with a negative prompt and cfg 7, so calibration does, too: both are connected to SSR "
            "Collect Stats. So is the text encoder, as LoRAs for SDXL often change it.",
        ),
        yours=YOURS.format(words="`inkwash style` and `anna1 woman` stand for yours")
        + "\n\n**SSR Add Combination** has prompts that ask for both, with the trigger words of each. Without them a "
        "merge learns that one is silent where the other speaks, and forgets to do both.",
        expect="Expect the face without the style, the style without the face, and both where both are asked for. SSR "
        "Apply has CLIP connected, since the merge changes the text encoder where the LoRAs do.",
        with_clip=True,
    )


def three_loras_zimage() -> list[Group]:
    return merge_and_compare(
        bases.z_image(),
        (ANNA, INKWASH, COAT),
        (
            Shot("character", "photo of anna1 woman standing on a bridge in the rain"),
            Shot("all three", "anna1 woman wearing a krndress coat in a market street, inkwash style"),
        ),
        "three-loras",
        start=(
            "Three LoRAs become one for Z-Image Turbo. Choose your LoRAs at the right.",
            "A turbo model is calibrated with its own steps, sampler and shift, so SSR Collect Stats has the same 8 "
            "steps as the KSampler. Change both together.",
        ),
        yours=YOURS.format(words="`anna1 woman`, `inkwash style` and `krndress coat` stand for yours"),
        expect="Expect the first prompt to show the character without the style or the coat. How well all three go "
        "together depends on the LoRAs; lower a strength in SSR Solve if one of them takes over.",
    )


def speed_lora_in_base_qwen() -> list[Group]:
    return merge_and_compare(
        bases.qwen_image_with_speed_lora(),
        (ANNA, INKWASH),
        (Shot("style and character", "anna1 woman standing on a bridge in the rain, inkwash style"),),
        "with-speed-lora",
        start=(
            "A Lightning, Turbo or LCM LoRA makes a model quick; it is no subject to be told apart from others. So it "
            "is not merged: it is loaded before SSR Collect Stats and stays in the base.",
            "Load it in the same way wherever you use the merge, here in both branches, and keep its steps and its cfg "
            "of 1 in SSR Collect Stats, too.",
        ),
        yours=YOURS.format(words="`anna1 woman` and `inkwash style` stand for yours"),
        expect="Expect the merge to keep the look of the quick model. It holds for the base with the speed LoRA on it; "
        "without it the merge still loads, but nothing was measured there.",
    )


def tiny_demo() -> list[Group]:
    groups = merge_and_compare(
        bases.tiny(),
        (MOCHI, ROBO, SEPIA),
        (
            Shot("Mochi", "mochi the cat on the beach", 3),
            Shot("Robo", "robo the robot on the moon", 6),
            Shot("sepia", "a red house on grass, sepia style", 2),
            Shot("Mochi in sepia", "mochi the cat on the beach, sepia style", 3),
        ),
        "tiny-demo",
        joints=(MOCHI_SEPIA, ROBO_SEPIA),
        start=(
            "This runs as it is, on any CPU, in the server of the demo (`python3 run.py demo --serve`), which has the "
            "small model and its three LoRAs. Press **Run**: the LoRAs are merged into one, and the merge draws a "
            "picture for each of them, and one that asks for two at once.",
            "Change the prompts, the strengths or the settings of SSR Solve and run again. The model knows only the "
            "words of its demo: eight things, eight colours, six places.",
        ),
        yours="Four prompts or more for each LoRA. **SSR Add Combination** is for prompts that ask for two at once; "
        "*loras* says which, by their numbers in the chain.",
        expect="The merge should draw each subject much as its LoRA does alone, and Mochi in sepia where both are "
        "asked for; in the stack all three LoRAs take part in every picture. Change a seed in both samplers of a row.",
        batch=2,
        bypassed=False,
    )
    return _with_polish(groups, "tiny-demo")


def _with_polish(groups: list[Group], name: str, **values: Any) -> list[Group]:
    """With a group behind the merge, in which it is polished and saved again."""
    nodes = {
        node.kind: node for group in groups for _, column in group.columns for node in column if isinstance(node, Node)
    }
    model, stats = (nodes["SSRCollectStats"].inputs["model"], nodes["SSRCollectStats"]["stats"])
    inputs = {"model": model, "stats": stats, "lora": nodes["SSRSolve"]["lora"]}
    polishing = Node("SSRPolish", None, inputs, values, 560, "merge", room=56)
    about = note(
        "Polishing",
        "**SSR Polish** trains the merge for a minute, with the LoRAs as its teachers, and saves it beside the other. "
        "The file is no larger than before. "
        "The chart shows how far its error falls, for each LoRA and for two at once.",
    )
    kept = [report(polishing["report"], "Before and after", 300), save(polishing["lora"], f"{name}-polished"), about]
    polish = Group("5 Polish", TEAL, [(460, [polishing]), (460, kept)])
    *others, compare = groups
    return [*others, polish, replace(compare, title=compare.title.replace("5", "6", 1))]


def merge_and_compare(
    base: Base,
    loras: Sequence[Lora],
    shots: Sequence[Shot],
    name: str,
    *,
    joints: Sequence[Joint] = (),
    start: Sequence[str],
    yours: str | None,
    expect: str,
    with_clip: bool = False,
    batch: int = 1,
    bypassed: bool = True,
) -> list[Group]:
    """Five groups: models, LoRAs, the merge, pictures of it, and the same pictures of the plain stack."""
    columns, tasks = chain(loras, base, joints)
    extra = {}
    negative = None
    if base.negative is not None:
        values = {"text": base.negative}
        negative = Node("SSRPrompts", "Negative prompt", {"clip": base.clip}, values, 120)
        extra = {"negative": negative["calibration"], "clip": base.clip}
    latent, collecting = collect(base, tasks, extra, batch)
    solving = solve(collecting["stats"])
    picture_size = size(base)
    applied_inputs = {"model": base.model, "lora": solving["lora"]}
    applied = Node("SSRApply", None, applied_inputs | ({"clip": base.clip} if with_clip else {}), colour="merge")
    clip = applied["clip"] if with_clip else base.clip
    drawn, texts = pictures(*(base, shots, applied["model"], picture_size["LATENT"], clip), prefix=f"{name}/merged")
    if with_clip:
        stacked, model, stack_clip = stack_with_clip(loras, base)
        twins, _ = pictures(base, shots, model, picture_size["LATENT"], stack_clip, "plain stack")
    else:
        stacked, model = stack(loras, base)
        twins, _ = pictures(base, shots, model, picture_size["LATENT"], kind="plain stack", texts=texts)
    compare = note("Compare", *((SWITCH,) if bypassed else ()), expect)
    use = Group("4 Use it", PURPLE, [(270, [applied, picture_size, compare]), (300, drawn.texts)])
    use.columns = [*use.columns, (270, drawn.samplers), (390, drawn.images)]
    return [
        Group("1 Models", BLUE, [(330, [note("Start here", *start), *base.nodes])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, yours)),
        Group(
            "3 Merge",
            AMBER,
            [
                (340, [latent, *([negative] if negative else []), collecting, solving]),
                (460, [report(solving["report"]), save(solving["lora"], name), merging()]),
            ],
        ),
        use,
        Group(
            "5 Compare with the plain stack" + (" (bypassed)" if bypassed else ""),
            GREY,
            [(270, stacked), (300, twins.texts), (270, twins.samplers), (390, twins.images)],
            under=use,
            bypassed=bypassed,
        ),
    ]
