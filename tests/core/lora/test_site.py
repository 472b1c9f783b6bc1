"""Site: rows of a weight; updates of fused and of split layers meet on common rows without changing a matrix."""

from itertools import pairwise

import pytest
import torch

from ssr_core import Site, align_rows, join_rows
from synthetic import dense, dense_joined, dense_modules, random_update


def rows(module: str, start: int, stop: int, total: int, rank: int = 2, seed: int = 0):
    return {Site(module, start, stop, total): random_update(stop - start, 5, rank, seed)}


FUSED = rows("qkv", 0, 12, 12, rank=3)
SPLIT = rows("qkv", 0, 4, 12, 1, 1) | rows("qkv", 4, 8, 12, 2, 2) | rows("qkv", 8, 12, 12, 1, 3)
ODD = rows("qkv", 1, 6, 12, 2, 4) | rows("qkv", 6, 7, 12, 1, 5)
LATE = rows("qkv", 5, 12, 12, 2, 6) | rows("mlp", 0, 6, 6, 1, 7)

GROUPS = {
    "fused and split": [FUSED, SPLIT],
    "overlapping odd slices": [ODD, LATE],
    "all": [FUSED, SPLIT, ODD, LATE],
}


def test_a_fused_update_is_cut_where_the_split_ones_end():
    fused, split = align_rows([FUSED, SPLIT])
    assert list(fused) == list(split) == list(SPLIT)


def test_odd_slices_are_cut_at_every_boundary_inside_them():
    early, late = align_rows([ODD, LATE])
    assert [(site.start, site.stop) for site in early] == [(1, 5), (5, 6), (6, 7)]
    assert [(site.module, site.start, site.stop) for site in late] == [
        ("qkv", 5, 6),
        ("qkv", 6, 7),
        ("qkv", 7, 12),
        ("mlp", 0, 6),
    ]


@pytest.mark.parametrize("tasks", GROUPS.values(), ids=GROUPS)
def test_aligned_sites_are_equal_or_share_no_row(tasks):
    sites = sorted({site for updates in align_rows(tasks) for site in updates})
    for one, other in pairwise(sites):
        assert one.module != other.module or one.stop <= other.start


@pytest.mark.parametrize("tasks", GROUPS.values(), ids=GROUPS)
def test_alignment_and_joining_restore_every_dense_matrix_exactly(tasks):
    for before, after in zip(tasks, align_rows(tasks), strict=True):
        wanted, joined = dense_modules(before), dense_joined(after)
        assert joined.keys() == wanted.keys()
        for module in wanted:
            torch.testing.assert_close(joined[module], wanted[module], rtol=1e-14, atol=1e-14)


def test_nothing_is_cut_where_tasks_agree():
    one, other = align_rows([FUSED, rows("qkv", 0, 12, 12, 1, 9)])
    assert list(one) == list(other) == list(FUSED)
    assert one[Site.whole("qkv", 12)] is FUSED[Site.whole("qkv", 12)]


def test_slices_of_one_update_share_their_down_tensor():
    fused, _ = align_rows([FUSED, SPLIT])
    assert len({update.down.data_ptr() for update in fused.values()}) == 1


def test_sites_of_one_lora_that_overlap_keep_both_their_updates():
    both = FUSED | rows("qkv", 4, 8, 12, 2, 8)
    (aligned,) = align_rows([both])
    torch.testing.assert_close(dense_joined(aligned)["qkv"], dense_modules(both)["qkv"])


def test_joining_leaves_a_whole_site_as_it_is():
    assert join_rows(FUSED)["qkv"] is FUSED[Site.whole("qkv", 12)]


def test_ranks_of_joined_slices_add_up():
    joined = join_rows(SPLIT)["qkv"]
    assert joined.rank == 4
    torch.testing.assert_close(dense(joined), dense_modules(SPLIT)["qkv"])


def test_a_site_prints_its_rows_only_where_it_is_a_slice():
    assert str(Site.whole("qkv", 12)) == "qkv"
    assert str(Site("qkv", 4, 8, 12)) == "qkv[4:8]"
