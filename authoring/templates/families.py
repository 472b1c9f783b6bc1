"""Families: workflows for models by name, for edit models, and for video with sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import bases
from .bases import Base
from .comparisons import merge_and_compare
from .graph import Group, Node, Source, note
from .parts import (
    AMBER,
    ANNA,
    ANNA_INKWASH,
    BLUE,
    GREEN,
    INKWASH,
    PICTURE,
    PURPLE,
    YOURS,
    Joint,
    Lora,
    Shot,
    chain,
    collect,
    merging,
    report,
    save,
    size,
    solve,
    with_note,
)

WORDS = YOURS.format(words="`anna1 woman` and `inkwash style` stand for yours")
BOTH = (
    WORDS + "\n\n**SSR Add Combination** has prompts that ask for both. Without them a merge forgets to do two at once."
)
EXPECT = (
    "Expect the face without the style, the style without the face, and both where both are asked for. The report says "
    "how much of each is left."
)
SHOT = Shot("style and character", "inkwash style, anna1 woman standing on a bridge in the rain")

RESTYLE = Lora(
    "edit",
    "edit.safetensors",
    (
        "turn this picture into an inkwash drawing",
        "redraw the scene as inkwash style, keep the composition",
        "make this an inkwash style painting, keep the pose",
        "inkwash style version of this picture, same camera angle",
    ),
)
INTO = Lora(
    "character",
    "character.safetensors",
    (
        "put anna1 woman into this place, full body",
        "anna1 woman sits here, upper body",
        "replace the person with anna1 woman, keep the light",
        "anna1 woman walks towards the camera in this scene",
    ),
)
EDIT_BOTH = Joint(
    "both at once",
    "1, 2",
    (
        "put anna1 woman into this place and turn it into an inkwash drawing",
        "anna1 woman sits here, redraw the scene as inkwash style",
        "replace the person with anna1 woman, inkwash style",
        "anna1 woman walks towards the camera, make this an inkwash style painting",
    ),
)


def krea2() -> list[Group]:
    return _named(
        bases.krea2(),
        "krea2",
        "A style and a character LoRA become one for **Krea 2 Turbo**, which is calibrated with its own 8 steps. The "
        "int8 weights are not touched while measuring.",
    )


def flux2_klein() -> list[Group]:
    return _named(
        bases.flux2_klein(),
        "flux2-klein",
        "A style and a character LoRA become one for **Flux2 Klein**. The distilled model takes 4 steps, and so does "
        "calibration. For the base model set 20 steps and cfg 5 everywhere, 8 steps in SSR Collect Stats, and connect "
        "a negative prompt there.",
    )


def anima() -> list[Group]:
    return _named(
        bases.anima(),
        "anima",
        "A style and a character LoRA become one for **Anima**. It renders with a negative prompt and cfg 4, so "
        "calibration does, too. The turbo LoRA, if you use it, belongs into the base: load it before SSR Collect "
        "Stats, with its steps and cfg 1.",
    )


def edit_loras() -> list[Group]:
    base = bases.kontext()
    columns, tasks = chain((RESTYLE, INTO), base, (EDIT_BOTH,))
    image = Node("LoadImage", "Your picture", values={"image": "example.png"}, height=PICTURE, colour="fill in")
    scaled = Node("FluxKontextImageScale", None, {"image": image["IMAGE"]})
    encoded = Node("VAEEncode", None, {"pixels": scaled["IMAGE"], "vae": base.vae})
    for prompts in columns[0]:
        prompts.inputs = {**prompts.inputs, "references": encoded["LATENT"]}
    latent, collecting = collect(base, tasks)
    solving = solve(collecting["stats"])
    applied = Node("SSRApply", None, {"model": base.model, "lora": solving["lora"]}, colour="merge")
    text = "put anna1 woman into this place, inkwash style"
    prompt = Node("CLIPTextEncode", "Edit", {"clip": base.clip}, {"text": text}, 118, "fill in")
    seen = Node("ReferenceLatent", None, {"conditioning": prompt["CONDITIONING"], "latent": encoded["LATENT"]})
    guided = Node("FluxGuidance", None, {"conditioning": seen["CONDITIONING"]}, {"guidance": base.guidance})
    nothing = Node("ConditioningZeroOut", "No negative (cfg is 1)", {"conditioning": prompt["CONDITIONING"]})
    picture_size = size(base)
    drawn = _drawn(base, applied["model"], guided["CONDITIONING"], nothing["CONDITIONING"], picture_size["LATENT"])
    decoded = Node("VAEDecode", None, {"samples": drawn["LATENT"], "vae": base.vae})
    shown = Node("SaveImage", "Edited", {"images": decoded["IMAGE"]}, {"filename_prefix": "edit-loras/edited"}, PICTURE)
    start = note(
        "Start here",
        "Several **edit LoRAs**, or an edit and a character, become one for an edit model. Calibration prompts need "
        "input pictures: *references* of SSR Prompts. One here for all; a batch (Batch Images, then VAE Encode, only "
        "to SSR Prompts) gives each prompt its own, which is better. One prompt and a batch is fine, too.",
        "For Flux2 and Qwen-Image-Edit use their loaders. For Qwen encode prompts with TextEncodeQwenImageEditPlus, "
        "join them with Conditioning (Combine) and connect that to SSR Add LoRA.",
    )
    expect = note("What to expect", "One file does either edit, and both at once where both are asked for. " + EXPECT)
    return [
        Group("1 Models and a picture", BLUE, [(330, [start, *base.nodes]), (330, [image, scaled, encoded])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, WORDS)),
        _merge(latent, collecting, solving, "edit-loras"),
        Group(
            "4 Use it",
            PURPLE,
            [
                (270, [applied, picture_size, expect]),
                (300, [prompt, seen, guided, nothing]),
                (270, [drawn, decoded]),
                (390, [shown]),
            ],
        ),
    ]


def ltx2() -> list[Group]:
    base = bases.ltx2()
    rate = Node("PrimitiveFloat", "Frames per second", values={"value": 25})
    sockets = {"frame_rate": rate["FLOAT"], "audio_vae": base.nodes[-1]["Audio VAE"]}
    sound = Node("LTXVEmptyLatentAudio", "Sound while calibrating", sockets, {"frames_number": 25}, 106)
    heard = Node("LTXVEmptyLatentAudio", "Sound", sockets, {"frames_number": 97}, 106)
    small = Node(base.latent, "Calibration size", values={**base.size, "length": 25})
    large = Node(base.latent, "Size of the video", values=base.size)
    joined = [
        Node("LTXVConcatAVLatent", title, {"video_latent": video["LATENT"], "audio_latent": audio["Latent"]})
        for title, video, audio in (("Calibration size, with sound", small, sound), ("With sound", large, heard))
    ]
    start = (
        "A style and a character LoRA become one for **LTX-2**, picture and sound. 25 frames are enough to measure.",
        "Speed LoRAs (distilled) and upscalers stay outside: load a speed LoRA before SSR Collect Stats, with its "
        "steps and cfg 1, and use the merge in each of your passes.",
    )
    return _video(
        base, "ltx2", start, [rate, small, sound, joined[0]], [large, heard, joined[1]], "LTXVAudioVAEDecode", 25
    )


def minimax_h3() -> list[Group]:
    base = bases.minimax_h3()
    small = Node(base.latent, "Calibration size, with sound", values={**base.size, "length": 22})
    large = Node(base.latent, "Size of the video, with sound", values=base.size)
    start = (
        "A style and a character LoRA become one for **MiniMax H3**, picture and sound. 22 frames are enough to "
        "measure.",
        "The model takes time and memory: try *steps* 4 in SSR Collect Stats first.",
    )
    return _video(base, "minimax-h3", start, [small], [large], "VAEDecodeAudio", 24)


def _named(base: Base, name: str, *start: str) -> list[Group]:
    """A style and a character for a model of that name."""
    return merge_and_compare(
        *(base, (INKWASH, ANNA), (SHOT,), name),
        joints=(ANNA_INKWASH,),
        start=(*start, "Choose your models here and your LoRAs at the right."),
        yours=BOTH,
        expect=EXPECT,
    )


def _video(
    base: Base,
    name: str,
    start: Sequence[str],
    measured: Sequence[Node],
    rendered: Sequence[Node],
    decoder: str,
    fps: int,
) -> list[Group]:
    """The same for a video with sound; the last of `measured` and `rendered` are empty latents of both."""
    columns, tasks = chain((INKWASH, ANNA), base, (ANNA_INKWASH,))
    latent = measured[-1]
    sockets: dict[str, Source] = {"model": base.model, "tasks": tasks, "latent": _latent(latent)}
    against, negative = [], {}
    if base.negative is not None:
        values = {"text": base.negative}
        against = [Node("SSRPrompts", "Negative prompt", {"clip": base.clip}, values, 120)]
        negative = {"negative": against[0]["calibration"]}
    collecting = Node("SSRCollectStats", None, sockets | negative, base.calibration_values(), room=56, colour="merge")
    solving = solve(collecting["stats"])
    applied = Node("SSRApply", None, {"model": base.model, "lora": solving["lora"]}, colour="merge")
    prompt = Node("CLIPTextEncode", "Prompt", {"clip": base.clip}, {"text": SHOT.prompt}, 140, "fill in")
    nothing = (
        []
        if negative
        else [Node("ConditioningZeroOut", "No negative (cfg is 1)", {"conditioning": prompt["CONDITIONING"]})]
    )
    other = negative["negative"] if negative else nothing[0]["CONDITIONING"]
    drawn = _drawn(base, applied["model"], prompt["CONDITIONING"], other, _latent(rendered[-1]))
    parted = Node("LTXVSeparateAVLatent", "Video and sound", {"av_latent": drawn["LATENT"]})
    frames = Node("VAEDecode", None, {"samples": parted["video_latent"], "vae": base.vae})
    sound = base.nodes[-1]
    socket, output = ("audio_vae", "Audio VAE") if decoder == "LTXVAudioVAEDecode" else ("vae", "VAE")
    heard = Node(decoder, None, {"samples": parted["audio_latent"], socket: sound[output]})
    audio = heard["Audio"] if decoder == "LTXVAudioVAEDecode" else heard["AUDIO"]
    shown = Node(
        *("SaveAnimatedWEBP", "Video", {"images": frames["IMAGE"]}),
        {"filename_prefix": f"{name}/merged", "fps": fps, "lossless": False},
        420,
    )
    played = Node("PreviewAudio", "Sound", {"audio": audio}, height=88)
    expect = note("What to expect", EXPECT, "Core's Create Video joins video and sound in one file.")
    return [
        Group("1 Models", BLUE, [(330, [note("Start here", *start), *base.nodes])]),
        Group("2 LoRAs and prompts", GREEN, with_note(columns, BOTH)),
        _merge(measured, [*against, collecting], solving, name),
        Group(
            "4 Use it",
            PURPLE,
            [
                (300, [applied, *rendered, prompt, *nothing]),
                (300, [drawn, parted, frames, heard, expect]),
                (440, [shown, played]),
            ],
        ),
    ]


def _merge(latent: Node | Sequence[Node], collecting: Node | Sequence[Node], solving: Node, name: str) -> Group:
    before = [*([latent] if isinstance(latent, Node) else latent)]
    before += [collecting] if isinstance(collecting, Node) else collecting
    kept = [report(solving["report"]), save(solving["lora"], name), merging()]
    return Group("3 Merge", AMBER, [(340, [*before, solving]), (460, kept)])


def _drawn(base: Base, model: Source, positive: Source, negative: Source, latent: Source) -> Node:
    inputs = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    values: dict[str, Any] = {"seed": 1, **base.sampling}
    return Node("KSampler", "KSampler: merged", inputs, values)


def _latent(node: Node) -> Source:
    """Its output, which nodes call by different names."""
    return node["latent" if node.kind == "LTXVConcatAVLatent" else "LATENT"]
