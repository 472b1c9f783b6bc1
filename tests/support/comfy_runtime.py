"""A real ComfyUI inside the test process: where it is, how to import it, and how to load this pack into it."""

import asyncio
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACK = "ssr_pack"  # the pack's private module name; never "nodes", which is ComfyUI's


@dataclass(frozen=True)
class ComfyRuntime:
    """An imported ComfyUI. Its modules are importable by their own names: `import comfy.sd, folder_paths, nodes`."""

    comfyui: Path
    base_directory: Path


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, or what nox fetched, or None. ValueError if COMFYUI_PATH is set and wrong."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        fetched = sorted(ROOT.glob(".cache/ComfyUI-*/main.py"))
        return fetched[-1].parent if fetched else None
    folder = Path(given).expanduser().resolve()
    if not (folder / "main.py").is_file():
        raise ValueError(f"COMFYUI_PATH={folder} is no ComfyUI folder: it has no main.py")
    return folder


def start(comfyui: Path, base_directory: Path) -> ComfyRuntime:
    """Imports ComfyUI for the CPU, with models and outputs in `base_directory`. Once per process."""
    # first, because this repository has a folder nodes/ and ComfyUI a module nodes.py
    sys.path.insert(0, str(comfyui))
    # main.py parses the command line, and nobody here does: these are the parser's defaults. Before anything else:
    # the folders of models and outputs are chosen when `folder_paths` is imported, which the next line does
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True
    args.base_directory = str(base_directory)
    args.database_url = "sqlite:///:memory:"
    importlib.import_module("utils.extra_config")  # first in main.py too: an older ComfyUI has a second `utils`
    nodes = importlib.import_module("nodes")
    if Path(nodes.__file__ or "").parent != comfyui:
        raise RuntimeError(f"`nodes` is {nodes.__file__}, not ComfyUI's: something imported the pack's folder first")
    folder_paths = importlib.import_module("folder_paths")
    if not Path(folder_paths.get_output_directory()).is_relative_to(base_directory):
        raise RuntimeError(f"outputs go to {folder_paths.get_output_directory()}, not below {base_directory}")
    loras = Path(folder_paths.get_output_directory()) / "loras"
    folder_paths.add_model_folder_path("loras", str(loras))  # main.py does: what is saved can be loaded
    importlib.import_module("execution")
    server = importlib.import_module("server")
    server.PromptServer(asyncio.new_event_loop())  # becomes PromptServer.instance, which nodes send their texts to
    return ComfyRuntime(comfyui, base_directory)


def load_pack() -> ModuleType:
    """This pack as ComfyUI imports it: a package under a made-up name, so that its relative imports work."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACK]
        raise
    return module
