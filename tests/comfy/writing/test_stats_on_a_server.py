"""Statistics behind a real ComfyUI server: saved, listed, chosen and solved again as a user does it."""

from typing import Any

import numpy
import pytest

from hosting.server import ComfyError, ComfyServer
from server_graphs import latent, merge_graph, node, prompt

pytestmark = pytest.mark.server

NEW = ("SSRSaveStats", "SSRLoadStats", "SSRAddStats", "SSRReport", "SSRCompare", "SSRQuickMerge")


def listed(server: ComfyServer) -> list[str]:
    spec = server.object_info()["SSRLoadStats"]["input"]["required"]["file"]
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def from_file(graph: dict[str, Any], file: str) -> dict[str, Any]:
    """The same graph with statistics of a file instead of collecting them."""
    inputs = {"file": file, "model": ["model", 0], "tasks": graph["collect"]["inputs"]["tasks"]}
    return {**graph, "collect": node("SSRLoadStats", **inputs)}


def test_every_input_of_every_node_has_a_tooltip_and_every_node_a_description(server: ComfyServer):
    info = server.object_info()
    ours = {name: spec for name, spec in info.items() if spec["category"] == "SSR Merge"}
    assert {*NEW, "SSRCollectStats", "SSRSolve"} <= ours.keys()
    for name, spec in ours.items():
        assert spec["description"] and (spec.get("search_aliases", True)), name
        inputs = {**spec["input"].get("required", {}), **spec["input"].get("optional", {})}
        assert all(len(one) > 1 and one[1].get("tooltip") for one in inputs.values()), name
        assert all(spec["output_tooltips"]), name


def test_saved_statistics_are_listed_at_once_and_give_the_same_picture(server: ComfyServer):
    graph = merge_graph(seed=31)
    server.run(
        graph | {"keep": node("SSRSaveStats", stats=["collect", 0], filename_prefix="cats/own", keep_prompts=True)}
    )
    collected = latent(server, "merged")
    (file,) = (name for name in listed(server) if name.startswith("cats/own"))
    assert file == "cats/own_00001_.safetensors [output]"
    run = server.run(from_file(graph, file))
    assert "collect" in run.executed
    assert numpy.array_equal(latent(server, "merged"), collected)
    assert "2 LoRAs, 16 sites. 2 prompts" in run.texts["collect"]
    again = server.run(from_file(merge_graph(seed=31, ridge=0.5), file))
    assert "collect" in again.cached


def test_statistics_in_the_input_folder_are_listed_too_and_a_replaced_file_is_read_again(server: ComfyServer):
    graph = merge_graph(seed=32)
    server.run(graph | {"keep": node("SSRSaveStats", stats=["collect", 0], filename_prefix="move", keep_prompts=False)})
    source = server.base_directory / "output" / "ssr_stats" / "move_00001_.safetensors"
    target = server.base_directory / "input" / "ssr_stats" / "moved.safetensors"
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    assert "moved.safetensors [input]" in listed(server)
    graph = from_file(graph, "moved.safetensors [input]")
    server.run(graph)
    assert "collect" in server.run(graph).cached
    content = target.read_bytes()
    target.unlink()
    target.write_bytes(content)
    assert "collect" in server.run(graph).executed


def test_a_changed_lora_is_named_to_the_user(server: ComfyServer):
    graph = merge_graph(seed=33)
    server.run(graph | {"keep": node("SSRSaveStats", stats=["collect", 0], filename_prefix="two", keep_prompts=True)})
    (file,) = (name for name in listed(server) if name.startswith("two"))
    other = from_file(merge_graph(seed=33, loras=("kohya", "diffusers")), file)
    with pytest.raises(ComfyError, match="generic is missing; diffusers was not there"):
        server.run(other)


def test_more_prompts_are_added_to_statistics_without_collecting_the_first_again(server: ComfyServer):
    graph = merge_graph(seed=34)
    server.run(graph)
    more = {f"more p{i}": prompt(10 + i) for i in range(2)}
    for i, lora in enumerate(("kohya", "generic")):
        inputs = {"lora_name": f"{lora}.safetensors", "strength": 1.0, "calibration": [f"more p{i}", 0]}
        more[f"more lora{i}"] = node("SSRAddLoRA", **inputs, **({"tasks": [f"more lora{i - 1}", 0]} if i else {}))
    how = {**graph["collect"]["inputs"], "tasks": ["more lora1", 0], "like": ["collect", 0]}
    more["more"] = node("SSRCollectStats", **how)
    more["sum"] = node("SSRAddStats", stats_a=["collect", 0], stats_b=["more", 0])
    solve = node("SSRSolve", **{**graph["solve"]["inputs"], "stats": ["sum", 0]})
    run = server.run(graph | more | {"solve": solve})
    assert "collect" in run.cached and {"more", "sum", "solve"} <= set(run.executed)


def test_the_report_shows_its_picture_on_the_node(server: ComfyServer):
    graph = merge_graph(seed=35) | {"conflict": node("SSRReport", stats=["collect", 0])}
    run = server.run(graph | {"words": node("PreviewAny", source=["conflict", 0])})
    (image,) = run.outputs["conflict"]["images"]
    assert (server.base_directory / image["type"] / image["subfolder"] / image["filename"]).stat().st_size > 10_000
    assert "Cross-talk" in "".join(run.outputs["words"]["text"])
