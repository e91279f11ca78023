"""Image pipelines around a transformer: SD3, FLUX, PixArt, Sana and the like."""

from __future__ import annotations

from typing import Any

import diffusers as df

from .case import family, image_call
from .parts import flow_vae, vae
from .text import WIDTH, clip_text, clip_text_projected, clip_tokenizer, t5_encoder, t5_tokenizer

KIND = "image_dit"


@family(KIND, image_call(max_sequence_length=48))
def sd3() -> Any:
    return df.StableDiffusion3Pipeline(
        transformer=df.SD3Transformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, out_channels=4,
        ),
        vae=flow_vae(), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text_projected(), text_encoder_2=clip_text_projected(hidden_act="gelu"),
        text_encoder_3=t5_encoder(d_model=2 * WIDTH),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux_parts(**changes: Any) -> dict[str, Any]:
    """Components of FLUX.1-dev; `changes` replaces or adds some."""
    parts: dict[str, Any] = {
        "transformer": df.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        "vae": flow_vae(1), "scheduler": df.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": clip_text(), "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(), "tokenizer_2": t5_tokenizer(),
    }  # fmt: skip
    return {**parts, **changes}


@family(KIND, image_call(max_sequence_length=48))
def flux() -> Any:
    return df.FluxPipeline(**flux_parts())


def pixart_parts(**options: Any) -> dict[str, Any]:
    """Components of PixArt; `options` go to its transformer."""
    base: dict[str, Any] = {
        "sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "caption_channels": WIDTH, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
        "norm_type": "ada_norm_single", "use_additional_conditions": False,
    }  # fmt: skip
    return {
        "transformer": df.PixArtTransformer2DModel(**{**base, **options}), "vae": vae(),
        "scheduler": df.DPMSolverMultistepScheduler(), "text_encoder": t5_encoder(), "tokenizer": t5_tokenizer(),
    }  # fmt: skip


@family(KIND, image_call(use_resolution_binning=False, max_sequence_length=48))
def pixart_alpha() -> Any:
    return df.PixArtAlphaPipeline(**pixart_parts())
