"""Collect, Solve and Apply on every form of base: quantized, cast, offloaded, compiled, patched. No weight is touched.

The oracle is `Base.exact`: the same model with its weights de-quantized to float32, and ComfyUI's own LoRA loader.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from base_kinds import SPEED, carrying_a_lora, computed_in, gguf, kept_in, offloaded, plain, quantized
from torch import Tensor

import bases
from allocations import allocations
from bases import Base
from lora_kinds import lora_of
from run_nodes import apply, collect, execute, hooks, load_lora, relative, sample, solve, task
from tiny_flux import conditioning, empty_latent, flux_lora, flux_state_dict

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

STEPS = 3  # as many as refinement needs
LORAS = (flux_lora("kohya", rank=4, alpha=2.0, seed=1), flux_lora("diffusers", rank=3, seed=2))


# --- the bases ---


def rounded_with_a_lora(base: Base) -> Base:
    """Where ComfyUI rounds the sum to the base's format: that is the base then."""
    with torch.inference_mode():
        model = load_lora(base.model, SPEED, 0.7)
    sample(model, steps=1)
    return bases.of(model)


def compiled() -> Base:
    """Block by block, which takes half as long as all in one piece."""
    compile_blocks = importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    model = plain().clone()
    blocks = [f"diffusion_model.{block}" for block in ("double_blocks.0", "single_blocks.0", "single_blocks.1")]
    compile_blocks(model=model, backend="eager", keys=blocks)  # a backend without a C compiler
    return Base(model, plain())


def carrying_a_bypass_lora() -> Base:
    sd = importlib.import_module("comfy.sd")
    model = sd.load_bypass_lora_for_models(plain(), None, dict(SPEED), 0.7, 0)[0]
    return Base(model, load_lora(plain(), SPEED, 0.7))


def patched(model: Any) -> Any:
    """In all the ways in which nodes change how a model runs without changing a weight."""
    nodes = importlib.import_module("comfy_extras.nodes_model_advanced")
    wrap_model = importlib.import_module("comfy.patcher_extension").WrappersMP.DIFFUSION_MODEL
    model = nodes.ModelSamplingFlux().patch(model, 1.5, 0.5, 512, 512)[0]
    model.set_model_attn1_patch(lambda q, k, v, **more: {"q": 0.7 * q, "k": k, "v": v})
    model.set_model_unet_function_wrapper(lambda run, given: 1.1 * run(given["input"], given["timestep"], **given["c"]))
    model.add_wrapper_with_key(wrap_model, "test", lambda run, *args, **more: 0.95 * run(*args, **more))
    return model


Make = Callable[[ExitStack], Base]

FLOAT32: dict[str, Make] = {
    "bf16, cast": lambda _: kept_in(torch.bfloat16),
    "fp8 e4m3": lambda _: kept_in(torch.float8_e4m3fn),
    "fp8 e5m2": lambda _: kept_in(torch.float8_e5m2),
    "fp8, older scaled": lambda _: bases.of(bases.load(bases.scaled_fp8())),
    **{form: lambda _, form=form: quantized(form) for form in ("fp8 e4m3, scaled", "mxfp8", "nvfp4")},
    "gguf Q8_0": lambda _: gguf("Q8_0"),
    "gguf F16": lambda _: gguf("F16"),
    "gguf Q4_0, carrying a lora": lambda _: carrying_a_lora(gguf("Q4_0")),
    "fp8 e4m3, carrying a lora": lambda _: rounded_with_a_lora(kept_in(torch.float8_e4m3fn)),
    "carrying a bypass lora": lambda _: carrying_a_bypass_lora(),
    "partly offloaded": lambda stack: offloaded(quantized("fp8 e4m3, scaled"), stack),
    "partly offloaded, carrying a lora": lambda stack: offloaded(carrying_a_lora(bases.of(plain())), stack),
    "compiled": lambda _: compiled(),
    "patched": lambda _: Base(patched(plain()), patched(plain())),
}

