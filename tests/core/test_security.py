"""What SECURITY.md promises of the shipped code: no network, no other programs, no code out of files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "ssr_core").rglob("*.py")])

# everything that is imported from outside; a new name here is a decision about security
IMPORTED = {
    *("__future__", "collections", "contextlib", "dataclasses", "datetime", "enum", "fnmatch", "functools", "hashlib"),
    *("inspect", "itertools", "json", "logging", "math", "os", "pathlib", "re", "sys", "threading", "time", "typing"),
    *(
        "uuid",
        "copy",
        "weakref",
        "zipfile",
        "concurrent",
        "comfyui_version",
        "numbers",
        "types",
        "warnings",
        "operator",
        "textwrap",
        "statistics",
        "abc",
        "io",
        "base64",
    ),
    *("torch", "safetensors", "numpy", "scipy", "PIL", "einops", "tqdm", "matplotlib"),
    *("comfy", "comfy_api", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
# of modules that may be imported, what may not be used
ATTRIBUTES = {
    "os": {
        "system",
        "popen",
        "environ",
        "environb",
        "getenv",
        "putenv",
        "fork",
        "kill",
        "chmod",
        "chown",
        "symlink",
        "link",
    },
    "torch": {"load", "save", "hub", "jit", "package", "classes", "ops", "multiprocessing", "distributed"},
    "sys": {"path", "meta_path", "settrace", "setprofile"},
    "numpy": {"load", "save", "fromfile", "ctypeslib", "f2py"},
    "zipfile": {"extract", "extractall"},
}
STARTS = ("exec", "spawn", "posix_spawn")  # of functions of os that start programs


def violations(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if a.name.split(".")[0] not in IMPORTED)
            yield from (f"imports {a.name}" for a in node.names if _forbidden(*a.name.partition(".")[::2]))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            if module.split(".")[0] not in IMPORTED:
                yield f"imports {module}"
            yield from (f"imports {module}.{a.name}" for a in node.names if _forbidden(module, a.name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield f"calls {node.func.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if _forbidden(node.value.id, node.attr):
                yield f"uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "weights_only", "trust_remote_code"):
            yield f"gives {node.arg}"


def _forbidden(module: str, name: str) -> bool:
    return name.split(".")[0] in ATTRIBUTES.get(module, ()) or (module == "os" and name.startswith(STARTS))


# sums statistics of processes that its caller has connected; nothing else imports it, see below
DISTRIBUTED = ROOT / "ssr_core" / "measure" / "distributed.py"


def test_only_scripts_of_their_own_connect_processes():
    for path in (path for path in SHIPPED if path != DISTRIBUTED):
        assert "distributed" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", [path for path in SHIPPED if path != DISTRIBUTED], ids=lambda path: path.stem)
def test_the_shipped_code_uses_no_network_starts_no_program_and_runs_no_code_of_a_file(path: Path):
    assert list(violations(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import subprocess", "import socket", "from urllib import request", "import requests", "import pickle"),
        *("import ctypes", "import multiprocessing", "import importlib", "import shutil", "import tempfile"),
        *("eval('1')", "exec('1')", "__import__('os')", "compile('1', '', 'eval')", "import os\nos.system('ls')"),
        *("from os import popen", "import os\nos.environ['A'] = '1'", "import os\nos.execv('a', [])"),
        *("import torch\ntorch.load('x')", "from torch import hub", "import torch.hub", "f(weights_only=False)"),
        "import numpy\nnumpy.load('x')",
    ],
)
def test_the_check_finds_what_is_forbidden(code: str):
    assert list(violations(ast.parse(code)))


def test_checkpoints_are_read_by_one_call_that_runs_no_code():
    """comfy.utils.load_torch_file unpickles whatever a file says unless it is told not to."""
    calls = [
        node
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_torch_file")
    ]
    assert len(calls) == 1
    assert [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "safe_load"] == ["True"]
