"""Parts: the pieces that the example workflows share, such as a LoRA with its prompts, or a picture and its twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bases import Base
from .graph import GAP, TITLE, Node, Source, note, note_height

PICTURE = 362  # height of a shown picture, as that of the nodes that draw it
BLUE, GREEN, AMBER, PURPLE, GREY, TEAL = "#3f789e", "#8A8", "#b58b2a", "#a1309b", "#88A", "#2a8f85"

YOURS = (
    "Green nodes are yours to fill in. Choose your LoRAs and write, for each, a few different prompts **with its "
    "trigger words** ({words}), one per line."
)

MERGING = (
    "**SSR Collect Stats** is the slow step: it samples every calibration prompt with the LoRA that the prompt is for. "
    "Its result is kept as long as nothing before it changes, so after changing **SSR Solve** only the merge and the "
    "pictures are made anew.",
    "In the report, 0 is the LoRA as it is alone and 1 is as if it were missing. Set *rank* to that of one of your "
    "LoRAs if the saved file shall be as small as theirs.",
)


@dataclass(frozen=True)
class Lora:
    """A LoRA of an example, and prompts for it."""

    what: str  # in titles
    file: str
    prompts: Sequence[str]
    strength: float = 1.0


@dataclass(frozen=True)
class Joint:
    """Several LoRAs of an example, by their numbers in the chain, and prompts that ask for all of them at once."""

    what: str  # in titles
    loras: str
    prompts: Sequence[str]


@dataclass(frozen=True)
class Shot:
    """A picture that a workflow draws."""

    what: str
    prompt: str
    seed: int = 1


ANNA = Lora(
    "character",
    "character.safetensors",
    (
        "photo of anna1 woman, close-up portrait, soft window light",
        "photo of anna1 woman walking through a park in autumn, full body",
        "photo of anna1 woman laughing in a cafe, upper body",
        "drawing of anna1 woman reading a book",
    ),
)
BERT = Lora(
    "character two",
    "character_two.safetensors",
    (
        "photo of bert2 man, close-up portrait, studio light",
        "photo of bert2 man on a beach at sunset, full body",
        "photo of bert2 man cooking in a kitchen, upper body",
        "drawing of bert2 man playing the guitar",
    ),
)
INKWASH = Lora(
    "style",
    "style.safetensors",
    (
        "a fishing village at dawn, inkwash style",
        "portrait of an old man, inkwash style",
        "a fox in a bamboo forest, inkwash style",
        "a steam train on a bridge, inkwash style",
    ),
)
COAT = Lora(
    "clothing",
    "clothing.safetensors",
    (
        "a man wearing a krndress coat, studio photo",
        "a woman wearing a krndress coat in the street",
        "close-up of a krndress coat on a hanger",
        "a couple wearing krndress coats in the snow",
    ),
    0.8,
)
MOCHI = Lora(
    "Mochi the cat",
    "mochi_cat.safetensors",
    ("mochi the cat on grass", "mochi the cat at night", "mochi the cat in the desert", "mochi the cat on the moon"),
)
ROBO = Lora(
    "Robo the robot",
    "robo_robot.safetensors",
    (
        *("robo the robot in the snow", "robo the robot at night"),
        *("robo the robot in the desert", "robo the robot on the beach"),
    ),
)
SEPIA = Lora(
    "sepia style",
    "sepia_style.safetensors",
    (
        *("a green house in the snow, sepia style", "a red car in the desert, sepia style"),
        *("a purple mushroom in the snow, sepia style", "a green tree at night, sepia style"),
        *("a yellow star on the moon, sepia style", "a white boat on grass, sepia style"),
        *("a orange ball on the beach, sepia style", "a pink flower at night, sepia style"),
    ),
)


ANNA_INKWASH = Joint(
    "both at once",
    "1, 2",
    (
        "inkwash style, anna1 woman, close-up portrait",
        "inkwash style, anna1 woman walking through a park in autumn",
        "inkwash style, anna1 woman laughing in a cafe",
        "inkwash style, anna1 woman reading a book under a tree",
    ),
)
# in the places that the character is calibrated in: the demo judges those that are left
MOCHI_SEPIA = Joint("Mochi in sepia", "1, 3", [f"{prompt}, sepia style" for prompt in MOCHI.prompts])
ROBO_SEPIA = Joint("Robo in sepia", "2, 3", [f"{prompt}, sepia style" for prompt in ROBO.prompts])


def chain(loras: Sequence[Lora], base: Base, joints: Sequence[Joint] = ()) -> tuple[list[list[Node]], Source]:
    """Columns of nodes that add LoRAs with their prompts, and combinations with theirs, and the list of them all."""
    prompts, guidances, adders = [], [], []
    tasks: dict[str, Source] = {}
    added: list[Lora | Joint] = [*loras, *joints]
    for one in added:
        text = {"text": "\n".join(one.prompts)}
        prompt = Node("SSRPrompts", f"SSR Prompts: {one.what}", {"clip": base.clip}, text, 166, "fill in")
        source = prompt["calibration"]
        if base.guidance is not None:
            guidances.append(guidance := _guidance(source, base.guidance, 166))
            source = guidance["CONDITIONING"]
        adders.append(_adder(one, {"calibration": source, **tasks}))
        prompts.append(prompt)
        tasks = {"tasks": adders[-1]["tasks"]}
    return [column for column in (prompts, guidances, adders) if column], tasks["tasks"]


def _adder(one: Lora | Joint, inputs: Mapping[str, Source]) -> Node:
    if isinstance(one, Joint):
        named = "SSRAddCombination", f"SSR Add Combination: {one.what}"
        return Node(*named, inputs, {"loras": one.loras}, 166, "fill in")
    values = {"lora_name": one.file, "strength": one.strength}
    return Node("SSRAddLoRA", f"SSR Add LoRA: {one.what}", inputs, values, 166, "fill in")


def _guidance(source: Source, value: float, height: int | None = None) -> Node:
    return Node("FluxGuidance", None, {"conditioning": source}, {"guidance": value}, height)


def collect(base: Base, tasks: Source, inputs: Mapping[str, Source] | None = None, batch: int = 1) -> tuple[Node, Node]:
    """(empty latent, SSR Collect Stats)"""
    latent = Node(base.latent, "Calibration size", values={**base.size, "batch_size": batch})
    sockets = {"model": base.model, "tasks": tasks, "latent": latent["LATENT"], **(inputs or {})}
    return latent, Node("SSRCollectStats", None, sockets, base.calibration_values(), room=56, colour="merge")


def solve(stats: Source, **values: Any) -> Node:
    return Node("SSRSolve", None, {"stats": stats}, values, 236, "merge")


def report(source: Source, title: str = "Report: what the merge keeps", height: int = 320) -> Node:
    return Node("PreviewAny", title, {"source": source}, height=height)


def save(lora: Source, name: str, title: str = "SSR Save LoRA (output/loras)", **values: Any) -> Node:
    inputs, given = {"lora": lora}, {"filename_prefix": name, **values}
    return Node("SSRSaveLoRA", title, inputs, given, room=76, colour="merge")


def merging() -> Node:
    return note("Merging", *MERGING)


def size(base: Base) -> Node:
    return Node(base.latent, "Picture size", values=base.size)


@dataclass
class Pictures:
    """Nodes that draw shots, by column."""

    texts: list[Node | int]
    samplers: list[Node]
    images: list[Node]


def pictures(
    base: Base,
    shots: Sequence[Shot],
    model: Source,
    latent: Source,
    clip: Source | None = None,
    kind: str = "merged",
    prefix: str | None = None,
    texts: Mapping[str, tuple[Source, Source]] | None = None,
) -> tuple[Pictures, dict[str, tuple[Source, Source]]]:
    """The nodes that draw `shots` with a model, and the encoded prompts, which `texts` can share with other pictures.

    Without `prefix` pictures are shown, not saved.
    """
    drawn, used = Pictures([], [], []), dict(texts or {})
    for shot in shots:
        if shot.what not in used:
            nodes, used[shot.what] = _encoded(base, shot, clip or base.clip, "" if kind == "merged" else ": stack")
            drawn.texts += nodes
        positive, negative = used[shot.what]
        inputs = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        sampler = Node("KSampler", f"KSampler: {kind}", inputs, {"seed": shot.seed, **base.sampling})
        decoded = Node("VAEDecode", None, {"samples": sampler["LATENT"], "vae": base.vae})
        drawn.samplers += [sampler, decoded]
        title = f"{kind.capitalize()}: {shot.what}"
        shown: dict[str, Any] = {"inputs": {"images": decoded["IMAGE"]}, "height": PICTURE}
        values = {"filename_prefix": prefix} if prefix else {}
        drawn.images.append(Node("SaveImage" if prefix else "PreviewImage", title, values=values, **shown))
    return drawn, used


def _encoded(base: Base, shot: Shot, clip: Source, suffix: str) -> tuple[list[Node | int], tuple[Source, Source]]:
    """Nodes and a space that fill the height of a picture, and (positive, negative)."""
    prompt = Node("CLIPTextEncode", f"Prompt: {shot.what}{suffix}", {"clip": clip}, {"text": shot.prompt}, 118)
    nodes, positive = [prompt], prompt["CONDITIONING"]
    if base.guidance is not None:
        nodes.append(_guidance(positive, base.guidance, 58))
        positive = nodes[-1]["CONDITIONING"]
    if base.negative is None:
        inputs = {"conditioning": prompt["CONDITIONING"]}
        nodes.append(Node("ConditioningZeroOut", "No negative (cfg is 1)", inputs, height=26))
    else:
        nodes.append(Node("CLIPTextEncode", f"Negative prompt{suffix}", {"clip": clip}, {"text": base.negative}, 118))
    space = PICTURE - sum((node.height or 0) + TITLE + GAP for node in nodes) + TITLE + GAP
    return [*nodes, space], (positive, nodes[-1]["CONDITIONING"])


def stack(loras: Sequence[Lora], base: Base) -> tuple[list[Node], Source]:
    """The same LoRAs one after the other, for the model alone."""
    nodes: list[Node] = []
    model = base.model
    for lora in loras:
        values = {"lora_name": lora.file, "strength_model": lora.strength}
        nodes.append(Node("LoraLoaderModelOnly", f"Load LoRA: {lora.what}", {"model": model}, values))
        model = nodes[-1]["MODEL"]
    return nodes, model


def stack_with_clip(loras: Sequence[Lora], base: Base) -> tuple[list[Node], Source, Source]:
    nodes: list[Node] = []
    model, clip = base.model, base.clip
    for lora in loras:
        values = {"lora_name": lora.file, "strength_model": lora.strength, "strength_clip": lora.strength}
        inputs = {"model": model, "clip": clip}
        nodes.append(Node("LoraLoader", f"Load LoRA: {lora.what}", inputs, values))
        model, clip = nodes[-1]["MODEL"], nodes[-1]["CLIP"]
    return nodes, model, clip


def with_note(columns: Sequence[Sequence[Node]], yours: str | None) -> list[tuple[int, list[Node | int]]]:
    """Columns of a chain of LoRAs with their widths, a note above the first."""
    widths = {"SSRPrompts": 400, "FluxGuidance": 210, "SSRAddLoRA": 320}  # by the first of a column
    above = note("Your LoRAs", yours) if yours else None
    space = note_height(above, widths["SSRPrompts"]) + TITLE + GAP if above else 0
    named: list[tuple[int, list[Node | int]]] = []
    for column in columns:
        kind = column[0].kind
        named.append((widths[kind], [above if above and kind == "SSRPrompts" else space, *column]))
    return named
