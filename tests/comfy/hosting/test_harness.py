"""The test harness itself: what the other tests rely on when they talk to ComfyUI."""

import threading
from pathlib import Path

import numpy
import pytest
import torch

from hosting.server import PATIENCE, ComfyError, ComfyServer, Event, Interrupted, InvalidGraph, convert_ui_to_api
from tiny_flux import conditioning, empty_latent, flux_linears, flux_lora

LORA_SITES = {"generic": 16, "kohya": 16, "diffusers": 26}


def render(steps: int = 2, seed: int = 0, lora: str | None = None, name: str = "latent") -> dict:
    """Stock nodes around the tiny model, in API format."""
    graph: dict = {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny-flux.safetensors", "weight_dtype": "default"},
        },
        "prompt": {
            "class_type": "TestConditioning",
            "inputs": {"seed": 1, "tokens": 8, "context_width": 32, "pooled_width": 16},
        },
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": ["model", 0], "positive": ["prompt", 0], "negative": ["prompt", 0]},
                **{"latent_image": ["empty", 0], "seed": seed, "steps": steps, "cfg": 1.0, "denoise": 1.0},
                **{"sampler_name": "euler", "scheduler": "simple"},
            },
        },
        "save": {"class_type": "TestSaveTensor", "inputs": {"latent": ["sampler", 0], "name": name}},
    }
    if lora is not None:
        graph["lora"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["model", 0], "lora_name": lora, "strength_model": 1.0},
        }
        graph["sampler"]["inputs"]["model"] = ["lora", 0]
    return graph


@pytest.mark.comfy
@pytest.mark.parametrize("guidance", [False, True])
def test_comfyui_loads_every_weight_of_the_tiny_flux(tiny_flux, guidance):
    model = tiny_flux(guidance=guidance)
    weights = model.model.diffusion_model.state_dict()
    assert type(model.model).__name__ == "Flux"
    for module, shape in flux_linears(guidance=guidance).items():
        assert weights[f"{module}.weight"].shape == shape
    assert all(weight.any() for weight in weights.values())


@pytest.mark.comfy
@pytest.mark.parametrize("spelling", ["generic", "kohya", "diffusers"])
def test_comfyui_matches_every_tensor_of_a_tiny_lora(tiny_flux, spelling):
    import comfy.lora
    import comfy.lora_convert

    model = tiny_flux()
    sites = comfy.lora.model_lora_keys_unet(model.model, {})
    lora = flux_lora(spelling, alpha=2.0)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), sites, log_missing=False)
    assert len(patches) == len(lora) // 3 == LORA_SITES[spelling]
    assert set(patches) == set(model.clone().add_patches(patches))


@pytest.mark.comfy
def test_the_tiny_flux_samples_in_process(tiny_flux):
    import comfy.sample

    latent = empty_latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        samples = [
            comfy.sample.sample(
                *(tiny_flux(), noise, 2, 1.0, "euler", "simple", conditioning(seed), conditioning(seed), latent),
                disable_pbar=True,
            )
            for seed in (0, 1)
        ]
    assert samples[0].isfinite().all()
    assert not torch.equal(samples[0], samples[1])  # the prompt matters


@pytest.mark.comfy
def test_nodes_is_the_module_of_comfyui_and_not_the_folder_of_this_pack(comfy_runtime):
    import nodes

    assert Path(nodes.__file__).parent == comfy_runtime.comfyui


@pytest.mark.server
def test_every_custom_node_pack_is_imported(server: ComfyServer):
    assert server.failed_imports() == []
    assert {"TestConditioning", "TestSaveTensor"} <= set(server.object_info())


@pytest.mark.server
def test_stock_nodes_render_and_unchanged_nodes_are_cached(server: ComfyServer):
    events: list[Event] = []
    first = server.run(render(seed=11, name="first"), events.append)
    assert set(first.executed) >= {"sampler", "save"}
    assert [event.data["value"] for event in events if event.kind == "progress"][-1] == 2
    second = server.run(render(seed=11, name="second"))
    assert set(second.cached) >= {"model", "prompt", "sampler"}
    assert second.executed == ("save",)
    assert first.outputs["save"]["tensors"][0]["filename"] == "first.npy"
    latents = [numpy.load(server.base_directory / "output" / f"{name}.npy") for name in ("first", "second")]
    assert latents[0].shape == (1, 16, 8, 8) and numpy.isfinite(latents[0]).all()
    assert numpy.array_equal(*latents)


