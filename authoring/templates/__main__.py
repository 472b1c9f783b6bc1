"""Writes workflows/*.json anew, with the sockets that a running ComfyUI has: `python -m authoring.templates`."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from demo.run import MODELS, ROOT, comfyui_path
from hosting.server import ComfyServer, prepare_base_directory

from .contents import WORKFLOWS
from .graph import ObjectInfo, workflow


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        base = prepare_base_directory(
            Path(folder),
            pack_root=ROOT,
            models={kind: [ROOT / "demo" / "assets" / name for name in names] for kind, names in MODELS.items()},
            custom_nodes=[ROOT / "demo" / "custom_nodes" / "tiny_text_encoder"],
        )
        with ComfyServer(comfyui_path(), base) as server:
            info = server.object_info()
    for name in WORKFLOWS:
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(as_text(name, info), encoding="utf-8")
        logging.info("%s", path)


def as_text(name: str, info: ObjectInfo) -> str:
    """The file of a workflow."""
    return json.dumps(workflow(name, WORKFLOWS[name](), info), indent=1) + "\n"


if __name__ == "__main__":
    main()
