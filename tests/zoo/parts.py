"""Tiny denoisers and autoencoders that several families share, and seeded pictures to feed them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image

from .text import WIDTH


def vae(**options: Any) -> AutoencoderKL:
    """An SD-like autoencoder with two levels: one latent pixel is 2 x 2 pixels."""
    base: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
    }  # fmt: skip
    base.update(options)
    levels = len(base["block_out_channels"])
    base["down_block_types"], base["up_block_types"] = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    return AutoencoderKL(**base)


def flow_vae(latents: int = 4, **options: Any) -> AutoencoderKL:
    """The autoencoder of the flow-matching transformers: no quantization convolutions, a shifted latent."""
    base: dict[str, Any] = {
        "latent_channels": latents, "use_quant_conv": False, "use_post_quant_conv": False,
        "shift_factor": 0.0609, "scaling_factor": 1.5035,
    }  # fmt: skip
    return vae(**{**base, **options})


UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH, "attention_head_dim": 4,
}  # fmt: skip


def unet(**options: Any) -> UNet2DConditionModel:
    """An SD 1.x-like UNet with one cross-attention level and one plain one."""
    base = {**UNET, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **options}
    return UNet2DConditionModel(**base)


def controlnet(**options: Any) -> ControlNetModel:
    """A ControlNet that fits `unet()`; its zero convolutions get weights, for zeros would hide it."""
    base = {**UNET, "conditioning_embedding_out_channels": (8, 16), **options}
    base.pop("sample_size")
    made = ControlNetModel(**base)
    with torch.no_grad():
        for block in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)
    return made


XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2), "cross_attention_dim": 2 * WIDTH,
}  # fmt: skip


def xl_unet(time_ids: int = 6, **options: Any) -> UNet2DConditionModel:
    """An SDXL-like UNet: two text encoders' width and the size conditioning (`time_ids` numbers of 8 channels each)."""
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return unet(**{**XL, "up_block_types": up, "projection_class_embeddings_input_dim": 8 * time_ids + WIDTH, **options})


def picture(width: int = 32, height: int = 32, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A seeded noise picture."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def hole(width: int = 32, height: int = 32) -> Image.Image:
    """An inpainting mask: the left half is to be painted."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask, "L")


def clip_of_pictures(frames: int = 5, width: int = 32, height: int = 32) -> list[Image.Image]:
    """A seeded noise video as a list of pictures."""
    return [picture(width, height, seed) for seed in range(frames)]
