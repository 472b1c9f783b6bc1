# SPDX-License-Identifier: Apache-2.0
"""The demo: a real ComfyUI merges three small LoRAs by the shared example workflow, and pictures show what came of it.

Run it with `python3 run.py demo`, which installs what it needs; `python3 run.py demo --serve` keeps the server up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from hosting.server import ComfyServer, Event, Run, convert_ui_to_api, prepare_base_directory

from . import graphs, picture
from .scenes import ERROR_SEEDS, LORAS, ROWS

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "demo" / "assets"
OUTPUT = ROOT / "demo" / "output"
# not below a package: it links back to the repository, and tools that walk packages would walk for ever
BASE = ROOT / ".cache" / "demo"
WORKFLOW = ROOT / "workflows" / "tiny-demo.json"

MERGED = {graphs.MERGE: "merged", graphs.POLISHED: "polished"}  # what is left in demo/output, by column
PREFIXES = {graphs.MERGE: "tiny-demo", graphs.POLISHED: "tiny-demo-polished"}  # as the workflow saves them

MODELS = {
    "diffusion_models": ["tiny_flux.safetensors"],
    "text_encoders": ["tiny_clip.safetensors"],
    "vae_approx": ["taef1_decoder.safetensors", "taef1_encoder.safetensors"],
    "loras": [*LORAS],
}


def main() -> None:
    """Merge, polish, compare, and leave comparison.png, errors.txt, report.txt and the LoRAs in demo/output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI running to play with the workflow")
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    started = time.perf_counter()
    with ComfyServer(comfyui_path(), base_directory()) as server:
        print(f"ComfyUI runs at http://{server.address}")
        with progress("Merging with workflows/tiny-demo.json") as show:
            merging = server.run(workflow_graph(server), show)
        merged = merged_names(server)
        report = reports_of(merging)
        (OUTPUT / "report.txt").write_text(report + "\n", encoding="utf-8")
        print(f"\n{report}\n")
        with progress("Comparing pictures") as show:
            draw_comparison(server, merged, show)
        with progress("Measuring errors") as show:
            table = measure(server, merged, show)
        (OUTPUT / "errors.txt").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\n")
        for column, name in merged.items():
            target = OUTPUT / f"{MERGED[column]}.safetensors"
            shutil.copy2(BASE / "output" / "loras" / name, target)
            print(f"{column:<12} {target}")
        print(f"Picture      {OUTPUT / 'comparison.png'}")
        print(f"{time.perf_counter() - started:.0f} s on {platform.processor() or platform.machine()}")
        if arguments.serve:
            serve(server)


def comfyui_path() -> Path:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder, or run `python3 run.py demo`, which fetches one.")
    return Path(path)


def base_directory() -> Path:
    """ComfyUI's folder of models, nodes and outputs for the demo."""
    return prepare_base_directory(
        BASE,
        pack_root=ROOT,
        models={kind: [ASSETS / name for name in names] for kind, names in MODELS.items()},
        custom_nodes=sorted(
            path for path in (ROOT / "demo" / "custom_nodes").iterdir() if (path / "__init__.py").exists()
        ),
    )


def workflow_graph(server: ComfyServer) -> graphs.Graph:
    ui = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    return convert_ui_to_api(ui, server.object_info())


@contextmanager
def progress(title: str) -> Iterator:
    """A bar over the nodes of a workflow; the steps of the running node are told behind it.

    Where nobody watches, as in a log, one line before and one after: each step of a bar would be a line there.
    """
    if not sys.stdout.isatty():
        print(f"{title} ...", flush=True)
        started = time.perf_counter()
        yield lambda event: None
        print(f"{title}: done in {time.perf_counter() - started:.0f} s", flush=True)
        return
    with tqdm(desc=title, unit=" nodes", file=sys.stdout) as bar:

        def show(event: Event) -> None:
            if event.kind == "executing" and event.node is not None:
                bar.update()
            elif event.kind == "progress":
                bar.set_postfix_str(f"step {event.data['value']} of {event.data['max']}")

        yield show


def merged_names(server: ComfyServer) -> dict[str, str]:
    """By column, the newest merged file, by the name that Load LoRA lists."""
    folder = server.base_directory / "output" / "loras"
    found = {}
    for column, prefix in PREFIXES.items():
        files = folder.glob(f"{prefix}_[0-9]*.safetensors")
        found[column] = max(files, key=lambda path: path.stat().st_mtime).relative_to(folder).as_posix()
    return found


def reports_of(run: Run) -> str:
    """Of the merge, and of polishing it."""
    texts = ["".join(output["text"]) for output in run.outputs.values() if "text" in output]
    wanted = [next(text for text in texts if words in text) for words in ("plain stack", "held-out points")]
    return "\n\n".join(dict.fromkeys(wanted))


def draw_comparison(server: ComfyServer, merged: Mapping[str, str], show) -> None:
    rows = [row for row in ROWS if row.is_drawn]
    graph, places = graphs.comparison(rows, merged)
    outputs = server.run(graph, show).outputs
    pictures = {}
    for node, place in places.items():
        image = outputs[node]["images"][0]
        pictures[place] = server.base_directory / "output" / image["subfolder"] / image["filename"]
    sheet = picture.grid(pictures, [row.prompt for row in rows], graphs.COLUMNS, graphs.COLUMNS.index(graphs.MERGE))
    sheet.save(OUTPUT / "comparison.png")


def measure(server: ComfyServer, merged: Mapping[str, str], show) -> str:
    """The table of errors: mean squared velocity difference from the LoRAs asked for, relative to the base model's."""
    graph, measured = graphs.measurement(ROWS, ERROR_SEEDS, merged)
    return error_table(graphs.errors(server.run(graph, show).outputs, measured))


def error_table(found: Mapping[tuple[str, str], float]) -> str:
    """One at a time, then two at once, each with its mean."""
    columns = [column for column in graphs.COLUMNS if column != graphs.REFERENCE]
    asked = {row.asked: len(row.loras) for row in ROWS}
    parts = {
        "mean, one at a time": [name for name, loras in asked.items() if loras == 1],
        "mean, two at once": [name for name, loras in asked.items() if loras > 1],
    }
    width = max(map(len, [*asked, *parts]))
    lines = [
        "Error on held-out prompts and seeds: 0 = the LoRAs asked for, as Load LoRA gives them; 1 = the base model."
    ]
    lines.append(" " * width + "".join(f"{column:>15}" for column in columns))
    for mean, names in parts.items():
        lines += [_figures(name, width, (found[name, column] for column in columns)) for name in names]
        means = (sum(found[name, column] for name in names) / len(names) for column in columns)
        lines.append(_figures(mean, width, means))
    return "\n".join(lines)


def _figures(label: str, width: int, figures: Iterable[float]) -> str:
    return f"{label:<{width}}" + "".join(f"{figure:>15.3f}" for figure in figures)


def serve(server: ComfyServer) -> None:
    print(f"\nOpen http://{server.address} and drop {WORKFLOW} onto the page. Ctrl+C stops the server.")
    try:
        while True:
            server.check_alive()
            time.sleep(1)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
