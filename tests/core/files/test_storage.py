"""Storage: what was read stays as it was, what cannot be computed with is refused, a save leaves one file or none."""

import os
import re
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssr_core import LoraError, SaveError, load_lora
from ssr_core.files import storage

PAIR = {"a.lora_A.weight": torch.ones(4, 1024), "a.lora_B.weight": torch.ones(1024, 4)}


def overwrite(path, tensors):
    """The same file, as trainers write it, not another under its name."""
    other = path.with_suffix(".new")
    save_file(tensors, other)
    with path.open("r+b") as same:
        same.write(other.read_bytes())
        same.truncate()
    other.unlink()


def test_what_was_read_does_not_change_when_the_file_is_overwritten(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file(PAIR, path)
    (update,) = load_lora(path).updates.values()
    overwrite(path, {key: torch.zeros_like(value) for key, value in PAIR.items()})
    assert update.up.all() and update.down.all()


def test_what_was_read_outlives_a_file_that_is_cut(tmp_path):
    """A view of it would end the process with SIGBUS."""
    path = tmp_path / "cat.safetensors"
    save_file(PAIR, path)
    (update,) = load_lora(path).updates.values()
    os.truncate(path, 8)
    assert float(update.down.sum() + update.up.sum()) == 2 * 4 * 1024


def test_a_file_that_is_written_to_while_it_is_read_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    save_file(PAIR, path)
    monkeypatch.setattr(storage, "_check", lambda *_: os.utime(path, (1, 1)))
    with pytest.raises(LoraError, match=r"cat\.safetensors was written to while it was read"):
        load_lora(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_factors_of_every_real_type_are_read_as_their_values(dtype, tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({key: value.to(dtype) for key, value in PAIR.items()}, path)
    (update,) = load_lora(path).updates.values()
    assert update.down.is_floating_point() and torch.equal(update.dense(), torch.full((1024, 1024), 4.0))


def test_complex_numbers_are_refused_by_file_and_key(tmp_path):
    save_file({key: value.to(torch.complex64) for key, value in PAIR.items()}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=r"cat\.safetensors: 'a\.lora_A\.weight' .*complex64"):
        load_lora(tmp_path / "cat.safetensors")


def test_factors_without_inputs_are_refused_by_file_and_key(tmp_path):
    save_file({"a.lora_A.weight": torch.ones(4, 0), "a.lora_B.weight": torch.ones(8, 4)}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=r"cat\.safetensors: a: down \(4, 0\)"):
        load_lora(tmp_path / "cat.safetensors")


def test_a_tucker_core_with_a_kernel_that_no_layer_has_is_refused_before_it_is_multiplied(tmp_path, monkeypatch):
    core = {"a.lora_down.weight": torch.ones(1, 9, 1, 1), "a.lora_up.weight": torch.ones(9, 1, 1, 1)}
    save_file(core | {"a.lora_mid.weight": torch.ones(1, 1, 100, 100)}, tmp_path / "cat.safetensors")
    monkeypatch.setattr(torch, "einsum", lambda *_: pytest.fail("it was multiplied"))
    with pytest.raises(LoraError, match=r"cat\.safetensors: a: a Tucker core \(1, 1, 100, 100\)"):
        load_lora(tmp_path / "cat.safetensors")


def test_what_a_killed_process_left_is_removed_by_the_next_save_and_what_is_being_written_is_not(tmp_path):
    ours, of_safetensors = (f"merged.safetensors.{digit * 32}.tmp" for digit in "ab"), (".tmpOsg3lu", ".tmp4bKz0Q")
    (old_one, new_one), (old_other, new_other) = ours, of_safetensors
    foreign = ["notes.tmp", "x.safetensors.1234.tmp", ".tmpdir"]
    for name in (old_one, new_one, old_other, new_other, *foreign):
        (tmp_path / name).touch()
    old = time.time() - storage.STALE - 60
    for name in (old_one, old_other, *foreign):
        os.utime(tmp_path / name, (old, old))
    storage.write_safetensors(PAIR, tmp_path / "merged.safetensors", {})
    assert {path.name for path in tmp_path.iterdir()} == {"merged.safetensors", new_one, new_other, *foreign}


def test_a_full_disk_is_an_error_with_the_name_of_the_file_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"merged\.safetensors cannot be written.*File too large.*free space"):
            storage.write_safetensors(PAIR, tmp_path / "merged.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_the_name_of_the_file(tmp_path):
    (tmp_path / "loras").touch()  # a file in its place
    with pytest.raises(SaveError, match=re.escape(str(tmp_path / "loras" / "merged.safetensors"))):
        storage.write_safetensors(PAIR, tmp_path / "loras" / "merged.safetensors", {})


def test_a_name_that_is_too_long_is_an_error_with_that_name_and_leaves_nothing(tmp_path):
    with pytest.raises(SaveError, match=r"x{300}\.safetensors cannot be written"):
        storage.write_safetensors(PAIR, tmp_path / f"{'x' * 300}.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (calls.append("fsync"), fsync(*args))[1])
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args))[1])
    storage.write_safetensors(PAIR, tmp_path / "merged.safetensors", {})
    assert calls == ["fsync", "replace"]
    assert load_file(tmp_path / "merged.safetensors").keys() == PAIR.keys()


def test_the_same_content_is_the_same_file_to_the_byte(tmp_path):
    metadata = {
        f"key{i}": value for i, value in enumerate(("\u00e4\u732b", '"\\', "\t\x01\x7f", "{}", "", " ", "/", "\u2028"))
    }
    for name in "abcde":
        storage.write_safetensors(PAIR, tmp_path / name, metadata)
    assert len({(tmp_path / name).read_bytes() for name in "abcde"}) == 1
    with safe_open(tmp_path / "a", framework="pt") as opened:
        assert opened.metadata() == metadata
        assert torch.equal(opened.get_tensor("a.lora_B.weight"), PAIR["a.lora_B.weight"])


def test_a_key_without_end_is_refused_before_it_is_taken_apart(tmp_path):
    save_file({"." * 1_000_000: torch.ones(1)}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=r"cat\.safetensors: the key '\.+'\.\.\. has 1000000 characters"):
        load_lora(tmp_path / "cat.safetensors")
