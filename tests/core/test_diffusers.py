"""The headless package with a diffusers model: PEFT's LoRAs in, one LoRA that diffusers loads out."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ssr_core
from synthetic import dense_joined

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "ff.net.0.proj", "proj_mlp", "norm.linear"]


def transformer() -> Any:
    """Flux's transformer in small, with random weights; the same ones each time."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16},
        **{"guidance_embeds": False, "axes_dims_rope": [4, 4, 8]},
    ).eval()


def batch(task: int, step: int = 0) -> dict[str, Any]:
    """What a step of sampling hands to the transformer; each task has a prompt of its own."""
    noise = torch.Generator().manual_seed(100 + step)
    prompt = torch.Generator().manual_seed(task)
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=noise),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=prompt).repeat(2, 1, 1),
        "pooled_projections": torch.randn(1, 16, generator=prompt).repeat(2, 1),
        "timestep": torch.full((2,), 1.0 - step / 4),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1),
        "txt_ids": torch.zeros(8, 3),
    }


def run(model: Any, task: int, step: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(task, step), return_dict=False)[0]


def adapter(model: Any, name: str, seed: int, rank: int, **options: Any) -> None:
    """A random LoRA on the model, alone active."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False, **options)
    model.add_adapter(config, name)
    for key, weight in model.named_parameters():
        if f".{name}." in key:
            weight.data = 0.15 * torch.randn_like(weight)
    model.set_adapter(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[list[torch.Tensor]]]:
    """Two files as diffusers saves them, and what PEFT makes of each at two steps of its own prompt."""
    files, outputs = [], []
    options: list[dict[str, Any]] = [
        {"rank": 4, "lora_alpha": 12, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 3}},
        {"rank": 3, "lora_alpha": 3, "use_rslora": True},
    ]
    for task, name in enumerate(("cat", "dog")):
        model = transformer()
        adapter(model, name, task + 1, **options[task])
        folder = tmp_path_factory.mktemp(name)
        model.save_lora_adapter(folder, adapter_name=name, weight_name=f"{name}.safetensors")
        files.append(folder / f"{name}.safetensors")
        outputs.append([run(model, task, step) for step in range(2)])
    return files, outputs


def with_weights(*updates: Any) -> Any:
    """The transformer with low-rank updates added to its weights."""
    model = transformer()
    for each in updates:
        for module, delta in dense_joined(each).items():
            model.get_submodule(module).weight.data += delta
    return model


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_a_lora_of_peft_does_in_the_hooks_what_it_does_in_peft(saved):
    files, outputs = saved
    model = transformer()
    collector = ssr_core.StatisticsCollector([ssr_core.load_lora(file) for file in files])
    for task in range(2):
        with torch.no_grad(), collector.watching(model, task):
            assert error(run(model, task), outputs[task][0]) < 1e-6
        assert error(run(transformer(), task), outputs[task][0]) > 0.05  # the LoRA does something


def test_the_merge_is_a_file_that_diffusers_loads_and_that_keeps_each_lora_better_than_stacking(saved, tmp_path):
    files, outputs = saved
    model = transformer()
    loras = [ssr_core.load_lora(file) for file in files]
    collector = ssr_core.StatisticsCollector(loras)
    tasks = [(task, step) for task in range(2) for step in range(4)]
    for task, step in tasks:
        with torch.no_grad(), collector.surveying(model, task):
            model(**batch(task, step))
    collector.see()
    for task, step in tasks:
        with torch.no_grad(), collector.watching(model, task):
            model(**batch(task, step))
    merge = ssr_core.merge(collector.calibration())
    ssr_core.save_lora(merge.updates, tmp_path / "merged.safetensors", prefix="transformer.")

    state = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    alphas = {key: value.item() for key, value in state.items() if key.endswith(".alpha")}
    loaded = transformer()
    weights = {key: value for key, value in state.items() if key not in alphas}
    loaded.load_lora_adapter(weights, prefix="transformer", network_alphas=alphas)
    patched = with_weights(merge.updates)
    stacked = with_weights(*(lora.updates for lora in loras))
    for task in range(2):
        assert error(run(loaded, task), run(patched, task)) < 1e-5
        assert error(run(loaded, task), outputs[task][0]) < error(run(stacked, task), outputs[task][0])


def test_a_folder_of_peft_is_read_with_the_alpha_of_its_config(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=7, target_modules=["0"]))
    weights = {key: torch.randn_like(value) for key, value in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 7
    (update,) = ssr_core.load_lora(tmp_path / "adapter_model.safetensors").updates.values()
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert error(model(x), model.base_model.model[0].base_layer(x) + x @ (update.up @ update.down).T) < 1e-6
