"""Graph: a workflow in the making, in columns and groups. Sockets and widgets come from the server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Any]  # what /object_info answers

SLOT, WIDGET, TITLE = 20, 24, 30  # LiteGraph's heights
TEXT = 110  # of a text box
GAP, COLUMN_GAP, MARGIN, GROUP_GAP = 24, 50, 24, 40
HEAD = 66  # of a group: its title, and the title of the topmost node
RAIL, CORRIDOR = 26, 150  # distance between links that pass below groups, and room for all of them
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTE = "MarkdownNote"
BYPASS = 4

# LiteGraph's own presets, as (title, body)
COLOURS = {"fill in": ("#232", "#353"), "merge": ("#223", "#335"), "note": ("#222", "#000")}

Source = tuple["Node", str]  # a node and the name of one of its outputs


@dataclass(eq=False)
class Node:
    """One node. `inputs` says where its sockets' links come from, `values` what its widgets hold if not the default."""

    kind: str
    title: str | None = None
    inputs: Mapping[str, Source] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    height: int | None = None
    colour: str | None = None
    models: Sequence[Mapping[str, str]] = ()  # files that ComfyUI offers to download
    room: int = 0  # below the widgets, for what the node says when it has run
    id: int = 0
    pos: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)

    def __getitem__(self, output: str) -> Source:
        return self, output


def note(title: str, *paragraphs: str) -> Node:
    return Node(NOTE, title, values={"": "\n\n".join(paragraphs)}, colour="note")


