"""Bases: the models of the example workflows, as the nodes that load them, and how each is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .graph import Node, Source

HUB = "https://huggingface.co"


@dataclass
class Base:
    """A model with its text encoder and its VAE, as the sources of their sockets."""

    nodes: Sequence[Node]
    model: Source
    clip: Source
    vae: Source
    size: Mapping[str, int]
    sampling: Mapping[str, Any]  # of KSampler
    latent: str = "EmptySD3LatentImage"
    guidance: float | None = None
    negative: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)  # of SSR Collect Stats

    def calibration_values(self) -> dict[str, Any]:
        return {key: self.sampling[key] for key in ("sampler_name", "scheduler")} | dict(self.calibration)


def file(path: str, folder: str) -> dict[str, str]:
    """A file on the Hub, for ComfyUI to offer when it is missing."""
    return {"name": path.rsplit("/", 1)[1], "url": f"{HUB}/{path}", "directory": folder}


def _loader(kind: str, title: str, values: Mapping[str, Any], *files: dict[str, str]) -> Node:
    return Node(kind, title, values=values, models=files)


def flux() -> Base:
    repository = "comfyanonymous/flux_text_encoders/resolve/main/"
    model = _loader(
        *("UNETLoader", "Flux dev", {"unet_name": "flux1-dev.safetensors"}),
        file("Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models"),
    )
    clip = _loader(
        *("DualCLIPLoader", "Text encoders of Flux"),
        {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp8_e4m3fn.safetensors", "type": "flux"},
        file(repository + "clip_l.safetensors", "text_encoders"),
        file(repository + "t5xxl_fp8_e4m3fn.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Flux", {"vae_name": "ae.safetensors"}),
        file("Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae"),
    )
    sampling = {"steps": 20, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"}
    size = {"width": 1024, "height": 1024}
    return Base([model, clip, vae], model["MODEL"], clip["CLIP"], vae["VAE"], size, sampling, guidance=3.5)


def sdxl() -> Base:
    loader = _loader(
        *("CheckpointLoaderSimple", "SDXL checkpoint", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        file("stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors", "checkpoints"),
    )
    return Base(
        [loader],
        *(loader["MODEL"], loader["CLIP"], loader["VAE"]),
        size={"width": 1024, "height": 1024},
        sampling={"steps": 25, "cfg": 7, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
        latent="EmptyLatentImage",
        negative="blurry, low quality, watermark, text",
        calibration={"cfg": 7},
    )


def z_image() -> Base:
    repository = "Comfy-Org/z_image_turbo/resolve/main/split_files/"
    loader = _loader(
        *("UNETLoader", "Z-Image Turbo", {"unet_name": "z_image_turbo_bf16.safetensors"}),
        file(repository + "diffusion_models/z_image_turbo_bf16.safetensors", "diffusion_models"),
    )
    shift = Node("ModelSamplingAuraFlow", "Shift of Z-Image Turbo", {"model": loader["MODEL"]}, {"shift": 3})
    clip = _loader(
        *("CLIPLoader", "Text encoder of Z-Image", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
        file(repository + "text_encoders/qwen_3_4b.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Z-Image", {"vae_name": "ae.safetensors"}),
        file(repository + "vae/ae.safetensors", "vae"),
    )
    sampling = {"steps": 8, "cfg": 1, "sampler_name": "res_multistep", "scheduler": "simple"}
    size = {"width": 1024, "height": 1024}
    return Base([loader, shift, clip, vae], shift["MODEL"], clip["CLIP"], vae["VAE"], size, sampling)


def qwen_image_with_speed_lora() -> Base:
    """The speed LoRA is part of the base: it is under every LoRA while calibrating, and under the merge."""
    repository = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/"
    loader = _loader(
        *("UNETLoader", "Qwen-Image", {"unet_name": "qwen_image_fp8_e4m3fn.safetensors"}),
        file(repository + "diffusion_models/qwen_image_fp8_e4m3fn.safetensors", "diffusion_models"),
    )
    speed = Node(
        *("LoraLoaderModelOnly", "Speed LoRA: stays in the base", {"model": loader["MODEL"]}),
        {"lora_name": "Qwen-Image-Lightning-8steps-V1.0.safetensors", "strength_model": 1},
        models=[
            file("lightx2v/Qwen-Image-Lightning/resolve/main/Qwen-Image-Lightning-8steps-V1.0.safetensors", "loras")
        ],
        colour="fill in",
    )
    shift = Node("ModelSamplingAuraFlow", "Shift of Qwen-Image", {"model": speed["MODEL"]}, {"shift": 3.1})
    clip = _loader(
        *("CLIPLoader", "Text encoder of Qwen-Image"),
        {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"},
        file(repository + "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Qwen-Image", {"vae_name": "qwen_image_vae.safetensors"}),
        file(repository + "vae/qwen_image_vae.safetensors", "vae"),
    )
    return Base(
        [loader, speed, shift, clip, vae],
        *(shift["MODEL"], clip["CLIP"], vae["VAE"]),
        size={"width": 1328, "height": 1328},
        sampling={"steps": 8, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"},
    )


def wan() -> tuple[Base, Base]:
    """(high-noise expert, low-noise expert), with one text encoder and one VAE, all loaded by the first one's nodes."""
    repository = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
    experts = []
    for noise in ("high", "low"):
        name = f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors"
        loader = _loader(
            *("UNETLoader", f"Wan 2.2, {noise}-noise expert", {"unet_name": name}),
            file(f"{repository}diffusion_models/{name}", "diffusion_models"),
        )
        experts += [loader, Node("ModelSamplingSD3", f"Shift, {noise} noise", {"model": loader["MODEL"]}, {"shift": 5})]
    clip = _loader(
        *("CLIPLoader", "Text encoder of Wan", {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}),
        file(
            "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/"
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
            "text_encoders",
        ),
    )
    vae = _loader(
        *("VAELoader", "VAE of Wan", {"vae_name": "wan_2.1_vae.safetensors"}),
        file(repository + "vae/wan_2.1_vae.safetensors", "vae"),
    )
    high = Base(
        [*experts, clip, vae],
        *(experts[1]["MODEL"], clip["CLIP"], vae["VAE"]),
        size={"width": 640, "height": 640, "length": 17},
        sampling={"steps": 20, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"},
        latent="EmptyHunyuanLatentVideo",
        negative="blurry, low quality, watermark, text, static",
        calibration={"cfg": 3.5, "steps": 8, "end_at_step": 4},
    )
    calibration = {"cfg": 3.5, "steps": 8, "start_at_step": 4}
    return high, replace(high, nodes=[], model=experts[3]["MODEL"], calibration=calibration)


def tiny() -> Base:
    """The demo's own model, which any CPU runs."""
    loader = Node("UNETLoader", "Tiny Flux (demo model)", values={"unet_name": "tiny_flux.safetensors"})
    clip = Node("SSRDemoLoadTinyCLIP", "Tiny text encoder (demo)", values={"clip_name": "tiny_clip.safetensors"})
    vae = Node("VAELoader", "Tiny VAE (demo)", values={"vae_name": "taef1"})
    sampling = {"steps": 12, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"}
    size = {"width": 128, "height": 128}
    return Base([loader, clip, vae], loader["MODEL"], clip["CLIP"], vae["VAE"], size, sampling)


def krea2() -> Base:
    repository = "Comfy-Org/Krea-2/resolve/main/"
    loader = _loader(
        *("UNETLoader", "Krea 2 Turbo", {"unet_name": "krea2_turbo_int8_convrot.safetensors"}),
        file(repository + "diffusion_models/krea2_turbo_int8_convrot.safetensors", "diffusion_models"),
    )
    clip = _loader(
        *("CLIPLoader", "Text encoder of Krea 2"),
        {"clip_name": "qwen3vl_4b_fp8_scaled.safetensors", "type": "krea2"},
        file(repository + "text_encoders/qwen3vl_4b_fp8_scaled.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Krea 2", {"vae_name": "qwen_image_vae.safetensors"}),
        file(repository + "vae/qwen_image_vae.safetensors", "vae"),
    )
    sampling = {"steps": 8, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"}
    size = {"width": 1024, "height": 1024}
    return Base([loader, clip, vae], loader["MODEL"], clip["CLIP"], vae["VAE"], size, sampling, "EmptyLatentImage")


def flux2_klein() -> Base:
    repository = "Comfy-Org/flux2-klein/resolve/main/split_files/"
    loader = _loader(
        *("UNETLoader", "Flux2 Klein 4B", {"unet_name": "flux-2-klein-4b.safetensors"}),
        file(repository + "diffusion_models/flux-2-klein-4b.safetensors", "diffusion_models"),
    )
    clip = _loader(
        *("CLIPLoader", "Text encoder of Klein", {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}),
        file(repository + "text_encoders/qwen_3_4b.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Flux2", {"vae_name": "flux2-vae.safetensors"}),
        file("Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors", "vae"),
    )
    return Base(
        [loader, clip, vae],
        *(loader["MODEL"], clip["CLIP"], vae["VAE"]),
        size={"width": 1024, "height": 1024},
        sampling={"steps": 4, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"},
        latent="EmptyFlux2LatentImage",
        calibration={"steps": 4},
    )


def anima() -> Base:
    repository = "circlestone-labs/Anima/resolve/main/split_files/"
    loader = _loader(
        *("UNETLoader", "Anima", {"unet_name": "anima-base-v1.0.safetensors"}),
        file(repository + "diffusion_models/anima-base-v1.0.safetensors", "diffusion_models"),
    )
    clip = _loader(
        *("CLIPLoader", "Text encoder of Anima"),
        {"clip_name": "qwen_3_06b_base.safetensors", "type": "stable_diffusion"},
        file(repository + "text_encoders/qwen_3_06b_base.safetensors", "text_encoders"),
    )
    vae = _loader(
        *("VAELoader", "VAE of Anima", {"vae_name": "qwen_image_vae.safetensors"}),
        file(repository + "vae/qwen_image_vae.safetensors", "vae"),
    )
    return Base(
        [loader, clip, vae],
        *(loader["MODEL"], clip["CLIP"], vae["VAE"]),
        size={"width": 1024, "height": 1024},
        sampling={"steps": 30, "cfg": 4, "sampler_name": "euler", "scheduler": "simple"},
        latent="EmptyLatentImage",
        negative="worst quality, low quality, score_1, score_2, score_3, blurry, jpeg artifacts",
        calibration={"cfg": 4},
    )


def kontext() -> Base:
    base = flux()
    repository = "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/"
    name = "flux1-dev-kontext_fp8_scaled.safetensors"
    loader = _loader(
        *("UNETLoader", "Flux Kontext", {"unet_name": name}),
        file(f"{repository}diffusion_models/{name}", "diffusion_models"),
    )
    return replace(base, nodes=[loader, *base.nodes[1:]], model=loader["MODEL"], guidance=2.5)


def ltx2() -> Base:
    """Of its nodes the last loads the VAE of its sound."""
    name = "ltx-2-19b-dev-fp8.safetensors"
    weights = file(f"Lightricks/LTX-2/resolve/main/{name}", "checkpoints")
    loader = _loader("CheckpointLoaderSimple", "LTX-2", {"ckpt_name": name}, weights)
    text = "gemma_3_12B_it_fp4_mixed.safetensors"
    clip = _loader(
        *("LTXAVTextEncoderLoader", "Text encoder of LTX-2", {"text_encoder": text, "ckpt_name": name}),
        file(f"Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/{text}", "text_encoders"),
    )
    sound = _loader("LTXVAudioVAELoader", "VAE of its sound", {"ckpt_name": name})
    return Base(
        [loader, clip, sound],
        *(loader["MODEL"], clip["CLIP"], loader["VAE"]),
        size={"width": 768, "height": 512, "length": 97},
        sampling={"steps": 20, "cfg": 4, "sampler_name": "euler", "scheduler": "simple"},
        latent="EmptyLTXVLatentVideo",
        negative="blurry, low quality, still frame, watermark, overlay, titles, subtitles",
        calibration={"cfg": 4},
    )


def minimax_h3() -> Base:
    """Of its nodes the last loads the VAE of its sound."""
    repository = "Comfy-Org/MiniMax-H3/resolve/main/"
    name = "minimax_h3_fl2va_pruned_int8_convrot.safetensors"
    loader = _loader(
        *("UNETLoader", "MiniMax H3", {"unet_name": name}),
        file(f"{repository}diffusion_models/{name}", "diffusion_models"),
    )
    text = "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors"
    clip = _loader(
        *("CLIPLoader", "Text encoder of MiniMax H3", {"clip_name": text, "type": "minimax"}),
        file(f"{repository}text_encoders/{text}", "text_encoders"),
    )
    vaes = [
        _loader("VAELoader", title, {"vae_name": vae}, file(f"{repository}vae/{vae}", "vae"))
        for title, vae in (
            ("VAE of MiniMax H3", "minimax_h3_video_vae_fp16.safetensors"),
            ("VAE of its sound", "minimax_h3_audio_vae_fp32.safetensors"),
        )
    ]
    return Base(
        [loader, clip, *vaes],
        *(loader["MODEL"], clip["CLIP"], vaes[0]["VAE"]),
        size={"width": 1344, "height": 768, "length": 124},
        sampling={"steps": 20, "cfg": 1, "sampler_name": "res_multistep", "scheduler": "simple"},
        latent="EmptyMiniMaxH3LatentAV",
    )
