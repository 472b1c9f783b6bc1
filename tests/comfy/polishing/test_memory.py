"""Memory of polishing: told before it starts, looked for, and bounded where points would take too much of it."""

import gc
import importlib
from dataclasses import replace

import pytest
import torch

from allocations import allocations
from run_nodes import collect, execute, hooks, node, solve, task
from tiny_models import FAMILIES, SPELLINGS, loras

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LARGER = 4  # times the side of a family's latent: at the smallest, activations hardly count


def prepared(family, larger=1, prompts=1, steps=1):
    """(model, SSR_STATS, LORA_MODEL)"""
    kind = FAMILIES[family]
    model = kind.build()
    spelling = SPELLINGS[family]["diffusers" if "diffusers" in SPELLINGS[family] else "kohya"]
    tasks = [
        replace(
            task(loras(model, spelling, 2, seed)[0], f"lora {seed}", 0.5),
            conditioning=[entry for prompt in range(prompts) for entry in kind.conditioning(10 * seed + prompt)],
        )
        for seed in (1, 2)
    ]
    *batch, height, width = kind.latent()["samples"].shape
    stats = collect(
        model, *tasks, steps=steps, latent={"samples": torch.zeros(*batch, larger * height, larger * width)}
    )
    return model, stats, solve(stats)[0]


def polish(model, stats, lora, **more):
    settings = {"steps": 2, "seed": 0, "batch": 2, **more}
    return execute(node("polish.SSRPolish"), model=model, stats=stats, lora=lora, **settings)


@pytest.mark.parametrize("family", ["Flux", "SDXL", "Wan2.1"])
def test_no_more_is_taken_than_told_and_hardly_less(family, monkeypatch):
    module = importlib.import_module("ssr_pack.nodes.polishing.polish")
    told, taken = [], []

    def counted(*args):
        gc.collect()
        found = []
        taken.append(allocations(lambda: found.append(module_distil(*args))).peak)
        return found[0]

    def look_for(need, device, tell):
        told.append(need.device + need.results // 2)  # while gradients pass, there is only the best step so far

    module_distil = module.distil
    monkeypatch.setattr(module, "distil", counted)
    monkeypatch.setattr(module, "look_for", look_for)
    polish(*prepared(family, LARGER))
    assert taken[0] <= told[0] < 1.15 * taken[0]


@pytest.fixture(scope="module")
def flux(pack):
    return prepared("Flux", prompts=3, steps=8)


def test_too_little_memory_is_refused_before_the_first_gradient(flux, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    module = importlib.import_module("ssr_pack.nodes.polishing.polish")
    look_for, lacking = module.look_for, 0

    def look_for_where_so_much_is_free(need, device, tell):
        free = need.device + need.results - lacking  # the points are in memory by then
        with monkeypatch.context() as patched:
            patched.setattr(management, "get_free_memory", lambda device: free)
            look_for(need, device, tell)

    def began(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "distil", began)
    monkeypatch.setattr(module, "look_for", look_for_where_so_much_is_free)
    with pytest.raises(ZeroDivisionError):
        polish(*flux)
    lacking = 1
    with pytest.raises(ValueError, match=r"takes \d+ MB of memory.*lower rank.*only_up.*smaller latent"):
        polish(*flux)
    assert hooks(flux[0]) == 0 and not management.in_training


def test_room_on_the_device_is_made_or_it_is_refused(pack, monkeypatch):
    core = importlib.import_module("ssr_pack.ssr_core")
    management = importlib.import_module("comfy.model_management")
    memory = importlib.import_module("ssr_pack.nodes.polishing.memory")
    need, device = core.DistillationRequirement(2000, 10, 20), torch.device("cuda", 0)
    freed, free = [], {"cuda": 1000, "cpu": 20}

    def free_memory(size, device):
        freed.append(size)
        free["cuda"] = left

    monkeypatch.setattr(management, "free_memory", free_memory)
    monkeypatch.setattr(management, "get_free_memory", lambda device: free[device.type])
    told, left = [], 2000
    memory.look_for(need, device, told.append)
    assert freed == [2000] and "on cuda:0" in told[0]
    left = 1999
    with pytest.raises(core.SSRError, match="cuda:0"):
        memory.look_for(need, device, told.append)
    free["cpu"] = 19
    with pytest.raises(core.SSRError, match="of memory"):
        memory.look_for(need, device, told.append)


def test_what_it_takes_is_told(flux, monkeypatch):
    told = []
    monkeypatch.setattr(importlib.import_module("ssr_pack.nodes.polish"), "say", lambda cls, text: told.append(text))
    report = polish(*flux)[1]
    said = next(number for number, text in enumerate(told) if text.startswith("Polishing takes"))
    assert said < next(number for number, text in enumerate(told) if text.startswith("Step 0"))
    assert "beside the model" in report and "one step in" not in report
    assert "96 points to learn from, 8 to judge by" in report


def test_where_points_take_too_much_memory_fewer_steps_of_each_prompt_are_kept(flux, monkeypatch):
    module = importlib.import_module("ssr_pack.nodes.polishing.polish")
    points, memory_of = [], importlib.import_module("ssr_pack.ssr_core").memory_of
    distil = module.distil

    def seen(network, diffusion_model, updates, learnt, *rest):
        points.append(learnt)
        return distil(network, diffusion_model, updates, learnt, *rest)

    monkeypatch.setattr(module, "distil", seen)
    polish(*flux)
    monkeypatch.setattr(module, "room_for_points", lambda: 0.3 * memory_of(points[0]))
    report = polish(*flux)[1]
    assert "24 points to learn from" in report and "one step in 4" in report
    assert memory_of(points[1]) <= 0.3 * memory_of(points[0])
    levels = [{float(point.args[1][0]) for point in kept} for kept in points]
    assert levels[0] == levels[1]  # of some prompt, each
    monkeypatch.setattr(module, "room_for_points", lambda: 0.0)
    assert "12 points to learn from" in polish(*flux)[1]  # one stays of each prompt, which was sampled twice


def test_steps_that_call_the_model_twice_stay_whole():
    module = importlib.import_module("ssr_pack.nodes.polishing.points")
    point = importlib.import_module("ssr_pack.ssr_core").Point
    steps = [[point(0, (torch.zeros(10),), {}, ()) for _ in range(2)] for _ in range(8)]
    notes = module.Notes(room=16 * 40)
    notes.add(steps)
    assert notes.every == 1
    notes.add(steps[::-1])  # the tensors of both prompts are the same here, so there is room
    assert notes.every == 1
    notes = module.Notes(room=9 * 40)
    notes.add(steps)
    assert notes.every == 2 and notes.points == [one for step in steps[::2] for one in step]