def note_height(note: Node, width: int) -> int:
    """Of a note that shows all of its text and has some room to spare, as fonts differ."""
    paragraphs = note.values[""].split("\n\n")
    lines = sum(-(-len(paragraph) // ((width - 26) // 5)) for paragraph in paragraphs)
    return 46 + 15 * lines + 10 * len(paragraphs)


@dataclass(eq=False)
class Group:
    """A coloured frame. Columns stand side by side; `under` puts the group below another instead of beside the last."""

    title: str
    colour: str
    columns: Sequence[tuple[int, Sequence[Node | int]]]  # (width, nodes from top to bottom, numbers as space between)
    under: Group | None = None
    closely: bool = False  # right below it, where only its first column has links that pass below groups
    bypassed: bool = False
    bounds: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom

    def nodes(self) -> list[Node]:
        return [node for _, column in self.columns for node in column if isinstance(node, Node)]


def workflow(name: str, groups: Sequence[Group], info: ObjectInfo) -> dict[str, Any]:
    """The workflow as the frontend saves it."""
    nodes = [node for group in groups for node in group.nodes()]
    for number, node in enumerate(nodes, 1):
        node.id = number
    _place(groups, info)
    links = _links(nodes, info)
    reroutes, ends = _rails(groups, links)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"ComfyUI-SSR-Merge/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": [
            _node(node, order, group.bypassed, links, info) for order, (group, node) in enumerate(_owned(groups))
        ],
        "links": [link.entry() for link in links],
        "groups": [_frame(number, group) for number, group in enumerate(groups, 1)],
        "config": {},
        "extra": {
            "ds": {"scale": 0.7, "offset": [140, 240]},
            "workflowRendererVersion": "LG",
            "reroutes": reroutes,
            "linkExtensions": ends,
        },
        "version": 0.4,
    }


# --- sockets and widgets ---


def _specs(node: Node, info: ObjectInfo) -> dict[str, tuple[list[Any], bool]]:
    """{input: (specification, whether it is optional)}"""
    if node.kind == NOTE:
        return {}
    kind = info[node.kind]
    sections = [section for section in ("required", "optional") if section in kind["input"]]
    return {
        name: (kind["input"][section][name], section == "optional")
        for section in sections
        for name in kind["input_order"][section]
    }


def _is_widget(spec: Sequence[Any]) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGET_TYPES


def _widgets(node: Node, info: ObjectInfo) -> Iterator[tuple[str, Any]]:
    """(name, value) in the frontend's order, the one that it adds to a seed included."""
    for name, (spec, _) in _specs(node, info).items():
        if not _is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        offered = spec[0] if isinstance(spec[0], list) else options.get("options", ())
        yield name, node.values.get(name, options.get("default", next(iter(offered), "")))
        if options.get("control_after_generate", spec[0] == "INT" and name in ("seed", "noise_seed")):
            yield "control_after_generate", "fixed"


def _height(node: Node, width: int, info: ObjectInfo) -> int:
    if node.height is not None:
        return node.height
    if node.kind == NOTE:
        return note_height(node, width)
    specs = _specs(node, info)
    inputs = sum(not _is_widget(spec) for spec, _ in specs.values())
    texts = sum(bool(len(spec) > 1 and spec[1].get("multiline")) for spec, _ in specs.values())
    widgets = len(list(_widgets(node, info)))
    slots = max(inputs, len(info[node.kind]["output"]))
    return SLOT * slots + WIDGET * (widgets - texts) + TEXT * texts + (14 if widgets else 6) + node.room


# --- places ---


def _place(groups: Sequence[Group], info: ObjectInfo) -> None:
    left = 0
    for group in groups:
        top = 0
        if group.under is not None:
            upper = group.under.bounds
            left, top = upper[0], upper[3] + GROUP_GAP if group.closely else _floor(groups) + CORRIDOR
        right, bottom = left + MARGIN, top
        for width, column in group.columns:
            bottom = max(bottom, _stack(column, width, right, top + HEAD, info))
            right += width + COLUMN_GAP
        group.bounds = (left, top, right - COLUMN_GAP + MARGIN, bottom + MARGIN)
        left = group.bounds[2] + GROUP_GAP


def _floor(groups: Sequence[Group]) -> int:
    """Where the upper row of groups ends."""
    return max(group.bounds[3] for group in groups if group.under is None)


def _stack(column: Sequence[Node | int], width: int, left: int, top: int, info: ObjectInfo) -> int:
    """Puts the nodes of a column in their places; returns where it ends."""
    bottom = top
    for node in column:
        if isinstance(node, int):
            top += node
            continue
        node.pos, node.size = (left, top), (width, _height(node, width, info))
        bottom = top + node.size[1]
        top = bottom + TITLE + GAP
    return bottom


# --- links ---


@dataclass
class _Link:
    id: int
    origin: Node
    output: int
    target: Node
    input: str
    slot: int
    kind: str

    def entry(self) -> list[Any]:
        return [self.id, self.origin.id, self.output, self.target.id, self.slot, self.kind]


def _links(nodes: Sequence[Node], info: ObjectInfo) -> list[_Link]:
    links: list[_Link] = []
    for node in nodes:
        order = _slots(node, info)
        for name in order:
            if name in node.inputs:
                origin, output = node.inputs[name]
                number = info[origin.kind]["output_name"].index(output)
                kind = info[origin.kind]["output"][number]
                links.append(_Link(len(links) + 1, origin, number, node, name, order.index(name), kind))
        unknown = set(node.inputs) - set(order) | set(node.values) - set(order) - {""}
        if unknown:
            raise ValueError(f"{node.kind} has no {', '.join(sorted(unknown))}")
    return links


def _slots(node: Node, info: ObjectInfo) -> list[str]:
    """The frontend puts sockets before widgets."""
    specs = _specs(node, info)
    return sorted(specs, key=lambda name: _is_widget(specs[name][0]))


def _rails(groups: Sequence[Group], links: Sequence[_Link]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Links to groups further on pass below those between, one rail for each output: (reroutes, ends of links)."""
    home = {node: group for group, node in _owned(groups)}
    reroutes: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    rails: dict[Source, int] = {}
    stops: dict[tuple[int, int], int] = {}

    def reroute(x: int, y: int, **parent: int) -> int:
        reroutes.append({"id": len(reroutes) + 1, "pos": [x, y], "linkIds": [], **parent})
        return len(reroutes)

    for link in links:
        start, goal = home[link.origin], home[link.target]
        if not any(start.bounds[2] < g.bounds[0] and g.bounds[2] < goal.bounds[0] for g in groups):
            continue
        source = (link.origin, str(link.output))
        number = list(rails).index(source) if source in rails else len(rails)
        y = _floor(groups) + RAIL * (number + 1)
        if source not in rails:
            rails[source] = reroute(start.bounds[2] + 10 + 8 * number, y)
        stop = (rails[source], link.target.pos[0] - 14 - 8 * number)
        if stop not in stops:
            stops[stop] = reroute(stop[1], y, parentId=rails[source])
        for passed in (rails[source], stops[stop]):
            reroutes[passed - 1]["linkIds"].append(link.id)
        ends.append({"id": link.id, "parentId": stops[stop]})
    return reroutes, ends


# --- as the frontend writes it ---


def _owned(groups: Sequence[Group]) -> list[tuple[Group, Node]]:
    return [(group, node) for group in groups for node in group.nodes()]


def _node(node: Node, order: int, bypassed: bool, links: Sequence[_Link], info: ObjectInfo) -> dict[str, Any]:
    into = {link.input: link.id for link in links if link.target is node}
    specs = _specs(node, info)
    entry: dict[str, Any] = {
        "id": node.id,
        "type": node.kind,
        "pos": list(node.pos),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": BYPASS if bypassed else 0,
        "inputs": [_input(name, *specs[name], into.get(name)) for name in _slots(node, info)],
        "outputs": [] if node.kind == NOTE else _outputs(node, links, info),
    }
    if node.title:
        entry["title"] = node.title
    entry["properties"] = {} if node.kind == NOTE else {"Node name for S&R": node.kind}
    if node.models:
        entry["properties"]["models"] = [dict(model) for model in node.models]
    values = [node.values[""]] if node.kind == NOTE else [value for _, value in _widgets(node, info)]
    if values:
        entry["widgets_values"] = values
    if node.colour:
        entry["color"], entry["bgcolor"] = COLOURS[node.colour]
    return entry


def _input(name: str, spec: Sequence[Any], optional: bool, link: int | None) -> dict[str, Any]:
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    entry: dict[str, Any] = {"localized_name": name, "name": name, "type": kind}
    if optional:
        entry["shape"] = 7
    if _is_widget(spec):
        entry["widget"] = {"name": name}
    return {**entry, "link": link}


def _outputs(node: Node, links: Sequence[_Link], info: ObjectInfo) -> list[dict[str, Any]]:
    kind = info[node.kind]
    outputs = []
    for number, (name, socket) in enumerate(zip(kind["output_name"], kind["output"], strict=True)):
        out = [link.id for link in links if link.origin is node and link.output == number]
        outputs.append({"localized_name": name, "name": name, "type": socket, "links": out or None})
    return outputs


def _frame(number: int, group: Group) -> dict[str, Any]:
    left, top, right, bottom = group.bounds
    return {
        "id": number,
        "title": group.title,
        "bounding": [left, top, right - left, bottom - top],
        "color": group.colour,
        "font_size": 24,
        "flags": {},
    }
