"""Nodes that break something, and one that looks at what is left."""

import gc
import json
import logging
import os
import random
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch.nn.modules import module as torch_module


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB, as a test")


def _error() -> None:
    raise RuntimeError("a layer broke, as a test")


FAULTS: dict[str, Callable[[], None]] = {
    "error": _error,
    "out of memory": _out_of_memory,
    "interrupt": comfy.model_management.interrupt_current_processing,
    "NaN": lambda: None,
    "none": lambda: None,
}


class TestFault(io.ComfyNode):
    """The model with one layer that fails at one of its calls, as if broken by another pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestFault",
            category="tests",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("kind", options=list(FAULTS)),
                io.String.Input("layer"),
                io.Int.Input("call", default=0, min=0),
                io.Int.Input("salt", default=0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, layer: str, call: int, salt: int) -> io.NodeOutput:
        forward, left = model.get_model_object(layer).forward, [call]

        def failing(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                FAULTS[kind]()
            out = forward(*args, **kwargs)
            return out * float("nan") if kind == "NaN" and left[0] == -1 else out

        model = model.clone()
        model.add_object_patch(f"{layer}.forward", failing)
        return io.NodeOutput(model)


class TestInspect(io.ComfyNode):
    """What is on a model and in this process: {"text": [JSON]}."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestInspect",
            category="tests",
            inputs=[io.Model.Input("model"), io.Latent.Input("after"), io.Int.Input("salt", default=0)],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, after: Any, salt: int) -> io.NodeOutput:
        gc.collect()
        modules = list(model.model.modules())
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        found = {
            "hooks": sum(len(getattr(m, kind)) for m in modules for kind in kinds),
            "global hooks": len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks),
            "patches": len(model.patches) + len(model.backup) + len(model.object_patches) + len(model.hook_patches),
            "object backup": len(model.object_patches_backup),
            "injections": len(model.injections),
            "training": sum(m.training for m in modules),
            "tensors": len(tensors),
            "bytes": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
            "log handlers": len(logging.getLogger().handlers),
            "grad": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "resident": _resident(),
        }
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


class TestBigLora(io.ComfyNode):
    """A LORA_MODEL of many megabytes, so that writing it takes a while."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestBigLora",
            category="tests",
            inputs=[io.Int.Input("megabytes", default=256), io.Int.Input("salt", default=0)],
            outputs=[io.Custom("LORA_MODEL").Output()],
        )

    @classmethod
    def execute(cls, megabytes: int, salt: int) -> io.NodeOutput:
        return io.NodeOutput({f"diffusion_model.a{i}.lora_A.weight": torch.ones(512, 512) for i in range(megabytes)})


class TestDisturb(io.ComfyNode):
    """Sets every global random state to something else."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestDisturb",
            category="tests",
            inputs=[io.Model.Input("model"), io.Int.Input("salt", default=0)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, salt: int) -> io.NodeOutput:
        torch.manual_seed(salt)
        random.seed(salt)
        torch.rand(salt % 97)
        return io.NodeOutput(model)


def _resident() -> int:
    """Bytes of this process in memory, 0 where that cannot be told."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