# their layers round what goes in or out too, so that even without a LoRA they are not what their weights stand for
ROUNDING: dict[str, Make] = {
    "bf16": lambda _: computed_in(torch.bfloat16, should_use_bf16=True),
    "fp16": lambda _: computed_in(torch.float16, should_use_fp16=True),
    "fp8, computed in fp8": lambda _: quantized("fp8 e4m3, scaled", supports_fp8_compute=True),
    **{form: lambda _, form=form: quantized(form) for form in ("int8", "int8, rotated", "int4, rotated")},
}

# on the others refinement is left out, to save time
REFINED = {"fp8 e4m3, scaled", "gguf Q8_0", "fp8 e4m3, carrying a lora", "partly offloaded", "compiled", "patched"}


def calls(model: Any, run: Callable[[], Any]) -> Tensor:
    """What the diffusion model returned each time it was called during `run`."""
    seen: list[Tensor] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda m, args, out: seen.append(out.float().clone()))
    try:
        run()
    finally:
        handle.remove()
    return torch.stack(seen)


def in_turn(model: Any, run: Callable[[int], Any]) -> Tensor:
    """The calls of run(0), then those of run(1)."""
    return torch.cat([calls(model, partial(run, i)) for i in range(2)])


def tasks(loras=LORAS) -> list[Any]:
    return [task(lora, f"lora{i}", seeds=(i,)) for i, lora in enumerate(loras)]


@dataclass(frozen=True)
class Case:
    """A base on which everything has been collected once."""

    name: str
    base: Base

    @cached_property
    def before(self) -> tuple[Tensor, dict[str, tuple]]:
        """What the base samples and stores before anything is collected."""
        return sample(self.base.model, steps=STEPS), bases.stored(self.base.model)

    @cached_property
    def collected(self) -> tuple[Any, Tensor]:
        """The statistics, and what the model returned at each call."""
        assert self.before
        stats: list[Any] = []
        model, refine = self.base.model, int(self.name in REFINED)
        seen = calls(model, lambda: stats.append(collect(model, *tasks(), steps=STEPS, context=8, refine=refine)))
        return stats[0], seen

    @cached_property
    def expected(self) -> Tensor:
        """What the exact model returns at each step under the first LoRA, then under the second."""
        exact = self.base.exact
        return self._sampled(exact, [load_lora(exact, lora) for lora in LORAS])

    @cached_property
    def own_error(self) -> float:
        """How far the base is from the exact model without any LoRA."""
        model, exact = self.base.model, self.base.exact
        return relative(self._sampled(model, [model, model]), self._sampled(exact, [exact, exact]))

    @cached_property
    def patching_error(self) -> float:
        """How far the base with a LoRA patched in is from the exact model with the same."""
        with torch.inference_mode():
            found, exact = (load_lora(one, LORAS[0]) for one in (self.base.model, self.base.exact))
        return relative(sample(found, steps=STEPS), sample(exact, steps=STEPS))

    @staticmethod
    def _sampled(model: Any, variants: list[Any]) -> Tensor:
        return in_turn(model, lambda i: sample(variants[i], steps=STEPS, prompt=i))


@pytest.fixture(scope="module", params=[*FLOAT32, *ROUNDING])
def case(request, pack) -> Iterator[Case]:
    with ExitStack() as stack:
        yield Case(request.param, (FLOAT32 | ROUNDING)[request.param](stack))


# --- on every base ---


def test_under_a_lora_the_base_returns_what_its_exact_weights_with_that_lora_return(case):
    """While looking, while measuring, and wherever refinement runs the LoRA alone."""
    _, seen = case.collected
    looking, measuring, refining = seen.split([2 * STEPS, 2 * STEPS, len(seen) - 4 * STEPS])
    # the hooks are float32 beside a layer: they may add rounding of float32, but nothing of the base's own coarseness
    limit = 1e-5 if case.name in FLOAT32 else 1.25 * case.own_error
    for run in (looking, measuring, *([refining[::2]] if case.name in REFINED else [])):
        assert relative(run, case.expected) < limit
    assert relative(case.expected[:STEPS], case.expected[STEPS:]) > 0.1  # the LoRAs matter


def test_every_layer_that_a_lora_changes_counts_its_tokens(case):
    statistics = case.collected[0].calibration.statistics
    image, text = 16, 8  # tokens
    assert len(statistics) == 26
    assert {one.tokens for one in statistics.values()} == {
        (STEPS * n, STEPS * n) for n in (1, text, image, image + text)
    }


