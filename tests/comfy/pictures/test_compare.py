"""SSR Compare in a real ComfyUI: each picture is what stock nodes make, and the grid is labelled legibly."""

import importlib

import pytest
import torch
from PIL import Image

from run_nodes import apply, collect, execute, load_lora, node, solve, task
from tiny_clip import tiny_clip
from tiny_flux import conditioning, empty_latent, flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

CAT, DOG = flux_lora("kohya", rank=4, alpha=2.0, seed=1), flux_lora("diffusers", rank=3, seed=2)
SAMPLING = {"steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}


class Pixels:
    """A VAE whose pictures are the latent's first three channels."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(0.3 * latent[:, :3]).movedim(1, -1)


@pytest.fixture(scope="module")
def made(pack):
    """(model, clip, tasks, merged LoRA)"""
    sd, tiny = importlib.import_module("comfy.sd"), importlib.import_module("tiny_flux")
    model, clip = sd.load_diffusion_model_state_dict(tiny.flux_for_tiny_clip()), tiny_clip(torch.float32)
    prompts = node("prompts.SSRPrompts")
    tasks = tuple(
        importlib.import_module("ssr_pack.nodes.reading.task").Task(
            name, lora, strength, execute(prompts, clip=clip, text=f"a {name}\ntwo {name}s")[0]
        )
        for name, lora, strength in (("cat", CAT, 1.0), ("dog", DOG, 0.5))
    )
    return model, clip, tasks, solve(collect(model, *tasks, steps=2))[0]


def compare(made, prompts="", seed=5, cell=64, latent=None, **more):
    return compared(made, prompts, seed, cell, latent, **more)[0]


def compared(made, prompts="", seed=5, cell=64, latent=None, **more):
    """All outputs."""
    model, clip, tasks, lora = made
    given = {"model": model, "clip": clip, "vae": Pixels(), "tasks": tasks, "lora": lora, **SAMPLING}
    latent = latent or empty_latent(16, 16)
    return execute(node("compare.SSRCompare"), **given | more, latent=latent, prompts=prompts, seed=seed, cell=cell)


def pictures(grid: torch.Tensor, rows: int, columns: int, cell: int = 64, lines: int = 0) -> list[list[torch.Tensor]]:
    """The cells of a grid with square pictures, from the lower right corner on, with so many lines below each."""
    gap, (height, width) = max(4, cell // 32), grid.shape[1:3]
    foot = lines * max(12, cell // 10) * 4 // 3
    found = []
    for row in range(rows):
        top = height - (rows - row) * (cell + foot + gap)
        lefts = [width - (columns - column) * (cell + gap) for column in range(columns)]
        found.append([grid[0, top : top + cell, left : left + cell] for left in lefts])
    return found


def stock(model, clip, text, seed=5, negative=None, cfg=1.0) -> torch.Tensor:
    """By ComfyUI's own KSampler, as large as in the grid."""
    nodes = importlib.import_module("nodes")
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        negative = negative or clip.encode_from_tokens_scheduled(clip.tokenize(""))
        sampled = nodes.common_ksampler(model, seed, 3, cfg, "euler", "simple", cond, negative, empty_latent(16, 16))[0]
    pixels = (Pixels().decode(sampled["samples"])[0] * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels).resize((64, 64), Image.Resampling.LANCZOS)
    return torch.from_numpy(importlib.import_module("numpy").asarray(picture).copy()).float() / 255


def test_every_picture_is_what_stock_nodes_make_of_the_same_prompt_and_seed(made):
    model, clip, _, lora = made
    columns = [
        model,
        load_lora(model, CAT),
        load_lora(model, DOG, 0.5),
        load_lora(load_lora(model, CAT), DOG, 0.5),
        load_lora(load_lora(model, CAT, 0.7), DOG, 0.35),
        apply(model, lora),
    ]
    texts = ["a cat in the rain", "a dog"]
    cells = pictures(compare(made, "\n".join(texts)), 2, 6)
    for row, text in enumerate(texts):
        for column, one in enumerate(columns):
            assert (cells[row][column] - stock(one, clip, text)).abs().max() < 0.01, (row, column)
    assert (cells[0][0] - cells[0][5]).abs().max() > 0.03


def test_without_prompts_the_rows_are_the_first_calibration_prompt_of_each_lora(made):
    model, clip, _, _ = made
    cells = pictures(compare(made), 2, 6, lines=1)
    for row, text in enumerate(("a cat", "a dog")):
        assert (cells[row][0] - stock(model, clip, text)).abs().max() < 0.01


def test_options_that_other_nodes_gave_a_calibration_prompt_are_used(made, monkeypatch):
    _, _, (cat, dog), _ = made
    rendering = importlib.import_module("ssr_pack.nodes.pictures.rendering")
    entry = [cat.conditioning[0][0], {**cat.conditioning[0][1], "guidance": 7.5}]
    (scene, _) = rendering.scenes_of("", [type(cat)("cat", CAT, 1.0, [entry, cat.conditioning[1]]), dog])
    ((_, options),) = scene.encoded(made[1])
    assert scene.label == "a cat" and options["guidance"] == 7.5


def test_prompts_of_unknown_text_are_shown_as_they_are(made):
    rendering = importlib.import_module("ssr_pack.nodes.pictures.rendering")
    unknown = task(CAT, "cat", seeds=(3,))
    (scene,) = rendering.scenes_of("", [unknown])
    assert scene.label == "cat: its first prompt"
    assert torch.equal(scene.encoded(made[1])[0][0], conditioning(3)[0][0])


def test_written_prompts_get_pictures_for_an_edit_model_in_turn(made):
    rendering = importlib.import_module("ssr_pack.nodes.pictures.rendering")
    pictures = torch.arange(2.0)[:, None, None, None].expand(2, 16, 4, 4)
    scenes = rendering.scenes_of("sepia\na hat\n1: both", made[2], {"samples": pictures})
    entries = [scene.encoded(made[1]) for scene in scenes]
    assert [int(options["reference_latents"][0].mean()) for ((_, options),) in entries] == [0, 1, 0]


def test_without_any_prompt_there_is_nothing_to_compare(made):
    core = importlib.import_module("ssr_pack.ssr_core")
    model, clip, tasks, lora = made
    bare = tuple(type(one)(one.name, one.lora, 1.0, []) for one in tasks)
    with pytest.raises(core.SSRError, match="no prompt to compare with"):
        compare((model, clip, bare, lora))


def test_the_negative_prompt_counts_with_a_cfg(made):
    model, clip, _, _ = made
    negative = execute(node("prompts.SSRPrompts"), clip=clip, text="blurry")[0]
    cells = pictures(compare(made, "a cat", cfg=3.0, negative=negative), 1, 6)
    assert (cells[0][0] - stock(model, clip, "a cat", negative=negative, cfg=3.0)).abs().max() < 0.01
    assert (cells[0][0] - stock(model, clip, "a cat", cfg=3.0)).abs().max() > 0.02


def test_loras_are_loaded_onto_the_text_encoder_too(made):
    model, clip, tasks, _ = made
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{key}.lora_up.weight": torch.randn(128, 2), f"{key}.lora_down.weight": torch.randn(2, 64)}
    tasks = (type(tasks[0])("cat", CAT | pair, 1.0, tasks[0].conditioning), tasks[1])
    lora, _ = solve(collect(model, *tasks, steps=1, clip=clip))
    cells = pictures(compare((model, clip, tasks, lora), "a cat"), 1, 6)
    sd = importlib.import_module("comfy.sd")
    patched = sd.load_lora_for_models(model, clip, dict(CAT | pair), 1.0, 1.0)
    assert (cells[0][1] - stock(*patched, "a cat")).abs().max() < 0.01
    assert (cells[0][1] - stock(patched[0], clip, "a cat")).abs().max() > 0.02


def test_of_a_batch_and_of_a_video_one_picture_is_shown(made, pack):
    one, batch = (compare(made, "a cat", latent=empty_latent(16, 16, batch)) for batch in (1, 3))
    assert torch.equal(one, batch)
    picture = importlib.import_module("ssr_pack.nodes.pictures.picture")
    frames = torch.arange(5.0).reshape(1, 5, 1, 1, 1).expand(1, 5, 8, 8, 3) / 5
    assert picture.picture_of(frames).getpixel((0, 0)) == (102, 102, 102)


def test_a_model_that_has_the_merge_on_it_is_no_base_to_compare_with(made):
    model, clip, tasks, lora = made
    on = execute(node("apply.SSRApply"), model=model, clip=clip, lora=lora, strength=1.0)[0]
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.LoraError, match="SSR Compare: this model has the merge on it already"):
        compare((on, clip, tasks, lora))


