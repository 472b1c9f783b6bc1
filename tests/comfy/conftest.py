"""Fixtures for tests inside a real ComfyUI: in this process (`pack`, `tiny_flux`) or behind a server (`server`)."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

import comfy_runtime as runtime
from demo.run import ASSETS, MODELS
from hosting.server import ComfyServer, prepare_base_directory
from tiny_flux import StateDict, flux_lora, flux_state_dict

SERVER_MODEL = "tiny-flux.safetensors"
SERVER_LORAS: dict[str, Callable[[], StateDict]] = {
    "kohya.safetensors": lambda: flux_lora("kohya", rank=4, alpha=2.0, seed=1),
    "diffusers.safetensors": lambda: flux_lora("diffusers", rank=3, seed=2),
    "generic.safetensors": lambda: flux_lora("generic", rank=2, seed=3),
    "foreign.safetensors": lambda: {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(4, 2)},
}


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder. Skips without one, unless SSR_REQUIRE_COMFYUI=1 (as nox sets it) makes that an error."""
    folder = runtime.find_comfyui()
    if folder is None:
        reason = "no ComfyUI: set COMFYUI_PATH to its folder, or run `python3 run.py tests`, which fetches one"
        if os.environ.get("SSR_REQUIRE_COMFYUI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


# --- in this process ---


@pytest.fixture(scope="session")
def comfy_runtime(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> runtime.ComfyRuntime:
    """A real ComfyUI imported into this process, on the CPU, with an empty base directory."""
    base_directory = prepare_base_directory(tmp_path_factory.mktemp("comfy-in-process"))
    return runtime.start(comfyui, base_directory)


@pytest.fixture(scope="session")
def pack(comfy_runtime: runtime.ComfyRuntime) -> ModuleType:
    """This pack, imported the way ComfyUI imports it; its modules are `ssr_pack.nodes.*` and `ssr_pack.ssr_core.*`."""
    return runtime.load_pack()


@pytest.fixture(scope="session")
def pack_module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """`pack_module("nodes.reading.patches")` is that module of the pack. Its ssr_core is not `import ssr_core`'s."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture
def tiny_flux(comfy_runtime: runtime.ComfyRuntime) -> Callable[..., Any]:
    """`tiny_flux(width=128, guidance=False, seed=0)` is a fresh ModelPatcher, through ComfyUI's own loader."""
    sd = importlib.import_module("comfy.sd")

    def load(width: int = 128, **options: Any) -> Any:
        model = sd.load_diffusion_model_state_dict(flux_state_dict(width, **options))
        assert model is not None, "ComfyUI did not recognise the tiny Flux"
        return model

    return load


# --- behind a server ---


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack, the test nodes, the model SERVER_MODEL and the LoRAs SERVER_LORAS."""
    files = tmp_path_factory.mktemp("models")
    safetensors.torch.save_file(flux_state_dict(), files / SERVER_MODEL)
    for name, lora in SERVER_LORAS.items():
        safetensors.torch.save_file(lora(), files / name)
    base_directory = prepare_base_directory(
        tmp_path_factory.mktemp("comfy-server"),
        pack_root=runtime.ROOT,
        models={"diffusion_models": [files / SERVER_MODEL], "loras": [files / name for name in SERVER_LORAS]},
        custom_nodes=[Path(__file__).parent / "nodes_pack"],
    )
    with ComfyServer(comfyui, base_directory) as running:
        yield running


@pytest.fixture(scope="session")
def demo_server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack, the demo's text encoder node and the demo's models."""
    base_directory = prepare_base_directory(
        tmp_path_factory.mktemp("comfy-demo"),
        pack_root=runtime.ROOT,
        models={folder: [ASSETS / name for name in names] for folder, names in MODELS.items()},
        custom_nodes=[runtime.ROOT / "demo" / "custom_nodes" / "tiny_text_encoder"],
    )
    with ComfyServer(comfyui, base_directory) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(demo_server: ComfyServer) -> dict[str, Any]:
    """What every node looks like, by the server."""
    return demo_server.object_info()
