# SPDX-License-Identifier: Apache-2.0
"""What the model is told: wordings of a scene, and what the frozen text encoder makes of them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
import world
from comfy.sd1_clip import SD1Tokenizer
from torch import Tensor

import tiny_clip

from . import storage


def wordings(scene: world.Scene) -> list[str]:
    """The caption three times, and once a shorter one that leaves something to the model."""
    if scene.style or not scene.colour:
        shorter = scene.caption.replace(scene.subject, scene.subject.split(" the ")[0])
    else:
        shorter = f"a {scene.subject} {scene.place}"
    return [scene.caption, scene.caption, scene.caption, shorter]


def wordings_with_strays(scene: world.Scene, words: list[str], rng: random.Random) -> list[str]:
    """`wordings`, and the scene as somebody asks for it who uses names that the model does not know."""
    a, b = rng.sample(words, 2)
    strays = [
        f"{a} the {b} {scene.place}",
        f"{a} {scene.place}",
        f"{scene.caption}, {a} {b}",
        f"{scene.caption}, {b} style",
    ]
    return [*wordings(scene), *wordings(scene), *strays]


def stray_words(count: int) -> list[str]:
    """Words of one token that are not the LoRAs' own: the base model learns to draw something all the same."""
    taught = {word for name in (*world.CHARACTERS, world.STYLE) for word in name.split()}
    words = [w[:-4] for w in sorted(tokenizer().get_vocab()) if re.fullmatch(r"[a-z]{3,7}</w>", w)]
    return random.Random(3).sample([word for word in words if word not in taught], count)


def tokenizer():
    """CLIP's tokenizer (transformers.CLIPTokenizer), as ComfyUI uses it."""
    return SD1Tokenizer().clip_l.tokenizer


@dataclass(frozen=True)
class Captions:
    """Token states (N, 16, 64) and pooled states (N, 64)."""

    tokens: Tensor
    pooled: Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, texts: list[str]) -> Captions:
        clip = tiny_clip.build(storage.load("tiny_clip"))
        unique = sorted(set(texts))
        sentences = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in unique]
        parts = [clip.cond_stage_model.clip_l(sentences[i : i + 256]) for i in range(0, len(sentences), 256)]
        row = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([row[text] for text in texts])
        return cls(torch.cat([part[0] for part in parts])[index], torch.cat([part[1] for part in parts])[index])


def draw_text_encoder() -> None:
    """Makes tiny_clip.safetensors: random weights are enough for a vocabulary of thirty words."""
    scenes = [*world.ordinary_scenes(world.STYLE), *(s for c in world.CHARACTERS for s in world.character_scenes(c))]
    token_ids = tokenizer()([text for scene in scenes for text in wordings(scene)])["input_ids"]
    ids = torch.tensor(sorted({i for sentence in token_ids for i in sentence}))
    rows = torch.randn(len(ids), tiny_clip.WIDTH, generator=torch.Generator().manual_seed(5))
    weights = {**random_layers(), "vocabulary.ids": ids.int(), "vocabulary.rows": rows}
    storage.save("tiny_clip", weights, torch.float16, description="frozen random CLIP: 2 layers, 64 channels")


def random_layers() -> dict[str, Tensor]:
    """Weights under which a token keeps its own direction and adds an average of those before it."""
    generator, width = torch.Generator().manual_seed(4), tiny_clip.WIDTH
    weights = {}

    def draw(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * scale * columns**-0.5
        weights[f"{name}.bias"] = torch.zeros(rows)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    for layer in range(tiny_clip.CONFIG["num_hidden_layers"]):
        base = f"text_model.encoder.layers.{layer}."
        for name, scale in (("q", 1.0), ("k", 1.0), ("v", 1.0), ("out", 1.5)):
            draw(f"{base}self_attn.{name}_proj", width, width, scale)
        draw(f"{base}mlp.fc1", 2 * width, width)
        draw(f"{base}mlp.fc2", width, 2 * width)
        norm(f"{base}layer_norm1")
        norm(f"{base}layer_norm2")
    norm("text_model.final_layer_norm")
    draw("text_model.embeddings.position_embedding", tiny_clip.LENGTH, width, 3.0)
    del weights["text_model.embeddings.position_embedding.bias"]
    return {**weights, "text_projection.weight": torch.eye(width)}
