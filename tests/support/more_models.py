"""Further model classes of ComfyUI, tiny and with random weights: those that run some layer in a way of their own, and
those whose LoRAs have one spelling only. Beside the families of `tiny_models`, which have many.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiny_models import WAN_CONFIG, Family, _conditioning, _latent, constructed

Conditioning = Callable[[int], list[Any]]


def with_options(conditioning: Conditioning, **options: Callable[[torch.Generator], Any]) -> Conditioning:
    """CONDITIONING that carries more, made of a random generator."""

    def made(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(1000 + seed)
        return [
            [cond, {**kept, **{k: make(generator) for k, make in options.items()}}] for cond, kept in conditioning(seed)
        ]

    return made


def random(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def nested(*shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """An empty LATENT of several parts, as of video and audio."""

    def made() -> dict[str, Any]:
        kind = importlib.import_module("comfy.nested_tensor").NestedTensor
        return {"samples": kind([torch.zeros(1, *shape) for shape in shapes])}

    return made


def _small_adapter(diffusion: Any) -> None:
    """Anima's is of fixed size, too large for a test."""
    anima = importlib.import_module("comfy.ldm.anima.model")
    ops = importlib.import_module("comfy.ops").disable_weight_init
    diffusion.llm_adapter = anima.LLMAdapter(32, 32, 32, num_layers=1, num_heads=2, dtype=torch.float32, operations=ops)


def _small_motion_encoder(diffusion: Any) -> None:
    """Wan Animate's is for faces of 512 x 512 pixels; here for 4 x 4, by its last convolution alone."""
    animate = importlib.import_module("comfy.ldm.wan.model_animate")
    last = animate.EqualConv2d(3, 512, 4, bias=False, dtype=torch.float32)
    diffusion.motion_encoder.enc.net_app.convs = torch.nn.ModuleList([last])


