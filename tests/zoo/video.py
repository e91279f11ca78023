"""Video pipelines."""

from __future__ import annotations

from typing import Any

import diffusers as df

from .case import call, family
from .parts import UNET, picture, unet, vae
from .image_unet import sd_parts
from .text import WIDTH, clip_images, clip_vision, t5_tokenizer, umt5_encoder

KIND = "video"


def video_call(**arguments: Any) -> dict[str, Any]:
    """A call at 16 x 16 pixels and 9 frames."""
    return call(**{"height": 16, "width": 16, "num_frames": 9, **arguments})


def wan_transformer(**options: Any) -> Any:
    base: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": WIDTH,
        "freq_dim": 64, "ffn_dim": 32, "num_layers": 2, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return df.WanTransformer3DModel(**{**base, **options})


def wan_parts(**changes: Any) -> dict[str, Any]:
    """Components of Wan 2.1; `changes` replaces or adds some."""
    parts: dict[str, Any] = {
        "transformer": wan_transformer(), "vae": df.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1],
                                                                     num_res_blocks=1),
        "scheduler": df.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "text_encoder": umt5_encoder(), "tokenizer": t5_tokenizer(),
    }  # fmt: skip
    return {**parts, **changes}


WAN_CALL = video_call(max_sequence_length=48)


@family(KIND, WAN_CALL, output="frames")
def wan21_t2v() -> Any:
    return df.WanPipeline(**wan_parts())


@family(KIND, lambda: video_call(prompt=..., image=picture(), height=32, width=32, num_frames=2, decode_chunk_size=1),
        output="frames")  # fmt: skip
def svd() -> Any:
    return df.StableVideoDiffusionPipeline(
        vae=df.AutoencoderKLTemporalDecoder(block_out_channels=(32, 64), latent_channels=4, sample_size=32,
                                            down_block_types=("DownEncoderBlock2D",) * 2),
        unet=df.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=16, num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
            projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
        ),
        image_encoder=clip_vision(image_size=224, patch_size=56), feature_extractor=clip_images(224),
        scheduler=df.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
            prediction_type="v_prediction", timestep_spacing="leading", timestep_type="continuous",
            use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, steps_offset=1),
    )  # fmt: skip


@family(KIND, call(height=32, width=32, num_frames=3), output="frames")
def animatediff() -> Any:
    adapter = df.MotionAdapter(
        block_out_channels=UNET["block_out_channels"], motion_layers_per_block=1, motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )  # fmt: skip
    parts = sd_parts(unet=unet(), vae=vae(), motion_adapter=adapter)
    return df.AnimateDiffPipeline(**{k: v for k, v in parts.items() if "safety" not in k})
