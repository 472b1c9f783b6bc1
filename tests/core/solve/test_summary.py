"""The two sentences on top of a report: what is kept, and the first thing worth doing."""

import math

import pytest

from ssr_core import Case, Lora, LowRankUpdate, join_loras
from ssr_core.solve.likeness import Likeness, alike, cosines_of
from ssr_core.solve.summary import Summary
from synthetic import dense, mlp, random, random_lora

SINGLES = (Case((0,)), Case((1,)))
BOTH = (*SINGLES, Case((0, 1)))


def summary(stack=(0.5, 0.3, 0.1), merge=(0.03, 0.1, 0.05), cases=BOTH, **more) -> Summary:
    return Summary(("cat", "sepia"), cases, stack, merge, **more)


def test_two_sentences_say_what_is_kept_and_what_to_do():
    kept, following = str(summary()).splitlines()
    assert kept == (
        "In its layers the merge keeps 97 % of cat and 90 % of sepia, and 95 % of what they do together; "
        "loaded one after the other, they would keep 50 % and 70 %."
    )
    assert following.startswith("Next: look at it with SSR Compare") and "SSR Save LoRA" in following


def test_of_a_quiet_lora_among_loud_ones_no_share_is_told():
    kept = str(summary(stack=(0.7, 5.1, 0.5), merge=(0.1, 1.06, 0.1))).splitlines()[0]
    assert kept.startswith("In its layers the merge keeps 90 % of cat, and 90 % of what they do together;")
    assert "Of sepia the layers tell little" in kept and "(error 1.06, stacked 5.10)" in kept
    assert "% of sepia" not in kept


def test_before_a_merge_it_is_what_one_would_keep():
    kept, following = str(summary(made=False)).splitlines()
    assert kept.startswith("In its layers the merge would keep 97 % of cat") and following.startswith(
        "Next: merge them with SSR Solve"
    )


def test_of_many_loras_the_mean_and_the_least_are_told():
    names, cases = tuple("abcdef"), tuple(Case((k,)) for k in range(6))
    kept = str(Summary(names, cases, (0.9,) * 6, (0.1, 0.2, 0.1, 0.1, 0.1, 0.0))).splitlines()[0]
    assert "90 % of the LoRAs on average, at least 80 % (b)" in kept


def test_of_one_lora_it_is_said_how_the_others_get_there():
    following = str(Summary(("cat",), (Case((0,)),), (0.0,), (0.0,))).splitlines()[1]
    assert following.startswith("Next: there is only cat, and nothing to merge it with. Connect `tasks`")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cases": SINGLES, "stack": (0.5, 0.5), "merge": (0.1, 0.1)}, "if you want cat and sepia in one picture"),
        ({"merge": (0.1, 0.6, 0.1)}, "look at sepia with SSR Compare, as it loses the most.*a higher strength of it"),
        ({"merge": (0.3, 0.1, 0.1)}, "look at cat .*eight steps, too"),
        ({"stack": (0.01, 0.02, 0.9), "merge": (0.01, 0.01, 0.2)}, "load the LoRAs one after the other"),
        ({"coverage": 1, "merge": (0.9, 0.9, 0.9)}, "collect again with 4 steps or more"),
        ({"alike": (Likeness(0, 1, 0.93),)}, "keep one of cat and sepia. They are 93% alike, as epochs"),
    ],
)
def test_the_first_thing_worth_doing_is_told_and_only_that(given, said):
    import re

    following = str(summary(**given)).splitlines()[1]
    assert re.search(said, following) and following.count("Next:") == 1


def test_what_is_not_known_is_not_told():
    nan = math.nan
    assert "not known what the merge keeps" in str(summary((nan,) * 3, (nan,) * 3))
    assert "of cat" not in str(summary((nan, 0.3, nan), (nan, 0.1, nan)))


def test_cosines_are_those_of_the_dense_updates():
    loras = [random_lora("cat", mlp(), 3, 1), random_lora("dog", mlp(), 2, 2, ["2"])]
    flat = [{site: dense(update) for site, update in lora.updates.items()} for lora in loras]
    product = sum(float((flat[0][site] * flat[1][site]).sum()) for site in flat[1])
    norms = [sum(float(matrix.square().sum()) for matrix in one.values()) ** 0.5 for one in flat]
    assert float(cosines_of(join_loras(loras))[0, 1]) == pytest.approx(product / norms[0] / norms[1], rel=1e-5)


def test_epochs_of_one_training_are_the_same_subject_and_others_are_not():
    first = random_lora("anna-000004", mlp(), 4, 1)
    moved = {
        site: LowRankUpdate(update.down + 0.1 * random(*update.down.shape).float() * update.down.std(), 1.3 * update.up)
        for site, update in first.updates.items()
    }
    loras = [first, random_lora("bert", mlp(), 4, 2), Lora("anna-000008", moved)]
    (found,) = alike(join_loras(loras))
    assert (found.one, found.other) == (0, 2) and 0.9 < found.cosine < 1
    assert alike(join_loras(loras[:2])) == ()
