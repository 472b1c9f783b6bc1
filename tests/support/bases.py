"""The tiny Flux in the forms in which big models are kept: fp8, int8, 4 bit, GGUF, half precision, offloaded."""

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tiny_flux import StateDict, flux_state_dict


@dataclass(frozen=True)
class Base:
    """A model as it is kept and run, and what it stands for."""

    model: Any  # a ModelPatcher
    exact: Any  # the same from de-quantized weights, in float32, neither compiled nor offloaded


def load(weights: StateDict, **model_options: Any) -> Any:
    """A ModelPatcher, as the stock Load Diffusion Model makes one."""
    sd = importlib.import_module("comfy.sd")
    with torch.inference_mode():  # as ComfyUI executes; moving quantized weights fails if it is not always the same
        model = sd.load_diffusion_model_state_dict(dict(weights), model_options=model_options)
    assert model is not None, "ComfyUI did not recognise the tiny Flux"
    return model


def of(model: Any) -> Base:
    return Base(model, load(dequantized(model)))


# --- what is in a checkpoint ---


def is_big(name: str, weight: Tensor) -> bool:
    """Whether quantized checkpoints quantize it: the layers of the blocks, not embedders, norms and biases."""
    return name.endswith(".weight") and weight.ndim == 2 and "_blocks." in name


def scaled_fp8() -> StateDict:
    """The older layout, with `scale_weight` beside each weight."""
    weights: StateDict = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, weight in flux_state_dict().items():
        if is_big(name, weight):
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            weights[f"{name.removesuffix('weight')}scale_weight"] = scale
            weight = (weight / scale).to(torch.float8_e4m3fn)
        weights[name] = weight
    return weights


def quantized(algorithm: str, layout: str, settings: dict[str, Any] | None = None, **how: Any) -> StateDict:
    """The current layout, with `comfy_quant` beside each weight. Mixed: the text stream's weights stay as they are."""
    quant_ops = importlib.import_module("comfy.quant_ops")
    if algorithm not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI knows no {algorithm}")
    description = torch.tensor(list(json.dumps({"format": algorithm, **(settings or {})}).encode()), dtype=torch.uint8)
    weights: StateDict = {}
    for name, weight in flux_state_dict().items():
        if is_big(name, weight) and ".txt_" not in name:
            weights |= quant_ops.QuantizedTensor.from_float(weight, layout, **how).state_dict(name)
            weights[f"{name.removesuffix('weight')}comfy_quant"] = description
        else:
            weights[name] = weight
    return weights


ROTATED: dict[str, Any] = {"convrot_groupsize": 64}  # a power of 4 that divides the tiny model's widths
QUANTIZED: dict[str, Callable[[], StateDict]] = {
    "fp8 e4m3, scaled": lambda: quantized("float8_e4m3fn", "TensorCoreFP8E4M3Layout", scale="recalculate"),
    "mxfp8": lambda: quantized("mxfp8", "TensorCoreMXFP8Layout"),
    "nvfp4": lambda: quantized("nvfp4", "TensorCoreNVFP4Layout"),
    "int8": lambda: quantized("int8_tensorwise", "TensorWiseINT8Layout"),
    "int8, rotated": lambda: quantized(
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        ROTATED | {"convrot": True},
        per_channel=True,
        convrot=True,
        **ROTATED,
    ),
    "int4, rotated": lambda: quantized("convrot_w4a4", "TensorCoreConvRotW4A4Layout", ROTATED, **ROTATED),
}


def write_gguf(path: Path, kind: str, width: int = 128) -> None:
    """`kind` is a quantization that the gguf package can write, such as Q8_0."""
    gguf = importlib.import_module("gguf")
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "flux")
    for name, weight in flux_state_dict(width).items():
        values = weight.numpy()
        if is_big(name, weight):
            writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- how it is loaded ---


def gguf_pack() -> Any:
    """ComfyUI-GGUF, imported the way ComfyUI imports it. Skips without one; it has no package that could be fetched."""
    given = os.environ.get("COMFYUI_GGUF_PATH")
    if not given:
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF_PATH to its folder, and install the package gguf")
    folder = Path(given).expanduser().resolve()
    if not (folder / "loader.py").is_file():
        raise ValueError(f"COMFYUI_GGUF_PATH={folder} is no ComfyUI-GGUF folder: it has no loader.py")
    if "gguf_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "gguf_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["gguf_pack"] = module
        spec.loader.exec_module(module)
    return sys.modules["gguf_pack"]


def load_gguf(kind: str, width: int = 128) -> Any:
    """Through ComfyUI-GGUF's own loader node."""
    node = gguf_pack().NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
    folder = Path(importlib.import_module("folder_paths").get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tiny-{width}-{kind}.gguf"
    write_gguf(folder / name, kind, width)
    with torch.inference_mode():
        return node.load_unet(name)[0]


@contextmanager
def a_device_that(**answers: bool) -> Iterator[None]:
    """While a model is loaded, ComfyUI's own questions about the device are answered like on a GPU."""
    management = importlib.import_module("comfy.model_management")
    with ExitStack() as stack:
        for question, answer in answers.items():
            stack.enter_context(mock.patch.object(management, question, return_value=answer))
        yield


@contextmanager
def room_for(model: Any, share: float) -> Iterator[None]:
    """No more than `share` of the model's weights are loaded; the others are cast when a layer runs."""
    cls = type(model)
    original = cls.partially_load
    budget = share * model.model_size()

    def partially_load(self: Any, device_to: Any, extra_memory: float = 0, **more: Any) -> Any:
        if self.model is model.model:
            extra_memory = min(extra_memory, max(budget - self.model.model_loaded_weight_memory, 0.1))
        return original(self, device_to, extra_memory, **more)

    with mock.patch.object(cls, "partially_load", partially_load):
        yield


# --- what it stands for ---


def dequantized(model: Any) -> StateDict:
    """The weights of the diffusion model as they are used, float32."""
    return {name: _dequantized(value) for name, value in model.model.diffusion_model.named_parameters()}


def _dequantized(weight: Tensor) -> Tensor:
    if hasattr(weight, "tensor_type"):  # ComfyUI-GGUF's
        unpack = importlib.import_module("gguf_pack.dequant").dequantize_tensor
        return unpack(weight, torch.float32).as_subclass(Tensor).clone()
    if hasattr(weight, "_qdata"):  # ComfyUI's
        weight = weight.dequantize()
    return weight.detach().float().clone()


def stored(model: Any) -> dict[str, tuple]:
    """What is stored as each weight of a model, scales included, as a digest of every byte."""
    return {
        name: (*map(_digest, _parts(value)), len(getattr(value, "patches", ())))  # ComfyUI-GGUF keeps LoRAs there
        for name, value in (*model.model.named_parameters(), *model.model.named_buffers())
    }


def _parts(weight: Tensor) -> list[Tensor]:
    if not hasattr(weight, "_qdata"):
        return [weight.detach()]
    return [weight._qdata, *(value for value in vars(weight._params).values() if isinstance(value, Tensor))]


def _digest(part: Tensor) -> str:
    raw = part.as_subclass(Tensor).contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
