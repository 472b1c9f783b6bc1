"""Lora: updates by site with a strength; kohya's and dotted spellings of one module meet."""

import torch

from ssr_core import Lora, Site, join_loras
from synthetic import dense, random_update


def lora(name: str, *modules: str, seed: int = 0) -> Lora:
    return Lora(name, {Site.whole(m, 6): random_update(6, 5, 2, seed + i) for i, m in enumerate(modules)})


def test_another_strength_keeps_updates_name_and_source():
    cat = Lora("cat", lora("cat", "a").updates, source={"file": "cat.safetensors"})
    weaker = cat.with_strength(0.5)
    assert (weaker.strength, cat.strength) == (0.5, 1.0)
    assert (weaker.name, weaker.updates, weaker.source) == (cat.name, cat.updates, cat.source)


def test_underscores_and_dots_of_one_module_meet_under_the_dotted_name():
    spaces = join_loras([lora("cat", "blocks_0_qkv", "blocks_1_qkv"), lora("dog", "blocks.0.qkv")])
    assert {site.module: space.ranks for site, space in spaces.items()} == {
        "blocks.0.qkv": (2, 2),
        "blocks_1_qkv": (2, 0),
    }


def test_the_order_of_the_spellings_does_not_matter():
    one, other = (
        join_loras([lora("a", first), lora("b", second, seed=5)])[Site.whole("blocks.0.qkv", 6)]
        for first, second in (("blocks_0_qkv", "blocks.0.qkv"), ("blocks.0.qkv", "blocks_0_qkv"))
    )
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one.up, other.up)


def test_a_lora_that_spells_one_module_twice_keeps_the_sum():
    both = lora("cat", "blocks_0_qkv", "blocks.0.qkv")
    ((site, space),) = join_loras([both]).items()
    assert site == Site.whole("blocks.0.qkv", 6)
    torch.testing.assert_close(space.up.double() @ space.down.double(), sum(map(dense, both.updates.values())))


def test_two_modules_with_dots_at_different_places_stay_apart():
    # only kohya's names, which hold no dot at all, stand for others
    spaces = join_loras([lora("cat", "a.b_c", "a_b.c"), lora("dog", "a.b_c")])
    assert {site.module: space.ranks for site, space in spaces.items()} == {"a.b_c": (2, 2), "a_b.c": (2, 0)}
