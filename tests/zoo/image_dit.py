"""Image pipelines around a transformer: SD3, FLUX, PixArt, Sana and the like."""

from __future__ import annotations

from typing import Any

import diffusers as df

from .case import family, image_call
from .parts import flow_vae, picture, vae
from .text import (
    WIDTH,
    bert_model,
    bert_tokenizer,
    clip_text,
    clip_text_projected,
    clip_tokenizer,
    gemma2_model,
    gemma_tokenizer,
    glm_model,
    glm_tokenizer,
    mistral3,
    qwen3_causal,
    qwen3_model,
    qwen25_vl,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
    umt5_encoder,
)  # fmt: skip

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


@family(KIND, lambda: image_call(image=picture(), strength=0.8, num_inference_steps=3, max_sequence_length=48))
def flux_img2img() -> Any:
    return df.FluxImg2ImgPipeline(**flux_parts())


@family(KIND, lambda: image_call(image=picture(), max_sequence_length=48, max_area=32 * 32, _auto_resize=False))
def flux_kontext() -> Any:
    return df.FluxKontextPipeline(**flux_parts())


def flux2_transformer() -> Any:
    return df.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=64, axes_dims_rope=(4, 4, 4, 4))  # fmt: skip


def flux2_vae() -> Any:
    return df.AutoencoderKLFlux2(
        block_out_channels=(16,), layers_per_block=1, latent_channels=1, norm_num_groups=1, sample_size=32,
        use_quant_conv=False, use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",))  # fmt: skip


FLUX2_CALL = image_call(max_sequence_length=64, text_encoder_out_layers=(1, 2, 3), height=16, width=16)


@family(KIND, FLUX2_CALL)
def flux2() -> Any:
    return df.Flux2Pipeline(
        transformer=flux2_transformer(), vae=flux2_vae(), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=mistral3(), tokenizer=qwen_tokenizer())  # fmt: skip


@family(KIND, FLUX2_CALL)
def flux2_klein() -> Any:
    return df.Flux2KleinPipeline(
        transformer=flux2_transformer(), vae=flux2_vae(), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen3_causal(), tokenizer=qwen_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=48))
def chroma() -> Any:
    return df.ChromaPipeline(
        transformer=df.ChromaTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
        vae=flow_vae(1), scheduler=df.FlowMatchEulerDiscreteScheduler(), text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip


@family(KIND, image_call(use_resolution_binning=False, max_sequence_length=48))
def pixart_sigma() -> Any:
    return df.PixArtSigmaPipeline(**pixart_parts())


@family(KIND, image_call(use_resolution_binning=False, max_sequence_length=48, complex_human_instruction=None))
def sana() -> Any:
    transformer = df.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH,
        sample_size=16)  # fmt: skip
    vae_dc = df.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407)  # fmt: skip
    return df.SanaPipeline(
        transformer=transformer, vae=vae_dc, scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=gemma2_model(), tokenizer=gemma_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=48))
def aura_flow() -> Any:
    transformer = df.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, pos_embed_max_size=256)  # fmt: skip
    return df.AuraFlowPipeline(
        transformer=transformer, vae=vae(), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=umt5_encoder(), tokenizer=t5_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=200))
def lumina2() -> Any:
    transformer = df.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH)  # fmt: skip
    return df.Lumina2Pipeline(
        transformer=transformer, vae=flow_vae(), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=gemma2_model(), tokenizer=gemma_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=48))
def cogview3() -> Any:
    transformer = df.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=4, pos_embed_max_size=16, sample_size=16)  # fmt: skip
    return df.CogView3PlusPipeline(
        transformer=transformer, vae=vae(), scheduler=df.CogVideoXDDIMScheduler(), text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=48))
def cogview4() -> Any:
    transformer = df.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=4, pos_embed_max_size=16, sample_size=16,
        rope_axes_dim=(16, 16))  # fmt: skip
    scheduler = df.FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256,
                                                   use_dynamic_shifting=True, time_shift_type="linear")  # fmt: skip
    return df.CogView4Pipeline(
        transformer=transformer, vae=vae(), scheduler=scheduler, text_encoder=glm_model(),
        tokenizer=glm_tokenizer())  # fmt: skip


@family(KIND, image_call(use_resolution_binning=False, height=64, width=64))
def hunyuan_dit() -> Any:
    transformer = df.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=24)  # fmt: skip
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return df.HunyuanDiTPipeline(
        transformer=transformer, vae=vae(block_out_channels=(8, 8, 8, 16)), scheduler=df.DDPMScheduler(), text_encoder=bert_model(),
        tokenizer=bert_tokenizer(), text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(), **parts)  # fmt: skip


@family(KIND, image_call(negative_prompt="grey", true_cfg_scale=2.0))
def qwen_image() -> Any:
    transformer = df.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4))  # fmt: skip
    autoencoder = df.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    return df.QwenImagePipeline(
        transformer=transformer, vae=autoencoder, scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen25_vl(), tokenizer=qwen_tokenizer())  # fmt: skip


@family(KIND, image_call(max_sequence_length=48, guidance_scale=3.0, cfg_normalization=False))
def z_image() -> Any:
    """Takes a list of samples instead of a batch."""
    transformer = df.ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])  # fmt: skip
    return df.ZImagePipeline(
        transformer=transformer, vae=flow_vae(16), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen3_model(), tokenizer=qwen_tokenizer())  # fmt: skip


@family(KIND, {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "np", "guidance_scale": 4.0})
def dit() -> Any:
    """Class-conditioned, no text encoder."""
    transformer = df.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000)  # fmt: skip
    return df.DiTPipeline(transformer=transformer, vae=vae(), scheduler=df.DDIMScheduler())
