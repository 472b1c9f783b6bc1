"""Thumbnails: the pictures beside the example workflows. `python -m authoring.templates.thumbnails` makes them anew.

They come from runs of the tiny model; workflows of other models have the same graph run with it and its LoRAs.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.run import ROOT, base_directory, comfyui_path
from hosting.browser import Frontend, frontend
from hosting.server import ComfyServer, convert_ui_to_api

from . import scenarios
from .bases import tiny
from .contents import WORKFLOWS
from .graph import Group, ObjectInfo, workflow
from .parts import MOCHI, MOCHI_SEPIA, ROBO, SEPIA, Joint, Shot

SIZE = 480
PAPER, INK, GOOD, BAD = (23, 32, 46), (232, 237, 244), (77, 208, 168), (255, 143, 135)

# drawn with the demo's merge and its plain stack, from tiny-demo
PICTURES: dict[str, Sequence[str]] = {
    "tiny-demo": ("Mochi", "Robo", "sepia"),
    "two-characters-flux": ("Mochi", "Robo"),
    "style-and-character-sdxl": ("sepia", "Mochi", "Mochi in sepia"),
    "three-loras-zimage": ("Mochi", "Robo", "sepia"),
}


LOADERS = ("UNETLoader", "CLIPLoader", "VAELoader")


def retuned() -> list[Group]:
    return scenarios.retune_saved_stats(tiny(), (MOCHI, ROBO), Shot("Mochi", "mochi the cat on the beach", 3))


# the same graph for the tiny model, the nodes to show, and whether they are shown after a run
GRAPHS: dict[str, tuple[Callable[[], list[Group]], Sequence[str], bool]] = {
    "START-HERE-first-steps-sdxl": (
        lambda: scenarios.first_steps(tiny(), (MOCHI, ROBO), "mochi the cat on the beach"),
        *(("SSRQuickMerge",), True),
    ),
    "diagnose-only-flux": (lambda: scenarios.diagnose_only(tiny(), (MOCHI, ROBO, SEPIA)), ("SSRReport",), True),
    "save-for-sharing-zimage": (
        lambda: scenarios.save_for_sharing(
            tiny(), (MOCHI, ROBO), ("1: mochi the cat on the beach", "2: robo the robot on the moon")
        ),
        *(("SSRCompare",), True),
    ),
    "polish-and-save-zimage": (
        lambda: scenarios.polish_and_save(
            tiny(),
            (MOCHI, SEPIA),
            Joint("both", "1, 2", MOCHI_SEPIA.prompts),
            Shot("both", "mochi the cat on the beach, sepia style", 3),
        ),
        *(("SSRPolish",), True),
    ),
    "retune-saved-stats-zimage": (retuned, ("SSRLoadStats", "SSRSolve"), False),
    "speed-lora-in-base-qwen": (
        WORKFLOWS["speed-lora-in-base-qwen"],
        *(("UNETLoader", "LoraLoaderModelOnly", "ModelSamplingAuraFlow"), False),
    ),
    "keep-your-sliders-zimage": (
        lambda: scenarios.keep_your_sliders(tiny(), (MOCHI, ROBO), Shot("Mochi", "mochi the cat on the beach", 3)),
        *(("SSRSplit",), True),
    ),
    "bake-into-checkpoint-sdxl": (WORKFLOWS["bake-into-checkpoint-sdxl"], ("SSRApply", "CheckpointSave"), False),
    "edit-loras-kontext": (
        WORKFLOWS["edit-loras-kontext"],
        ("LoadImage", "FluxKontextImageScale", "VAEEncode"),
        False,
    ),
    "style-and-character-krea2": (WORKFLOWS["style-and-character-krea2"], LOADERS, False),
    "style-and-character-flux2-klein": (WORKFLOWS["style-and-character-flux2-klein"], LOADERS, False),
    "style-and-character-anima": (WORKFLOWS["style-and-character-anima"], LOADERS, False),
    "video-with-sound-ltx2": (
        WORKFLOWS["video-with-sound-ltx2"],
        *(("CheckpointLoaderSimple", "LTXAVTextEncoderLoader", "LTXVAudioVAELoader"), False),
    ),
    "video-with-sound-minimax-h3": (WORKFLOWS["video-with-sound-minimax-h3"], LOADERS, False),
    "two-experts-wan22": (WORKFLOWS["two-experts-wan22"], ("SSRCollectStats", "SSRSolve"), False),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ComfyServer(comfyui_path(), base_directory()) as server:
        info = server.object_info()
        pictures = drawn(server, info)
        for name, wanted in PICTURES.items():
            save(name, compared([(pictures["Plain stack", what], pictures["Merged", what]) for what in wanted]))
        with frontend(server, 1200, 1100) as opened:
            for name in GRAPHS:
                save(name, of_nodes(opened, info, name))
            whole(opened, info).save(ROOT / "docs" / "in-comfyui.jpg", quality=78, optimize=True, progressive=True)


def drawn(server: ComfyServer, info: ObjectInfo) -> Mapping[tuple[str, str], Path]:
    """{(how, what): picture} of the demo's workflow."""
    ui = workflow("tiny-demo", WORKFLOWS["tiny-demo"](), info)
    outputs = server.run(convert_ui_to_api(ui, info)).outputs
    found = {}
    for node in ui["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage"):
            image = outputs[str(node["id"])]["images"][0]
            how, what = node["title"].split(": ")
            found[how, what] = server.base_directory / image["type"] / image["subfolder"] / image["filename"]
    return found


