"""run.py: which way it makes its environment, what it starts in there, and what it says where it cannot."""

import ast
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """run.py in a repository with nothing but a noxfile, and where no program is started."""
    module = load()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "noxfile.py").write_text((ROOT / "noxfile.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module.subprocess, "run", forbidden)
    monkeypatch.setattr(module.subprocess, "call", forbidden)
    monkeypatch.setattr(module.request, "urlopen", forbidden)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_of_the_repository", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forbidden(*command: object, **_: object) -> None:
    raise AssertionError(f"not in this test: {command}")


def have(monkeypatch: pytest.MonkeyPatch, run: ModuleType, *found: str) -> None:
    """A machine with no other of uv, venv, ensurepip and pip than `found`."""
    monkeypatch.setattr(run, "uv", lambda: "/programs/uv" if "uv" in found else "")
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name if name in found else None)


def record(monkeypatch: pytest.MonkeyPatch, run: ModuleType, failing: str = "") -> list[str]:
    """The commands that would have been run; one with `failing` in it fails, any other makes the Python it should."""
    commands: list[str] = []

    def call(*command: object, **variables: str) -> None:
        commands.append(" ".join(map(str, command)))
        if failing and failing in commands[-1]:
            raise subprocess.CalledProcessError(1, commands[-1])
        if "venv" in commands[-1] or "virtualenv" in commands[-1]:
            python = expected_python(run)
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    monkeypatch.setattr(run, "call", call)
    return commands


def expected_python(run: ModuleType) -> Path:
    folder = run.ROOT / ".cache" / f"nox-{sys.version_info.major}.{sys.version_info.minor}"
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.mark.parametrize(
    ("found", "ways"),
    [
        (("uv", "venv", "ensurepip", "pip"), ["by_uv", "by_venv", "by_virtualenv"]),
        (("venv", "ensurepip", "pip"), ["by_venv", "by_virtualenv"]),
        (("venv", "pip"), ["by_virtualenv"]),
        (("venv",), ["by_virtualenv"]),
        (("ensurepip",), ["by_virtualenv"]),
        ((), ["by_virtualenv"]),
    ],
)
def test_uv_goes_first_then_venv_where_it_is_whole_and_virtualenv_is_always_left(run, monkeypatch, found, ways):
    have(monkeypatch, run, *found)
    assert [way.__name__ for way in run.ways()] == ways


@pytest.mark.parametrize(("code", "works"), [(0, True), (127, False)])
def test_a_uv_that_does_not_start_is_no_uv(run, monkeypatch, code: int, works: bool):
    monkeypatch.setattr(run.shutil, "which", lambda name: f"/shims/{name}")
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))
    monkeypatch.delenv("UV", raising=False)
    assert run.uv() == ("/shims/uv" if works else "")


def test_the_environment_is_made_once(run, monkeypatch):
    have(monkeypatch, run, "venv", "ensurepip")
    commands = record(monkeypatch, run)
    assert [run.environment(), run.environment()] == [expected_python(run)] * 2
    assert len(commands) == 2 and commands[1].endswith(f"-m pip install --quiet {run.NOX}")


def test_an_environment_whose_making_broke_off_is_made_anew(run, monkeypatch):
    have(monkeypatch, run, "venv", "ensurepip")
    python = expected_python(run)
    rest = python.parent / "rest"
    rest.parent.mkdir(parents=True)
    rest.touch()
    python.touch()  # as after Ctrl+C while pip installed
    commands = record(monkeypatch, run)
    assert run.environment() == python
    assert commands and not rest.exists()


def test_another_way_is_tried_where_one_fails(run, monkeypatch, capsys):
    have(monkeypatch, run, "uv", "venv", "ensurepip")
    commands = record(monkeypatch, run, failing="/programs/uv pip")
    run.environment()
    assert "-m venv" in commands[2] and "/programs/uv pip" in capsys.readouterr().err


def test_what_to_look_at_is_told_where_every_way_fails(run, monkeypatch, capsys):
    have(monkeypatch, run, "venv", "ensurepip", "pip")
    commands = record(monkeypatch, run, failing="install")
    with pytest.raises(SystemExit, match="HTTPS_PROXY, PIP_INDEX_URL"):
        run.environment()
    assert len(commands) == 3 and capsys.readouterr().err.count("That failed") == 2
    with pytest.raises(SystemExit):  # and it does not count as made
        run.environment()