_masked = with_options(_conditioning(24), attention_mask=lambda generator: torch.ones(1, 6, dtype=torch.long))
_DIT = {"concat_padding_mask": True, "pos_emb_cls": "rope3d"}
_PREDICT2 = {
    **_DIT,
    **{"max_img_h": 16, "max_img_w": 16, "max_frames": 4, "in_channels": 16, "out_channels": 16},
    **{"patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "num_blocks": 1, "num_heads": 2},
    **{"crossattn_emb_channels": 32, "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 8},
    "rope_enable_fps_modulation": False,
}
_HIDREAM = {
    **{"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1},
    **{"attention_head_dim": 16, "num_attention_heads": 4, "caption_channels": [24, 24], "text_emb_dim": 16},
    **{"num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": [8, 4, 4], "max_resolution": [8, 8]},
    **{"llama_layers": [0, 1]},
}
_LTXV = {
    **{"in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2},
    **{"caption_channels": 24, "num_layers": 1},
}
_LTXAV = {
    **_LTXV,
    **{"audio_in_channels": 128, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16},
    **{"audio_num_attention_heads": 2, "connector_attention_head_dim": 12, "connector_num_attention_heads": 2},
    **{"connector_num_layers": 1},
}
_MINIMAX = {
    **{"hidden_size": 64, "num_layers": 1, "token_refiner_num_layers": 1, "num_attention_heads": 2},
    **{"attention_head_dim": 128, "ffn_hidden_size": 64, "latents_dim": 24, "audio_latents_dim": 32, "text_dim": 24},
    **{"timestep_input_dim": 32, "time_embed_hidden_size": 32, "time_embed_dim": 32},
}
_AURA = {"dim": 128, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "cond_seq_dim": 24, "max_seq": 64}
_PIXART = {
    **{
        "input_size": 8,
        "hidden_size": 64,
        "depth": 1,
        "num_heads": 2,
        "caption_channels": 24,
        "micro_condition": False,
    },
    **{"pe_interpolation": 1, "model_max_length": 16, "image_model": "pixart_sigma"},
}
_LENS = {
    **{"num_layers": 1, "attention_head_dim": 64, "num_attention_heads": 1, "enc_hidden_dim": 24},
}
_PIXELDIT = {
    **{"num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 16, "pixel_attn_hidden_size": 64},
    **{"pixel_num_groups": 2, "patch_depth": 1, "pixel_depth": 1, "txt_embed_dim": 24, "txt_max_length": 8},
}
_ACE15 = {
    **{"hidden_size": 64, "text_hidden_dim": 24, "num_dit_layers": 1, "num_lyric_layers": 1, "num_timbre_layers": 1},
    **{"num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 64},
    **{"fsq_dim": 64, "encoder_hidden_size": 64, "encoder_intermediate_size": 64, "encoder_num_heads": 2},
}
_OMNIGEN = {
    **{"patch_size": 2, "in_channels": 16, "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1},
    **{"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": [8, 12, 12], "text_feat_dim": 24},
    **{"multiple_of": 32, "axes_lens": [64, 64, 64]},
}
_BOOGU = {
    **{k: v for k, v in _OMNIGEN.items() if k != "text_feat_dim"},
    **{"instruction_feat_dim": 24, "num_double_stream_layers": 1, "num_layers": 2},
}
_KANDINSKY = {
    **{"in_text_dim": 24, "in_text_dim2": 16, "time_dim": 32, "model_dim": 64, "ff_dim": 64, "visual_embed_dim": 132},
    **{"num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": [16, 8, 8]},
}
_ERNIE = {
    **{"hidden_size": 64, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 64, "text_in_dim": 24},
    **{"rope_axes_dim": (8, 12, 12)},
}
_COGVIDEO = {
    **{"num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 32, "text_embed_dim": 24, "num_layers": 1},
    **{"use_rotary_positional_embeddings": True, "max_text_seq_length": 8},
}
_JOY = {"hidden_size": 128, "num_attention_heads": 1, "text_dim": 24, "num_layers": 1}
_HYDIT = {
    **{
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "text_states_dim": 24,
        "text_states_dim_t5": 24,
        "mlp_ratio": 2.0,
    },
    **{"text_len": 8, "text_len_t5": 8},
}
_HUNYUAN3D = {
    **{"in_channels": 64, "context_in_dim": 24, "hidden_size": 64, "num_heads": 2, "depth": 1},
    **{"depth_single_blocks": 1, "guidance_embed": False},
}
_HUNYUAN3D_MOE = {
    **{"in_channels": 64, "context_dim": 24, "hidden_size": 64, "num_heads": 2, "depth": 3, "num_moe_layers": 1},
    **{"guidance_cond_proj_dim": None, "num_experts": 4, "moe_top_k": 2},
}
_COSMOS = {
    **_DIT,
    **{"max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2},
    **{"patch_temporal": 1, "model_channels": 64, "block_config": "FA-CA-MLP", "num_blocks": 1, "num_heads": 2},
    **{"block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8},
    **{
        "extra_per_block_abs_pos_emb": True,
        "extra_per_block_abs_pos_emb_type": "learnable",
        "crossattn_emb_channels": 24,
    },
}
_ANIMATE = {**WAN_CONFIG, "model_type": "animate", "in_dim": 36, "motion_encoder_dim": 512, "num_layers": 5}
_O1 = {
    "text_config_overrides": {
        **{"vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    },
    "vision_config_overrides": {
        **{"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1, "num_position_embeddings": 16},
        "deepstack_visual_indexes": (),
    },
}


def _o1_prompt(seed: int) -> list[Any]:
    """Tokens, which this model reads itself."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1000, (1, 8), generator=generator)
    return [[torch.zeros(1, 8, 16), {"text_input_ids": ids}]]


_FAMILIES = (
    Family(
        "Anima",
        constructed("Anima", _PREDICT2, _small_adapter),
        _latent(16, 1, 8, 8),
        with_options(
            _conditioning(32),
            t5xxl_ids=lambda g: torch.randint(0, 1000, (6,), generator=g),
            t5xxl_weights=lambda g: torch.ones(6),
        ),
    ),
    Family("Cosmos-Predict2", constructed("CosmosT2IPredict2", _PREDICT2), _latent(16, 1, 8, 8), _conditioning(32)),
    Family("Cosmos", constructed("CosmosT2V", _COSMOS), _latent(16, 2, 8, 8), _conditioning(24)),
    Family(
        "HiDream",
        constructed("HiDream", _HIDREAM),
        _latent(16, 8, 8),
        with_options(_conditioning(24, pooled=16), conditioning_llama3=random(1, 2, 6, 24)),
    ),
    Family("LTXV", constructed("LTXV", _LTXV), _latent(128, 2, 4, 4), _masked),
    Family(
        "LTX-2",
        constructed("LTXAV", _LTXAV),
        nested((128, 2, 4, 4), (8, 4, 16)),
        with_options(_conditioning(24), unprocessed_ltxav_embeds=lambda g: True),
    ),
    Family(
        "LTX-2, video only",
        constructed("LTXAV", _LTXAV),
        _latent(128, 2, 4, 4),
        with_options(_conditioning(24), unprocessed_ltxav_embeds=lambda g: True),
    ),
    Family("MiniMax H3", constructed("MiniMaxH3", _MINIMAX), nested((24, 2, 4, 4), (32, 2, 4)), _conditioning(24)),
    Family("HiDream-O1", constructed("HiDreamO1", _O1), _latent(3, 64, 64), _o1_prompt),
    Family("AuraFlow", constructed("AuraFlow", _AURA), _latent(4, 8, 8), _conditioning(24)),
    Family("PixArt", constructed("PixArtSigma", _PIXART), _latent(4, 40, 40), _conditioning(24)),
    Family(
        "HunyuanDiT",
        constructed("HunyuanDiT1", _HYDIT),
        _latent(4, 8, 8),
        with_options(
            _conditioning(24, tokens=8),
            attention_mask=lambda g: torch.ones(1, 8),
            conditioning_mt5xl=random(1, 8, 24),
            attention_mask_mt5xl=lambda g: torch.ones(1, 8),
        ),
    ),
    Family("Lens", constructed("Lens", _LENS), _latent(128, 4, 4), _conditioning(4 * 24)),
    Family("PixelDiT", constructed("PixelDiTT2I", _PIXELDIT), _latent(3, 32, 32), _conditioning(24)),
    Family(
        "ACE-Step 1.5",
        constructed("ACEStep15", _ACE15),
        _latent(64, 16),
        with_options(_conditioning(24), conditioning_lyrics=random(1, 4, 24)),
    ),
    Family("Omnigen2", constructed("Omnigen2", _OMNIGEN), _latent(16, 8, 8), _masked),
    Family("Boogu", constructed("Boogu", _BOOGU), _latent(16, 8, 8), _masked),
    Family("Kandinsky5", constructed("Kandinsky5", _KANDINSKY), _latent(16, 2, 4, 4), _conditioning(24, pooled=16)),
    Family("Ernie", constructed("ErnieImage", _ERNIE), _latent(128, 4, 4), _conditioning(24)),
    Family("CogVideoX", constructed("CogVideoX_T2V", _COGVIDEO), _latent(16, 2, 4, 4), _conditioning(24)),
    Family("JoyImage", constructed("JoyImage", _JOY), _latent(16, 1, 8, 8), _conditioning(24)),
    Family("Hunyuan3D", constructed("Hunyuan3Dv2", _HUNYUAN3D), _latent(64, 16), _conditioning(24)),
    Family("Hunyuan3D 2.1", constructed("Hunyuan3Dv2_1", _HUNYUAN3D_MOE), _latent(64, 16), _conditioning(24)),
    Family(
        "Wan VACE",
        constructed("WAN21_Vace", {**WAN_CONFIG, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
        _latent(16, 2, 4, 4),
        _conditioning(4096),
    ),
    Family(
        "Wan Animate",
        constructed("WAN22_Animate", _ANIMATE, _small_motion_encoder),
        _latent(16, 2, 4, 4),
        with_options(_conditioning(4096), face_video_pixels=random(1, 3, 5, 4, 4)),
    ),
    Family(
        "Wan S2V",
        constructed("WAN22_S2V", {**WAN_CONFIG, "model_type": "s2v"}),
        _latent(16, 2, 4, 4),
        _conditioning(4096),
    ),
    Family(
        "Wan HuMo",
        constructed("WAN21_HuMo", {**WAN_CONFIG, "model_type": "humo"}),
        _latent(16, 2, 4, 4),
        _conditioning(4096),
    ),
)
MORE: dict[str, Family] = {family.name: family for family in _FAMILIES}

# those that run layers in a way of their own
TELLING = ("Anima", "LTX-2", "MiniMax H3", "HiDream", "Hunyuan3D 2.1")
