"""Files from strangers: each is refused by name or read as something sane, and nothing is run or written."""

import pytest

import ssr_core
from fuzzing import core_readers, fuzz

FILES = 10  # of each kind of damage; benchmarks/trust/fuzz.py has thousands


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about odd files
@pytest.mark.parametrize("reader", ["ssr_core.load_lora", "ssr_core.load_statistics"])
def test_a_damaged_or_hostile_file_is_refused_by_name_or_read_as_something_finite(reader, tmp_path):
    chosen = core_readers(ssr_core, tmp_path)[reader]
    count = FILES * len(chosen.kinds)
    found, bugs = fuzz(chosen, range(10_000, 10_000 + count), tmp_path)
    assert bugs == []
    assert found.total() == count and found["error"] > count / 2
