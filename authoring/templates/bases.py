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
