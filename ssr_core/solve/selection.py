"""Selection: which layers a merge keeps, stacks without routing, or leaves out, by rules on their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from ..errors import SSRError

Treatment = Literal["keep", "stack", "drop"]

_WORDS = {  # what people call parts of a model, in the module names of the families ComfyUI runs
    "all": r".",
    "attention": r"attn|attention|(^|[._])(qkv|to_[qkv]|to_out|[qkvo]_proj|out_proj|add_[qkv]_proj|to_add_out)([._]|$)",
    "mlp": r"(^|[._])(\w+_)?(mlp|ff|ffn|feed_forward|ff_context)([._]|$)",
    "modulation": r"(^|[._])(\w+_)?(mod|modulation|adaLN\w*)([._]|$)",
    "text": r"(^|\.)(txt_\w+|context_\w+|cap_embedder|ff_context|add_[qkv]_proj|to_add_out|text_\w+)(\.|$)",
    "image": r"(^|\.)(img_\w+|x_block|x_embedder|noise_refiner)(\.|$)|(^|\.)transformer_blocks\.\d+\.attn\.to_[qkvo]",
    "text_encoder": r"^(text_encoder|lora_te|lora_prior_te|clip_|conditioner\.|te[12]\.)",
}


@dataclass(frozen=True)
class Rule:
    """What to do with the layers whose name matches.

    A pattern is a word (all, attention, mlp, modulation, text, image, text_encoder) or some consecutive parts of a
    dotted name: "single_blocks.7", "double_blocks.0-5", "blocks.*.cross_attn".
    """

    treatment: Treatment
    pattern: str

    def matches(self, module: str) -> bool:
        if self.pattern in _WORDS:
            in_text_encoder = re.search(_WORDS["text_encoder"], module) is not None
            if self.pattern in ("text", "image") and in_text_encoder:
                return False  # these are streams of the diffusion model
            return re.search(_WORDS[self.pattern], module) is not None
        wanted, parts = self.pattern.split("."), module.split(".")
        starts = range(len(parts) - len(wanted) + 1)
        return any(all(map(_fits, parts[start:], wanted)) for start in starts)

    def __str__(self) -> str:
        return f"{self.treatment} {self.pattern}"


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Rules from lines such as "drop mlp, single_blocks.0-9". Later ones overrule earlier ones; # begins a comment.

    Raises:
        SSRError: a line that does not begin with keep, stack or drop, or names nothing.
    """
    rules: list[Rule] = []
    for line in re.split(r"[\n;]", text):
        treatment, *patterns = re.split(r"[\s,]+", line.partition("#")[0].strip().rstrip(","))
        if not treatment:
            continue
        if treatment not in get_args(Treatment) or not patterns:
            raise SSRError(
                f"{line.strip()!r} is no rule for layers; write keep, stack or drop and what, such as "
                "'drop mlp' or 'stack single_blocks.0-18'."
            )
        words = (pattern.lower() if pattern.lower() in _WORDS else pattern.removesuffix(".") for pattern in patterns)
        rules += [Rule(cast(Treatment, treatment), word) for word in words]
    return tuple(rules)


def treatment_of(module: str, rules: Sequence[Rule]) -> Treatment:
    """What the last rule that matches says; "keep" where none does."""
    return next((rule.treatment for rule in reversed(rules) if rule.matches(module)), "keep")


def check_rules(rules: Sequence[Rule], modules: Iterable[str]) -> None:
    """Raise SSRError for a rule that matches none of the modules."""
    modules = sorted(modules)
    for rule in rules:
        if not any(map(rule.matches, modules)):
            raise SSRError(
                f"No layer of these LoRAs matches '{rule}'. Their names are like {modules[0]}, {modules[-1]}; "
                f"or use one of the words {', '.join(_WORDS)}."
            )


def _fits(part: str, wanted: str) -> bool:
    """Whether one part of a name is `wanted`: with wildcards, or in a range of numbers."""
    if bounds := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return part.isdigit() and int(bounds[1]) <= int(part) <= int(bounds[2])
    return fnmatchcase(part, wanted)
