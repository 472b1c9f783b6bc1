# SPDX-License-Identifier: Apache-2.0
"""Writes subgraphs/SSR Merge.json anew: a merge of two LoRAs as one node that can be unpacked.

Run it with `python -m authoring.blueprint`. ComfyUI lists the file among the nodes, as "SSR Merge". Sockets and widgets
are those that a running ComfyUI has.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "SSR Merge"
FILE = Path(__file__).resolve().parents[1] / "subgraphs" / f"{NAME}.json"
DESCRIPTION = (
    "Merges two LoRAs into one that keeps both. To change any step or to add LoRAs, unpack it before you fill it in."
)
NOTHING = {"lora_name": "(use the lora input)"}  # until somebody chooses
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SOCKETS = ("model", "clip", "latent", "negative")
INPUT, OUTPUT = -10, -20  # the ends of a subgraph, as LiteGraph numbers them

Json = dict[str, Any]


@dataclass(frozen=True)
class Inner:
    """A node of the subgraph. A source is a number of a node and its output, or the name of an input of the whole."""

    kind: str
    title: str
    at: tuple[int, int]
    size: tuple[int, int]
    sources: Mapping[str, tuple[int, int] | str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


NODES = {
    1: Inner("SSRPrompts", "Prompts of LoRA 1", (0, 0), (400, 160), {"clip": "clip", "text": "prompts_1"}),
    2: Inner(
        "SSRAddLoRA",
        "LoRA 1",
        (460, 0),
        (320, 170),
        {"calibration": (1, 0), "lora_name": "lora_1", "strength": "strength_1"},
        NOTHING,
    ),
    3: Inner("SSRPrompts", "Prompts of LoRA 2", (0, 240), (400, 160), {"clip": "clip", "text": "prompts_2"}),
    4: Inner(
        "SSRAddLoRA",
        "LoRA 2",
        (460, 240),
        (320, 170),
        {"calibration": (3, 0), "tasks": (2, 0), "lora_name": "lora_2", "strength": "strength_2"},
        NOTHING,
    ),
    5: Inner(
        "SSRCollectStats",
        "Measure",
        (840, 0),
        (340, 560),
        {
            **{name: name for name in ("model", "latent", "negative", "clip")},
            **{name: name for name in ("seed", "steps", "sampler_name", "scheduler", "cfg")},
            "tasks": (4, 0),
        },
    ),
    6: Inner("SSRSolve", "Merge", (1240, 0), (320, 260), {"stats": (5, 0), "rank": "rank"}),
    7: Inner("SSRApply", "Apply", (1620, 0), (260, 120), {"model": "model", "lora": (6, 0), "clip": "clip"}),
}
OUTPUTS = {"model": (7, 0), "clip": (7, 1), "lora": (6, 0), "report": (6, 1)}


def blueprint(info: Mapping[str, Any]) -> Json:
    """The file: one node of the subgraph, and its definition. `info` is ComfyUI's object_info."""
    links = list(_links(info))
    used = [s for node in NODES.values() for s in node.sources.values() if isinstance(s, str)]
    names = list(dict.fromkeys([*SOCKETS, *used]))
    promoted = {name: _first_use(name) for name in names}
    is_widget = {name: _is_widget(info, *promoted[name]) for name in names}
    inputs: list[Json] = [
        {
            "id": _id(f"input {name}"),
            "name": name,
            "type": _type(info, *promoted[name]),
            "linkIds": [link["id"] for link in links if link["origin_id"] == INPUT and link["name"] == name],
            "pos": [-160, 20 + 20 * i],
        }
        for i, name in enumerate(names)
    ]
    for link in links:
        if link["origin_id"] == INPUT:
            link["origin_slot"] = names.index(link["name"])
    outputs: list[Json] = [
        {
            **{"id": _id(f"output {name}"), "name": name, "type": info[NODES[node].kind]["output"][slot]},
            "linkIds": [link["id"] for link in links if link["target_id"] == OUTPUT and link["target_slot"] == i],
            "pos": [1980, 20 + 20 * i],
        }
        for i, (name, (node, slot)) in enumerate(OUTPUTS.items())
    ]
    definition = {
        **{"id": _id("definition"), "version": 1, "revision": 0, "config": {}, "name": NAME},
        "state": {"lastGroupId": 0, "lastNodeId": max(NODES), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": INPUT, "bounding": [-280, 0, 140, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [1960, 0, 120, 40 + 20 * len(outputs)]},
        **{"inputs": inputs, "outputs": outputs, "widgets": [], "groups": []},
        "nodes": [_node(number, node, links, info) for number, node in NODES.items()],
        "links": [{key: value for key, value in link.items() if key != "name"} for link in links],
        "extra": {},
        "category": "SSR Merge",
        "description": DESCRIPTION,
    }
    outer = {
        **{"id": 1, "type": definition["id"], "pos": [0, 0], "size": [400, 520], "flags": {}, "order": 0, "mode": 0},
        "inputs": [
            {"name": one["name"], "type": one["type"], "link": None}
            | ({"widget": {"name": one["name"]}} if is_widget[one["name"]] else {})
            for one in inputs
        ],
        "outputs": [{"name": one["name"], "type": one["type"], "links": []} for one in outputs],
        "properties": {
            "proxyWidgets": [[str(promoted[name][0]), promoted[name][1]] for name in names if is_widget[name]]
        },
        **{"widgets_values": [], "title": NAME},
    }
    return {
        **{"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [outer], "links": [], "version": 0.4},
        **{"definitions": {"subgraphs": [definition]}, "extra": {}},
    }


def _links(info: Mapping[str, Any]) -> Iterator[Json]:
    """All links inside; those from an input of the whole with its name."""
    number = 0
    for target, node in NODES.items():
        slots = [name for name, _ in _slots(info, node.kind)]
        for name, source in node.sources.items():
            number += 1
            origin, slot = (INPUT, 0) if isinstance(source, str) else source
            link = {"id": number, "origin_id": origin, "origin_slot": slot, "target_id": target}
            known = {"target_slot": slots.index(name), "type": _type(info, target, name)}
            yield link | known | {"name": source if isinstance(source, str) else ""}
    for place, (origin, slot) in enumerate(OUTPUTS.values()):
        number += 1
        kind = info[NODES[origin].kind]["output"][slot]
        ends = {"origin_id": origin, "origin_slot": slot, "target_id": OUTPUT, "target_slot": place}
        yield {"id": number, **ends, "type": kind, "name": ""}


def _node(number: int, node: Inner, links: list[Json], info: Mapping[str, Any]) -> Json:
    into = {link["target_slot"]: link["id"] for link in links if link["target_id"] == number}
    inputs = []
    for slot, (name, spec) in enumerate(_slots(info, node.kind)):
        shown: Json = {"localized_name": name, "name": name, "type": _kind(spec), "link": into.get(slot)}
        shown |= {"widget": {"name": name}} if _kind(spec) in WIDGETS else {}
        shown |= {"shape": 7} if name in info[node.kind]["input"].get("optional", {}) else {}
        inputs.append(shown)
    outputs = [
        {
            **{"localized_name": name, "name": name, "type": kind},
            "links": [link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == (number, slot)],
        }
        for slot, (name, kind) in enumerate(zip(info[node.kind]["output_name"], info[node.kind]["output"], strict=True))
    ]
    return {
        **{"id": number, "type": node.kind, "title": node.title, "pos": list(node.at), "size": list(node.size)},
        **{"flags": {}, "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs},
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": list(_values(node, info)),
    }


def _values(node: Inner, info: Mapping[str, Any]) -> Iterator[Any]:
    """In the order in which the frontend makes widgets, the one that it adds to a seed included."""
    for name, spec in _specs(info, node.kind):
        if _kind(spec) not in WIDGETS:
            continue
        options = spec[1] if len(spec) > 1 else {}
        choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
        yield node.values.get(name, options.get("default", choices[0] if choices else ""))
        if options.get("control_after_generate"):
            yield "fixed"


def _specs(info: Mapping[str, Any], kind: str) -> list[tuple[str, list[Any]]]:
    sections = [section for section in ("required", "optional") if section in info[kind]["input"]]
    return [(n, info[kind]["input"][s][n]) for s in sections for n in info[kind]["input_order"][s]]


def _slots(info: Mapping[str, Any], kind: str) -> list[tuple[str, list[Any]]]:
    """As the frontend orders inputs: sockets, then widgets."""
    return sorted(_specs(info, kind), key=lambda named: _kind(named[1]) in WIDGETS)


def _kind(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _first_use(name: str) -> tuple[int, str]:
    """The node that an input of the whole goes to, and what it is called there."""
    return next((n, own) for n, node in NODES.items() for own, source in node.sources.items() if source == name)


def _type(info: Mapping[str, Any], node: int, name: str) -> str:
    return _kind(dict(_specs(info, NODES[node].kind))[name])


def _is_widget(info: Mapping[str, Any], node: int, name: str) -> bool:
    return _type(info, node, name) in WIDGETS


def _id(name: str) -> str:
    """The same at every run, so that the file does not change for nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"ssr-merge/{NAME}/{name}"))


def main() -> None:
    from demo.run import ROOT, comfyui_path
    from hosting.server import ComfyServer, prepare_base_directory

    with tempfile.TemporaryDirectory() as folder:
        base = prepare_base_directory(Path(folder), pack_root=ROOT)
        with ComfyServer(comfyui_path(), base) as server:
            info = server.object_info()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(blueprint(info), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
