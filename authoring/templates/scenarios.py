"""Scenarios: workflows for one purpose each, from the first steps to a file to share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import bases
from .bases import Base
from .graph import GAP, TITLE, Group, Node, Source, note, note_height
from .parts import (
    AMBER,
    ANNA,
    ANNA_INKWASH,
    BLUE,
    COAT,
    GREEN,
    GREY,
    INKWASH,
    PURPLE,
    TEAL,
    YOURS,
    Joint,
    Lora,
    Shot,
    chain,
    collect,
    pictures,
    report,
    save,
    size,
    solve,
    stack,
    with_note,
)

EXAMPLES = YOURS.format(words="`anna1 woman` and so on stand for yours")

BRIDGE = Shot("character and style", "anna1 woman standing on a bridge in the rain, inkwash style")


def first_steps(
    base: Base | None = None,
    loras: tuple[Lora, Lora] = (INKWASH, ANNA),
    positive: str = "inkwash style, anna1 woman standing on a bridge in the rain",
) -> list[Group]:
    written = base is not None  # for everybody's own LoRAs nobody's examples are right
    base = base or bases.sdxl()
    latent = size(base)
    prompt = Node("CLIPTextEncode", "Prompt", values={"text": positive}, height=140, colour="fill in")
    negative = Node("CLIPTextEncode", "Negative prompt", {"clip": base.clip}, {"text": base.negative or ""}, 120)
    quick = Node(
        "SSRQuickMerge",
        None,
        {
            **{"model": base.model, "clip": base.clip, "latent": latent["LATENT"]},
            "negative": negative["CONDITIONING"],
        },
        {
            **{f"lora_{number}": lora.file for number, lora in enumerate(loras, 1)},
            **{f"prompts_{number}": "\n".join(lora.prompts) for number, lora in enumerate(loras, 1) if written},
            **{key: base.sampling[key] for key in ("cfg", "sampler_name", "scheduler")},
        },
        colour="fill in",
        room=120,
    )
    prompt.inputs = {"clip": quick["clip"]}
    sockets = {"model": quick["model"], "positive": prompt["CONDITIONING"], "latent_image": latent["LATENT"]}
    sampler = Node("KSampler", None, {**sockets, "negative": negative["CONDITIONING"]}, {"seed": 1, **base.sampling})
    decoded = Node("VAEDecode", None, {"samples": sampler["LATENT"], "vae": base.vae})
    image = Node(
        *("SaveImage", "Picture", {"images": decoded["IMAGE"]}, {"filename_prefix": "first-steps/merged"}), height=420
    )
    start = note(
        "Start here",
        "1. Choose an SDXL checkpoint. Red frames go when all files are chosen. (For another family use its "
        "loaders, and its latent, sampler, cfg and negative prompt in **SSR Quick Merge** and KSampler.)",
        "2. In **SSR Quick Merge** choose two to four LoRAs and write a few prompts for each, **with its trigger "
        "words**: `anna1 woman in a garden`, `anna1 woman, close-up, rain`. Left empty, some are proposed from what "
        "the files tell.",
        "3. Write a prompt for the picture and press **Run**.",
        "The first run measures; later ones only draw. **Load LoRA** lists the saved file.",
    )
    expect = note(
        "What to expect",
        "The report says how much of each LoRA is left: 0 is the LoRA as it is alone, 1 as if it were missing.",
        "The prompt asks for both LoRAs at once. That comes out better with prompts of your own for both: four lines "
        "in *combinations*, such as `1+2: inkwash style, anna1 woman in a park`. Left empty, some are made of the "
        "LoRAs' own.",
        "For more control open the template *two-characters-flux* or *style-and-character-sdxl*: there each step is a "
        "node of its own, and a comparison is included.",
    )
    use = Group("3 Use it", PURPLE, [(330, [prompt, sampler, decoded]), (540, [image])])
    kept = [save(quick["lora"], "first-steps"), expect]
    return [
        Group("1 Model", BLUE, [(330, [start, *base.nodes, latent, negative])]),
        Group("2 Merge", GREEN, [(420, [quick])]),
        use,
        Group("4 Keep it", AMBER, [(330, kept), (540, [report(quick["report"], height=420)])], use, closely=True),
    ]


def polish_and_save(
    base: Base | None = None,
    loras: Sequence[Lora] = (INKWASH, ANNA),
    joint: Joint = ANNA_INKWASH,
    shot: Shot = BRIDGE,
) -> list[Group]:
    base = base or bases.z_image()
    columns, tasks = chain(loras, base, [joint])
    latent, collecting = collect(base, tasks)
    solving = solve(collecting["stats"], rank=32)
    inputs = {"model": base.model, "stats": collecting["stats"], "lora": solving["lora"]}
    polishing = Node("SSRPolish", None, inputs, height=560, room=56, colour="merge")
    picture_size = size(base)
    applied = Node("SSRApply", None, {"model": base.model, "lora": polishing["lora"]}, colour="merge")
    drawn, _ = pictures(base, [shot], applied["model"], picture_size["LATENT"], prefix="polished/picture")
    start = note(
        "Start here",
        "SSR Solve needs no training, and leaves an error. **SSR Polish** takes most of the rest off: it trains the "
        "merge for some steps, with the LoRAs themselves as its teachers. It needs no pictures.",
        "Choose your models here and your LoRAs at the right.",
    )
    about = note(
        "Polishing",
        "It takes the time of some thousand sampling steps and several times the memory of sampling: a card on which a "
        "LoRA can be trained for this model will do. With 25 steps most of it is done.",
        "Set *rank* in **SSR Solve** first: the file keeps that size. The chart shows the error on noise that it does "
        "not learn from; what is kept is where that was the smallest.",
    )
    keep = save(polishing["lora"], "polished")
    use = Group("5 Use it", PURPLE, [(270, [applied, picture_size, keep]), (300, drawn.texts)])
    use.columns = [*use.columns, (270, drawn.samplers), (390, drawn.images)]
    return [
        Group("1 Models", BLUE, [(330, [start, *base.nodes])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, EXAMPLES)),
        Group("3 Merge", AMBER, [(340, [latent, collecting, solving]), (460, [report(solving["report"])])]),
        Group("4 Polish", TEAL, [(460, [polishing]), (400, [report(polishing["report"], "Before and after"), about])]),
        use,
    ]


def diagnose_only(base: Base | None = None, loras: Sequence[Lora] = (ANNA, INKWASH, COAT)) -> list[Group]:
    base = base or bases.flux()
    columns, tasks = chain(loras, base)
    latent, collecting = collect(base, tasks)
    collecting.values = {**collecting.values, "refine": 0}
    found = Node("SSRReport", None, {"stats": collecting["stats"]}, height=520, colour="merge")
    start = note(
        "Start here",
        "Do these LoRAs get in each other's way, and where? This graph measures and tells; it merges nothing.",
        "Choose your models and LoRAs. *refine* is 0 in SSR Collect Stats, since only a merge needs it: that saves "
        "most of the time.",
    )
    reading = note(
        "Reading the report",
        "For each LoRA: what a plain stack would lose of it, and what the merge would. 0 is the LoRA as it is alone, 1 "
        "as if it were missing.",
        "Where even the stack loses next to nothing, load the LoRAs one after the other and save yourself the merge. "
        "Where both lose much, the prompts make the model see the same things: let them differ more, or drop a LoRA.",
    )
    return [
        Group("1 Models", BLUE, [(330, [start, *base.nodes[:2]])]),
        Group(
            "2 LoRAs and prompts",
            GREEN,
            with_note(columns, EXAMPLES),
        ),
        Group("3 Measure", AMBER, [(340, [latent, collecting])]),
        Group(
            "4 Read", PURPLE, [(560, [found]), (460, [report(found["report"], "The report in words", 520), reading])]
        ),
    ]


def retune_saved_stats(
    base: Base | None = None,
    loras: Sequence[Lora] = (ANNA, INKWASH),
    shot: Shot = BRIDGE,
) -> list[Group]:
    base = base or bases.z_image()
    columns, tasks = chain(loras, base)
    latent, collecting = collect(base, tasks)
    saving = Node(
        *("SSRSaveStats", None, {"stats": collecting["stats"]}, {"filename_prefix": "my-loras"}), colour="merge"
    )
    loaded = Node(
        *("SSRLoadStats", None, {"model": base.model, "tasks": tasks}),
        {"file": "my-loras_00001_.safetensors [output]"},
        colour="fill in",
    )
    solving = solve(loaded["stats"], rank=32, strengths="1, 0.8", layers="keep all\nstack modulation")
    picture_size = size(base)
    applied = Node("SSRApply", None, {"model": base.model, "lora": solving["lora"]}, colour="merge")
    drawn, _ = pictures(base, (shot,), applied["model"], picture_size["LATENT"], prefix="retuned/merged")
    start = note(
        "Start here",
        "Measuring takes minutes, solving seconds. Saved statistics bring you back to the second part days later, with "
        "other strengths, another rank, other layers.",
        "First time: the group at the bottom is bypassed; select its nodes, press Ctrl+B, run, then bypass it again, "
        "press R and choose the file in SSR Load Stats.",
    )
    knobs = note(
        "What to change",
        "*strengths*: one number per LoRA. *rank*: the size of the file; -1 finds one. *layers*: rules such as "
        "`drop mlp` or `stack single_blocks.0-9`. *ridge*: raise it after short calibrations.",
        "The LoRA files must be the same, in any order; their prompts are not read again.",
    )
    read = Group(
        "3 Solve again",
        AMBER,
        [(340, [loaded, solving]), (460, [report(solving["report"]), save(solving["lora"], "retuned"), knobs])],
    )
    return [
        Group("1 Models", BLUE, [(330, [start, *base.nodes])]),
        Group(
            "2 LoRAs and prompts",
            GREEN,
            with_note(columns, EXAMPLES),
        ),
        read,
        Group(
            "4 Use it",
            PURPLE,
            [
                *((270, [applied, picture_size]), (300, drawn.texts), (270, drawn.samplers)),
                (390, drawn.images),
            ],
        ),
        Group("5 Measure once (bypassed)", GREY, [(340, [latent, collecting]), (460, [saving])], read, bypassed=True),
    ]


def save_for_sharing(
    base: Base | None = None,
    loras: Sequence[Lora] = (ANNA, INKWASH),
    prompts: Sequence[str] = (
        "1: photo of anna1 woman riding a bicycle",
        "2: a lighthouse in a storm, inkwash style",
        "1+2: anna1 woman standing on a bridge in the rain, inkwash style",
    ),
) -> list[Group]:
    base = base or bases.z_image()
    columns, tasks = chain(loras, base)
    latent, collecting = collect(base, tasks)
    solving = solve(collecting["stats"], rank=-1)
    compare = Node(
        "SSRCompare",
        "SSR Compare: the sheet to show with the file",
        {
            **{"model": base.model, "clip": base.clip, "vae": base.vae, "tasks": tasks, "lora": solving["lora"]},
            "latent": latent["LATENT"],
        },
        {"prompts": "\n".join(prompts), "seed": 1001, **base.sampling},
        700,
        "merge",
    )
    image = Node("SaveImage", "Save the sheet", {"images": compare["grid"]}, {"filename_prefix": "sharing/sheet"}, 300)
    start = note(
        "Start here",
        "One small file that others can load with plain Load LoRA, a sheet that shows what it does, and a report to "
        "paste beside it.",
        "Ask the makers of the LoRAs, or read their licences, before you publish a merge of them.",
    )
    inside = note(
        "What is in the file",
        "Names, sha256 and strengths of the LoRAs, their trigger words, the base, the settings and the report. Set "
        "*rank* of SSR Solve to -1 for the smallest file that loses less than 1 % of the effect in each layer.",
        "bfloat16 loads everywhere; float16 is for tools that want it.",
    )
    return [
        Group("1 Models", BLUE, [(330, [start, *base.nodes])]),
        Group(
            "2 LoRAs and prompts",
            GREEN,
            with_note(columns, EXAMPLES),
        ),
        Group("3 Merge", AMBER, [(340, [latent, collecting, solving])]),
        Group(
            "4 Share",
            PURPLE,
            [
                (460, [save(solving["lora"], "anna1-inkwash"), report(solving["report"]), inside]),
                (620, [compare]),
                (390, [image]),
            ],
        ),
    ]


def wan_two_experts() -> list[Group]:
    high, low = bases.wan()
    loras = (ANNA, INKWASH)
    prompts, high_adders = chain([_for(lora, "high") for lora in loras], high)[0]
    low_adders: list[Node] = []
    tasks: dict[str, Source] = {}
    for lora, prompt in zip(loras, prompts, strict=True):
        prompt.title = f"SSR Prompts: {lora.what}"  # both experts' LoRAs are for the same
        expert = _for(lora, "low")
        values = {"lora_name": expert.file, "strength": expert.strength}
        inputs = {"calibration": prompt["calibration"], **tasks}
        low_adders.append(Node("SSRAddLoRA", f"SSR Add LoRA: {expert.what}", inputs, values, 166, "fill in"))
        tasks = {"tasks": low_adders[-1]["tasks"]}
    negative = Node("SSRPrompts", "Negative prompt", {"clip": high.clip}, {"text": high.negative}, 120)
    more = {"negative": negative["calibration"]}
    latent, high_collect = collect(high, high_adders[-1]["tasks"], more)
    high_collect.title = "SSR Collect Stats: high noise"
    high_solve = solve(high_collect["stats"])
    high_apply = Node("SSRApply", "SSR Apply: high noise", {"model": high.model, "lora": high_solve["lora"]})
    low_collect = collect(low, tasks["tasks"], {"model_before": high_apply["model"], **more})[1]
    low_collect.inputs = {**low_collect.inputs, "latent": latent["LATENT"]}
    low_collect.title = "SSR Collect Stats: low noise"
    low_solve = solve(low_collect["stats"])
    low_apply = Node("SSRApply", "SSR Apply: low noise", {"model": low.model, "lora": low_solve["lora"]})
    high_apply.colour = low_apply.colour = "merge"
    video = Node(high.latent, "Size of the video", values={**high.size, "length": 81})
    text = "anna1 woman walks through a market street in the rain, inkwash style"
    prompt = Node("CLIPTextEncode", "Prompt", {"clip": high.clip}, {"text": text}, 140, "fill in")
    shared = {"positive": prompt["CONDITIONING"], "negative": negative["calibration"]}
    start_values = {"add_noise": "enable", "noise_seed": 1, **high.sampling, "start_at_step": 0, "end_at_step": 10}
    first = Node(
        *("KSamplerAdvanced", "High noise: steps 0 to 10"),
        {"model": high_apply["model"], **shared, "latent_image": video["LATENT"]},
        {**start_values, "return_with_leftover_noise": "enable"},
    )
    end_values = {"add_noise": "disable", "noise_seed": 0, **high.sampling, "start_at_step": 10, "end_at_step": 10000}
    second = Node(
        *("KSamplerAdvanced", "Low noise: steps 10 to 20"),
        {"model": low_apply["model"], **shared, "latent_image": first["LATENT"]},
        {**end_values, "return_with_leftover_noise": "disable"},
    )
    decoded = Node("VAEDecode", None, {"samples": second["LATENT"], "vae": high.vae})
    shown = Node(
        *("SaveAnimatedWEBP", "Video", {"images": decoded["IMAGE"]}),
        {"filename_prefix": "wan22/merged", "fps": 16, "lossless": False},
        480,
    )
    start = note(
        "Start here",
        "Wan 2.2 is two models, one for the noisy half and one for the rest, and a LoRA for it is two files. Merge "
        "each half by itself.",
        "Choose the files for the high-noise expert in the upper two nodes and those for the low-noise expert below.",
    )
    handing = note(
        "Handing over",
        "Rendering takes 20 steps and hands over at 10; calibration takes 8 and hands over at 4. Keep the two in the "
        "same proportion: *end_at_step* of the high-noise node and *start_at_step* of the low-noise node.",
        "The low-noise node gets the merged high-noise model as *model_before*, so it sees what that will hand it. 17 "
        "frames are enough to measure.",
    )
    yours = note("Your LoRAs", EXAMPLES)
    return [
        Group("1 Models", BLUE, [(330, [start, *high.nodes])]),
        Group(
            "2 LoRAs and prompts",
            GREEN,
            [
                (
                    400,
                    [
                        yours,
                        *prompts,
                    ],
                ),
                (360, [note_height(yours, 400) + TITLE + GAP, *high_adders, *low_adders]),
            ],
        ),
        Group(
            "3 Merge both experts",
            AMBER,
            [
                (340, [latent, high_collect, high_solve]),
                (340, [negative, low_collect, low_solve]),
                (
                    460,
                    [
                        report(high_solve["report"], "Report: high noise", 250),
                        save(high_solve["lora"], "wan22-high-noise"),
                        report(low_solve["report"], "Report: low noise", 250),
                        save(low_solve["lora"], "wan22-low-noise"),
                        handing,
                    ],
                ),
            ],
        ),
        Group(
            "4 Use it",
            PURPLE,
            [(300, [high_apply, low_apply, video, prompt]), (300, [first, second, decoded]), (440, [shown])],
        ),
    ]


def _for(lora: Lora, noise: str) -> Lora:
    stem = lora.file.removesuffix(".safetensors")
    return replace(lora, what=f"{lora.what}, {noise} noise", file=f"{stem}_{noise}_noise.safetensors")


def keep_your_sliders(
    base: Base | None = None, loras: Sequence[Lora] = (ANNA, INKWASH), shot: Shot = BRIDGE, prefix: str = "split"
) -> list[Group]:
    base = base or bases.z_image()
    columns, tasks = chain(loras, base)
    latent, collecting = collect(base, tasks)
    splitting = Node(
        "SSRSplit", None, {"stats": collecting["stats"]}, {"filename_prefix": prefix}, room=56, colour="merge"
    )
    parts, model = stack(
        [
            replace(lora, file=f"{prefix}_{lora.file.removesuffix('.safetensors')}_00001_.safetensors", strength=1.0)
            for lora in loras
        ],
        base,
    )
    picture_size = size(base)
    drawn, _ = pictures(base, (shot,), model, picture_size["LATENT"], prefix="sliders/parts")
    start = note(
        "Start here",
        "**SSR Split** saves the merge as one cleaned LoRA for each of yours. They no longer disturb each other, and "
        "each keeps its own strength, mask and schedule, in any tool.",
        "Press **Run**: the files appear under output/loras. Then press R, select the nodes of the group at the right "
        "and press Ctrl+B to switch it on.",
    )
    sliders = note(
        "Sliders",
        "At strength 1 the files together are the merge. Turn one down to have less of it, or leave it out: the other "
        "is then nearly what its LoRA is by itself.",
        "Where you need no sliders, one file of **SSR Solve** is smaller and runs faster.",
    )
    return [
        Group("1 Models", BLUE, [(330, [start, *base.nodes])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, EXAMPLES)),
        Group(
            "3 Split", AMBER, [(340, [latent, collecting, splitting]), (460, [report(splitting["report"]), sliders])]
        ),
        Group(
            "4 Use them (bypassed)",
            PURPLE,
            [(270, [*parts, picture_size]), (300, drawn.texts), (270, drawn.samplers), (390, drawn.images)],
            bypassed=True,
        ),
    ]


def bake_into_checkpoint() -> list[Group]:
    base, loras = bases.sdxl(), (INKWASH, ANNA)
    columns, tasks = chain(loras, base, [ANNA_INKWASH])
    negative = Node("SSRPrompts", "Negative prompt", {"clip": base.clip}, {"text": base.negative}, 120)
    latent, collecting = collect(base, tasks, {"negative": negative["calibration"], "clip": base.clip})
    solving = solve(collecting["stats"])
    inputs = {"model": base.model, "lora": solving["lora"], "clip": base.clip}
    applied = Node("SSRApply", None, inputs, colour="merge")
    baked = Node(
        "CheckpointSave",
        "Save Checkpoint (core)",
        {"model": applied["model"], "clip": applied["clip"], "vae": base.vae},
        {"filename_prefix": "checkpoints/merged"},
        colour="merge",
    )
    start = note(
        "Start here",
        "The merge is baked into a whole checkpoint by ComfyUI's own node. For models in several files use Model Save "
        "and CLIP Save instead. A LoRA file is a hundredth of the size and fits every variant of the base, so bake "
        "only for tools that take no LoRA.",
        "Choose your checkpoint here and your LoRAs at the right.",
    )
    rounding = note(
        "Precision",
        "Saved in the precision of the loaded base. In bf16 and fp16 nothing is lost that matters. In **fp8** each "
        "weight keeps 3 bits behind the point: ComfyUI rounds at random so that the mean stays right, yet each weight "
        "is off by some percent, often more than the LoRA changes it. Bake from a bf16 or fp16 base, and make fp8 of "
        "the result; or keep the LoRA file, which is exact on fp8, too, where a loader does not patch weights.",
        "The merge's part for the text encoder is baked in, too: SSR Apply has CLIP connected.",
    )
    kept = [report(solving["report"]), save(solving["lora"], "before-baking", "SSR Save LoRA (keep it, too)")]
    return [
        Group("1 Checkpoint", BLUE, [(330, [start, *base.nodes])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, EXAMPLES)),
        Group("3 Merge", AMBER, [(340, [latent, negative, collecting, solving]), (460, kept)]),
        Group("4 Bake", PURPLE, [(400, [applied, baked, rounding])]),
    ]
