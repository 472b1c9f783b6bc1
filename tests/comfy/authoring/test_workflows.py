"""The example workflows, against the nodes of a real server: they load, they convert, and one of them runs as it is."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import comfy_runtime as runtime
from authoring.templates.__main__ import as_text
from authoring.templates.contents import WORKFLOWS as CONTENTS
from demo.scenes import LORAS, ROWS
from hosting.server import ComfyServer, convert_ui_to_api

WORKFLOWS = sorted((runtime.ROOT / "workflows").glob("*.json"))
COMPARING = [path for path in WORKFLOWS if "Compare with the plain stack" in path.read_text(encoding="utf-8")]
NOTES = {"Note", "MarkdownNote"}  # the frontend's own, unknown to the server
LATENTS = (
    *("EmptySD3LatentImage", "EmptyLatentImage", "EmptyHunyuanLatentVideo"),
    *("EmptyFlux2LatentImage", "EmptyLTXVLatentVideo", "EmptyMiniMaxH3LatentAV"),
)
FILE_INPUTS = re.compile(r"(unet|clip|vae|ckpt|lora)_name\d?|lora_\d|file|text_encoder|image")
FILES = re.compile(r"taef1|None|.+\.safetensors( \[output\])?|example\.png")
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
TITLE_HEIGHT, SLOT_HEIGHT, WIDGET_HEIGHT = 30, 20, 24  # LiteGraph's
BYPASSED = 4

Workflow = dict[str, Any]
Node = dict[str, Any]

pytestmark = pytest.mark.server


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> Workflow:
    return read(request.param)


@pytest.fixture(params=COMPARING, ids=lambda path: path.stem)
def comparison(request: pytest.FixtureRequest) -> Workflow:
    """A workflow that draws the same pictures with the merge and with the plain stack."""
    return read(request.param)


def read(path: Path) -> Workflow:
    return json.loads(path.read_text(encoding="utf-8"))


def real_nodes(workflow: Workflow) -> list[Node]:
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def of_type(workflow: Workflow, *types: str) -> list[Node]:
    return [node for node in workflow["nodes"] if node["type"] in types]


def label(node: Node) -> str:
    return f"{node['id']} {node.get('title', node['type'])}"


def specs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """{input name: its specification}, in the order in which the frontend makes widgets."""
    sections = (section for section in ("required", "optional") if section in info["input"])
    return {name: info["input"][s][name] for s in sections for name in info["input_order"][s]}


def options(spec: list[Any]) -> list[Any] | None:
    """What a combo offers; None for any other input."""
    if isinstance(spec[0], list):
        return spec[0]
    return spec[1]["options"] if spec[0] == "COMBO" else None


def socket_type(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def widgets(node: Node, object_info: dict[str, Any]) -> list[str]:
    """The names of a node's widgets in the order of its widgets_values, the one that the frontend adds included."""
    names = []
    for name, spec in specs(object_info[node["type"]]).items():
        if options(spec) is None and spec[0] not in WIDGET_TYPES:
            continue
        names.append(name)
        implied = spec[0] == "INT" and name in ("seed", "noise_seed")
        if (spec[1] if len(spec) > 1 else {}).get("control_after_generate", implied):
            names.append("control_after_generate")
    return names


def values(node: Node, object_info: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(widgets(node, object_info), node.get("widgets_values", []), strict=True))


