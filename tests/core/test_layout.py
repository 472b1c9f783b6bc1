"""The layout: folders in the order of the data flow, arrows one way, and small files that say what they are."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssr_core

ROOT = Path(__file__).resolve().parents[2]

# Modules in the order of the data flow, by folder: each may import what stands before it.
CORE = {
    "": ("errors", "parallel"),
    "lora": ("low_rank_update", "expansion", "site", "lora", "subspace"),
    "statistics": ("case", "grams", "sufficient_statistics", "correction", "calibration", "weight_calibration"),
    "measure": (
        *("accumulator", "placed", "layer", "finding", "sketch", "token_choice", "tap"),
        *("recording", "survey", "refinement", "requirement", "collector", "distributed"),
    ),
    "solve": (
        *("router", "rank", "selection", "settings", "diagnostics", "likeness", "summary", "merge_report"),
        *("weights", "solution", "problem", "merge", "split"),
    ),
    "report": ("conflict", "advice"),
    "distillation": (
        *("structure", "hooks", "point", "factors", "muon", "branch", "overwriting", "frozen"),
        *("footprint", "requirement", "judge", "distil"),
    ),
    "files": ("storage", "peft_config", "lora_file", "statistics_entry", "statistics_file"),
}
# Folders of which each may import the ones before it; "" holds the nodes, a file each.
NODES = ("schema", "reading", "wording", "calibrating", "writing", "polishing", "pictures", "")
# What stands around the pack. `ssr_core` and `nodes` are what is shipped, and import nothing of the others.
AROUND = ("ssr_core", "nodes", "hosting", "demo", "authoring")

OUTSIDE = {"torch", "safetensors"}
LINES = 260
FILES = 16  # in one folder

ORDER = [f"{folder}.{name}".lstrip(".") for folder, names in CORE.items() for name in names]


def modules(folder: Path) -> dict[str, Path]:
    """By dotted name below `folder`; a package has the name of its folder."""
    found = {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", "."): path for path in folder.rglob("*.py")
    }
    return {name.removesuffix("__init__").rstrip("."): path for name, path in found.items()}


def imports(folder: Path, name: str) -> Iterator[str]:
    """Dotted names of what a module below `folder` imports of the same folder, wherever the statement stands."""
    path = modules(folder)[name]
    package = [folder.name, *name.split(".")] if path.stem == "__init__" else [folder.name, *name.split(".")[:-1]]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] if node.level <= len(package) else ["outside"]
            target = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:  # a name may be a module of its own
                whole = ".".join([*target[1:], alias.name])
                own = whole if whole in modules(folder) else ".".join(target[1:])
                if node.level <= len(package):
                    yield own


def outside(path: Path) -> set[str]:
    """Top-level names of what a module imports from elsewhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((found for target in arrows.get(name, ()) if (found := visit(target, [*way, name]))), [])

    return next((found for name in arrows if (found := visit(name, []))), [])


def floor(name: str, folders: tuple[str, ...]) -> int:
    folder = name.split(".")[0] if "." in name else ""
    return folders.index(folder)


def test_every_module_of_the_core_has_its_place_in_the_order():
    assert set(modules(ROOT / "ssr_core")) == {*ORDER, *CORE}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_of_the_core_imports_only_those_before_it(name):
    assert set(imports(ROOT / "ssr_core", name)) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", [*ORDER, *CORE])
def test_the_core_needs_only_torch_safetensors_and_the_standard_library(name):
    path = modules(ROOT / "ssr_core")[name]
    assert outside(path) - {"__future__"} - set(sys.stdlib_module_names) <= OUTSIDE


def test_arrows_between_folders_of_the_nodes_run_one_way_and_in_no_circle():
    folder = ROOT / "nodes"
    arrows = {name: set(imports(folder, name)) for name in modules(folder)}
    up = [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in targets
        if name and floor(target, NODES) > floor(name, NODES)
    ]
    assert up == []
    assert cycle({name: targets - {""} for name, targets in arrows.items()}) == []


def test_a_node_imports_no_other_node():
    folder = ROOT / "nodes"
    nodes = {name for name in modules(folder) if name and "." not in name and name not in NODES}
    assert [name for name in sorted(nodes) if set(imports(folder, name)) & nodes] == []
    assert nodes == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_arrows_between_the_folders_around_the_pack_run_one_way():
    for number, name in enumerate(AROUND):
        for path in (ROOT / name).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            known = {other for other in AROUND[number + 1 :] if f"from {other}" in text or f"..{other}" in text}
            assert known == set(), path


def test_a_circle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


def test_everything_public_is_exported_once():
    public = {name for name in vars(ssr_core) if not name.startswith("_")}
    assert sorted(ssr_core.__all__) == sorted(public - set(CORE) - set(CORE[""]))


@pytest.mark.parametrize("folder", ["ssr_core", "nodes"])
def test_files_fit_on_a_few_screens_and_say_what_they_are(folder):
    for path in modules(ROOT / folder).values():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LINES, path
        assert ast.get_docstring(ast.parse(text)), path


def test_no_folder_holds_more_than_a_person_can_look_over():
    folders = {path.parent for name in AROUND for path in (ROOT / name).rglob("*.py")}
    crowded = {folder.name: len(list(folder.glob("*.py"))) for folder in folders if folder.name != "nodes"}
    assert {name: count for name, count in crowded.items() if count > FILES} == {}
