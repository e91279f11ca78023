"""Relatives of the other files' families that differ in what they call: second networks, clips as input, other loops."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers as df
import torch
import transformers as tf

from .case import call, family, image_call
from .image_dit import flux_parts
from .image_staged import if_parts, noise, prior, prior_scheduler
from .image_unet import sd_parts, without
from .other import pixel_unet
from .parts import UNET, clip_of_pictures, controlnet, flow_vae, hole, picture, unet, vae
from .text import (
    TEXT_VOCABULARY,
    WIDTH,
    clip_images,
    clip_text,
    clip_text_projected,
    clip_tokenizer,
    clip_vision,
    decoder_config,
    qwen3_model,
    qwen25_vl,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from .video import hunyuan_video, stand_in_for_ftfy, video_call, wan_parts

SHORT: dict[str, Any] = {"max_sequence_length": 48}
PLAIN = ("safety_checker", "feature_extractor", "requires_safety_checker")


@family("image_dit", lambda: image_call(control_image=picture(), **SHORT))
def flux_controlnet() -> Any:
    net = df.FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True)  # fmt: skip
    with torch.no_grad():
        for block in [*net.controlnet_blocks, *net.controlnet_single_blocks]:
            torch.nn.init.normal_(block.weight, std=0.1)
    return df.FluxControlNetPipeline(**flux_parts(controlnet=net))


@family("image_dit", image_call(max_sequence_length=256))
def ovis_image() -> Any:
    transformer = df.OvisImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8))  # fmt: skip
    return df.OvisImagePipeline(
        transformer=transformer, vae=flow_vae(1), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen3_model(), tokenizer=qwen_tokenizer())  # fmt: skip


@family("image_dit", image_call(**SHORT))
def bria() -> Any:
    transformer = df.BriaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=[0, 8, 8])  # fmt: skip
    return df.BriaPipeline(
        transformer=transformer, vae=flow_vae(1), scheduler=df.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer())  # fmt: skip


@family("image_unet", lambda: image_call(image=picture(), mask_image=hole(), strength=0.8, num_inference_steps=4, height=..., width=...))
def deepfloyd_if_inpaint() -> Any:
    return df.IFInpaintingPipeline(**if_parts())


@family("image_unet", image_call(prior_num_inference_steps=2))
def stable_unclip() -> Any:
    """A prior's image embedding, noised, is the class embedding of the UNet."""
    normalizer = importlib.import_module("diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer")
    model = unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    return df.StableUnCLIPPipeline(
        **without(sd_parts(unet=model), *PLAIN), prior=prior(), prior_scheduler=prior_scheduler(), prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=clip_text_projected(), image_normalizer=normalizer.StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=df.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))  # fmt: skip


@family("image_unet", image_call(editing_prompt=["dog", "hat"], edit_warmup_steps=1, edit_guidance_scale=[3, 4],
                                 reverse_editing_direction=[False, True]))  # fmt: skip
def semantic_guidance() -> Any:
    """Four predictions a step: without text, with it, and one per edit."""
    return df.SemanticStableDiffusionPipeline(**sd_parts())


@family("image_unet", lambda: call(prompt=..., image=picture(), processing_resolution=0), output="prediction")
def marigold_normals() -> Any:
    return df.MarigoldNormalsPipeline(**without(sd_parts(unet=unet(in_channels=8)), *PLAIN), prediction_type="normals")


def unidiffuser_call() -> dict[str, Any]:
    """Neither prompt nor picture: both are made, from latents that are given."""
    return call(prompt=..., height=32, width=32, prompt_latents=noise(1, 77, WIDTH), vae_latents=noise(1, 4, 16, 16),
                clip_latents=noise(1, 1, WIDTH))  # fmt: skip


@family("other", unidiffuser_call)
def unidiffuser() -> Any:
    """What it makes depends on which arguments it is given."""
    parts = importlib.import_module("diffusers.pipelines.deprecated.unidiffuser")
    model = parts.UniDiffuserModel(
        text_dim=16, clip_img_dim=WIDTH, num_text_tokens=77, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, num_layers=2, norm_num_groups=4, sample_size=16, patch_size=2, activation_fn="gelu", num_embeds_ada_norm=1000,
        norm_type="layer_norm", block_type="unidiffuser", use_timestep_embedding=False, ff_final_dropout=True, use_data_type_embedding=True,
        use_patch_pos_embed=False)  # fmt: skip
    decoder = parts.UniDiffuserTextDecoder(
        prefix_length=77, prefix_inner_dim=WIDTH, prefix_hidden_dim=16, vocab_size=TEXT_VOCABULARY, n_positions=200, n_embd=WIDTH,
        n_layer=2, n_head=4, n_inner=37)  # fmt: skip
    tokenizer = qwen_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return df.UniDiffuserPipeline(
        unet=model, text_decoder=decoder, vae=vae(), text_encoder=clip_text(), image_encoder=clip_vision(),
        clip_image_processor=clip_images(), clip_tokenizer=clip_tokenizer(), text_tokenizer=tokenizer,
        scheduler=df.DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                 solver_order=3))  # fmt: skip