def test_collecting_leaves_every_byte_of_every_weight_as_it_was(case):
    latent, weights = case.before
    assert case.collected
    assert bases.stored(case.base.model) == weights
    assert hooks(case.base.model) == 0
    assert torch.equal(sample(case.base.model, steps=STEPS), latent)


def test_an_error_while_sampling_leaves_every_byte_of_every_weight_as_it_was(case):
    latent, weights = case.before
    model, left = case.base.model, [True, True, True]

    def breaks(*_: Any) -> None:
        left.pop()
        if not left:
            raise RuntimeError("layer broke")

    handle = model.model.diffusion_model.single_blocks[1].linear2.register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="layer broke"):
        collect(model, *tasks(), steps=STEPS)
    handle.remove()
    assert hooks(model) == 0
    assert bases.stored(model) == weights
    assert torch.equal(sample(model, steps=STEPS), latent)


def test_the_merge_goes_onto_the_base_it_was_collected_on(case):
    stats, _ = case.collected
    lora, _ = solve(stats)
    merged, wanted = (sample(apply(one, lora), steps=STEPS) for one in (case.base.model, case.base.exact))
    bare = sample(case.base.model, steps=STEPS)
    # ComfyUI rounds what it patches to the base's own format; a LoRA from Load LoRA tells how much that is
    error = relative(merged, wanted)
    assert error < 1e-5 or error < 2 * case.patching_error
    assert relative(merged, bare) > 0.1
    assert torch.equal(bare, case.before[0])


PACKED = ("fp8 e4m3, scaled", "nvfp4", "int8, rotated", "gguf Q8_0", "gguf F16", "gguf Q4_0, carrying a lora")


@pytest.mark.parametrize("case", ["fp8 e4m3", *PACKED], indirect=True)
def test_adapters_that_follow_the_bases_weight_are_read_with_it_de_quantized(case):
    assert case.before  # loaded and run
    doras = lora_of("dora", seed=1), flux_lora("kohya", rank=2, seed=2)
    found, exact = (
        collect(one, *tasks(doras), steps=1, context=0).calibration.subspaces
        for one in (case.base.model, case.base.exact)
    )
    changed = [site for site, space in exact.items() if space.ranks[0]]
    assert len(changed) == 3
    for site in changed:
        assert relative(found[site].task(0).dense(), exact[site].task(0).dense()) < 1e-5


@pytest.mark.parametrize("case", ["fp8 e4m3, scaled", "gguf Q8_0"], indirect=True)
def test_differences_of_norms_and_biases_are_on_the_base_only_while_their_lora_is_measured(case):
    latent, weights = case.before
    layer, norm = (f"diffusion_model.double_blocks.0.img_attn.{name}" for name in ("proj", "norm.query_norm"))
    differences = {f"{layer}.diff_b": torch.full((128,), 0.5), f"{norm}.diff": torch.full((128,), 0.5)}
    loras = LORAS[0] | differences, LORAS[1]
    seen = calls(case.base.model, lambda: collect(case.base.model, *tasks(loras), steps=1, context=0))
    exact = case.base.exact
    expected = in_turn(exact, lambda i: sample(load_lora(exact, loras[i]), steps=1, prompt=i))
    assert relative(seen, expected) < 1e-5
    assert torch.equal(sample(case.base.model, steps=STEPS), latent)
    assert bases.stored(case.base.model) == weights


# --- the bases are what they say ---


@pytest.mark.parametrize("case", ["partly offloaded", "partly offloaded, carrying a lora"], indirect=True)
def test_a_part_of_the_layers_is_really_offloaded(case):
    assert case.before
    layers = [module for module in case.base.model.model.modules() if hasattr(module, "comfy_cast_weights")]
    cast = [module for module in layers if hasattr(module, "prev_comfy_cast_weights")]
    assert case.base.model.model.model_lowvram
    assert 0 < len(cast) < len(layers)