def test_a_merge_of_another_model_is_refused(made):
    core = importlib.import_module("ssr_pack.ssr_core")
    model, clip, tasks, _ = made
    with pytest.raises(core.ModelMismatchError, match="does not fit the model"):
        compare((model, clip, tasks, {"diffusion_model.blocks.7.attn.lora_A.weight": torch.ones(1, 4)}), "a cat")


# --- numbers ---


def latent_of(model, clip, text, seed=5):
    nodes = importlib.import_module("nodes")
    with torch.inference_mode():
        cond, other = (clip.encode_from_tokens_scheduled(clip.tokenize(one)) for one in (text, ""))
        return nodes.common_ksampler(model, seed, 3, 1.0, "euler", "simple", cond, other, empty_latent(16, 16))[0][
            "samples"
        ]


def test_each_number_is_the_distance_of_the_latent_from_what_its_prompt_asks_for(made):
    model, clip, _, lora = made
    stack = load_lora(load_lora(model, CAT), DOG, 0.5)
    _, said, images, sheet = compared(made, "2: a dog\na house\n1+2: a cat and a dog")
    assert len(images) == 18 and all(image.shape == (1, 16, 16, 3) for image in images)
    rows = {line[:12].strip(): line.split()[-6:] for line in said.splitlines()[2:]}
    for text, wanted in (("a dog", load_lora(model, DOG, 0.5)), ("a cat and a dog", stack)):
        base, found, right = (latent_of(one, clip, text) for one in (model, apply(model, lora), wanted))
        off = float((found - right).square().sum() / (base - right).square().sum())
        assert float(rows[text[:12].strip()][-1]) == pytest.approx(off, abs=1e-3)
        assert float(rows[text[:12].strip()][0]) == 1
    assert float(rows["a dog"][2]) == 0 and float(rows["a cat and a"][3]) == pytest.approx(0, abs=1e-3)
    assert "a house" not in said and (1, 0) not in sheet.captions and sheet.captions[0, 0] == "1.00"


