"""Files: every spelling is read exactly, what is broken is refused by file and key, and writing is all or nothing."""

import os
import stat
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allocations import allocations
from ssr_core import (
    Lora,
    LoraError,
    LowRankUpdate,
    Site,
    StatisticsCollector,
    StatisticsError,
    load_lora,
    load_statistics,
    merge,
    read_pairs,
    save_lora,
    save_statistics,
    to_state_dict,
)
from ssr_core.files import storage
from ssr_core.files.storage import read_metadata
from synthetic import collect, dense, dense_joined, mlp, random, random_lora, random_update

FACTORS = {"blocks.0.q": ((4, 8), (6, 4)), "blocks.1.conv": ((2, 3, 3, 3), (5, 2, 1, 1))}
ENDS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "peft with an adapter": ("lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
}
PREFIXES = {
    "kohya": "lora_unet_",
    "peft": "base_model.model.",
    "peft with an adapter": "base_model.model.",
    "diffusers": "unet.",
}


def factors(module: str) -> tuple[Tensor, Tensor]:
    down, up = FACTORS[module]
    return random(*down, seed=1, dtype=torch.float32), random(*up, seed=2, dtype=torch.float32)


def spelled(
    prefix: str, ends: tuple[str, str], underscores: bool = False, alpha: float | None = None
) -> dict[str, Tensor]:
    state = {}
    for module in FACTORS:
        key = prefix + (module.replace(".", "_") if underscores else module)
        state |= {f"{key}.{end}": factor for end, factor in zip(ends, factors(module), strict=True)}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def deltas(alpha_over_rank: dict[str, float] | None = None) -> dict[str, Tensor]:
    scales = alpha_over_rank or dict.fromkeys(FACTORS, 1.0)
    pairs = {module: factors(module) for module in FACTORS}
    return {m: scales[m] * up.double().flatten(1) @ down.double().flatten(1) for m, (down, up) in pairs.items()}


@pytest.mark.parametrize("spelling", ENDS)
def test_every_spelling_reads_as_the_same_dense_updates(spelling, tmp_path):
    underscores = spelling == "kohya"
    save_file(spelled(PREFIXES[spelling], ENDS[spelling], underscores), tmp_path / "cat.safetensors")
    lora = load_lora(tmp_path / "cat.safetensors", strength=0.5)
    assert (lora.name, lora.strength) == ("cat", 0.5)
    for module, delta in deltas().items():
        update = lora.updates[Site.whole(module.replace(".", "_") if underscores else module, len(delta))]
        torch.testing.assert_close(dense(update), delta)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_transformer_", ""])
def test_the_prefixes_of_the_field_are_no_part_of_a_modules_name(prefix, tmp_path):
    save_file(spelled(prefix, ENDS["peft"]), tmp_path / "cat.safetensors")
    assert {site.module for site in load_lora(tmp_path / "cat.safetensors").updates} == set(FACTORS)


def test_alpha_of_a_file_is_divided_by_the_rank_of_each_pair(tmp_path):
    save_file(spelled("lora_unet_", ENDS["kohya"], True, alpha=8.0), tmp_path / "cat.safetensors")
    lora = load_lora(tmp_path / "cat.safetensors")
    wanted = deltas({"blocks.0.q": 8 / 4, "blocks.1.conv": 8 / 2})
    for module, delta in wanted.items():
        torch.testing.assert_close(dense(lora.updates[Site.whole(module.replace(".", "_"), len(delta))]), delta)


