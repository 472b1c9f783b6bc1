"""A ComfyUI server in a child process, and a client that runs workflows on it."""

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket  # PyPI: websocket-client

Graph = Mapping[str, Any]  # API format: {node id: {"class_type": ..., "inputs": {...}}}

PACK_NAME = "ComfyUI-SSR-Merge"
FOLDERS = ("models", "input", "output", "temp", "user", "custom_nodes")
NOT_COPIED = (".*", "__pycache__", "output", "tests", "benchmarks")

# Seconds until a wait counts as a hang, the same for every wait here, in demo/browser.py and in the tests. Many times
# what an idle machine takes: on a busy one all is ten times slower, and nothing is wrong. Less than pytest's limit for
# a test, so that the error tells what was waited for.
PATIENCE = float(os.environ.get("SSR_PATIENCE", "900"))

PREVIEW_IMAGE, TEXT, PREVIEW_IMAGE_WITH_METADATA = 1, 3, 4  # ComfyUI's protocol.BinaryEventTypes


class ComfyError(RuntimeError):
    """A workflow failed. `node_id` is None where ComfyUI blames no single node."""

    def __init__(self, message: str, node_id: str | None = None, node_type: str | None = None, traceback: str = ""):
        where = "" if node_id is None else f"node {node_id} ({node_type}): "
        super().__init__(where + message)
        self.message = message
        self.node_id = node_id
        self.node_type = node_type
        self.traceback = traceback


class InvalidGraph(ComfyError):
    """ComfyUI refused the workflow before running any of it."""


class Interrupted(ComfyError):
    """Somebody stopped the workflow."""


class ServerDied(RuntimeError):
    """The server process ended or does not answer; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Event:
    """One message about a running workflow.

    `kind` is ComfyUI's message type ("executing", "progress", "progress_state", "executed", ...) with `data` as sent,
    or "progress_text" with data {"text": str}, or "preview" with data {"image": bytes}, an encoded JPEG or PNG.
    """

    kind: str
    node: str | None
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished workflow. `executed` and `cached` are node ids; `texts` is each node's last progress text."""

    prompt_id: str
    history: Mapping[str, Any]
    executed: tuple[str, ...]
    cached: tuple[str, ...]
    texts: Mapping[str, str]

    @property
    def outputs(self) -> Mapping[str, Any]:
        """{node id: what its output node reported}, for example {"9": {"images": [...]}}."""
        outputs: Mapping[str, Any] = self.history["outputs"]
        return outputs


