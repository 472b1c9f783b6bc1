"""SSR Prompts in a real ComfyUI."""

import importlib

import pytest
import torch

from run_nodes import execute, node
from tiny_clip import tiny_clip

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def prompts(text):
    return execute(node("prompts.SSRPrompts"), clip=tiny_clip(), text=text)[0]


def test_each_line_is_a_prompt_and_blank_lines_are_none():
    entries = prompts("a cat\n\n  a dog on grass  \n")
    clip = tiny_clip()
    assert len(entries) == 2
    for entry, text in zip(entries, ("a cat", "a dog on grass"), strict=True):
        assert torch.equal(entry[0], clip.encode_from_tokens(clip.tokenize(text)))


def test_no_prompt_at_all_is_refused():
    core = importlib.import_module("ssr_pack.ssr_core")
    with pytest.raises(core.SSRError, match="write one per line"):
        prompts(" \n ")