def test_a_tucker_core_of_a_file_is_used(tmp_path):
    down, mid, up = random(2, 3, 1, 1), random(2, 2, 3, 3, seed=1), random(5, 2, 1, 1, seed=2)
    state = {"c.lora_down.weight": down, "c.lora_mid.weight": mid, "c.lora_up.weight": up}
    save_file({key: value.float() for key, value in state.items()}, tmp_path / "cat.safetensors")
    update = load_lora(tmp_path / "cat.safetensors").updates[Site.whole("c", 5)]
    wanted = torch.einsum("or,rqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(dense(update).reshape(5, 3, 3, 3), wanted, rtol=1e-5, atol=1e-5)


def test_the_pairs_of_a_state_dict_are_told_from_the_rest():
    state = spelled("text.", ENDS["peft"]) | {"text.norm.diff": torch.ones(3), "emb": torch.ones(2)}
    pairs, rest = read_pairs(state, "cat.safetensors")
    assert list(pairs) == ["text.blocks.0.q", "text.blocks.1.conv"]
    assert rest == ["text.norm.diff", "emb"]


def test_the_source_of_a_lora_tells_its_file_and_hash(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file(spelled("", ENDS["peft"]), path, metadata={"ss_tag": "cat"})
    source = load_lora(path).source
    assert source["file"] == "cat.safetensors"
    assert len(source["sha256"]) == 64
    assert "ss_tag" in source["metadata"]


@pytest.mark.parametrize("damage", ["missing", "a folder", "empty", "truncated", "text"])
def test_a_file_that_is_no_whole_safetensors_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "cat.safetensors"
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        save_file(spelled("", ENDS["peft"]), path)
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": content[:-9], "text": b"version https://git-lfs"}[damage])
    with pytest.raises(LoraError, match=r"cat\.safetensors"):
        load_lora(path)
    with pytest.raises(StatisticsError, match=r"cat\.safetensors"):
        load_statistics(path, [])


@pytest.mark.parametrize("half", ["lora_A", "lora_B", "lora_down", "lora_up"])
def test_half_a_pair_is_refused_by_file_and_key(half, tmp_path):
    save_file({f"blocks.0.{half}.weight": torch.ones(4, 4)}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=rf"cat\.safetensors: blocks\.0\.{half}\.weight .*incomplete"):
        load_lora(tmp_path / "cat.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora_A": torch.ones(0, 8), "lora_B": torch.ones(6, 0)}, "rank is 0"),
        ({"lora_A": torch.full((4, 8), torch.nan)}, "NaN"),
        ({"lora_B": torch.full((6, 4), torch.inf)}, "NaN or infinite"),
        ({"lora_A": torch.ones(3, 8)}, "differ in rank"),
        ({"lora_B": torch.ones(6)}, "not the factors"),
    ],
    ids=["rank 0", "NaN", "infinite", "ranks", "vector"],
)
def test_a_damaged_pair_is_refused_by_file_and_key(change, text, tmp_path):
    state = spelled("", ENDS["peft"]) | {f"blocks.0.q.{end}.weight": value for end, value in change.items()}
    save_file(state, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=rf"cat\.safetensors: blocks\.0\.q.*{text}"):
        load_lora(tmp_path / "cat.safetensors")


def test_an_alpha_of_several_numbers_is_refused_by_file_and_key(tmp_path):
    save_file(spelled("", ENDS["peft"]) | {"blocks.0.q.alpha": torch.ones(2)}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=r"cat\.safetensors: blocks\.0\.q"):
        load_lora(tmp_path / "cat.safetensors")


@pytest.mark.parametrize("key", ["blocks.0.q.hada_w1_a", "blocks.0.q.lokr_w1", "blocks.0.q.dora_scale", "norm.diff"])
def test_adapters_that_are_not_plain_lora_are_refused_by_file_and_key(key, tmp_path):
    save_file(spelled("", ENDS["peft"]) | {key: torch.ones(3)}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=rf"cat\.safetensors .*{key}"):
        load_lora(tmp_path / "cat.safetensors")


def test_a_file_without_any_tensor_is_refused_by_name(tmp_path):
    save_file({}, tmp_path / "cat.safetensors")
    with pytest.raises(LoraError, match=r"cat\.safetensors holds no LoRA"):
        load_lora(tmp_path / "cat.safetensors")


def test_two_spellings_of_one_module_in_one_file_do_not_lose_an_update(tmp_path):
    one, other = (spelled(prefix, ENDS["peft"]) for prefix in ("diffusion_model.", "transformer."))
    save_file(one | {key: value * 0.5 for key, value in other.items()}, tmp_path / "cat.safetensors")
    try:
        updates = dense_joined(load_lora(tmp_path / "cat.safetensors").updates)
    except LoraError as error:
        assert "cat.safetensors" in str(error)
    else:  # 1 + 0.5 * 0.5
        torch.testing.assert_close(updates["blocks.0.q"], 1.25 * deltas()["blocks.0.q"])