def switched_on(workflow: Workflow) -> Workflow:
    """With nothing bypassed."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        node["mode"] = 0
    return workflow


def box(node: Node) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def bounds(group: dict[str, Any]) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contains(outer: tuple[float, ...], inner: tuple[float, ...]) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


# --- what is in the files ---


def test_there_is_a_file_and_a_small_picture_for_every_workflow_that_is_defined():
    assert {path.stem for path in WORKFLOWS} == set(CONTENTS)
    for path in WORKFLOWS:
        assert 5_000 < path.with_suffix(".jpg").stat().st_size < 60_000, path.stem


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_file_is_what_its_definition_gives_with_the_nodes_as_they_are(path, object_info):
    assert path.read_text(encoding="utf-8") == as_text(path.stem, object_info), "run `python -m authoring.templates`"


def test_every_node_of_a_workflow_exists_on_the_server(workflow, object_info):
    assert {node["type"] for node in real_nodes(workflow)} <= set(object_info)


def test_every_link_joins_two_slots_that_name_it_and_have_its_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for identity, origin, out, target, into, kind in workflow["links"]:
        source, sink = nodes[origin]["outputs"][out], nodes[target]["inputs"][into]
        assert identity in source["links"] and sink["link"] == identity
        taken = sink["type"].split(",")  # a socket may take several types
        assert source["type"] == kind and (kind in taken or taken == ["*"]), (
            label(nodes[origin]),
            label(nodes[target]),
        )


def test_no_slot_names_a_link_that_is_not_there(workflow):
    links = [link[0] for link in workflow["links"]]
    from_inputs = [s["link"] for n in workflow["nodes"] for s in n["inputs"] if s["link"] is not None]
    from_outputs = [link for n in workflow["nodes"] for s in n["outputs"] for link in s["links"] or ()]
    assert len(set(links)) == len(links)
    assert sorted(links) == sorted(from_inputs) == sorted(from_outputs)
    reroutes = {reroute["id"]: reroute for reroute in workflow["extra"]["reroutes"]}
    ends = {entry["id"]: entry["parentId"] for entry in workflow["extra"]["linkExtensions"]}
    assert set(ends) <= set(links) and set(ends.values()) <= set(reroutes)
    for reroute in reroutes.values():
        assert set(reroute["linkIds"]) <= set(ends)
        assert reroute.get("parentId", reroute["id"]) in reroutes


def test_the_sockets_of_every_node_are_those_of_the_server(workflow, object_info):
    for node in real_nodes(workflow):
        info = object_info[node["type"]]
        known = {name: socket_type(spec) for name, spec in specs(info).items()}
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == known, label(node)
        assert [slot["type"] for slot in node["outputs"]] == info["output"], label(node)
        assert [slot["name"] for slot in node["outputs"]] == info["output_name"], label(node)


def test_every_input_that_a_node_needs_is_connected(workflow, object_info):
    for node in real_nodes(workflow):
        required = object_info[node["type"]]["input"].get("required", {})
        for slot in node["inputs"]:
            if "widget" not in slot and slot["name"] in required:
                assert slot["link"] is not None, f"{label(node)}: {slot['name']}"


def test_every_node_has_one_value_for_each_of_its_widgets(workflow, object_info):
    for node in real_nodes(workflow):
        if node["type"] != "PreviewAny":  # its widgets are the frontend's own
            assert len(node.get("widgets_values", [])) == len(widgets(node, object_info)), label(node)


def test_no_seed_changes_between_two_runs(workflow, object_info):
    seeded = [node for node in real_nodes(workflow) if "control_after_generate" in widgets(node, object_info)]
    measuring = of_type(workflow, "SSRCollectStats", "SSRQuickMerge")
    assert measuring and all(node in seeded for node in measuring)  # else measuring would start over with each run
    assert {values(node, object_info)["control_after_generate"] for node in seeded} == {"fixed"}


# --- as the frontend would send them ---


@pytest.mark.parametrize("everything", [False, True], ids=["as it is", "with the comparison"])
def test_the_converted_workflow_has_only_valid_values(workflow, object_info, everything):
    graph = convert_ui_to_api(switched_on(workflow) if everything else workflow, object_info)
    active = [node for node in real_nodes(workflow) if everything or node["mode"] == 0]
    assert set(graph) == {str(node["id"]) for node in active}
    for identity, node in graph.items():
        known = specs(object_info[node["class_type"]])
        assert set(object_info[node["class_type"]]["input"].get("required", {})) <= set(node["inputs"]) <= set(known)
        for name, value in node["inputs"].items():
            where = f"{identity} {node['class_type']}: {name} = {value!r}"
            if isinstance(value, list):  # a link
                assert value[0] in graph, where
            else:
                assert_valid(name, value, known[name], where)


def assert_valid(name: str, value: Any, spec: list[Any], where: str) -> None:
    offered, limits = options(spec), spec[1] if len(spec) > 1 else {}
    if FILE_INPUTS.fullmatch(name):
        assert FILES.fullmatch(value), where
    elif offered is not None:
        assert value in offered, where
    elif spec[0] == "INT":
        assert type(value) is int and limits["min"] <= value <= limits["max"], where
    elif spec[0] == "BOOLEAN":
        assert type(value) is bool, where
    elif spec[0] == "FLOAT":
        assert type(value) in (int, float) and limits["min"] <= value <= limits["max"], where
    else:
        assert spec[0] == "STRING" and isinstance(value, str), where


# --- what they do ---


def test_calibration_samples_the_way_the_pictures_are_sampled(workflow, object_info):
    latents = of_type(workflow, *LATENTS)
    sizes = [values(node, object_info) for node in latents]
    assert len({(size["width"], size["height"]) for size in sizes}) == 1
    measuring = of_type(workflow, "SSRCollectStats", "SSRQuickMerge")
    drawing = of_type(workflow, "KSampler", "KSamplerAdvanced", "SSRCompare")
    ways = [values(node, object_info) for node in (*measuring, *drawing)]
    assert len({(way["sampler_name"], way["scheduler"], float(way["cfg"])) for way in ways}) == 1


def test_every_lora_has_at_least_four_calibration_prompts_and_none_twice(workflow, object_info):
    nodes = [node for node in of_type(workflow, "SSRPrompts") if node.get("title", "").startswith("SSR Prompts")]
    prompts = [values(node, object_info)["text"].splitlines() for node in nodes]
    quick = of_type(workflow, "SSRQuickMerge")
    for node in quick:
        texts = [values(node, object_info)[f"prompts_{number}"] for number in range(1, 5)]
        prompts += [text.splitlines() for text in texts if text]
    assert len(prompts) >= 2 or (quick and not prompts)  # it proposes some where none are written
    assert all(len(lines) >= 4 and all(lines) for lines in prompts)
    assert len(set(itertools.chain(*prompts))) == sum(map(len, prompts))
    for node in of_type(workflow, "SSRAddLoRA"):
        source = origin_of(workflow, next(slot["link"] for slot in node["inputs"] if slot["name"] == "calibration"))
        while source["type"] == "FluxGuidance":
            source = origin_of(workflow, source["inputs"][0]["link"])
        assert source in nodes, label(node)


def test_what_the_demo_compares_was_never_calibrated_on(object_info):
    ui = read(runtime.ROOT / "workflows" / "tiny-demo.json")
    calibrated = {line for node in of_type(ui, "SSRPrompts") for line in values(node, object_info)["text"].splitlines()}
    rendered = {values(node, object_info)["text"] for node in of_type(ui, "CLIPTextEncode")}
    assert not calibrated & ({row.prompt for row in ROWS} | rendered)


def test_the_comparison_stacks_the_same_loras_at_the_same_strengths(comparison, object_info):
    merged = [values(node, object_info) for node in of_type(comparison, "SSRAddLoRA")]
    loaders = of_type(comparison, "LoraLoaderModelOnly", "LoraLoader")
    stacked = [values(node, object_info) for node in loaders if node["title"].startswith("Load LoRA")]
    assert [(v["lora_name"], v["strength"]) for v in merged] == [(v["lora_name"], v["strength_model"]) for v in stacked]
    assert all(v.get("strength_clip", v["strength_model"]) == v["strength_model"] for v in stacked)


def test_each_compared_picture_differs_from_the_merged_one_only_in_its_model(comparison, object_info):
    settings: dict[str, list[Any]] = {"merged": [], "plain stack": []}
    for node in of_type(comparison, "KSampler"):
        sources = {slot["name"]: origin_of(comparison, slot["link"]) for slot in node["inputs"] if "widget" not in slot}
        kind = "merged" if sources["model"]["type"] == "SSRApply" else "plain stack"
        texts = [encoded_text(comparison, sources[side], object_info) for side in ("positive", "negative")]
        settings[kind].append((values(node, object_info), texts, sources["latent_image"]["id"]))
    assert settings["merged"] and settings["merged"] == settings["plain stack"]


def origin_of(workflow: Workflow, link: int) -> Node:
    origin = next(entry[1] for entry in workflow["links"] if entry[0] == link)
    return next(node for node in workflow["nodes"] if node["id"] == origin)


def encoded_text(workflow: Workflow, node: Node, object_info: dict[str, Any]) -> list[str]:
    """The prompt, and the nodes that its encoding goes through."""
    if node["type"] == "CLIPTextEncode":
        return [values(node, object_info)["text"]]
    inner = encoded_text(workflow, origin_of(workflow, node["inputs"][0]["link"]), object_info)
    return [*inner, node["type"], *map(str, node.get("widgets_values", []))]


def test_only_the_comparison_is_ever_switched_off_and_then_all_of_it(comparison):
    *use, stack = sorted(comparison["groups"], key=lambda group: group["title"])
    inside = {n["id"] for n in real_nodes(comparison) if contains(bounds(stack), box(n))}
    off = {node["id"] for node in comparison["nodes"] if node["mode"] == BYPASSED}
    polished = any("Polish" in group["title"] for group in use)
    assert len(use) == 4 + polished and inside
    assert off == (inside if "bypassed" in stack["title"] else set())
    assert {node["mode"] for node in comparison["nodes"]} <= {0, BYPASSED}


def test_the_tiny_demo_runs_as_it_is_and_ends_with_pictures_a_report_and_a_file(demo_server: ComfyServer, object_info):
    ui = read(runtime.ROOT / "workflows" / "tiny-demo.json")
    graph = convert_ui_to_api(ui, object_info)
    for polish in (node for node in graph.values() if node["class_type"] == "SSRPolish"):
        polish["inputs"]["steps"] = 2  # a hundred take a minute, and show no more here
    run = demo_server.run(graph)
    images = demo_server.images(run.history)
    assert len(images) == len(of_type(ui, "SaveImage", "PreviewImage", "SSRPolish")) == 9
    assert all(image.stat().st_size > 1000 for image in images)
    reports = ["".join(run.outputs[str(one["id"])]["text"]) for one in of_type(ui, "PreviewAny")]
    assert all(Path(name).stem in report for name in LORAS for report in reports) and len(reports) == 2
    for name in ("tiny-demo", "tiny-demo-polished"):
        assert list((demo_server.base_directory / "output" / "loras").glob(f"{name}_*.safetensors"))


# --- how they look ---


def test_no_two_nodes_overlap(workflow):
    for a, b in itertools.combinations(workflow["nodes"], 2):
        assert not overlap(box(a), box(b)), (label(a), label(b))


def test_no_two_groups_overlap_and_every_node_is_inside_one(workflow):
    groups = workflow["groups"]
    assert not any(overlap(bounds(a), bounds(b)) for a, b in itertools.combinations(groups, 2))
    for node in workflow["nodes"]:
        assert any(contains(bounds(group), box(node)) for group in groups), label(node)


def test_the_groups_are_numbered_from_left_to_right_and_then_down(workflow):
    lefts = [group["bounding"][0] for group in workflow["groups"]]
    titles = [group["title"] for group in workflow["groups"]]
    assert [title.split()[0] for title in titles] == [str(number + 1) for number in range(len(titles))]
    upper = [left for left, group in zip(lefts, workflow["groups"], strict=True) if group["bounding"][1] == 0]
    assert len(upper) >= 3 and upper == sorted(upper) and lefts[: len(upper)] == upper
    assert len({group["color"] for group in workflow["groups"]}) == len(titles)


def test_no_node_is_too_small_for_its_sockets_and_widgets(workflow, object_info):
    for node in real_nodes(workflow):
        sockets = max(sum("widget" not in slot for slot in node["inputs"]), len(node["outputs"]))
        count = len(widgets(node, object_info))
        needed = SLOT_HEIGHT * sockets + WIDGET_HEIGHT * count + (14 if count else 6)
        assert node["size"][1] >= needed and node["size"][0] >= 210, label(node)


def test_notes_say_what_to_change_and_what_to_expect(workflow):
    notes = {node["title"]: node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES}
    assert "Start here" in notes and len(notes) >= 2
    for title, text in notes.items():
        assert 1 <= len(re.findall(r"[.?:](\s|$)", text)) <= 12, title
