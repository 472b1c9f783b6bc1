"""Browser: ComfyUI's own frontend in a headless Chromium, as a user has it, and what it complained about."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .server import PACK_NAME, PATIENCE, ComfyServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"]
# what a user who has been here before has set; the minimap would hide part of the graph in pictures
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Locale": "en"}
READY = "() => window.app?.extensionManager && window.app?.canvas && window.app?.graph"


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "no playwright: pip install playwright (its own browsers are not needed)"
    return None if executable() else f"no browser: none of {', '.join(NAMES)} is on PATH; set SSR_CHROMIUM to one"


def executable() -> str | None:
    return os.environ.get("SSR_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Frontend:
    """A page with the frontend. `complaints` are the errors that have to do with this pack."""

    page: Any
    server: ComfyServer
    complaints: list[str] = field(default_factory=list)

    def set(self, **settings: Any) -> None:
        """Settings, with their names' dots as double underscores; then the page is loaded anew."""
        for name, value in settings.items():
            self.page.evaluate(
                "([name, value]) => app.extensionManager.setting.set(name, value)", [name.replace("__", "."), value]
            )
        self.open()

    def open(self) -> None:
        self.page.goto(f"http://{self.server.address}/")
        self.page.wait_for_function(READY)
        self.page.wait_for_function("() => Object.keys(LiteGraph.registered_node_types).some(n => n === 'SSRSolve')")
        self.page.wait_for_function("() => document.querySelector('[data-testid=queue-button]')")

    def load(self, workflow: Mapping[str, Any]) -> None:
        """As by dropping the file on the canvas."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.wait_until_open(workflow)

    def wait_until_open(self, workflow: Mapping[str, Any], timeout: float = PATIENCE) -> None:
        """Until all nodes and links are there: opened from the template browser, they come by and by."""
        self.page.wait_for_function(
            "([nodes, links]) => app.graph._nodes.length === nodes && app.graph.links.size === links",
            arg=[len(workflow["nodes"]), len(workflow["links"])],
            timeout=1000 * timeout,
        )

    def opens(self, workflow: Mapping[str, Any], within: float) -> bool:
        """Whether all of it is there in so many seconds."""
        from playwright.sync_api import TimeoutError

        try:
            self.wait_until_open(workflow, within)
        except TimeoutError:
            return False
        return True

    def prompt(self) -> dict[str, Any]:
        """What Run would send."""
        sent: dict[str, Any] = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return sent

    def set_widget(self, node: int, name: str, value: Any) -> None:
        self.page.evaluate(
            "([id, name, value]) => { const node = app.graph.getNodeById(id);"
            " node.widgets.find(w => w.name === name).value = value; }",
            [node, name, value],
        )

    def press_run(self) -> str:
        """The id of the prompt that pressing Run queues."""
        with self.page.expect_response(lambda r: r.url.endswith("/prompt") and r.request.method == "POST") as answer:
            self.page.get_by_test_id("queue-button").click()
        sent: str = json.loads(answer.value.body())["prompt_id"]
        return sent

    @contextmanager
    def undrawn(self) -> Iterator[None]:
        """Inside, nothing is drawn: without a GPU each step takes more of the processor than a small model's own."""
        self.page.evaluate("app.canvas.pause_rendering = true")
        try:
            yield
        finally:
            self.page.evaluate("app.canvas.pause_rendering = false")

    def wait_until_done(self, prompt: str, timeout: float = PATIENCE) -> Mapping[str, Any]:
        """The history of a prompt that has ended, well or not."""
        self.page.evaluate(
            """async ([id, seconds]) => {
                const deadline = performance.now() + 1000 * seconds;
                while (!(id in await (await fetch('/history/' + id)).json())) {
                    if (performance.now() > deadline) throw Error('prompt ' + id + ' did not end in time');
                    await new Promise(again => setTimeout(again, 200));
                }
            }""",
            [prompt, timeout],
        )
        return self.server.history(prompt)

    def search(self, words: str) -> None:
        """What a double click on the canvas opens, with words typed into it."""
        self.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        self.page.get_by_placeholder("Add a node...").fill(words)

    def clear(self) -> None:
        """Windows and notices closed."""
        for _ in range(3):
            self.page.keyboard.press("Escape")
        for close in self.page.get_by_test_id("error-overlay-dismiss").all():
            close.click()

    def look_at(self, *nodes: int) -> None:
        """The nodes of these ids, or all, as large as the window allows; nothing else in the way."""
        self.page.evaluate(
            """ids => {
                const canvas = app.canvas, nodes = ids.map(id => app.graph.getNodeById(id));
                const boxes = ids.length
                    ? nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])
                    : app.graph._groups.map(g => [g.pos[0], g.pos[1], g.size[0], g.size[1]]);
                const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
                const width = Math.max(...boxes.map(b => b[0] + b[2])) - left;
                const height = Math.max(...boxes.map(b => b[1] + b[3])) - top;
                const free = [innerWidth - 80, innerHeight - 120];
                canvas.ds.scale = Math.min(free[0] / width, free[1] / height, 1.2);
                canvas.ds.offset = [70 / canvas.ds.scale - left, 90 / canvas.ds.scale - top];
                canvas.setDirty(true, true);
            }""",
            list(nodes),
        )
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def cut_out(self, *nodes: int) -> bytes:
        """A PNG of these nodes alone, as `look_at` shows them."""
        self.look_at(*nodes)
        left, top, right, bottom = self.page.evaluate(
            """ids => {
                const {scale, offset} = app.canvas.ds, nodes = ids.map(id => app.graph.getNodeById(id));
                const x = value => (value + offset[0]) * scale, y = value => (value + offset[1]) * scale;
                const right = n => n.pos[0] + n.size[0], bottom = n => n.pos[1] + n.size[1];
                return [
                    x(Math.min(...nodes.map(n => n.pos[0]))), y(Math.min(...nodes.map(n => n.pos[1] - 30))),
                    x(Math.max(...nodes.map(right))), y(Math.max(...nodes.map(bottom))),
                ];
            }""",
            list(nodes),
        )
        clip = {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": bottom - top + 16}
        picture: bytes = self.page.screenshot(clip=clip)
        return picture

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)


@contextmanager
def frontend(server: ComfyServer, width: int = 1600, height: int = 900) -> Iterator[Frontend]:
    """The frontend of a running server, ready to use."""
    from playwright.sync_api import sync_playwright

    settings = server.base_directory / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable(), args=ARGUMENTS, timeout=1000 * PATIENCE)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * PATIENCE)
        opened = Frontend(page, server)
        page.on("console", lambda message: _heard(opened, message))
        page.on("pageerror", lambda error: opened.complaints.append(f"uncaught: {error}"))
        page.on("response", lambda answer: _answered(opened, answer.status, answer.url))
        opened.open()
        yield opened
        chromium.close()


def _heard(opened: Frontend, message: Any) -> None:
    """Errors, but for those about requests, which `_answered` judges by their address."""
    known = ("Failed to load resource", "ComfyApp graph accessed before initialization")
    if message.type == "error" and not message.text.startswith(known):
        opened.complaints.append(message.text)


def _answered(opened: Frontend, status: int, address: str) -> None:
    if status >= 400 and (PACK_NAME in address or "SSR" in address):
        opened.complaints.append(f"{status} for {address}")