def sample_updates() -> dict:
    return {
        Site("qkv", 0, 4, 12): random_update(4, 8, 2, 1),
        Site("qkv", 4, 12, 12): random_update(8, 8, 3, 2),
        Site.whole("conv", 5): random_update(5, (3, 3, 3), 2, 3),
        Site.whole("transformer.blocks.0", 6): random_update(6, 8, 2, 4),
    }


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "base_model.model."])
def test_a_saved_lora_reads_back_as_the_same_dense_updates(prefix, tmp_path):
    path = tmp_path / "new folder" / "merged.safetensors"
    save_lora(sample_updates(), path, prefix=prefix)
    read, wanted = dense_joined(load_lora(path).updates), dense_joined(sample_updates())
    if prefix == "":
        wanted["blocks.0"] = wanted.pop("transformer.blocks.0")  # then it reads like a prefix of the field
    assert read.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert torch.equal(read[module], delta)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_a_lora_saved_in_half_precision_stays_near_and_is_half_precision(dtype, tolerance, tmp_path):
    save_lora(sample_updates(), tmp_path / "m.safetensors", dtype=dtype)
    stored = load_file(tmp_path / "m.safetensors")
    assert {value.dtype for key, value in stored.items() if "lora_" in key} == {dtype}
    read, wanted = dense_joined(load_lora(tmp_path / "m.safetensors").updates), dense_joined(sample_updates())
    for module, delta in wanted.items():
        assert float((read[module] - delta).norm() / delta.norm()) < tolerance


def test_the_state_dict_is_in_the_generic_spelling_with_alpha_equal_to_the_rank():
    state = to_state_dict(sample_updates())
    assert state["diffusion_model.qkv.lora_A.weight"].shape == (5, 8)
    assert state["diffusion_model.qkv.lora_B.weight"].shape == (12, 5)
    assert float(state["diffusion_model.qkv.alpha"]) == 5
    assert state["diffusion_model.conv.lora_A.weight"].shape == (2, 3, 3, 3)
    assert state["diffusion_model.conv.lora_B.weight"].shape == (5, 2, 1, 1)


