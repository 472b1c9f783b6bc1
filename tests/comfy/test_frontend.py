"""The pack as a user meets it: ComfyUI's own frontend in a headless browser, against a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import comfy_runtime as runtime
from authoring.locales import LANGUAGES, read
from hosting import browser
from hosting.browser import Frontend
from hosting.server import PACK_NAME, ComfyServer, convert_ui_to_api

WORKFLOWS = sorted((runtime.ROOT / "workflows").glob("*.json"))
DEMO = runtime.ROOT / "workflows" / "tiny-demo.json"
SHOTS = runtime.ROOT / ".cache" / "screenshots"

Workflow = dict[str, Any]

pytestmark = [pytest.mark.frontend, pytest.mark.server]


@pytest.fixture(scope="module")
def frontend(demo_server: ComfyServer) -> Iterator[Frontend]:
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.frontend(demo_server) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_to_complain_about(frontend: Frontend) -> Iterator[None]:
    """Every test here fails if the browser's console has an error that has to do with this pack."""
    frontend.complaints.clear()
    yield
    assert frontend.complaints == []


def demo_workflow() -> Workflow:
    return json.loads(DEMO.read_text(encoding="utf-8"))


def of_type(workflow: Workflow, kind: str) -> list[int]:
    return [node["id"] for node in workflow["nodes"] if node["type"] == kind]


def test_the_page_opens_and_the_search_finds_the_nodes_by_what_people_call_them(frontend: Frontend):
    frontend.search("merge lora")
    frontend.page.get_by_text("SSR Quick Merge", exact=True).first.wait_for()
    assert frontend.page.get_by_text("SSR Solve", exact=True).count() == 0  # one node to begin with
    frontend.screenshot(SHOTS / "search.png")
    frontend.clear()


def test_the_blueprint_is_found_and_opens_as_a_subgraph_of_whole_nodes(frontend: Frontend):
    page = frontend.page
    page.evaluate("() => app.graph.clear()")
    frontend.search("SSR Merge")
    page.get_by_role("button", name="Blueprints").click()
    page.get_by_text("Merges two LoRAs into one").first.click()
    page.wait_for_function("() => app.graph._nodes.length === 1")
    page.get_by_placeholder("Add a node...").wait_for(state="detached")
    page.mouse.move(700, 250)
    page.mouse.click(800, 300)  # until it is put down somewhere it hangs on the mouse
    page.wait_for_function("() => !app.graph._nodes[0].flags.ghost")
    kinds = page.evaluate("() => app.graph._nodes[0].subgraph.nodes.map(node => node.type)")
    assert len(kinds) >= 7 and all(kind.startswith("SSR") for kind in kinds)
    frontend.screenshot(SHOTS / "blueprint.png")