@pytest.mark.parametrize("case", ["compiled"], indirect=True)
def test_a_hook_on_the_compiled_model_fires_while_collecting_and_never_otherwise(case):
    assert case.before  # it was compiled then
    fired: list[int] = []
    layer = case.base.model.model.diffusion_model.single_blocks[1].linear2
    handle = layer.register_forward_hook(lambda *_: fired.append(1))
    sample(case.base.model, steps=1)
    without = len(fired)
    collect(case.base.model, *tasks(), steps=1, context=0)
    handle.remove()
    assert (without, len(fired)) == (0, 2)


@pytest.mark.parametrize("case", ["patched"], indirect=True)
def test_the_patches_change_what_is_sampled(case):
    assert relative(case.before[0], sample(plain(), steps=STEPS)) > 1e-2


# --- compiling ---


def test_a_model_that_will_be_compiled_at_its_first_run_is_collected_on_before_that():
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    model = execute(node, model=plain(), backend="eager")[0]
    seen = calls(model, lambda: collect(model, *tasks(), steps=1, context=0))
    exact = plain()
    expected = in_turn(exact, lambda i: sample(load_lora(exact, LORAS[i]), steps=1, prompt=i))
    assert relative(seen, expected) < 1e-5


# --- LoRAs on the conditioning ---


def hooked(seed: int, keyframes: bool) -> list[list]:
    """A prompt that brings a LoRA of its own, as Create Hook LoRA and Set CLIP Hooks make it."""
    module = importlib.import_module("comfy.hooks")
    group = module.create_hook_lora(SPEED, 0.7, 0)
    if keyframes:
        frames = module.HookKeyframeGroup()
        frames.add(module.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(module.HookKeyframe(strength=0.2, start_percent=0.5))
        group.set_keyframes_on_hooks(frames)
    return module.set_hooks_for_conditioning(conditioning(seed), group)


def hooked_tasks(keyframes: bool = False) -> list[Any]:
    return [replace(one, conditioning=hooked(i, keyframes)) for i, one in enumerate(tasks())]


def sample_prompt(model: Any, prompt: list[list]) -> None:
    ksampler = importlib.import_module("nodes").common_ksampler
    with torch.inference_mode():
        ksampler(model, 0, STEPS, 1.0, "euler", "simple", prompt, prompt, empty_latent())


@pytest.mark.parametrize("keyframes", [False, True])
def test_a_lora_that_a_calibration_prompt_brings_is_active_below_the_one_that_is_measured(keyframes):
    model = plain()
    seen = calls(model, lambda: collect(model, *hooked_tasks(keyframes), steps=STEPS, context=0))
    expected, without = (
        in_turn(model, lambda i, prompt=prompt: sample_prompt(load_lora(model, LORAS[i]), prompt(i)))
        for prompt in (lambda i: hooked(i, keyframes), conditioning)
    )
    assert relative(seen, expected) < 1e-5
    assert relative(without, expected) > 0.05


@pytest.mark.parametrize("breaks", [False, True])
def test_a_lora_that_a_calibration_prompt_brings_is_taken_off_again(breaks):
    model = bases.load(flux_state_dict(), dtype=torch.float8_e4m3fn)
    latent, weights = sample(model, steps=STEPS), bases.stored(model)
    if breaks:
        layer = model.model.diffusion_model.single_blocks[1].linear2
        handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("layer broke")))
        with pytest.raises(RuntimeError, match="layer broke"):
            collect(model, *hooked_tasks(), steps=STEPS)
        handle.remove()
    else:
        collect(model, *hooked_tasks(), steps=STEPS, refine=1)
    assert bases.stored(model) == weights
    assert (hooks(model), model.patches, model.hook_patches, model.hook_backup) == (0, {}, {}, {})
    assert torch.equal(sample(model, steps=STEPS), latent)


# --- nodes that let steps be skipped, or compile in place ---


