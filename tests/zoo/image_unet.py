"""Image pipelines around a UNet: Stable Diffusion and its relatives, SDXL, DeepFloyd IF, Kandinsky, cascades."""

from __future__ import annotations

from typing import Any

import diffusers as df

from .case import family, image_call
from .parts import controlnet, hole, picture, unet, vae, xl_unet
from .text import WIDTH, clip_text, clip_text_projected, clip_tokenizer, t5_encoder, t5_tokenizer

KIND = "image_unet"


def sd_parts(**changes: Any) -> dict[str, Any]:
    """Components of Stable Diffusion 1.x; `changes` replaces or adds some."""
    parts: dict[str, Any] = {
        "vae": vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "unet": unet(),
        "scheduler": df.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                      clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return {**parts, **changes}


def without(parts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name not in names}


@family(KIND, image_call())
def sd15() -> Any:
    return df.StableDiffusionPipeline(**sd_parts())


@family(KIND, lambda: image_call(image=picture(), strength=0.8, num_inference_steps=3, height=..., width=...))
def sd15_img2img() -> Any:
    return df.StableDiffusionImg2ImgPipeline(**sd_parts())


@family(KIND, lambda: image_call(image=picture(), mask_image=hole()))
def sd15_inpaint() -> Any:
    return df.StableDiffusionInpaintPipeline(**sd_parts(unet=unet(in_channels=9)))


@family(KIND, lambda: image_call(image=picture()))
def sd15_controlnet() -> Any:
    return df.StableDiffusionControlNetPipeline(**sd_parts(controlnet=controlnet()))


def xl_parts(**changes: Any) -> dict[str, Any]:
    """Components of Stable Diffusion XL; `changes` replaces or adds some."""
    parts: dict[str, Any] = {
        "vae": vae(), "unet": xl_unet(), "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(),
        "text_encoder": clip_text(), "text_encoder_2": clip_text_projected(hidden_act="gelu"),
        "scheduler": df.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                               steps_offset=1, timestep_spacing="leading"),
    }  # fmt: skip
    return {**parts, **changes}


@family(KIND, image_call())
def sdxl() -> Any:
    return df.StableDiffusionXLPipeline(**xl_parts())


def if_unet(**options: Any) -> Any:
    """DeepFloyd IF's UNet: pixels in, mean and variance out, text projected from T5."""
    base: dict[str, Any] = {
        "in_channels": 3, "out_channels": 6, "sample_size": 32, "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "only_cross_attention": (True, False), "encoder_hid_dim": WIDTH, "attention_head_dim": 8,
        "addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
    }  # fmt: skip
    return unet(**{**base, **options})


def if_parts(**changes: Any) -> dict[str, Any]:
    """Components of DeepFloyd IF, stage 1; `changes` replaces or adds some."""
    parts: dict[str, Any] = {
        "tokenizer": t5_tokenizer(), "text_encoder": t5_encoder(), "unet": if_unet(),
        "scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
                                      dynamic_thresholding_ratio=0.95, sample_max_value=1.0),
        "safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,
    }  # fmt: skip
    return {**parts, **changes}


@family(KIND, image_call())
def deepfloyd_if() -> Any:
    return df.IFPipeline(**if_parts())
