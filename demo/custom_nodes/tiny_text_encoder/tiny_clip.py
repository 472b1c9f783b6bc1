# SPDX-License-Identifier: Apache-2.0
"""A text encoder of two layers and 64 channels, as a ComfyUI CLIP object with the ordinary CLIP tokenizer.

The file holds the rows of the token table that the demo's vocabulary uses; the other rows are drawn from a fixed seed,
so that any prompt works and the file stays small. Prompts are padded to 16 tokens; longer ones become several chunks.
"""

from __future__ import annotations

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

VOCABULARY = 49408
WIDTH = 64
LENGTH = 16
TABLE = "text_model.embeddings.token_embedding.weight"
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def expanded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its token table completed to all 49408 rows, in float32."""
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    ids, rows = weights.pop("vocabulary.ids").long(), weights.pop("vocabulary.rows")
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    table[ids] = rows
    return {**weights, TABLE: table}


def build(weights: dict[str, Tensor]) -> comfy.sd.CLIP:
    """A CLIP with these weights; ComfyUI takes the number of positions from the position table."""
    options = {"model_config": dict(CONFIG), "dtype": torch.float32}
    return comfy.sd.load_text_encoder_state_dicts([expanded(weights)], model_options=options)


def load(path: str) -> comfy.sd.CLIP:
    """ValueError if the file is some other text encoder."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    if "vocabulary.rows" not in weights:
        raise ValueError(f"{path} is not the demo's text encoder: it has no tensor vocabulary.rows")
    return build(weights)