@family("other", lambda: {"image": noise(1, 3, 16, 16), "mask_image": torch.ones(1, 3, 16, 16), "num_inference_steps": 4,
                          "jump_length": 2, "jump_n_sample": 2, "output_type": "np"})  # fmt: skip
def repaint() -> Any:
    """Goes back and forth in time."""
    return df.RePaintPipeline(unet=pixel_unet(), scheduler=df.RePaintScheduler())


@family("other", lambda: call(prompt=..., image=picture()))
def ldm_superres() -> Any:
    vqvae = df.VQModel(block_out_channels=(32, 64), latent_channels=3, norm_num_groups=8,
                       down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    return df.LDMSuperResolutionPipeline(vqvae=vqvae, unet=pixel_unet(in_channels=6, out_channels=3), scheduler=df.DDIMScheduler())


@family("video", lambda: video_call(video=clip_of_pictures(9, 16, 16), mask=[hole(16, 16)] * 9, **SHORT), output="frames")
def wan_vace() -> Any:
    stand_in_for_ftfy(importlib.import_module("diffusers.pipelines.wan.pipeline_wan_vace"))
    transformer = df.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=WIDTH, freq_dim=64,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=96)  # fmt: skip
    return df.WanVACEPipeline(**wan_parts(transformer=transformer))


@family("video", video_call(base_num_frames=9, **SHORT), output="frames")
def skyreels_v2_forcing() -> Any:
    """Every frame has a time step of its own."""
    stand_in_for_ftfy(importlib.import_module("diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"))
    transformer = df.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=WIDTH, freq_dim=64,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32)  # fmt: skip
    return df.SkyReelsV2DiffusionForcingPipeline(**wan_parts(transformer=transformer))


@family("video", video_call(num_frames=5, height=32, width=32, max_sequence_length=32), output="frames")
def kandinsky5() -> Any:
    transformer = df.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4, model_dim=24, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 2))  # fmt: skip
    return df.Kandinsky5T2VPipeline(
        transformer=transformer, vae=hunyuan_video().vae, scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=qwen25_vl(), tokenizer=qwen_tokenizer(), text_encoder_2=clip_text(), tokenizer_2=clip_tokenizer())  # fmt: skip


@family("video", lambda: image_call(video=clip_of_pictures(3), conditioning_frames=clip_of_pictures(3), strength=0.8,
                                    num_inference_steps=4), output="frames")  # fmt: skip
def animatediff_video_controlnet() -> Any:
    adapter = df.MotionAdapter(
        block_out_channels=UNET["block_out_channels"], motion_layers_per_block=1, motion_norm_num_groups=8,
        motion_num_attention_heads=2)  # fmt: skip
    parts = without(sd_parts(motion_adapter=adapter, controlnet=controlnet()), *PLAIN)
    return df.AnimateDiffVideoToVideoControlNetPipeline(**parts)


@family("video", image_call(num_frames=2), output="frames")
def text_to_video_sd() -> Any:
    model = df.UNet3DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=32, norm_num_groups=2, cross_attention_dim=WIDTH,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))  # fmt: skip
    return df.TextToVideoSDPipeline(**without(sd_parts(unet=model), *PLAIN))


@family("other", {"prompt": "Name a color.", "gen_length": 16, "num_inference_steps": 3, "temperature": 0.0, "eos_early_stop": False,
                  "output_type": "seq"}, output="sequences")  # fmt: skip
def diffusion_gemma() -> Any:
    """Text, block by block: the encoder fills a cache of keys and values that the pipeline hands to every decoder call."""
    text = {**decoder_config(layers=2), "global_head_dim": 8, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
            "sliding_window": 16}  # fmt: skip
    picture_encoder = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "num_key_value_heads": 4, "head_dim": 8, "patch_size": 8}  # fmt: skip
    config = tf.DiffusionGemmaConfig(text_config=text, vision_config=picture_encoder, canvas_length=8)
    config._experts_implementation = "batched_mm"  # the default's histogram takes other types on a CPU than elsewhere
    return df.DiffusionGemmaPipeline(
        model=tf.DiffusionGemmaForBlockDiffusion(config), scheduler=df.BlockRefinementScheduler(), processor=qwen_tokenizer()
    )