def compared(pairs: Sequence[tuple[Path, Path]]) -> Image.Image:
    """The plain stack's pictures above those of the merge."""
    sheet = Image.new("RGB", (SIZE, SIZE), PAPER)
    draw, gap, head = ImageDraw.Draw(sheet), 12, 32
    cell = min((SIZE - gap * (len(pairs) + 1)) // len(pairs), SIZE // 2 - head - gap // 2)
    left = (SIZE - cell * len(pairs) - gap * (len(pairs) - 1)) // 2
    for row, (label, colour) in enumerate((("plain stack", BAD), ("SSR merge", GOOD))):
        top = row * SIZE // 2 + (SIZE // 2 - cell - head) // 2
        draw.text((SIZE / 2, top + head / 2), label, colour, ImageFont.load_default(22), anchor="mm")
        for column, pair in enumerate(pairs):
            with Image.open(pair[row]) as picture:
                resized = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(resized, (left + column * (cell + gap), top + head))
    return sheet


def whole(opened: Frontend, info: ObjectInfo) -> Image.Image:
    """The first steps, done: the whole graph."""
    ui = workflow("START-HERE-first-steps-sdxl", GRAPHS["START-HERE-first-steps-sdxl"][0](), info)
    opened.page.set_viewport_size({"width": 1400, "height": 1100})
    opened.load(ui)
    opened.wait_until_done(opened.press_run())
    opened.clear()
    shot = opened.cut_out(*(node["id"] for node in ui["nodes"]))
    opened.page.wait_for_timeout(6000)  # until what it says of the job is gone
    shot = opened.cut_out(*(node["id"] for node in ui["nodes"]))
    return Image.open(io.BytesIO(shot)).convert("RGB")


def of_nodes(opened: Frontend, info: ObjectInfo, name: str) -> Image.Image:
    build, kinds, run = GRAPHS[name]
    ui = workflow(name, build(), info)
    opened.load(ui)
    if run:
        opened.wait_until_done(opened.press_run())
    opened.clear()
    nodes = [node["id"] for node in ui["nodes"] if node["type"] in kinds and node["mode"] == 0]
    opened.page.evaluate("() => app.graph._nodes.forEach(node => { node.has_errors = false; })")  # files that lack
    opened.look_at(*nodes)
    opened.page.wait_for_timeout(1000)  # pictures on the nodes are loaded when they are drawn first
    shot = Image.open(io.BytesIO(opened.cut_out(*nodes))).convert("RGB")
    shot.thumbnail((SIZE - 16, SIZE - 16), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (SIZE, SIZE), PAPER)
    sheet.paste(shot, ((SIZE - shot.width) // 2, (SIZE - shot.height) // 2))
    return sheet


def save(name: str, picture: Image.Image) -> None:
    path = ROOT / "workflows" / f"{name}.jpg"
    picture.save(path, quality=85, optimize=True, progressive=True)
    logging.info("%s, %.0f KB", path.name, path.stat().st_size / 1000)


if __name__ == "__main__":
    main()
