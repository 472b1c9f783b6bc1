"""What goes wrong in the middle of a merge in a real server leaves model, memory and folders as they were."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import KINDS, Trial, kill_while_saving, merge_graph, tiny_server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def trial(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """benchmarks/trust/faults.py has hundreds of each."""
    with tiny_server(tmp_path_factory.mktemp("faults"), comfyui) as server:
        trial = Trial(server)
        trial.begin()
        yield trial


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_fault_the_untouched_model_makes_the_same_image_and_nothing_is_left(kind: str, trial: Trial):
    assert trial.strike(kind, 1) == []


def test_rounds_of_merges_leave_no_tensor_behind(trial: Trial):
    for seed in range(10):
        trial.server.run(merge_graph(seed))
    assert trial.differences() == []


def test_a_server_killed_while_saving_leaves_no_half_file_under_a_name_that_loads(trial: Trial):
    image, merged = trial.image, trial.merged
    assert kill_while_saving(trial) == []
    folder = trial.server.base_directory / "output" / "loras"
    left = [path for path in folder.iterdir() if path.suffix != ".safetensors"]  # safetensors may have one of its own
    assert any(path.suffix == ".tmp" for path in left)
    trial.begin()
    assert (trial.image, trial.merged) == (image, merged)
    long_ago = time.time() - 2 * 24 * 3600
    for path in left:
        os.utime(path, (long_ago, long_ago))
    trial.server.run(merge_graph(0, save="after"))
    assert [path.name for path in folder.iterdir()] == ["after_00001_.safetensors"]