def test_where_a_cache_skips_steps_refinement_compares_nothing_or_all():
    cache = importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode
    model = execute(cache, model=plain(), reuse_threshold=0.2, start_percent=0.0, end_percent=1.0, verbose=False)[0]
    runs = []
    handle = model.model.diffusion_model.final_layer.register_forward_hook(lambda *_: runs.append(1))
    try:
        stats = collect(model, *tasks(), steps=6, context=0, refine=1)
    finally:
        handle.remove()
    measured, refined = 2 * 6, 2 * 2 * 6  # with a LoRA on it, the cache skips no step of this model in plain sampling
    assert all(sum(found.tokens) for found in stats.calibration.statistics.values())
    if len(runs) < measured + refined:
        assert not stats.calibration.corrections
        assert "did not run as often under the merge" in solve(stats)[1]
    else:
        assert not stats.notes


def test_blocks_that_a_node_has_replaced_by_compiled_ones_are_refused_for_what_they_are():
    """ComfyUI's own loader puts no LoRA on such a model either, without a word."""
    core = importlib.import_module("ssr_pack.ssr_core")
    model = plain().clone()
    for name in ("diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"):
        model.add_object_patch(name, torch.compile(model.get_model_object(name), backend="eager"))
    with pytest.raises(core.SSRError, match="compile"):
        collect(model, *tasks(), steps=1)


# --- models whose layers cannot be seen ---


class Engine:
    """As TensorRT's node puts one in the place of the diffusion model."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Packed(torch.nn.Module):
    """As Nunchaku's layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))


def test_an_engine_is_refused_for_what_it_is():
    core = importlib.import_module("ssr_pack.ssr_core")
    model = plain()
    del model.model.diffusion_model
    model.model.diffusion_model = Engine()
    with pytest.raises(core.ModelMismatchError, match=r"compiled engine \(Engine, as of TensorRT\)"):
        collect(model, *tasks(), steps=1)


def test_a_model_with_packed_layers_is_refused_for_what_it_is():
    core = importlib.import_module("ssr_pack.ssr_core")
    model = plain()
    model.model.diffusion_model.double_blocks[0].img_mlp[0] = Packed()
    with pytest.raises(core.ModelMismatchError, match=r"Nunchaku.*double_blocks\.0\.img_mlp\.0: Packed.*own loader"):
        collect(model, *tasks(), steps=1)


# --- memory ---


WIDTH = 384  # at which the smallest weight of a LoRA's layers is larger than everything a layer reads or writes
WEIGHT = 4 * WIDTH * WIDTH  # bytes of that weight in float32


def wide_tasks() -> list[Any]:
    """A joint rank of 7 out of 384."""
    kohya = flux_lora("kohya", WIDTH, rank=4, alpha=2.0, seed=1, only=lambda layer: "single" in layer)
    return tasks((kohya, flux_lora("diffusers", WIDTH, rank=3, seed=2, only=lambda layer: "single" in layer)))


def test_nothing_of_a_weights_size_is_ever_made_while_collecting():
    """Neither while looking and measuring nor by the first merge and refinement."""
    model = bases.load(flux_state_dict(WIDTH))
    seen = allocations(lambda: collect(model, *wide_tasks(), steps=STEPS, context=8, refine=1))
    assert max(seen.sizes) < WEIGHT


def test_no_more_weights_are_cast_while_collecting_than_the_model_casts_to_run():
    model = bases.load(flux_state_dict(WIDTH), dtype=torch.float8_e4m3fn)
    sample(model, steps=1)
    running = allocations(lambda: sample(model, steps=1)).count_from(WEIGHT)
    ran: list[int] = []
    collecting = allocations(
        lambda: ran.append(len(calls(model, lambda: collect(model, *wide_tasks(), steps=1, context=8))))
    )
    assert running > 0
    assert collecting.count_from(WEIGHT) == ran[0] * running


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_measuring_takes_no_more_memory_than_sampling_and_a_few_copies_of_the_joint_loras(dtype):
    model = bases.load(flux_state_dict(WIDTH), dtype=dtype)
    sample(model, steps=1)
    sampling = allocations(lambda: sample(model, steps=1)).peak
    stats: list[Any] = []
    peak = allocations(lambda: stats.append(collect(model, *wide_tasks(), steps=1, context=0))).peak
    calibration = stats[0].calibration
    joint = sum(4 * (space.down.numel() + space.up.numel()) for space in calibration.subspaces.values())
    grams = sum(8 * one.gram.numel() for one in calibration.statistics.values())
    assert peak < sampling + 3 * (joint + grams)
