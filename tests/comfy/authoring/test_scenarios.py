"""The example workflows for one purpose each, run with the tiny model in place of theirs."""

from typing import Any

import pytest

from authoring.templates.graph import BYPASS, workflow
from authoring.templates.thumbnails import GRAPHS
from hosting.server import ComfyServer, Run, convert_ui_to_api

Workflow = dict[str, Any]

pytestmark = pytest.mark.server


def graph(name: str, object_info: dict[str, Any]) -> Workflow:
    build, _, _ = GRAPHS[name]
    return workflow(f"{name} with the tiny model", build(), object_info)


def run(server: ComfyServer, ui: Workflow, object_info: dict[str, Any]) -> Run:
    return server.run(convert_ui_to_api(ui, object_info))


def shown(ran: Run, ui: Workflow, kind: str) -> dict[str, Any]:
    (node,) = (node for node in ui["nodes"] if node["type"] == kind)
    return ran.outputs[str(node["id"])]


def test_the_first_steps_end_with_a_picture_a_report_and_a_file(demo_server: ComfyServer, object_info):
    ui = graph("START-HERE-first-steps-sdxl", object_info)
    ran = run(demo_server, ui, object_info)
    assert len(shown(ran, ui, "SaveImage")["images"]) == 1
    assert "mochi_cat" in "".join(shown(ran, ui, "PreviewAny")["text"])
    assert list((demo_server.base_directory / "output" / "loras").glob("first-steps*.safetensors"))


def test_a_diagnosis_merges_nothing_and_ends_with_a_chart_and_words(demo_server: ComfyServer, object_info):
    ui = graph("diagnose-only-flux", object_info)
    ran = run(demo_server, ui, object_info)
    assert not {node["type"] for node in ui["nodes"]} & {"SSRSolve", "SSRApply", "KSampler"}
    assert len(shown(ran, ui, "SSRReport")["images"]) == 1
    words = "".join(shown(ran, ui, "PreviewAny")["text"])
    assert "mochi_cat" in words and "sepia_style" in words


def test_sharing_ends_with_a_sheet_and_a_small_file(demo_server: ComfyServer, object_info):
    ui = graph("save-for-sharing-zimage", object_info)
    ran = run(demo_server, ui, object_info)
    assert len(shown(ran, ui, "SaveImage")["images"]) == 1
    (file,) = (demo_server.base_directory / "output" / "loras").glob("anna1-inkwash*.safetensors")
    assert 10_000 < file.stat().st_size < 1_000_000


def test_sliders_end_with_a_file_for_each_lora_that_the_rest_of_the_graph_loads(demo_server: ComfyServer, object_info):
    ui = graph("keep-your-sliders-zimage", object_info)
    ran = run(demo_server, ui, object_info)
    assert "add up to the merge" in "".join(shown(ran, ui, "PreviewAny")["text"])
    files = {file.name for file in (demo_server.base_directory / "output" / "loras").glob("split_*.safetensors")}
    assert {f"split_{name}_00001_.safetensors" for name in ("mochi_cat", "robo_robot")} <= files
    for node in ui["nodes"]:
        node["mode"] = 0
    assert len(shown(run(demo_server, ui, demo_server.object_info()), ui, "SaveImage")["images"]) == 1


def test_what_was_measured_once_is_solved_again_from_its_file_without_measuring(demo_server: ComfyServer, object_info):
    ui = graph("retune-saved-stats-zimage", object_info)
    later = [node for node in ui["nodes"] if node["pos"][0] >= _left(ui, "3") and node["mode"] != BYPASS]
    once = [node for node in ui["nodes"] if node["mode"] == BYPASS]
    for node in once:
        node["mode"] = 0
    for node in later:
        node["mode"] = BYPASS
    run(demo_server, ui, object_info)
    for node in later:
        node["mode"] = 0
    for node in once:
        node["mode"] = BYPASS
    ran = run(demo_server, ui, demo_server.object_info())
    assert not {str(node["id"]) for node in once} & set(ran.executed)
    assert len(shown(ran, ui, "SaveImage")["images"]) == 1


def _left(ui: Workflow, number: str) -> float:
    return next(group["bounding"][0] for group in ui["groups"] if group["title"].startswith(number))