def test_nothing_is_installed_into_a_system_whose_python_lacks_ensurepip(run, monkeypatch):
    have(monkeypatch, run, "venv", "pip")
    commands = record(monkeypatch, run)
    run.environment()
    of_the_system = [command for command in commands if command.startswith(f"{sys.executable} -m pip")]
    assert len(of_the_system) == 1 and "install -q --target " in of_the_system[0]


def index(monkeypatch: pytest.MonkeyPatch, run: ModuleType, wheel: bytes) -> list[str]:
    """The addresses asked of an index that has `wheel` as pip's, by a link relative to its page."""
    asked: list[str] = []

    def urlopen(address: str, **_: object) -> io.BytesIO:
        asked.append(address)
        page = f'<a href="../../files/pip-1.0.whl">1</a> <a href="../../files/{run.PIP}#sha256=0">2</a>'
        answer = io.BytesIO(wheel if run.PIP in address else page.encode())
        answer.url = address  # type: ignore[attr-defined]
        return answer

    monkeypatch.setattr(run.request, "urlopen", urlopen)
    return asked


def test_a_python_without_pip_runs_the_wheel_of_the_index_that_pip_is_set_to(run, monkeypatch, tmp_path):
    have(monkeypatch, run)
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple/")
    monkeypatch.setattr(run, "PIP_SHA256", hashlib.sha256(b"wheel").hexdigest())
    asked = index(monkeypatch, run, b"wheel")
    commands = record(monkeypatch, run)
    run.environment()
    assert asked[0] == "https://index.example/simple/pip/"
    assert asked[1].startswith(f"https://index.example/files/{run.PIP}")
    assert re.search(rf"{re.escape(run.PIP)}.pip install -q --target .* virtualenv", commands[0])


def test_a_pip_that_is_not_the_expected_one_is_not_run(run, monkeypatch, tmp_path):
    index(monkeypatch, run, b"another wheel")
    with pytest.raises(OSError, match=run.PIP_SHA256):
        run.fetched_pip(tmp_path)
    assert not (tmp_path / run.PIP).exists()


@pytest.mark.parametrize(
    ("arguments", "passed_on"),
    [
        (["demo"], ["demo", "--"]),
        (["demo", "--serve"], ["demo", "--", "--serve"]),
        (["demo", "--", "--serve"], ["demo", "--", "--serve"]),
        (["tests", "tests/core", "-x", "-q"], ["tests", "--", "tests/core", "-x", "-q"]),
    ],
)
def test_arguments_reach_the_session_and_its_exit_code_comes_back(run, monkeypatch, arguments, passed_on):
    monkeypatch.setattr(run, "environment", lambda: Path("python"))
    started: list[list[str]] = []

    def call(command: list[str], env: dict[str, str]) -> int:
        started.append(command)
        return 7

    monkeypatch.setattr(run.subprocess, "call", call)
    assert run.main(arguments) == 7
    assert started[0][:5] == ["python", "-m", "nox", "--noxfile", str(run.ROOT / "noxfile.py")]
    assert started[0][5:] == ["--session", *passed_on]


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--help"], 0), (["dmeo"], 2)])
def test_without_the_name_of_a_session_they_are_listed_and_nothing_is_made(
    run, capsys, arguments: list[str], code: int
):
    assert run.main(arguments) == code
    said = capsys.readouterr().out
    for name in ("demo", "tests", "fidelity", "speed", "trust", "lint", "core"):
        assert re.search(rf"^  {name} +[A-Z].*\.$", said, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run", *map(str, ROOT.glob("benchmarks/*/*.md"))])
def test_pages_name_only_sessions_that_there_are(run, page: str):
    named = set(re.findall(r"\brun\.py (\w+)", (ROOT / page).read_text(encoding="utf-8")))
    assert named and named <= set(run.sessions())


def test_an_old_python_is_told_which_one_it_is_and_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 6, "final", 0))
    monkeypatch.setattr(sys, "version", "3.9.6 (default)")
    with pytest.raises(SystemExit, match=r"3\.10 or newer is needed; .* is 3\.9\.6\."):
        load()


def test_an_old_python_can_read_the_file_up_to_there():
    ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 7))