def test_the_template_browser_shows_every_workflow_with_its_picture(frontend: Frontend):
    page = frontend.page
    page.get_by_role("button", name="Templates").click()
    page.get_by_role("dialog").get_by_text(PACK_NAME).first.click()
    for path in WORKFLOWS:
        page.get_by_test_id(f"template-workflow-{path.stem}").wait_for()
        picture = page.request.get(
            f"http://{frontend.server.address}/api/workflow_templates/{PACK_NAME}/{path.stem}.jpg"
        )
        assert picture.ok and len(picture.body()) < 60_000, path.stem
    page.wait_for_function("() => [...document.querySelectorAll('[role=dialog] img')].every(i => i.naturalWidth > 1)")
    frontend.screenshot(SHOTS / "templates.png")
    workflow = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    card = page.get_by_test_id(f"template-workflow-{WORKFLOWS[0].stem}")
    card.click()
    if not frontend.opens(workflow, within=60):  # one click in many is lost: the page makes its cards anew by and by
        card.click()
        frontend.wait_until_open(workflow)
    page.get_by_role("dialog").wait_for(state="detached")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_whole_and_would_send_what_its_file_says(frontend: Frontend, object_info, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    frontend.load(workflow)
    frontend.clear()
    frontend.look_at()
    frontend.screenshot(SHOTS / f"{path.stem}.png")
    page = frontend.page
    assert page.evaluate("() => app.graph._nodes.filter(n => n.has_errors && !n.constructor.nodeData).length") == 0
    assert page.evaluate("() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).length") == 0
    links = page.evaluate("() => [...app.graph.links.values()].map(l => [l.id, l.origin_id, l.target_id].map(Number))")
    assert sorted(links) == sorted([link[0], link[1], link[3]] for link in workflow["links"])
    for node in workflow["nodes"]:
        width, height = page.evaluate("id => [...app.graph.getNodeById(id).size]", node["id"])
        assert (width, height) == tuple(node["size"]), f"{node['type']} grew to {height}"
    assert _sent(frontend.prompt()) == _sent(convert_ui_to_api(workflow, object_info))


def _sent(graph: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in graph.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_and_names_are_in_the_users_language(frontend: Frontend, language: str):
    strings = read(language)
    frontend.set(Comfy__Locale=language)
    page = frontend.page
    page.evaluate("() => app.graph.clear()")
    for kind, told in strings.items():
        shown = page.evaluate(
            """async kind => {
                const node = LiteGraph.createNode(kind); app.graph.add(node);
                const named = node.inputs.map(i => [i.name, i.label ?? i.localized_name ?? i.name]);
                return {title: node.title, inputs: named};
            }""",
            kind,
        )
        assert shown["title"] == told["display_name"]
        assert dict(shown["inputs"]) == {name: told["inputs"][name]["name"] for name, _ in shown["inputs"]}
    solve = page.evaluate("() => { const n = app.graph._nodes.find(n => n.type === 'SSRSolve'); return n.id; }")
    page.evaluate("id => { for (const n of [...app.graph._nodes]) if (n.id !== id) app.graph.remove(n); }", solve)
    frontend.look_at(solve)
    page.evaluate("id => { app.canvas.selectNode(app.graph.getNodeById(id)); }", solve)
    page.get_by_test_id("info-button").click()
    page.get_by_text(strings["SSRSolve"]["inputs"]["ridge"]["tooltip"]).first.wait_for()
    frontend.screenshot(SHOTS / f"help-{language}.png")
    page.get_by_test_id("info-button").click()
    frontend.set(Comfy__Locale="en")


def test_pressing_run_ends_with_pictures_a_report_and_a_changed_ridge_only_solves_again(frontend: Frontend):
    workflow = demo_workflow()
    frontend.load(workflow)
    (collect,), (solve,) = of_type(workflow, "SSRCollectStats"), of_type(workflow, "SSRSolve")
    frontend.set_widget(collect, "steps", 4)  # more of them, and of the next, take minutes and show no more here
    for polish in of_type(workflow, "SSRPolish"):
        frontend.set_widget(polish, "steps", 2)
    shown = [*of_type(workflow, "SaveImage"), *of_type(workflow, "PreviewImage")]
    with frontend.undrawn():
        history = frontend.wait_until_done(frontend.press_run())
    assert history["status"]["status_str"] == "success"
    frontend.look_at()  # the frontend loads the pictures of nodes that it draws
    frontend.page.wait_for_function(
        "ids => ids.every(id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth)", arg=shown
    )
    frontend.screenshot(SHOTS / "tiny-demo-done.png")
    frontend.set_widget(solve, "ridge", 0.02)
    with frontend.undrawn():
        history = frontend.wait_until_done(frontend.press_run())
    cached = next(data["nodes"] for kind, data in history["status"]["messages"] if kind == "execution_cached")
    merged = [
        node for node in shown if "erged" in frontend.page.evaluate("id => app.graph.getNodeById(id).title", node)
    ]
    assert str(collect) in cached and str(solve) not in cached
    assert merged and not {str(node) for node in merged} & set(cached)
    assert {str(node) for node in shown} - set(cached) == {str(node) for node in merged}  # the stack's are kept


def test_the_cancel_button_stops_collecting(frontend: Frontend):
    workflow = demo_workflow()
    frontend.load(workflow)
    (collect,) = of_type(workflow, "SSRCollectStats")
    frontend.set_widget(collect, "steps", 2000)
    prompt = frontend.press_run()
    frontend.page.wait_for_function("id => app.graph.getNodeById(id).progress > 0", arg=collect)
    frontend.page.get_by_role("button", name="Cancel current run").click()
    history = frontend.wait_until_done(prompt)
    kinds = [kind for kind, _ in history["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_success" not in kinds
    merged = {str(node) for node in of_type(workflow, "SaveImage")}
    assert not merged & set(history["outputs"])
