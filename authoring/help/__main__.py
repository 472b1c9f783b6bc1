"""Writes the help pages anew: `python -m authoring.help`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from demo.run import ROOT, comfyui_path
from hosting.server import ComfyServer, prepare_base_directory

from ..locales import english
from .pages import pages


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfyui_path(), prepare_base_directory(Path(folder), pack_root=ROOT)) as server,
    ):
        info = server.object_info()
    for name, text in pages(info, list(english(info))):
        path = ROOT / "web" / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
