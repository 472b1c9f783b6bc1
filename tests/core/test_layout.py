"""The layout of ssr_core: a chain of small modules that need torch and safetensors and nothing of a host."""

import ast
import sys
from pathlib import Path

import pytest

import ssr_core

FOLDER = Path(ssr_core.__file__).parent
ORDER = (
    *("errors", "storage", "parallel", "low_rank_update", "expansion", "site", "lora", "subspace", "grams"),
    *("sufficient_statistics", "accumulator", "correction", "calibration", "layer", "sketch", "choice", "tap"),
    *("recording", "refinement", "requirement", "collect", "distributed", "router", "rank", "selection", "diagnostics"),
    *("solution", "merge", "conflict", "advice", "peft_config", "files", "entry", "statistics_file"),
)
OUTSIDE = {"torch", "safetensors"}


def imports(name: str) -> tuple[set[str], set[str]]:
    """(modules of this package, top-level names of others) that a module imports, wherever the statement stands."""
    own, other = set(), set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            other.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            other.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{name}.py imports from outside of its package"
            own.update([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
    return own, other


def test_every_module_has_its_place_in_the_order():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_before_it(name):
    own, _ = imports(name)
    assert own <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", [*ORDER, "__init__"])
def test_a_module_needs_only_torch_safetensors_and_the_standard_library(name):
    _, other = imports(name)
    assert other - {"__future__"} - set(sys.stdlib_module_names) <= OUTSIDE


def test_everything_public_is_exported_once():
    public = {name for name in vars(ssr_core) if not name.startswith("_")} - set(ORDER) | {"merge"}
    assert sorted(ssr_core.__all__) == sorted(public)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_fits_on_a_few_screens_and_says_what_it_is(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 260
    assert ast.get_docstring(ast.parse(text))