@pytest.mark.server
@pytest.mark.parametrize("lora", ["kohya.safetensors", "diffusers.safetensors", "generic.safetensors"])
def test_each_saved_lora_changes_the_picture(server: ComfyServer, lora: str):
    server.run(render(seed=3, name="plain"))
    server.run(render(seed=3, name="with-lora", lora=lora))
    plain, changed = (numpy.load(server.base_directory / "output" / f"{name}.npy") for name in ("plain", "with-lora"))
    assert numpy.abs(changed - plain).max() > 1e-3


@pytest.mark.server
def test_a_refused_and_a_failing_workflow_name_the_node(server: ComfyServer):
    graph = render()
    graph["model"]["inputs"]["unet_name"] = "absent.safetensors"
    with pytest.raises(InvalidGraph, match=r"absent\.safetensors") as refused:
        server.run(graph)
    assert (refused.value.node_id, refused.value.node_type) == ("model", "UNETLoader")
    graph = render(seed=5)
    graph["prompt"]["inputs"]["context_width"] = 33
    with pytest.raises(ComfyError, match="33") as failed:
        server.run(graph)
    assert (failed.value.node_id, failed.value.node_type) == ("sampler", "KSampler")


@pytest.mark.server
def test_interrupt_stops_a_running_workflow_and_the_server_goes_on(server: ComfyServer):
    started = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            server.run(render(steps=9_000), lambda event: event.kind == "progress" and started.set())
        except Exception as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    server.interrupt()
    thread.join(PATIENCE)
    assert [type(failure) for failure in failures] == [Interrupted]
    assert server.run(render(seed=6)).executed


@pytest.mark.server
def test_a_workflow_from_the_frontend_is_converted_and_runs(server: ComfyServer):
    def node(id_: int, type_: str, widgets: list, inputs: dict[str, int], outputs: dict[str, list[int]]) -> dict:
        return {
            **{"id": id_, "type": type_, "mode": 0, "widgets_values": widgets},
            "inputs": [{"name": name, "type": "*", "link": link} for name, link in inputs.items()],
            "outputs": [{"name": name, "type": name, "links": links} for name, links in outputs.items()],
        }

    workflow = {
        "version": 0.4,
        "nodes": [
            node(1, "UNETLoader", ["tiny-flux.safetensors", "default"], {}, {"MODEL": [1]}),
            node(2, "TestConditioning", [4, "fixed", 8, 32, 16], {}, {"CONDITIONING": [2, 3]}),
            node(3, "EmptySD3LatentImage", [64, 64, 1], {}, {"LATENT": [4]}),
            node(
                *(4, "KSampler", [7, "fixed", 1, 1.0, "euler", "simple", 1.0]),
                *({"model": 1, "positive": 2, "negative": 3, "latent_image": 4}, {"LATENT": [5]}),
            ),
            node(5, "TestSaveTensor", ["converted"], {"latent": 5}, {}),
        ],
        "links": [
            [1, 1, 0, 4, 0, "MODEL"],
            [2, 2, 0, 4, 1, "CONDITIONING"],
            [3, 2, 0, 4, 2, "CONDITIONING"],
            [4, 3, 0, 4, 3, "LATENT"],
            [5, 4, 0, 5, 0, "LATENT"],
        ],
    }
    graph = convert_ui_to_api(workflow, server.object_info())
    sampler = graph["4"]["inputs"]
    assert (sampler["model"], sampler["seed"], sampler["steps"]) == (["1", 0], 7, 1)
    server.run(graph)
    assert (server.base_directory / "output" / "converted.npy").is_file()


@pytest.mark.server
def test_a_server_that_cannot_start_says_why(comfyui: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"):
        ComfyServer(comfyui, tmp_path, arguments=["--no-such-option"]).start()
