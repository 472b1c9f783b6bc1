"""LoRA files of strangers, read by the nodes in a real ComfyUI: refused by name, or sane; no code of theirs is run."""

import pytest
import torch
from safetensors.torch import save_file

from fuzzing import fuzz, node_readers

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::UserWarning")]  # of torch, about odd files

FILES = 10  # of each kind of damage; benchmarks/trust/fuzz.py has thousands


@pytest.mark.parametrize("reader", ["nodes.read_tasks", "nodes.read_tasks, .pt"])
def test_a_damaged_or_hostile_file_is_refused_by_name_or_read_as_something_finite(reader, pack, tiny_flux, tmp_path):
    chosen = node_readers(pack, tiny_flux())[reader]
    count = FILES * len(chosen.kinds)
    found, bugs = fuzz(chosen, range(10_000, 10_000 + count), tmp_path)
    assert bugs == []
    assert found.total() == count and found["error"] > count / 2


LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
THIN, FLAT = torch.ones(2000, 12), torch.ones(12, 2000)
# of a layer of 128 x 128; scaled up, such factors fill any memory
BOMBS = {
    "LoHa": {"hada_w1_a": THIN, "hada_w1_b": FLAT, "hada_w2_a": THIN, "hada_w2_b": FLAT},
    "LoKr": {"lokr_w1": torch.ones(40, 40), "lokr_w2": torch.ones(40, 40)},
    "LoKr of factors": {"lokr_w1_a": THIN, "lokr_w1_b": FLAT, "lokr_w2_a": THIN, "lokr_w2_b": FLAT},
    "GLoRA": {"a1.weight": torch.ones(128, 2), "a2.weight": torch.ones(2, 128), "b1.weight": THIN, "b2.weight": FLAT},
    "DoRA": {"lora_up.weight": THIN, "lora_down.weight": FLAT, "dora_scale": torch.ones(2000, 1)},
    "Tucker": {
        **{"lora_up.weight": torch.ones(2000, 1, 1, 1), "lora_down.weight": torch.ones(1, 2000, 1, 1)},
        "lora_mid.weight": torch.ones(1, 1, 5, 5),
    },
}


@pytest.mark.parametrize("kind", BOMBS)
def test_factors_of_something_larger_than_the_layer_are_refused_before_they_are_multiplied(
    kind, pack_module, tiny_flux, tmp_path, monkeypatch
):
    adapters, patches, task = (
        pack_module(f"nodes.{name}") for name in ("reading.adapters", "reading.patches", "reading.task")
    )
    path = tmp_path / "bomb.safetensors"
    save_file({f"{LAYER}.{end}": value.clone() for end, value in BOMBS[kind].items()}, path)
    for name in ("_factors", "dense"):
        monkeypatch.setattr(adapters, name, lambda *_: pytest.fail("the factors were multiplied"))
    with pytest.raises(pack_module("ssr_core").ModelMismatchError, match=r"bomb: .*img_attn\.proj.* another variant"):
        patches.read_tasks([task.Task("bomb", path, 1.0, [])], tiny_flux())


def test_a_lora_does_not_change_when_its_file_is_overwritten_later(pack_module, tiny_flux, tmp_path):
    """As a trainer does that writes its next epoch over the last one, while the first is being merged."""
    patches, task = (pack_module(f"nodes.{name}") for name in ("reading.patches", "reading.task"))
    path = tmp_path / "epoch.safetensors"
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 128), f"{LAYER}.lora_B.weight": torch.ones(128, 4)}
    save_file(tensors, path)
    loaded = patches.read_tasks([task.Task("epoch", path, 1.0, [])], tiny_flux())[0]
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    with path.open("r+b") as same:  # the same file, not another under its name
        same.write(content)
    (update,) = loaded.model.updates.values()
    assert update.up.all() and update.down.all()


def test_a_control_lora_without_its_other_half_is_refused_by_name(pack_module, tiny_flux, tmp_path):
    """ComfyUI knows it by two of its keys and then expects a third."""
    patches, task = (pack_module(f"nodes.{name}") for name in ("reading.patches", "reading.task"))
    keys = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")
    save_file({key: torch.ones(4, 4) for key in keys}, tmp_path / "control.safetensors")
    with pytest.raises(pack_module("ssr_core").LoraError, match=r"control has no 'img_in\.lora_B\.weight'.*incomplete"):
        patches.read_tasks([task.Task("control", tmp_path / "control.safetensors", 1.0, [])], tiny_flux())
