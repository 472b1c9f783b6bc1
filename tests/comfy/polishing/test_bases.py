"""SSR Polish on every form of base: quantized, cast, offloaded, patched. Gradients are those of the exact weights.

The oracle is `Base.exact`: the same model with its weights de-quantized to float32.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from base_kinds import carrying_a_lora, computed_in, gguf, kept_in, offloaded, plain, quantized
from extent import chosen
from torch import Tensor
from torch.utils._pytree import tree_map

import bases
from bases import Base
from run_nodes import collect, execute, hooks, node, relative, sample, solve, task
from tiny_flux import conditioning, flux_lora, flux_state_dict

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LORAS = tuple(flux_lora("kohya", rank=2, seed=seed) for seed in (1, 2))

Make = Callable[[ExitStack], Base]


def patched(model: Any) -> Any:
    """In all the ways in which nodes change how a model runs without changing a weight."""
    wrap_model = importlib.import_module("comfy.patcher_extension").WrappersMP.DIFFUSION_MODEL
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, **more: {"q": 0.7 * q, "k": k, "v": v})
    model.set_model_unet_function_wrapper(lambda run, given: 1.1 * run(given["input"], given["timestep"], **given["c"]))
    model.add_wrapper_with_key(wrap_model, "test", lambda run, *args, **more: 0.95 * run(*args, **more))
    return model


# by how far gradients may be from those of the exact weights, relative
BASES: dict[str, tuple[float, Make]] = {
    "bf16, cast": (1e-4, lambda _: kept_in(torch.bfloat16)),
    "fp8 e4m3": (1e-4, lambda _: kept_in(torch.float8_e4m3fn)),
    "fp8 e5m2": (1e-4, lambda _: kept_in(torch.float8_e5m2)),
    "fp8, older scaled": (1e-4, lambda _: bases.of(bases.load(bases.scaled_fp8()))),
    "fp8 e4m3, scaled": (1e-4, lambda _: quantized("fp8 e4m3, scaled")),
    "mxfp8": (1e-4, lambda _: quantized("mxfp8")),
    "nvfp4": (1e-4, lambda _: quantized("nvfp4")),
    "gguf Q8_0": (1e-4, lambda _: gguf("Q8_0")),
    "gguf F16": (1e-4, lambda _: gguf("F16")),
    "gguf Q4_0, carrying a lora": (1e-4, lambda _: carrying_a_lora(gguf("Q4_0"))),
    "carrying a lora": (1e-4, lambda _: carrying_a_lora(bases.of(plain()))),
    "partly offloaded": (1e-4, lambda stack: offloaded(quantized("fp8 e4m3, scaled"), stack)),
    "partly offloaded, carrying a lora": (1e-4, lambda stack: offloaded(carrying_a_lora(bases.of(plain())), stack)),
    "patched": (1e-4, lambda _: Base(patched(plain()), patched(plain()))),
    # their layers round what goes in or out too
    "bf16": (0.03, lambda _: computed_in(torch.bfloat16, should_use_bf16=True)),
    "fp16": (0.005, lambda _: computed_in(torch.float16, should_use_fp16=True)),
    "fp8, computed in fp8": (0.2, lambda _: quantized("fp8 e4m3, scaled", supports_fp8_compute=True)),
    "int8": (0.05, lambda _: quantized("int8")),
    "int8, rotated": (0.05, lambda _: quantized("int8, rotated")),
}


TELLING = ("nvfp4", "gguf Q4_0, carrying a lora", "partly offloaded", "fp16")


@pytest.fixture(scope="module", params=chosen(BASES, TELLING))
def case(request, pack) -> Iterator[tuple[float, Base]]:
    limit, make = BASES[request.param]
    with ExitStack() as stack:
        yield limit, make(stack)


def test_a_base_whose_kernels_have_no_gradient_is_refused_by_name(pack):
    core = importlib.import_module("ssr_pack.ssr_core")
    model = quantized("int4, rotated").model
    latent, weights = sample(model), bases.stored(model)
    stats = collect(model, *tasks(), steps=2)
    with pytest.raises(core.SolveError, match=r"No gradient passes through diffusion_model\.\w+_blocks\.\d.*bf16"):
        polish(model, stats, solve(stats)[0])
    assert hooks(model) == 0
    assert bases.stored(model) == weights
    assert torch.equal(sample(model), latent)


# --- what else may be on a model ---


def prompts(*seeds: int, tokens: int = 8) -> list[Any]:
    return [entry for seed in seeds for entry in conditioning(seed, tokens)]


@pytest.mark.parametrize("tokens", [8, 12])  # a negative prompt of another length is a call of its own
def test_cfg_with_a_negative_prompt(pack, tokens):
    model = plain()
    stats = collect(model, *tasks(), steps=2, cfg=3.0, negative=prompts(5, tokens=tokens))
    lora, report = polish(model, stats, solve(stats, rank=2)[0])
    before, after = errors(lora)
    assert after < 0.95 * before, report


def test_a_batch_of_latents(pack):
    model = plain()
    stats = collect(model, *tasks(), steps=2, batch=2)
    before, after = errors(polish(model, stats, solve(stats, rank=2)[0])[0])
    assert after < 0.95 * before


def test_steps_from_the_middle_that_another_model_begins(pack):
    model, other = plain(), bases.load(flux_state_dict(seed=3))
    calls: list[int] = []
    handle = other.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    stats = collect(model, *tasks(), steps=4, start_at_step=2, model_before=other)
    calls.clear()
    before, after = errors(polish(model, stats, solve(stats, rank=2)[0], model_before=other)[0])
    handle.remove()
    assert calls and after < 0.95 * before


def tasks() -> list[Any]:
    return [task(lora, f"lora{number}", seeds=(number,)) for number, lora in enumerate(LORAS)]


def polish(model: Any, stats: Any, lora: Any, **more: Any) -> tuple[Any, str]:
    """(LORA_MODEL, report)"""
    settings = {"steps": 12, "seed": 0, "batch": 4, **more}
    return execute(node("polish.SSRPolish"), model=model, stats=stats, lora=lora, **settings)[:2]


def errors(lora: Any) -> tuple[float, float]:
    """Before and after."""
    before, after = json.loads(lora.metadata["ssr.polish"])["error"]
    return before, after


def test_the_error_falls_and_the_model_is_as_before(case):
    model = case[1].model
    latent, weights = sample(model), bases.stored(model)
    stats = collect(model, *tasks(), steps=2)
    before, after = errors(polish(model, stats, solve(stats, rank=2)[0])[0])
    assert after < 0.95 * before
    assert bases.stored(model) == weights
    assert hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert torch.equal(sample(model), latent)


def test_gradients_are_those_of_the_exact_weights(case):
    limit, base = case
    (point, *_) = recorded(base.model)
    exact = replace(point, **{name: tree_map(as_float32, getattr(point, name)) for name in ("args", "kwargs")})
    found, expected = gradient(base.model, point), gradient(base.exact, exact)
    assert expected.norm() > 0
    assert relative(found, expected) < limit


def as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def recorded(model: Any) -> list[Any]:
    """Points of the first LoRA."""
    core = importlib.import_module("ssr_pack.ssr_core")
    recorder = core.PointRecorder(0)
    with recorder.attached(model.model.diffusion_model):
        sample(model, steps=2)
    return list(recorder.points)


def gradient(model: Any, point: Any) -> Tensor:
    """Of all factors of a LoRA, in one vector."""
    learning, frozen, judge, overwriting = (
        importlib.import_module(f"ssr_pack.ssr_core.distillation.{name}")
        for name in ("factors", "frozen", "judge", "overwriting")
    )
    core = importlib.import_module("ssr_pack.ssr_core")
    training = importlib.import_module("ssr_pack.nodes.polishing.training")
    patches = importlib.import_module("ssr_pack.nodes.reading.patches")
    updates = patches.read_task(task(LORAS[0]), model).model.updates
    factors = {site: learning.Learning(update, model.load_device) for site, update in updates.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())  # as ComfyUI executes
        network = stack.enter_context(training.in_training(model, 0))
        for inside in (frozen.frozen(network), torch.enable_grad(), core.Branch(factors).attached(network)):
            stack.enter_context(inside)
        with overwriting.Overwriting():
            judge.distance(point, network.diffusion_model, model.load_device).backward()
    return torch.cat([one.grad.flatten() for factor in factors.values() for one in factor.parameters()])