def test_values_too_large_for_float16_are_refused_by_key_and_nothing_is_written(tmp_path):
    update = random_update(6, 8, 2)
    updates = {Site.whole("blocks.0", 6): update}
    update.up[0, 0] = 1e6  # the other factor takes a part of it
    save_lora(updates, tmp_path / "m.safetensors", dtype=torch.float16)
    (tmp_path / "m.safetensors").unlink()
    update.up[0, 0] = 1e12
    with pytest.raises(LoraError, match=r"diffusion_model\.blocks\.0: .*torch\.float16.*bfloat16"):
        save_lora(updates, tmp_path / "m.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_lora(updates, tmp_path / "m.safetensors", dtype=torch.bfloat16)


def test_metadata_is_written_with_the_lora(tmp_path):
    save_lora(sample_updates(), tmp_path / "m.safetensors", metadata={"ssr.report": "fine"})
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"ssr.report": "fine"}


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(interruption, where, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_lora(sample_updates(), path)
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise interruption("disk full")

    monkeypatch.setattr(*((storage, "save_file") if where == "save_file" else (os, "replace")), fail)
    with pytest.raises(interruption, match="disk full"):
        save_lora({Site.whole("other", 6): random_update(6, 8, 2)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_replaces_an_older_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_lora(sample_updates(), path)
    save_lora({Site.whole("other", 6): random_update(6, 8, 2)}, path)
    assert [site.module for site in load_lora(path).updates] == ["other"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission bits")
def test_a_saved_file_can_be_read_by_whoever_can_read_other_new_files(tmp_path):
    (tmp_path / "usual").touch()
    save_lora(sample_updates(), tmp_path / "m.safetensors")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "m.safetensors")]
    assert modes[0] == modes[1]


def measured():
    model = mlp()
    loras = [random_lora("cat", model, 3, 1), random_lora("dog", model, 2, 2), random_lora("pose", model, 1, 3, ["2"])]
    return collect(loras, model, [random(20 + task, 8, seed=task) for task in range(3)])


def test_statistics_read_back_bit_for_bit(tmp_path):
    # a Gram is symmetric, so that its upper triangle is all of it
    calibration = measured()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", calibration.loras)
    assert read.tokens == calibration.tokens
    assert read.statistics.keys() == calibration.statistics.keys()
    for site, statistics in calibration.statistics.items():
        assert torch.equal(read.statistics[site].gram.triu(), statistics.gram.triu())
        assert torch.equal(read.statistics[site].gram, read.statistics[site].gram.mT)
        assert read.statistics[site].tokens == statistics.tokens
        assert read.statistics[site].fingerprint == statistics.fingerprint


def test_statistics_of_sites_that_share_their_sums_are_saved_and_read_back(tmp_path):
    model = nn.ModuleDict({"qkv": nn.Linear(8, 12)}).double()
    loras = [
        Lora(name, {Site("qkv", at, at + 4, 12): random_update(4, 8, 2, seed) for at in (0, 4, 8)})
        for seed, name in enumerate(("cat", "dog"))
    ]
    collector = StatisticsCollector(loras)
    for task in range(2):
        with torch.no_grad(), collector.watching(model, task):
            model["qkv"](random(20, 8, seed=task))
    calibration = collector.calibration()
    first, second, _ = (s.grams.packed[0] for s in calibration.statistics.values())
    assert first.data_ptr() == second.data_ptr()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", loras)
    for site, statistics in calibration.statistics.items():
        assert torch.equal(read.statistics[site].gram, statistics.gram)


def test_statistics_read_back_merge_and_add_like_those_saved(tmp_path):
    calibration = measured()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", calibration.loras)
    one, other = merge(calibration).updates, merge(read).updates
    for site in one:
        torch.testing.assert_close(dense(one[site]), dense(other[site]))
    assert (read + calibration).tokens == (40, 42, 44)


def test_statistics_read_back_serve_with_other_strengths(tmp_path):
    calibration = measured()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    stronger = [lora.with_strength(2.0) for lora in calibration.loras]
    read = load_statistics(tmp_path / "stats.safetensors", stronger)
    assert merge(read).report.strengths == (2.0, 2.0, 2.0)


def test_statistics_of_kohya_loras_read_back_with_those_loras(tmp_path):
    model = nn.ModuleDict({"block": nn.ModuleDict({"qkv": nn.Linear(8, 6)})}).double()
    loras = [Lora(n, {Site.whole("block_qkv", 6): random_update(6, 8, 2, k)}) for k, n in enumerate(("cat", "dog"))]
    collector = StatisticsCollector(loras)
    with torch.no_grad(), collector.watching(model, 0):
        model["block"]["qkv"](random(9, 8))
    calibration = collector.calibration()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    for given in (loras, calibration.loras):
        read = load_statistics(tmp_path / "stats.safetensors", given)
        assert read.tokens == (9, 0)
        (one,), (other,) = (merge(c).updates.values() for c in (calibration, read))
        torch.testing.assert_close(dense(one), dense(other))


def seeing(kernel: tuple[int, ...] = (), out: int = 6, inner: int = 8):
    """Statistics measured with context rows."""
    layer = nn.Conv2d(inner, out, kernel) if kernel else nn.Linear(inner, out)
    model = nn.ModuleDict({"layer": layer}).double()
    collector = StatisticsCollector([random_lora(name, model, 2, seed) for seed, name in enumerate(("cat", "dog"))])
    batches = [random(3, inner, 5, 5, seed=seed) if kernel else random(20, inner, seed=seed) for seed in range(2)]
    for task, batch in enumerate(batches):
        with torch.no_grad(), collector.surveying(model, task, rows=3):
            layer(batch)
    collector.see(rows=3)
    for task, batch in enumerate(batches):
        with torch.no_grad(), collector.watching(model, task):
            layer(batch)
    return collector.calibration()


@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)], ids=str)
def test_statistics_with_context_rows_read_back_with_those_rows(kernel, tmp_path):
    calibration = seeing(kernel)
    save_statistics(calibration, tmp_path / "stats.safetensors")
    read = load_statistics(tmp_path / "stats.safetensors", calibration.loras)
    (one,), (other,) = calibration.subspaces.values(), read.subspaces.values()
    assert (other.context, other.fingerprint) == (3, one.fingerprint)
    (one,), (other,) = (merge(c).updates.values() for c in (calibration, read))
    torch.testing.assert_close(dense(one), dense(other))


@pytest.mark.parametrize("size", [{"inner": 10}, {"out": 7}], ids=["inputs", "outputs"])
def test_statistics_with_context_rows_of_another_model_are_refused_by_file(size, tmp_path):
    save_statistics(seeing(), tmp_path / "stats.safetensors")
    with pytest.raises(StatisticsError, match=r"stats\.safetensors.*other LoRAs"):
        load_statistics(tmp_path / "stats.safetensors", seeing(**size).loras)


