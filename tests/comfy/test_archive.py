"""What the Comfy registry would serve: it validates, packs, and its archive is a working pack in a clean ComfyUI."""

import io
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import comfy_runtime as runtime
from hosting.server import ComfyServer, prepare_base_directory

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `comfy node pack` makes it, but in a folder of its own."""
    file_utils = pytest.importorskip("comfy_cli.file_utils")
    if not (runtime.ROOT / ".git").exists():
        pytest.skip("no git checkout: the registry packs what git tracks")
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runtime.ROOT)
        file_utils.zip_files(path)
    return path


def test_the_project_validates_for_the_registry(monkeypatch):
    command = pytest.importorskip("comfy_cli.command.custom_nodes.command")
    monkeypatch.chdir(runtime.ROOT)
    with redirect_stdout(io.StringIO()) as said:
        config = command.validate_node_for_publishing()
    assert "Warning" not in said.getvalue()
    assert config.project.version and config.project.urls.repository and config.tool_comfy.icon
    assert config.project.supported_comfyui_version == ">=0.30.0" and config.project.dependencies == []


def test_the_archive_has_what_users_need_and_nothing_that_writes_or_downloads(archive):
    names = zipfile.ZipFile(archive).namelist()
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "locales/zh/nodeDefs.json"} <= set(names)
    assert any(name.startswith("web/docs/") for name in names) and "workflows/START-HERE-first-steps-sdxl.jpg" in names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert not {"run.py", "noxfile.py"} & set(names)
    assert folders <= {"locales", "nodes", "ssr_core", "subgraphs", "web", "workflows"}
    assert sum(info.compress_size for info in zipfile.ZipFile(archive).infolist()) < 2_000_000


def test_the_archive_runs_in_a_clean_comfyui(archive, comfyui, object_info, tmp_path):
    base_directory = prepare_base_directory(tmp_path)
    zipfile.ZipFile(archive).extractall(tmp_path / "custom_nodes" / "comfyui-ssr-merge")
    with ComfyServer(comfyui, base_directory) as server:
        found = server.object_info()
        assert server.failed_imports() == []
    wanted = {name for name in object_info if name.startswith("SSR") and not name.startswith("SSRDemo")}
    assert wanted <= set(found)
