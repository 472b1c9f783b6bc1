"""Locales: what the nodes say, by language. `python -m authoring.locales` writes English, tells what others lack."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from demo.run import ROOT, comfyui_path
from hosting.server import PACK_NAME, ComfyServer, prepare_base_directory

LOCALES = ROOT / "locales"
LANGUAGES = ("en", "zh", "ja")

Strings = dict[str, Any]


def english(info: Mapping[str, Any]) -> Strings:
    """locales/en/nodeDefs.json as it follows from the schemas that /object_info tells."""
    return {name: _node(node) for name, node in sorted(info.items()) if PACK_NAME in node["python_module"]}


def _node(node: Mapping[str, Any]) -> Strings:
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node.get("output_tooltips") or [None] * len(node["output"]), strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {
            name: {"name": name, "tooltip": (spec[1] if len(spec) > 1 else {}).get("tooltip")}
            for name, spec in inputs.items()
        },
        "outputs": {str(at): {"name": name, "tooltip": tooltip} for at, (name, tooltip) in enumerate(outputs)},
    }


def read(language: str) -> Strings:
    strings: Strings = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return strings


def flat(strings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, string) of every string: ("SSRSolve.inputs.ridge.tooltip", "How far ...")."""
    for key, value in strings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfyui_path(), prepare_base_directory(Path(folder), pack_root=ROOT)) as server,
    ):
        found = english(server.object_info())
    before, wanted = dict(flat(read("en"))), dict(flat(found))
    (LOCALES / "en" / "nodeDefs.json").write_text(
        json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for key in before.keys() & wanted.keys():
        if before[key] != wanted[key]:
            logging.info("English has changed, translations should, too: %s: %s", key, wanted[key])
    for language in LANGUAGES[1:]:
        has = dict(flat(read(language)))
        for key in wanted.keys() - has.keys():
            logging.info("%s lacks %s: %s", language, key, wanted[key])
        for key in has.keys() - wanted.keys():
            logging.info("%s has %s, which no node says any more", language, key)


if __name__ == "__main__":
    main()
