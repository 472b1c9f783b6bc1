"""The whole pack behind a real ComfyUI server: caching, progress, interrupt, errors as a user meets them."""

import threading

import numpy
import pytest

from hosting.server import ComfyError, ComfyServer, Event, Interrupted
from server_graphs import latent, merge_graph, node, sampler

pytestmark = pytest.mark.server


def test_the_pack_is_listed_with_its_nodes(server: ComfyServer):
    assert not [failure for failure in server.failed_imports() if "custom_nodes" in failure]
    nodes = {"SSRPrompts", "SSRAddLoRA", "SSRAddLoRAStack", "SSRCollectStats", "SSRSolve", "SSRApply", "SSRSaveLoRA"}
    info = server.object_info()
    assert nodes <= set(info)
    assert all(info[name]["category"] == "SSR Merge" for name in nodes)


def test_a_changed_ridge_does_not_collect_again(server: ComfyServer):
    first = server.run(merge_graph(ridge=0.01, seed=21))
    assert {"collect", "solve", "apply"} <= set(first.executed)
    before = latent(server, "merged")
    second = server.run(merge_graph(ridge=0.5, seed=21))
    assert "collect" in second.cached and "collect" not in second.executed
    assert {"solve", "apply"} <= set(second.executed)
    assert not numpy.array_equal(before, latent(server, "merged"))


def test_progress_counts_all_loras_prompts_and_steps_and_the_node_tells_what_it_did(server: ComfyServer):
    events: list[Event] = []
    server.run(merge_graph(steps=3, seed=22), events.append)
    steps = [e.data for e in events if e.kind == "progress" and e.data.get("node") == "collect"]
    assert (steps[-1]["value"], steps[-1]["max"]) == (18, 18)  # 2 LoRAs, 3 steps each to survey, measure and refine
    texts = [e.data["text"] for e in events if e.kind == "progress_text"]
    assert any("2 LoRAs" in text and "sites" in text for text in texts)


def test_a_saved_merge_is_listed_by_load_lora_at_once_and_does_what_ssr_apply_does(server: ComfyServer):
    graph = merge_graph(seed=23) | {
        "save lora": node("SSRSaveLoRA", lora=["solve", 0], filename_prefix="from-server", dtype="float32")
    }
    server.run(graph)
    listed = server.object_info()["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
    name = next(name for name in listed if name.startswith("from-server"))
    loaded = {key: graph[key] for key in ("model", "latent", "p0")} | {
        "load": node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0)
    }
    server.run(loaded | sampler(["load", 0], "loaded"))
    merged, again = latent(server, "merged"), latent(server, "loaded")
    assert numpy.linalg.norm(merged - again) <= 1e-6 * numpy.linalg.norm(merged)
    assert "key not loaded" not in server.log_tail(50)


def test_the_result_goes_through_comfyuis_own_lora_model_nodes_and_back(server: ComfyServer):
    """Load LoRA Model, Save LoRA Weights, and a saved merge as one of the LoRAs of the next."""
    saver = next(name for name in ("SaveLoRA", "SaveLoRANode") if name in server.object_info())
    graph = merge_graph(seed=26) | {
        "core loader": node("LoraModelLoader", model=["model", 0], lora=["solve", 0], strength_model=1.0, bypass=False),
        "core saver": node(saver, lora=["solve", 0], prefix="loras/by-core"),
    }
    server.run(graph | sampler(["core loader", 0], "by core"))
    merged, through_core = latent(server, "merged"), latent(server, "by core")
    assert numpy.linalg.norm(merged - through_core) <= 1e-6 * numpy.linalg.norm(merged)
    listed = server.object_info()["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
    name = next(name for name in listed if name.startswith("by-core"))
    again = {key: graph[key] for key in ("model", "latent", "p0")} | {
        "load": node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0),
        "lora0": node("SSRAddLoRA", lora_name=name, strength=1.0, calibration=["p0", 0]),
        "lora1": node(
            "SSRAddLoRA",
            **{"lora_name": "(use the lora input)", "lora": ["solve", 0], "strength": 1.0},
            **{"calibration": ["p1", 0], "tasks": ["lora0", 0]},
        ),
    }
    run = server.run(graph | again | {"collect": graph["collect"]} | sampler(["load", 0], "saved by core"))
    assert "save saved by core" in run.executed
    assert numpy.linalg.norm(merged - latent(server, "saved by core")) <= 1e-6 * numpy.linalg.norm(merged)


def test_an_interrupt_in_the_middle_of_collecting_changes_nothing(server: ComfyServer):
    plain = {key: value for key, value in merge_graph().items() if key in ("model", "latent", "p0")}
    server.run(plain | sampler(["model", 0], "before", seed=7))
    stopped = threading.Event()

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.data.get("node") == "collect" and not stopped.is_set():
            stopped.set()
            server.interrupt()

    with pytest.raises(Interrupted):
        server.run(merge_graph(steps=400, seed=24), stop)
    assert stopped.is_set()
    server.run(plain | sampler(["model", 0], "after", seed=7) | {"other": node("PreviewAny", source="again")})
    server.free()
    server.run(plain | sampler(["model", 0], "after all", seed=7))
    assert numpy.array_equal(latent(server, "before"), latent(server, "after all"))
    assert {"collect", "solve"} <= set(server.run(merge_graph(steps=2, seed=24)).executed)


def test_an_error_in_a_lora_reaches_the_user_with_its_name(server: ComfyServer):
    graph = merge_graph(seed=25)
    graph["collect"]["inputs"]["tasks"] = ["foreign", 0]
    graph["foreign"] = node(
        "SSRAddLoRA", lora_name="foreign.safetensors", strength=1.0, calibration=["p0", 0], tasks=["lora0", 0]
    )
    with pytest.raises(ComfyError, match="foreign does not fit this model"):
        server.run(graph)
