"""What the names of a text encoder's layers mean, in files of all trainers, where no encoder is there to ask.

The spellings are those of comfy.lora.model_lora_keys_clip: ComfyUI's own, kohya's and OneTrainer's, diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...ssr_core import LoraError
from ...ssr_core.lora.site import canonical

_SPELLINGS = (  # the encoder, or its number as a file has it, and the name of the layer in it
    re.compile(r"text_encoders\.(?P<encoder>\w+)\.transformer\.(model\.|bert\.)?(?P<layer>.+)"),
    re.compile(r"text_encoders\.transformer\.(model\.|bert\.)?(?P<layer>.+)"),
    re.compile(r"lora_te(?P<number>\d?)_(?P<layer>.+)"),
    re.compile(r"lora_(?P<prior>prior)_te_(?P<layer>.+)"),
    re.compile(r"text_encoder(_(?P<number>\d))?\.(?P<layer>.+)"),
)
_CLIP = re.compile(r"text_model_encoder_layers_|text_projection")  # layers of all CLIPs have the same names

Layer = tuple[str, str]  # of which encoder, as far as that needs to be told, and its name in it


def meanings(names: Iterable[str]) -> dict[str, Layer]:
    """For each name which layer it is: of two names that mean the same one, ComfyUI would load only one.

    Raises:
        LoraError: files name the same layer of two encoders, and one of them does not say of which.
    """
    read = {name: _read(name) for name in names}
    encoders: dict[str, set[str]] = {}
    for encoder, _, layer in read.values():
        encoders.setdefault(layer, set()).update({encoder} - {""})
    numbers = {number for _, number, layer in read.values() if _CLIP.match(layer)}
    told = set().union(*encoders.values())
    alone = "clip_g" in told and not told & {"clip_l", "clip_h"} and not numbers & {"1", "2"}  # SDXL's refiner
    found = {}
    for name, (encoder, number, layer) in read.items():
        if _CLIP.match(layer):
            second = encoder == "clip_g" or number in ("2", "prior") or (alone and not encoder)
            found[name] = ("second CLIP" if second else "first CLIP", layer)
        elif len(encoders[layer]) < 2:
            found[name] = ("", layer)
        elif encoder:
            found[name] = (encoder, layer)
        else:
            raise LoraError(
                f"{name} may be a layer of any of the text encoders {', '.join(sorted(encoders[layer]))}, which other "
                "LoRAs change, too. Connect clip to SSR Collect Stats, which knows."
            )
    return found


def _read(name: str) -> tuple[str, str, str]:
    """Encoder, number and layer; empty where the name does not say."""
    match = next((match for spelling in _SPELLINGS if (match := spelling.fullmatch(name))), None)
    if match is None:
        return "", "", name
    told = match.groupdict()
    return told.get("encoder") or "", told.get("number") or told.get("prior") or "", canonical(told["layer"])
