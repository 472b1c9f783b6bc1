"""SSR Quick Merge, SSR Compare and the blueprint on the demo's model, behind a real server."""

import json
import threading
from typing import Any

import pytest
from PIL import Image

from authoring import blueprint
from demo.scenes import LORAS
from hosting.server import ComfyServer, Event, Interrupted
from server_graphs import node

pytestmark = pytest.mark.server

PROMPTS = ("mochi the cat on grass\nmochi the cat at night", "robo the robot in the snow\nrobo the robot on grass")
SAMPLING = {"sampler_name": "euler", "scheduler": "simple", "seed": 0}


def loaders() -> dict[str, Any]:
    return {
        "model": node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        "clip": node("SSRDemoLoadTinyCLIP", clip_name="tiny_clip.safetensors"),
        "vae": node("VAELoader", vae_name="taef1"),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
    }


def quick(steps: int = 2) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for number, (lora, prompts) in enumerate(zip(LORAS, PROMPTS, strict=False), 1):
        chosen |= {f"lora_{number}": lora, f"strength_{number}": 1.0, f"prompts_{number}": prompts}
    given = {"model": ["model", 0], "clip": ["clip", 0], "latent": ["latent", 0], "steps": steps}
    return {"quick": node("SSRQuickMerge", **given, **chosen)}


def compare(steps: int = 3, **more: Any) -> dict[str, Any]:
    graph: dict[str, Any] = {}
    for number, (lora, prompts) in enumerate(zip(LORAS, PROMPTS, strict=False)):
        graph[f"prompts {number}"] = node("SSRPrompts", clip=["clip", 0], text=prompts)
        inputs = {"lora_name": lora, "strength": 1.0, "calibration": [f"prompts {number}", 0]}
        before = {"tasks": [f"lora {number - 1}", 0]} if number else {}
        graph[f"lora {number}"] = node("SSRAddLoRA", **inputs, **before)
    sources = {name: [name, 0] for name in ("model", "clip", "vae", "latent")}
    given = {**sources, "tasks": ["lora 1", 0], "lora": ["quick", 2], "prompts": "", "steps": steps, "cfg": 1.0}
    return graph | {"compare": node("SSRCompare", **given, **SAMPLING, **more)}


def test_a_quick_merge_is_compared_in_one_grid_with_progress_over_all_of_it(demo_server: ComfyServer):
    events: list[Event] = []
    run = demo_server.run(
        loaders() | quick() | compare() | {"say": node("PreviewAny", source=["quick", 3])}, events.append
    )
    assert "2 LoRAs" in "".join(run.outputs["say"]["text"])
    (image,) = run.outputs["compare"]["images"]
    with Image.open(demo_server.base_directory / image["type"] / image["subfolder"] / image["filename"]) as grid:
        assert grid.width == 256 + 8 + 6 * (256 + 8) and 2 * 256 < grid.height < 3 * 256
    steps = [e.data for e in events if e.kind == "progress" and e.data.get("node") == "compare"]
    assert (steps[-1]["value"], steps[-1]["max"]) == (36, 36)  # 6 models, 2 prompts, 3 steps
    told = [e.data["text"] for e in events if e.kind == "progress_text"]
    assert "4 of 6: plain stack" in told and any(text.endswith("measuring, mochi_cat") for text in told)


def test_another_seed_of_the_comparison_does_not_merge_again(demo_server: ComfyServer):
    demo_server.run(loaders() | quick() | compare())
    run = demo_server.run(loaders() | quick() | compare(steps=1))
    assert "quick" in run.cached and "compare" in run.executed


def test_a_comparison_can_be_stopped_and_started_again(demo_server: ComfyServer):
    stopped = threading.Event()

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.data.get("node") == "compare" and not stopped.is_set():
            stopped.set()
            demo_server.interrupt()

    with pytest.raises(Interrupted):
        demo_server.run(loaders() | quick() | compare(steps=400), stop)
    assert stopped.is_set()
    assert demo_server.run(loaders() | quick() | compare(steps=1)).outputs["compare"]["images"]


# --- the blueprint ---


def test_comfyui_lists_the_blueprint_of_the_pack(demo_server: ComfyServer):
    found = demo_server._request("/global_subgraphs").values()
    assert "SSR Merge" in [entry["name"] for entry in found if entry["source"] == "custom_node"]


def test_the_blueprint_has_the_sockets_and_widgets_that_the_nodes_have(demo_server: ComfyServer):
    assert json.loads(blueprint.FILE.read_text(encoding="utf-8")) == blueprint.blueprint(demo_server.object_info())


def test_the_blueprint_merges(demo_server: ComfyServer):
    """Its inner graph, with what the outer node is given put where its links lead, as the frontend does."""
    (outer,) = json.loads(blueprint.FILE.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    given = {
        **{"model": ["model", 0], "clip": ["clip", 0], "latent": ["latent", 0]},
        **{f"lora_{i + 1}": LORAS[i] for i in range(2)},
        **{f"prompts_{i + 1}": PROMPTS[i] for i in range(2)},
        **{"strength_1": 1.0, "strength_2": 1.0, "cfg": 1.0, "steps": 2, "rank": 4, **SAMPLING},
    }
    graph = loaders()
    for inner in outer["nodes"]:
        names = [slot["name"] for slot in inner["inputs"] if "widget" in slot]
        values = [value for value in inner["widgets_values"] if value != "fixed"]
        inputs = dict(zip(names, values, strict=True))
        for link in (link for link in outer["links"] if link["target_id"] == inner["id"]):
            name = inner["inputs"][link["target_slot"]]["name"]
            source = outer["inputs"][link["origin_slot"]]["name"] if link["origin_id"] == blueprint.INPUT else None
            if source is None:
                inputs[name] = [str(link["origin_id"]), link["origin_slot"]]
            elif source in given:
                inputs[name] = given[source]
        graph[str(inner["id"])] = node(inner["type"], **inputs)
    places = {one["name"]: link for one, link in zip(outer["outputs"], _ends(outer), strict=True)}
    assert list(places) == ["model", "clip", "lora", "report"]
    run = demo_server.run(graph | {"say": node("PreviewAny", source=places["report"])})
    assert "mochi_cat" in "".join(run.outputs["say"]["text"])


def _ends(outer: dict[str, Any]) -> list[list[Any]]:
    ends = sorted(
        (link for link in outer["links"] if link["target_id"] == blueprint.OUTPUT), key=lambda e: e["target_slot"]
    )
    return [[str(link["origin_id"]), link["origin_slot"]] for link in ends]