def test_calibration_prompts_are_told_apart_and_have_means_by_kind(made):
    model, clip, tasks, lora = made
    combination = importlib.import_module("ssr_pack.nodes.reading.combination").Combination
    prompts = [
        combination("all", execute(node("prompts.SSRPrompts"), clip=clip, text=text)[0]) for text in ("both", "all two")
    ]
    said = compared((model, clip, (*tasks, *prompts), lora))[1].splitlines()
    assert [line.split("  ")[0] for line in said[2:]] == [
        *("a cat", "a dog", "both", "all two"),
        *("mean, one at a time", "mean, several at once"),
    ]


def test_a_number_that_is_no_lora_is_refused(made):
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match=r"'1\+3: both' asks for a LoRA that is not there; there are 2: cat, dog"):
        compare(made, "1+3: both")


def test_scores_of_another_node_stand_below_the_pictures_in_their_order(made):
    core, cls = importlib.import_module("ssr_pack.ssr_core"), node("add_scores.SSRAddScores")
    grid, _, images, sheet = compared(made, "1: a cat\na house")
    scores = [float(image.mean()) for image in images]
    scored, again = execute(cls, sheet=[sheet], scores=scores, label=["mean"])
    assert again.captions[0, 1].split("\n") == [sheet.captions[0, 1], f"mean {scores[1]:.3g}"]
    assert again.captions[1, 0] == f"mean {scores[6]:.3g}"
    assert scored.shape[2] == grid.shape[2] and scored.shape[1] > grid.shape[1]
    for wrong, said in ((scores[1:], "11 scores for 12 pictures"), (["x"] * 12, "scores are no numbers")):
        with pytest.raises(core.SSRError, match=said):
            execute(cls, sheet=[sheet], scores=wrong, label=[""])


# --- the grid ---


def drawn(names, prompts, size=(60, 90), cell=128):
    grid = importlib.import_module("ssr_pack.nodes.pictures.grid")
    places = [(r, c) for r in range(len(prompts)) for c in range(len(names))]
    shown = {place: Image.new("RGB", size, (250, 10, 10)) for place in places}
    return grid.grid(shown, prompts, names, 0, cell)


def ink_outside_the_pictures(sheet: Image.Image) -> list[int]:
    """How much of each heading's and label's place is not paper: (headings, labels)."""
    grey = torch.from_numpy(importlib.import_module("numpy").asarray(sheet.convert("L")).copy())
    return int((grey[:20] < 128).sum()), int((grey[:, :80] < 128).sum())


def test_pictures_keep_their_shape_and_fill_their_cells(pack):
    sheet = drawn(["a", "b"], ["one", "two", "three"])
    red = torch.from_numpy(importlib.import_module("numpy").asarray(sheet).copy())
    cells = (red[..., 0] > 240) & (red[..., 1] < 20)
    assert int(cells.sum()) == 6 * 85 * 128


@pytest.mark.parametrize("name", ["flux_dev_character_anna_v3_final_epoch20_and_more", "\u732b" * 60, "x" * 400])
def test_long_names_stay_inside_their_column(pack, name):
    grid = importlib.import_module("ssr_pack.nodes.pictures.grid")
    from PIL import ImageDraw

    text = grid._fitted(name, 120, 60, 16)
    draw = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text.lines, text.font, spacing=4)
    assert right - left <= 122 and bottom - top <= 62
    assert text.lines.replace("\n", "").startswith(name[:5])


def test_a_name_is_broken_where_it_has_a_dash_or_an_underscore(pack):
    grid = importlib.import_module("ssr_pack.nodes.pictures.grid")
    lines = grid._fitted("flux_dev_character_anna-v3", 120, 60, 16).lines.split("\n")
    assert len(lines) > 1 and all(line[-1] in "_-." for line in lines[:-1])


def test_headings_and_labels_are_drawn(pack):
    heading, label = ink_outside_the_pictures(drawn(["a cat", "SSR merge"], ["a prompt of some length"]))
    assert heading > 20 and label > 20


def test_the_demos_picture_is_drawn_by_the_same_grid(pack, tmp_path):
    from demo import picture

    Image.new("RGB", (60, 90), (250, 10, 10)).save(tmp_path / "red.png")
    paths = {(row, column): tmp_path / "red.png" for row in range(2) for column in range(3)}
    sheet = picture.grid(paths, ["one", "two"], ["a", "b", "c"], 0)
    assert sheet.tobytes() == drawn(["a", "b", "c"], ["one", "two"], cell=192).tobytes()
