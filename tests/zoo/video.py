"""Video pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers as df
from diffusers.pipelines.wan import pipeline_wan_i2v as wan_i2v

from .case import call, family
from .image_unet import sd_parts
from .parts import UNET, picture, unet, vae
from .text import (
    WIDTH,
    clip_images,
    clip_text,
    clip_tokenizer,
    clip_vision,
    clip_vision_plain,
    llama_model,
    llama_tokenizer,
    t5_encoder,
    t5_tokenizer,
    umt5_encoder,
)  # fmt: skip

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


def stand_in_for_ftfy(module: Any) -> None:
    """Some pipelines call ftfy without asking whether it is installed; without it, leave their prompts as they are."""
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)


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


@family(KIND, video_call(max_sequence_length=48, num_inference_steps=4), output="frames")
def wan22_t2v() -> Any:
    """Two transformers: one for the noisy steps, one for the rest."""
    return df.WanPipeline(**wan_parts(transformer_2=wan_transformer(), boundary_ratio=0.875))


@family(KIND, lambda: video_call(image=picture(), max_sequence_length=48), output="frames")
def wan21_i2v() -> Any:
    stand_in_for_ftfy(wan_i2v)
    transformer = wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24)
    return df.WanImageToVideoPipeline(**wan_parts(
        transformer=transformer, image_encoder=clip_vision_plain(), image_processor=clip_images()))  # fmt: skip


def cogvideo_vae() -> Any:
    return df.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=16, sample_width=16)  # fmt: skip


@family(KIND, video_call(max_sequence_length=48), output="frames")
def cogvideox() -> Any:
    transformer = df.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=48)  # fmt: skip
    return df.CogVideoXPipeline(
        transformer=transformer, vae=cogvideo_vae(), scheduler=df.CogVideoXDDIMScheduler(),
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer())  # fmt: skip


@family(KIND, video_call(max_sequence_length=48, height=32, width=32), output="frames")
def ltx_video() -> Any:
    transformer = df.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH)  # fmt: skip
    autoencoder = df.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        patch_size=1)  # fmt: skip
    return df.LTXPipeline(
        transformer=transformer, vae=autoencoder, scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer())  # fmt: skip


@family(KIND, video_call(max_sequence_length=48, num_frames=7), output="frames")
def mochi() -> Any:
    transformer = df.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=48)  # fmt: skip
    autoencoder = df.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1))  # fmt: skip
    return df.MochiPipeline(
        transformer=transformer, vae=autoencoder, scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer())  # fmt: skip


TEMPLATE = {"template": "<video> {}", "crop_start": 4}


@family(KIND, video_call(max_sequence_length=48, prompt_template=TEMPLATE), output="frames")
def hunyuan_video() -> Any:
    transformer = df.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4))  # fmt: skip
    autoencoder = df.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4)  # fmt: skip
    return df.HunyuanVideoPipeline(
        transformer=transformer, vae=autoencoder, scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=llama_model(), tokenizer=llama_tokenizer(), text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer())  # fmt: skip


@family(KIND, call(height=16, width=16, video_length=2, clean_caption=False), output="frames")
def latte() -> Any:
    transformer = df.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=WIDTH, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, video_length=2)  # fmt: skip
    return df.LattePipeline(
        transformer=transformer, vae=vae(), scheduler=df.DDIMScheduler(), text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(120))  # fmt: skip


@family(KIND, video_call(num_frames=8, max_sequence_length=48, clean_caption=False), output="frames")
def allegro() -> Any:
    transformer = df.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=WIDTH)  # fmt: skip
    autoencoder = df.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4)  # fmt: skip
    # Its decoder refuses to work on a whole video, and its tile is fixed at 24 x 320 x 320: one that fits this video.
    autoencoder.enable_tiling()
    autoencoder.kernel, autoencoder.stride = (8, 16, 16), (4, 8, 8)
    return df.AllegroPipeline(
        transformer=transformer, vae=autoencoder, scheduler=df.DDIMScheduler(), text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer())  # fmt: skip
