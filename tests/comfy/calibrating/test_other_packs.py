"""Other packs on the same layers of a real ComfyUI: their hooks, wrappers and patches are as they were, and work."""

import pytest
import torch
from torch.nn.modules import module as torch_module

from run_nodes import collect, hooks, load_lora, sample, solve, task
from tiny_flux import flux_lora

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LAYER = "diffusion_model.double_blocks.0.img_attn.qkv"


def two() -> list:
    return [task(flux_lora("kohya", seed=1), "a"), task(flux_lora("generic", seed=2), "b")]


def grams(stats) -> list[torch.Tensor]:
    return [statistics.gram for statistics in stats.calibration.statistics.values()]


def test_hooks_of_others_stay_in_their_order_and_are_called_as_often_as_the_layer_runs(tiny_flux):
    model, calls = tiny_flux(), []
    layer = model.model.get_submodule(LAYER)
    handles = [
        layer.register_forward_pre_hook(lambda m, args: calls.append("pre")),
        layer.register_forward_hook(lambda m, args, out: calls.append("first")),
        layer.register_forward_hook(lambda m, args, out: calls.append("second")),
        torch_module.register_module_forward_hook(lambda m, *_: calls.append("global") if m is layer else None),
    ]
    before = (list(layer._forward_pre_hooks.items()), list(layer._forward_hooks.items()))
    collect(model, *two(), steps=3, refine=1)
    assert (list(layer._forward_pre_hooks.items()), list(layer._forward_hooks.items())) == before
    for handle in handles:
        handle.remove()
    assert {calls.count(kind) for kind in ("pre", "first", "second", "global")} == {len(calls) // 4}
    assert len(calls) // 4 == 2 * (3 + 3 + 2 * 3)


def test_a_hook_that_another_pack_puts_on_and_takes_off_while_a_merge_runs_stays_its_own(tiny_flux):
    model, own = tiny_flux(), []
    layer = model.model.get_submodule(LAYER)

    def juggling(module, args):
        if own:
            own.pop().remove()
        else:
            own.append(layer.register_forward_hook(lambda *_: None))

    handle = layer.register_forward_pre_hook(juggling)
    collect(model, *two(), steps=3)
    handle.remove()
    for left in own:
        left.remove()
    assert hooks(model) == 0


def test_a_hook_of_another_pack_that_changes_what_a_layer_says_is_part_of_what_is_measured(tiny_flux):
    model = tiny_flux()
    plain = grams(collect(model, *two(), steps=2))
    layer = model.model.get_submodule(LAYER)
    handle = layer.register_forward_hook(lambda m, args, out: out * 1.5)
    changed = grams(collect(model, *two(), steps=2))
    handle.remove()
    assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, grams(collect(model, *two(), steps=2)), strict=True))


@pytest.mark.parametrize("error", [RuntimeError("a wrapper broke"), torch.OutOfMemoryError("a wrapper broke")])
def test_a_wrapper_of_another_pack_that_fails_leaves_no_hook_of_ours(error, tiny_flux):
    import comfy.patcher_extension as extension

    model = tiny_flux()
    before = sample(model)
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "other pack", wrapper)
    with pytest.raises(type(error), match="a wrapper broke"):
        collect(wrapped, *two(), steps=3)
    assert hooks(model) == 0
    assert list(wrapped.wrappers[extension.WrappersMP.DIFFUSION_MODEL]) == ["other pack"]
    assert torch.equal(sample(model), before)


@pytest.mark.parametrize("error", [RuntimeError("a wrapper broke"), torch.OutOfMemoryError("no memory is left")])
def test_what_was_measured_survives_whatever_fails_while_refining(error, tiny_flux):
    import comfy.patcher_extension as extension

    model, calls = tiny_flux(), []
    measured, steps = collect(model, *two(), steps=3), 2 * (3 + 3)

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) > steps + 8:  # in the second LoRA's comparison
            raise error
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "other pack", wrapper)
    stats = collect(wrapped, *two(), steps=3, refine=1)
    assert hooks(model) == 0
    assert len(calls) == steps + 9
    assert all(torch.equal(a, b) for a, b in zip(grams(measured), grams(stats), strict=True))
    assert stats.calibration.corrections == {}
    lora, report = solve(stats)
    assert f"Refining failed ({type(error).__name__}: {error})" in report
    plain = solve(measured)[0]
    assert all(torch.equal(lora[key], plain[key]) for key in plain)


def test_a_round_that_fails_leaves_the_rounds_before_it(tiny_flux):
    import comfy.patcher_extension as extension

    model, calls = tiny_flux(), []
    once = collect(model, *two(), steps=3, refine=1)

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2 * (3 + 3 + 6) + 8:
            raise RuntimeError("a wrapper broke")
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "other pack", wrapper)
    kept = collect(wrapped, *two(), steps=3, refine=2).calibration.corrections
    assert kept.keys() == once.calibration.corrections.keys()
    assert all(torch.equal(kept[s].target, c.target) for s, c in once.calibration.corrections.items())


def test_a_stop_while_refining_stops(tiny_flux):
    import comfy.model_management
    import comfy.patcher_extension as extension

    model, calls = tiny_flux().clone(), []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "other pack", wrapper)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        collect(model, *two(), steps=3, refine=1)
    assert hooks(model) == 0


def test_patches_and_options_of_others_on_the_model_are_as_they_were(tiny_flux):
    model = load_lora(tiny_flux(), flux_lora("generic", seed=9))
    model.set_model_patch(lambda x, *_: x, "other pack")
    before = sample(model)
    patches, options = {key: list(value) for key, value in model.patches.items()}, repr(sorted(model.model_options))
    uuid = model.patches_uuid
    collect(model, *two(), steps=3, refine=1)
    assert {key: list(value) for key, value in model.patches.items()} == patches
    assert (repr(sorted(model.model_options)), model.patches_uuid, model.injections) == (options, uuid, {})
    assert torch.equal(sample(model), before)
