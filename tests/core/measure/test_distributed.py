"""Distributed: two processes that collect on half of the prompts each have what one has that collects on all."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from ssr_core import (
    Calibration,
    Lora,
    StatisticsCollector,
    StatisticsError,
    load_statistics,
    merge,
    save_statistics,
)
from ssr_core.measure.distributed import sum_calibrations, sum_surveys
from synthetic import dense, mlp, random, random_lora

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
LORAS = {"cat": 3, "dog": 2}


def loras(model: nn.Module) -> list[Lora]:
    return [random_lora(name, model, rank, seed) for seed, (name, rank) in enumerate(LORAS.items())]


def batch(task: int, prompt: int) -> Tensor:
    return random(20 + prompt, 8, seed=10 * task + prompt) + task


def collected(prompts: list[int], between=lambda collector: None, among=lambda calibration: calibration) -> Calibration:
    """Of these prompts: surveyed, measured and refined."""
    model = mlp()
    collector = StatisticsCollector(loras(model))
    for task in range(2):
        for prompt in prompts:
            with torch.no_grad(), collector.surveying(model, task, rows=3):
                model(batch(task, prompt))
    between(collector)
    collector.see(rows=3)
    for task in range(2):
        for prompt in prompts:
            with torch.no_grad(), collector.watching(model, task) as recording:
                recording.at(float(prompt))
                model(batch(task, prompt))
    updates = merge(among(collector.calibration())).updates
    for task in range(2):
        for prompt in prompts:
            with torch.no_grad(), collector.refining(model, task, updates) as run:
                with run.alone():
                    model(batch(task, prompt))
                with run.merged():
                    model(batch(task, prompt))
    return among(collector.calibration())


def process(rank: int, folder: str, alike: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        if alike:
            found = collected([[0, 2], [1]][rank], between=sum_surveys, among=sum_calibrations)
            save_statistics(found, f"{folder}/{rank}.safetensors")
        else:
            with pytest.raises(StatisticsError, match="Process 1 collected with other LoRAs or context rows"):
                collected([rank], among=sum_calibrations)
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_other_folder_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its tests have run, ComfyUI is on sys.path, and its tests/ hides this one from a spawned process."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "main.py").is_file()])


def run(folder, alike: bool = True) -> None:
    mp.spawn(process, (str(folder), alike), nprocs=2)


def test_two_processes_have_the_sum_of_what_one_would_have_collected(tmp_path):
    run(tmp_path)
    alone = collected([0, 1, 2])
    for rank in range(2):
        found = load_statistics(tmp_path / f"{rank}.safetensors", alone.loras)
        for site, statistics in alone.statistics.items():
            assert found.statistics[site].tokens == statistics.tokens == (63, 63)
            assert found.statistics[site].levels == statistics.levels
            # the processes' context rows differ from one's by the rounding of a sum
            torch.testing.assert_close(found.statistics[site].gram, statistics.gram, rtol=1e-5, atol=1e-4)
        one, other = merge(alone).updates, merge(found).updates
        for site in one:
            torch.testing.assert_close(dense(other[site]), dense(one[site]), rtol=1e-4, atol=1e-5)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_processes_that_see_other_context_rows_are_told_so(tmp_path):
    run(tmp_path, alike=False)