@dataclass
class ComfyServer:
    """`with ComfyServer(comfyui, base_directory) as server: server.run(graph)`.

    `comfyui` is the folder with main.py; models, inputs, outputs and custom nodes live in `base_directory`
    (see `prepare_base_directory`). It runs on the CPU with this process's Python interpreter.
    """

    comfyui: Path
    base_directory: Path
    arguments: Sequence[str] = ()
    startup_timeout: float = PATIENCE
    log_file: Path = field(init=False)
    address: str = field(init=False, default="")
    _process: "subprocess.Popen[bytes] | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.base_directory = Path(self.base_directory).resolve()
        self.log_file = self.base_directory / "comfyui.log"

    # --- life ---

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and waits until it answers; ServerDied if it does not."""
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        for folder in FOLDERS:
            (self.base_directory / folder).mkdir(parents=True, exist_ok=True)
        database = (self.base_directory / "user" / "comfyui.db").as_posix()
        command = [
            *(sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base_directory), "--database-url", f"sqlite:///{database}"),
            *("--disable-auto-launch", *self.arguments),
        ]
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONSAFEPATH", None)  # main.py needs its own folder on sys.path
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.startup_timeout
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                self._request("/system_stats", timeout=5)
                return
            time.sleep(0.2)
        raise ServerDied(f"ComfyUI gave no answer in {self.startup_timeout:.0f} s. Its log ends:\n{self.log_tail()}")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = "not started" if self._process is None else f"ended with exit code {self._process.returncode}"
            raise ServerDied(f"ComfyUI {code}. Its log ends:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        if not self.log_file.is_file():
            return "(no log)"
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def failed_imports(self) -> list[str]:
        """The log's lines about custom nodes that could not be imported; empty when all is well."""
        marks = ("(IMPORT FAILED)", "module for custom nodes", "Error while calling comfy_entrypoint")
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        lines = re.sub(r"\x1b\[\d*m", "", text).splitlines()  # the log is in colour
        return [line for line in lines if any(mark in line for mark in marks)]

    # --- requests ---

    def object_info(self) -> dict[str, Any]:
        """What every node looks like: {class type: {"input": ..., "output": ..., ...}}."""
        return self._request("/object_info")

    def submit(self, graph: Graph, client_id: str | None = None) -> str:
        """Queues a workflow in API format and returns its prompt id; InvalidGraph if ComfyUI refuses it."""
        try:
            answer = self._request("/prompt", {"prompt": graph, "client_id": client_id or uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            raise refusal(error.read().decode("utf-8", "replace")) from None
        prompt_id: str = answer["prompt_id"]
        return prompt_id

    def run(self, graph: Graph, on_event: Callable[[Event], None] | None = None, timeout: float = PATIENCE) -> Run:
        """Runs a workflow in API format to its end.

        Raises InvalidGraph, ComfyError (with the failing node's id, class and message), Interrupted, ServerDied
        or TimeoutError (after interrupting). `on_event` sees each message as it arrives.
        """
        client_id = uuid.uuid4().hex
        executed: list[str] = []
        cached: tuple[str, ...] = ()
        texts: dict[str, str] = {}
        # connected before submitting, so that no message is missed
        with self._messages(client_id, timeout) as messages:
            prompt_id = self.submit(graph, client_id)
            try:
                for event in messages:
                    if event.data.get("prompt_id", prompt_id) != prompt_id:
                        continue
                    if on_event is not None:
                        on_event(event)
                    if event.kind == "execution_cached":
                        cached = tuple(event.data["nodes"])
                    elif event.kind == "progress_text" and event.node is not None:
                        texts[event.node] = event.data["text"]
                    elif event.kind == "executing" and event.node is not None:
                        executed.append(event.node)
                    elif event.kind == "executing":  # no node: the history is written
                        break
            except TimeoutError:
                self.interrupt(prompt_id)
                raise
        history = self.history(prompt_id)
        raise_failure(history)
        return Run(prompt_id, history, tuple(executed), cached, texts)

    @contextlib.contextmanager
    def _messages(self, client_id: str, timeout: float) -> Iterator[Iterator[Event]]:
        socket_ = websocket.create_connection(f"ws://{self.address}/ws?clientId={client_id}", timeout=PATIENCE)
        try:
            # previews then come with the id of the node that sends them
            features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            socket_.send(json.dumps(features))
            socket_.settimeout(1.0)  # how often to look whether the server lives
            yield self._read(socket_, time.monotonic() + timeout)
        finally:
            socket_.close()

    def _read(self, socket_: "websocket.WebSocket", deadline: float) -> Iterator[Event]:
        while time.monotonic() < deadline:
            try:
                frame = socket_.recv()
            except websocket.WebSocketTimeoutException:
                self.check_alive()
                continue
            except (websocket.WebSocketException, OSError) as error:
                raise ServerDied(f"the connection broke ({error}). Its log ends:\n{self.log_tail()}") from error
            event = text_event(frame) if isinstance(frame, str) else binary_event(frame)
            if event is not None:
                yield event
        raise TimeoutError(f"the workflow did not end in time. The log of ComfyUI ends:\n{self.log_tail()}")

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the running workflow, or only if it is `prompt_id`."""
        self._request("/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The history entry {"prompt", "outputs", "status", ...} of a finished workflow."""
        entries = self._request(f"/history/{prompt_id}")
        if prompt_id not in entries:
            raise KeyError(f"prompt {prompt_id} has no history: it is still queued or running, or the server restarted")
        entry: dict[str, Any] = entries[prompt_id]
        return entry

    def images(self, history: Mapping[str, Any]) -> list[Path]:
        """The image files that a history entry (or `run.history`) speaks of, in node order."""
        return [
            self.base_directory / image["type"] / image["subfolder"] / image["filename"]
            for node_output in history["outputs"].values()
            for image in node_output.get("images", [])
        ]

    def free(self) -> None:
        """Unloads all models and empties the cache of node results, before the next workflow runs."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def clear_history(self) -> None:
        """Forgets all finished workflows, which the server otherwise keeps in memory."""
        self._request("/history", {"clear": True})

    def _request(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = PATIENCE) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # no proxy, whatever the environment says: the server is on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            content = response.read()
        return json.loads(content) if content else None


# --- messages and failures ---


def text_event(frame: str) -> Event | None:
    message = json.loads(frame)
    data = message.get("data") or {}
    return Event(message["type"], data.get("node") or data.get("node_id"), data)


def binary_event(frame: bytes) -> Event | None:
    """Layouts: ComfyUI's server.py, `send_progress_text`, `send_image` and `send_image_with_metadata`."""
    kind, length = struct.unpack(">II", frame[:8])
    if kind == TEXT:
        return Event("progress_text", frame[8 : 8 + length].decode(), {"text": frame[8 + length :].decode()})
    if kind == PREVIEW_IMAGE:
        return Event("preview", None, {"image": frame[8:]})
    if kind == PREVIEW_IMAGE_WITH_METADATA:
        metadata = json.loads(frame[8 : 8 + length])
        return Event("preview", metadata.get("node_id"), {**metadata, "image": frame[8 + length :]})
    return None


def refusal(answer: str) -> InvalidGraph:
    """The exception for /prompt's answer to a workflow that does not validate: its first named node, all messages."""
    try:
        parsed = json.loads(answer)
        error, node_errors = parsed["error"], parsed.get("node_errors") or {}
    except (ValueError, KeyError, TypeError):
        return InvalidGraph(answer)
    if not node_errors:
        return InvalidGraph(f"{error['message']} {error.get('details', '')}".strip())
    node_id, first = next(iter(node_errors.items()))
    messages = [
        f"{item['message']}: {item.get('details', '')}" for node in node_errors.values() for item in node["errors"]
    ]
    return InvalidGraph("; ".join(messages), node_id, first["class_type"])


def raise_failure(history: Mapping[str, Any]) -> None:
    for kind, data in history["status"]["messages"]:
        if kind == "execution_interrupted":
            raise Interrupted("interrupted", data["node_id"], data["node_type"])
        if kind == "execution_error":
            message = f"{data['exception_type']}: {data['exception_message']}".strip()
            raise ComfyError(message, data["node_id"], data["node_type"], "".join(data["traceback"]))
    if history["status"]["status_str"] != "success":
        raise ComfyError(f"the workflow ended as {history['status']['status_str']!r}")


# --- preparation ---


def convert_ui_to_api(ui: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow as the frontend saves it, in the format that `ComfyServer.run` takes."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # comfy-cli reports usage unless told not to
    from comfy_cli.workflow_to_api import convert_ui_to_api as convert

    graph: dict[str, Any] = convert(dict(ui), dict(object_info))
    return graph


def prepare_base_directory(
    path: Path,
    pack_root: Path | None = None,
    models: Mapping[str, Sequence[Path]] | None = None,
    custom_nodes: Sequence[Path] = (),
) -> Path:
    """Fills a ComfyUI base directory with links to this pack, other packs and model files; returns it.

    `models` maps a folder of models/ ("loras", "diffusion_models", ...) to files. What is there already is replaced.
    """
    path = Path(path).resolve()
    for folder in FOLDERS:
        (path / folder).mkdir(parents=True, exist_ok=True)
    if pack_root is not None:
        link(Path(pack_root).resolve(), path / "custom_nodes" / PACK_NAME)
    for pack in custom_nodes:
        link(Path(pack).resolve(), path / "custom_nodes" / Path(pack).name)
    for folder, files in (models or {}).items():
        (path / "models" / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            link(Path(file).resolve(), path / "models" / folder / Path(file).name)
    return path


def link(source: Path, target: Path) -> None:
    """A link to `source`, or a copy where the system allows no links (Windows without developer mode)."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
        else:
            shutil.copy2(source, target)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
