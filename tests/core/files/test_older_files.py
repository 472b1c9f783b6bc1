"""Files that earlier versions wrote are read, and give what they gave."""

from pathlib import Path

import pytest

from ssr_core import Lora, Site, StatisticsError, load_lora, load_statistics, merge
from ssr_core.files import statistics_file
from ssr_core.files.storage import read_metadata
from ssr_core.statistics.case import singles
from synthetic import dense, relative_error

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def loras() -> list[Lora]:
    """As the first format was written with: rank 2 and 3 on two linear layers, one of them on both."""
    files = (("cat", 0.8), ("dog", 1.0))
    return [load_lora(DATA / f"statistics-1-{name}.safetensors").with_strength(strength) for name, strength in files]


def test_statistics_of_the_first_format_have_each_lora_by_itself_and_their_corrections(loras):
    found = load_statistics(DATA / "statistics-1.safetensors", loras)
    assert found.cases == singles(2) and found.tokens == (40, 40)
    assert {site.module for site in found.corrections} == {"0", "2"}
    assert found.statistics[Site.whole("2", 8)].coverage == (2, 2)


def test_statistics_of_the_first_format_solve_to_the_lora_they_gave_then(loras):
    found = merge(load_statistics(DATA / "statistics-1.safetensors", loras)).updates
    wanted = load_lora(DATA / "statistics-1-merged.safetensors").updates
    assert found.keys() == wanted.keys()
    for site, update in found.items():
        assert relative_error(dense(update), dense(wanted[site])) < 1e-5


def of_format(number: int) -> list[Lora]:
    files = (("cat", 0.8), ("dog", 1.0))
    return [load_lora(DATA / f"statistics-{number}-{name}.safetensors").with_strength(s) for name, s in files]


@pytest.mark.parametrize("number", [1, 2])
def test_statistics_of_every_format_solve_to_the_lora_they_gave_then(number):
    found = merge(load_statistics(DATA / f"statistics-{number}.safetensors", of_format(number))).updates
    wanted = load_lora(DATA / f"statistics-{number}-merged.safetensors").updates
    assert found.keys() == wanted.keys()
    for site, update in found.items():
        assert relative_error(dense(update), dense(wanted[site])) < 1e-5


def test_statistics_of_the_second_format_have_combinations_and_silence_and_their_corrections():
    found = load_statistics(DATA / "statistics-2.safetensors", of_format(2))
    assert [case.speakers for case in found.cases] == [(0,), (1,), (0, 1), ()]
    assert found.tokens == (40, 40, 20, 9) and {site.module for site in found.corrections} == {"0", "2"}


def test_every_format_that_is_written_has_files_here():
    """A new format needs files of its own: tests/support/format_files.py."""
    kept = {read_metadata(path, StatisticsError).get("ssr.format") for path in DATA.glob("statistics-?.safetensors")}
    assert {statistics_file.PLAIN, statistics_file.WITH_CASES} == kept
