"""Rules for layers, on the module names of the families that ComfyUI runs."""

import pytest
import torch

from ssr_core import (
    MergeSettings,
    Rule,
    SSRError,
    StatisticsCollector,
    check_rules,
    merge,
    parse_rules,
    treatment_of,
)
from synthetic import dense_joined, mlp, random, random_lora, run

NAMES = {
    "diffusion_model.double_blocks.0.img_attn.qkv": {"attention", "image"},
    "diffusion_model.double_blocks.0.txt_attn.proj": {"attention", "text"},
    "diffusion_model.double_blocks.12.txt_mlp.2": {"mlp", "text"},
    "diffusion_model.double_blocks.3.img_mod.lin": {"modulation", "image"},
    "diffusion_model.single_blocks.7.linear1": set(),  # attention and mlp in one: neither
    "diffusion_model.single_blocks.7.modulation.lin": {"modulation"},
    "diffusion_model.final_layer.adaLN_modulation.1": {"modulation"},
    "diffusion_model.txt_in": {"text"},
    "diffusion_model.joint_blocks.4.context_block.attn.qkv": {"attention", "text"},
    "diffusion_model.joint_blocks.4.x_block.mlp.fc1": {"mlp", "image"},
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": {"attention"},
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.ff.net.0.proj": {"mlp"},
    "diffusion_model.input_blocks.4.1.proj_in": set(),
    "diffusion_model.transformer_blocks.9.attn.to_q": {"attention", "image"},
    "diffusion_model.transformer_blocks.9.attn.add_q_proj": {"attention", "text"},
    "diffusion_model.transformer_blocks.9.img_mlp.net.0.proj": {"mlp", "image"},
    "diffusion_model.layers.2.attention.qkv": {"attention"},
    "diffusion_model.layers.2.feed_forward.w1": {"mlp"},
    "diffusion_model.blocks.30.cross_attn.k": {"attention"},
    "diffusion_model.blocks.30.ffn.0": {"mlp"},
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj": {"attention", "text_encoder"},
    "lora_te1_text_model_encoder_layers_3_mlp_fc1": {"mlp", "text_encoder"},
}
WORDS = ("attention", "mlp", "modulation", "text", "image", "text_encoder")


@pytest.mark.parametrize("module", NAMES)
def test_a_word_means_the_layers_that_people_call_so(module):
    assert {word for word in WORDS if Rule("drop", word).matches(module)} == NAMES[module]
    assert Rule("drop", "all").matches(module)


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        ("single_blocks.7", True),
        ("single_blocks.0-7", True),
        ("single_blocks.8-19", False),
        ("single_blocks.70", False),
        ("blocks.7", False),  # parts of a name are whole
        ("*_blocks.7", True),
        ("single_blocks.*.linear1", True),
        ("linear1", True),
        ("diffusion_model.single_blocks.7.linear1", True),
        ("linear1.weight", False),
        ("7-7", True),
    ],
)
def test_a_pattern_is_some_consecutive_parts_of_a_name(pattern, there):
    assert Rule("stack", pattern).matches("diffusion_model.single_blocks.7.linear1") == there


def test_the_last_rule_that_matches_counts():
    rules = parse_rules("drop all\nkeep attention, mlp  # comment\nstack double_blocks.0-3; drop txt_mlp")
    assert [str(rule) for rule in rules] == [
        *("drop all", "keep attention", "keep mlp", "stack double_blocks.0-3", "drop txt_mlp")
    ]
    found = {
        name: treatment_of(f"diffusion_model.{name}", rules) for name in ("double_blocks.2.img_attn.qkv", "img_in")
    }
    assert found == {"double_blocks.2.img_attn.qkv": "stack", "img_in": "drop"}
    assert treatment_of("diffusion_model.double_blocks.2.txt_mlp.0", rules) == "drop"
    assert treatment_of("diffusion_model.double_blocks.9.img_mlp.0", rules) == "keep"
    assert parse_rules(" \n# nothing\n") == () and treatment_of("anything", ()) == "keep"


@pytest.mark.parametrize("line", ["remove mlp", "drop", "mlp"])
def test_a_line_that_is_no_rule_is_refused(line):
    with pytest.raises(SSRError, match=f"'{line}' is no rule for layers; write keep, stack or drop"):
        parse_rules(f"keep all\n{line}")


def test_a_rule_that_matches_nothing_is_refused_with_names_that_would():
    check_rules(parse_rules("drop img_attn"), NAMES)
    with pytest.raises(SSRError, match=r"matches 'drop blocks\.99'\. Their names are like diffusion_model\.blocks"):
        check_rules(parse_rules("drop blocks.99"), NAMES)


@pytest.fixture
def calibration():
    model = mlp()
    collector = StatisticsCollector([random_lora(name, model, 2, seed) for seed, name in enumerate(("cat", "dog"), 1)])
    run(collector, model, [random(40, 8, seed=seed) for seed in (1, 2)])
    return collector.calibration()


def test_dropped_layers_are_left_out_and_reported_as_lost(calibration):
    merged, whole = merge(calibration, MergeSettings(rules=parse_rules("drop 0"))), merge(calibration)
    assert {site.module for site in merged.updates} == {"2"}
    assert torch.equal(dense_joined(merged.updates)["2"], dense_joined(whole.updates)["2"])
    assert merged.report.error(0) > whole.report.error(0)
    dropped = next(site for site in merged.report.sites if site.site.module == "0")
    assert dropped.error("merge") == pytest.approx(1) and dropped.rank == 0
    assert "1 site left out as asked: 0." in str(merged.report)


def test_stacked_layers_are_the_plain_sum_whatever_the_routing(calibration):
    merged = merge(calibration, MergeSettings(rules=parse_rules("stack 0")))
    stack, whole = merge(calibration, MergeSettings(routing=0)), merge(calibration)
    found = dense_joined(merged.updates)
    assert torch.allclose(found["0"], dense_joined(stack.updates)["0"], atol=1e-6)
    assert torch.equal(found["2"], dense_joined(whole.updates)["2"])


def test_the_rank_of_dropped_layers_is_not_spent(calibration):
    merged = merge(calibration, MergeSettings(rank=2, rules=parse_rules("drop 0")))
    assert [update.rank for update in merged.updates.values()] == [2]