def test_statistics_of_a_lora_alone_read_back(tmp_path):
    model = mlp()
    calibration = collect([random_lora("c", model, 3, 1)], model, [])
    save_statistics(calibration, tmp_path / "stats.safetensors")
    assert load_statistics(tmp_path / "stats.safetensors", calibration.loras).statistics == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("values", "cat is another file or has changed"),
        ("fewer", "pose is missing"),
        ("more", "bird was not there"),
        ("another", "pose is missing; bird was not there"),
        ("sites", "dog is another file or has changed"),
    ],
)
def test_statistics_of_other_loras_are_refused_by_file_and_say_which_differ(change, said, tmp_path):
    calibration = measured()
    cat, dog, pose = calibration.loras
    bird = random_lora("bird", mlp(), 2, 7)
    others = {
        "values": (random_lora("cat", mlp(), 3, 9), dog, pose),
        "fewer": (cat, dog),
        "more": (cat, dog, pose, bird),
        "another": (cat, dog, bird),
        "sites": (cat, random_lora("dog", mlp(), 2, 2, ["2"]), pose),
    }[change]
    save_statistics(calibration, tmp_path / "stats.safetensors")
    with pytest.raises(StatisticsError, match=rf"stats\.safetensors was measured with other LoRAs .*: {said}"):
        load_statistics(tmp_path / "stats.safetensors", others)


@pytest.mark.parametrize("context", [False, True])
def test_statistics_read_with_the_loras_in_another_order_are_those_of_that_order(context, tmp_path):
    calibration = seeing() if context else measured()
    save_statistics(calibration, tmp_path / "stats.safetensors")
    order = list(range(len(calibration.loras)))[::-1]
    read = load_statistics(tmp_path / "stats.safetensors", [calibration.loras[i] for i in order])
    assert read.names == calibration.names[::-1] and read.tokens == calibration.tokens[::-1]
    one, other = merge(calibration), merge(read)
    for site, update in one.updates.items():
        torch.testing.assert_close(dense(other.updates[site]), dense(update), rtol=1e-5, atol=1e-6)
    assert [other.report.error(i) for i in order] == pytest.approx([one.report.error(i) for i in range(len(order))])


def test_a_lora_that_is_there_twice_is_known_by_its_name(tmp_path):
    cat, dog, _ = measured().loras
    loras = [cat, replace(cat, name="copy"), dog]
    calibration = collect(loras, mlp(), [random(20 + task, 8, seed=task) for task in range(3)])
    save_statistics(calibration, tmp_path / "stats.safetensors")
    assert load_statistics(tmp_path / "stats.safetensors", [loras[1], dog, cat]).tokens == (21, 22, 20)


def test_metadata_of_the_host_is_kept_beside_the_statistics_own(tmp_path):
    save_statistics(measured(), tmp_path / "stats.safetensors", {"ssr.model": "Flux", "ssr.format": "no"})
    header = read_metadata(tmp_path / "stats.safetensors", StatisticsError)
    assert (header["ssr.model"], header["ssr.format"]) == ("Flux", "statistics 1")


def test_a_lora_file_is_no_statistics_file(tmp_path):
    save_lora(sample_updates(), tmp_path / "m.safetensors")
    with pytest.raises(StatisticsError, match=r"m\.safetensors is no statistics file"):
        load_statistics(tmp_path / "m.safetensors", [])


@pytest.mark.parametrize("damage", ["no header", "no json", "no tensor", "odd size"])
def test_damaged_statistics_are_refused_by_file(damage, tmp_path):
    calibration, path = measured(), tmp_path / "stats.safetensors"
    save_statistics(calibration, path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    if damage == "no header":
        del header["ssr.sites"]
    elif damage == "no json":
        header["ssr.sites"] = header["ssr.sites"][:-5]
    elif damage == "no tensor":
        del tensors["gram/0/1"]
    else:
        tensors["gram/0/1"] = tensors["gram/0/1"][:-1].contiguous()
    save_file(tensors, path, metadata=header)
    with pytest.raises(StatisticsError, match=r"stats\.safetensors is damaged"):
        load_statistics(path, calibration.loras)


def test_statistics_with_values_that_are_not_finite_are_refused_by_file_and_site(tmp_path):
    calibration, path = measured(), tmp_path / "stats.safetensors"
    next(iter(calibration.statistics.values())).grams.packed[0][0] = torch.nan
    save_statistics(calibration, path)
    with pytest.raises(StatisticsError, match=r"stats\.safetensors: 0: .*NaN"):
        load_statistics(path, calibration.loras)


def test_a_state_dict_takes_its_own_size_and_little_more_while_it_is_made():
    pieces = [LowRankUpdate(torch.randn(8, 256), torch.randn(64, 8)) for _ in range(64)]
    updates = {Site(f"m{n // 4}", 64 * (n % 4), 64 * (n % 4) + 64, 256): piece for n, piece in enumerate(pieces)}
    made = []
    seen = allocations(lambda: made.append(to_state_dict(updates)))
    assert seen.peak < 1.3 * sum(tensor.nbytes for tensor in made[0].values())
