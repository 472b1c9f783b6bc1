"""All set-up in one command: `python3 run.py demo`, on Windows `py run.py demo`. Needs Python 3.10 and nothing else.

It makes an environment with nox under `.cache/` (by uv, if there is one) and hands over to a session of noxfile.py.
"""

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib import parse, request

if sys.version_info < (3, 10):  # noqa: UP036  before all else: an older one can read this file, but not run it
    sys.exit(
        f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]}. Install one, for example from "
        f"https://www.python.org/downloads/, and name it: `python3.12 {' '.join(sys.argv)}` (Windows: `py -3.12 ...`)"
    )

ROOT = Path(__file__).resolve().parent
NOX = "nox>=2025.2.9"
PIP = "pip-25.3-py3-none-any.whl"  # for a Python that has neither ensurepip nor pip
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
# settings of pip that are meant for other environments and would stop it in these
ENVIRONMENT = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def main(arguments: list[str]) -> int:
    """Runs the session named first with the arguments behind it; returns its exit code."""
    known, (name, *rest) = sessions(), arguments or ["--help"]
    if name not in known:
        print("python3 run.py NAME [ARGUMENTS], NAME being", *(f"  {key:<10}{known[key]}" for key in known), sep="\n")
        return 0 if name in ("-h", "--help") else 2
    nox = [str(environment()), "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--session", name, "--"]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl+C reaches nox, too, which ends in its own way; wait for it
    return subprocess.call([*nox, *(rest[1:] if rest[:1] == ["--"] else rest)], env=ENVIRONMENT)


def sessions() -> dict[str, str]:
    """{name: what it does} of the sessions in noxfile.py, read without nox."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in found}


def environment() -> Path:
    """The Python of an environment that has nox. Made the first time, and again where that has broken off."""
    folder = ROOT / ".cache" / "nox-{}.{}".format(*sys.version_info)
    python, complete = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), folder / "complete"
    if python.exists() and complete.is_file() and complete.read_text(encoding="utf-8") == NOX:
        return python
    for way in ways():
        print(f"Making an environment for nox {way.__name__.replace('_', ' ')}: {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            way(folder, python)
            complete.write_text(NOX, encoding="utf-8")
            return python
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"That failed: {error}", file=sys.stderr, flush=True)
    sys.exit("Can the package index be reached? Settings: HTTPS_PROXY, PIP_INDEX_URL and, for uv, UV_DEFAULT_INDEX")


def ways() -> list[Callable[[Path, Path], None]]:
    """What may make an environment here, best first. The last can everywhere: it needs no more than the network."""
    can_venv = importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")
    return [*([by_uv] if uv() else []), *([by_venv] if can_venv else []), by_virtualenv]


def uv() -> str:
    """uv's program, or an empty string. A version manager's stand-in for a uv that is not installed does not count."""
    program = shutil.which(os.environ.get("UV") or "uv")
    return program if program and not subprocess.run([program, "--version"], capture_output=True).returncode else ""


def by_uv(folder: Path, python: Path) -> None:
    call(uv(), "venv", "--quiet", "--python", sys.executable, folder)
    call(uv(), "pip", "install", "--quiet", "--python", python, NOX)


def by_venv(folder: Path, python: Path) -> None:
    call(sys.executable, "-m", "venv", folder)
    call(python, "-m", "pip", "install", "--quiet", NOX)


def by_virtualenv(folder: Path, python: Path) -> None:
    """Without ensurepip: virtualenv brings a pip of its own. It is put aside, as systems refuse it among their own."""
    with tempfile.TemporaryDirectory() as aside:
        pip = ["-m", "pip"] if importlib.util.find_spec("pip") else [fetched_pip(Path(aside))]
        call(sys.executable, *pip, "install", "-q", "--target", aside, "virtualenv", PIP_ROOT_USER_ACTION="ignore")
        call(sys.executable, "-m", "virtualenv", "--quiet", folder, PYTHONPATH=aside)
    call(python, "-m", "pip", "install", "--quiet", NOX)


def fetched_pip(folder: Path) -> Path:
    """What Python runs as pip: its wheel, from the package index into `folder`, need not be installed for that."""
    address = (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/") + "/pip/"
    print(f"Fetching pip from {parse.urlsplit(address).hostname}", flush=True)
    with request.urlopen(address, timeout=180) as page:
        links = re.findall(rf"""href=["']([^"']*{re.escape(PIP)}[^"']*)""", page.read().decode())
    content = request.urlopen(parse.urljoin(page.url, links[0]), timeout=180).read() if links else b""
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        raise OSError(f"{address} has no {PIP} with sha256 {PIP_SHA256}; a pip by your system's own means will do, too")
    (folder / PIP).write_bytes(content)
    return folder / PIP / "pip"


def call(*command: "str | Path", **variables: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**ENVIRONMENT, **variables})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
