"""The same seed on the same machine is the same merge to the byte, in a real ComfyUI, whatever was run before."""

import hashlib
import random
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from lora_kinds import lora_of
from run_nodes import collect, execute, node, sample, solve, task
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


@pytest.fixture
def saved(comfy_runtime, pack_module, tmp_path, monkeypatch):
    """`saved(lora)` is the sha256 of the file that SSR Save LoRA makes of it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    today = SimpleNamespace(date=SimpleNamespace(today=lambda: date(2026, 1, 1)))  # midnight may come in between
    monkeypatch.setattr(pack_module("nodes.writing.lora_file"), "datetime", today)

    def save(lora: Any) -> str:
        listed = execute(node("save_lora.SSRSaveLoRA"), lora=lora, filename_prefix="m", dtype="float32")[0]
        path = Path(tmp_path) / "loras" / listed
        content = path.read_bytes()
        path.unlink()  # the next one then has the same name, which is in its metadata
        return hashlib.sha256(content).hexdigest()

    return save


def merged(model: Any, seed: int = 3, sampler: str = "euler", **options: Any) -> Any:
    tasks = [
        task(flux_lora("kohya", rank=4, alpha=2.0, seed=1), "a", seeds=(1, 2)),
        task(flux_lora("diffusers", rank=3, seed=2), "b"),
        task(lora_of("loha"), "c"),
    ]
    stats = collect(model, *tasks, steps=3, seed=seed, refine=1, tokens=10, sampler_name=sampler)
    return solve(stats, **options)[0]


def disturb(model: Any, number: int) -> None:
    """Other seeds, other merges, other images, all global random states."""
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)
    torch.rand(number)
    if number % 2:
        sample(model, seed=number)
        merged(model, seed=number, rank=2)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_merge_is_the_same_file_whatever_was_run_before(sampler, tiny_flux, saved):
    model = tiny_flux()
    found = set()
    for number in range(5):
        disturb(model, number)
        found.add(saved(merged(model, sampler=sampler)))
    assert len(found) == 1
    assert saved(merged(model, seed=4, sampler=sampler)) not in found


def test_another_copy_of_the_model_and_a_smaller_rank_make_the_same_file_too(tiny_flux, saved):
    first, second = tiny_flux(), tiny_flux()
    disturb(first, 1)
    assert saved(merged(first, rank=3)) == saved(merged(second, rank=3))


def test_a_merge_leaves_the_global_random_states_of_others_alone(tiny_flux):
    """Those of Python and numpy; torch's own is set by ComfyUI's samplers."""
    model = tiny_flux()
    random.seed(1)
    numpy.random.seed(1)
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    merged(model)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
