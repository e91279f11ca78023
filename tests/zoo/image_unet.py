"""Image pipelines around a latent UNet: Stable Diffusion 1.x, SDXL and their relatives."""

from __future__ import annotations

from typing import Any

import diffusers as df
import torch

from .case import call, family, image_call
from .parts import XL, controlnet, hole, picture, unet, vae, xl_unet
from .text import WIDTH, clip_images, clip_text, clip_text_projected, clip_tokenizer, clip_vision

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


@family(KIND, lambda: image_call(image=picture(), strength=0.8, num_inference_steps=3, height=..., width=...))
def sdxl_refiner() -> Any:
    """The refiner's shape: one text encoder, an aesthetics score instead of the target size, image to image."""
    return df.StableDiffusionXLImg2ImgPipeline(
        **xl_parts(unet=xl_unet(5, cross_attention_dim=WIDTH), text_encoder=None, tokenizer=None),
        requires_aesthetics_score=True,
    )


@family(KIND, lambda: image_call(image=picture(), mask_image=hole(), strength=0.9, num_inference_steps=3))
def sdxl_inpaint() -> Any:
    return df.StableDiffusionXLInpaintPipeline(**xl_parts(unet=xl_unet(in_channels=9)))


@family(KIND, lambda: image_call(image=picture()))
def sdxl_controlnet() -> Any:
    net = controlnet(**XL, projection_class_embeddings_input_dim=8 * 6 + WIDTH)
    return df.StableDiffusionXLControlNetPipeline(**xl_parts(controlnet=net))


@family(KIND, lambda: image_call(image=picture(), image_guidance_scale=1.5, height=..., width=...))
def instruct_pix2pix() -> Any:
    return df.StableDiffusionInstructPix2PixPipeline(**sd_parts(unet=unet(in_channels=8)))


@family(KIND, lambda: image_call(image=picture()))
def t2i_adapter() -> Any:
    adapter = df.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    return df.StableDiffusionAdapterPipeline(**sd_parts(adapter=adapter))


@family(KIND, image_call(gligen_phrases=["a cat"], gligen_boxes=[[0.2, 0.2, 0.8, 0.8]]))
def gligen() -> Any:
    return df.StableDiffusionGLIGENPipeline(**sd_parts(unet=unet(attention_type="gated")))


@family(KIND, lambda: image_call(ip_adapter_image=picture()))
def sd15_image_encoder() -> Any:
    """Stable Diffusion with an IP-Adapter: a vision encoder in front of the UNet's second cross attention."""
    from diffusers.models.embeddings import ImageProjection

    parts = sd_parts(image_encoder=clip_vision(), feature_extractor=clip_images())
    pipe = df.StableDiffusionPipeline(**parts)
    projection = ImageProjection(image_embed_dim=WIDTH, cross_attention_dim=WIDTH, num_image_text_embeds=4)
    state = {"ip_adapter": ip_adapter_layers(pipe.unet), "image_proj": {
        "proj.weight": projection.image_embeds.weight, "proj.bias": projection.image_embeds.bias,
        "norm.weight": projection.norm.weight, "norm.bias": projection.norm.bias,
    }}  # fmt: skip
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return pipe


def ip_adapter_layers(model: Any) -> dict[str, Any]:
    """Key and value projections of an IP-Adapter in its checkpoint's layout: odd numbers, cross attentions only."""
    widths = [m.to_k.out_features for n, m in model.named_modules() if n.endswith("attn2")]
    return {f"{2 * i + 1}.to_{x}_ip.weight": torch.randn(w, WIDTH) / WIDTH
            for i, w in enumerate(widths) for x in "kv"}  # fmt: skip


@family(KIND, image_call(num_inference_steps=3))
def lcm() -> Any:
    return df.LatentConsistencyModelPipeline(
        **sd_parts(unet=unet(time_cond_proj_dim=32), scheduler=df.LCMScheduler()))


@family(KIND, image_call(pag_scale=3.0))
def sd15_pag() -> Any:
    return df.StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid"])


@family(KIND, image_call(pag_scale=3.0))
def sdxl_pag() -> Any:
    return df.StableDiffusionXLPAGPipeline(**xl_parts(), pag_applied_layers=["mid"])


@family(KIND, lambda: image_call(image=picture(16, 16), height=..., width=...))
def x4_upscaler() -> Any:
    """Latents and the noised small picture side by side; the noise level is a class label."""
    parts = sd_parts(unet=unet(in_channels=7, num_class_embeds=100), vae=vae(block_out_channels=(8, 16, 16)),
                     low_res_scheduler=df.DDPMScheduler(), max_noise_level=99)  # fmt: skip
    return df.StableDiffusionUpscalePipeline(**without(parts, "requires_safety_checker", "safety_checker"))


@family(KIND, lambda: image_call(image=picture(64, 64), height=..., width=...))
def latent_upscaler() -> Any:
    """K-diffusion blocks; noise level and pooled text condition the time embedding."""
    model = unet(
        in_channels=8, out_channels=5, act_fn="gelu", attention_head_dim=8, norm_num_groups=None,
        time_embedding_type="fourier", timestep_post_act="gelu", time_cond_proj_dim=128 + WIDTH,
        conv_in_kernel=1, conv_out_kernel=1, resnet_time_scale_shift="scale_shift", block_out_channels=(32, 32, 64, 64),
        mid_block_type=None, down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), only_cross_attention=False,
    )  # fmt: skip
    parts = sd_parts(unet=model, scheduler=df.EulerDiscreteScheduler(prediction_type="sample"),
                     vae=vae(block_out_channels=(8, 16, 16, 16)))  # fmt: skip
    keep = without(parts, "safety_checker", "feature_extractor", "requires_safety_checker")
    return df.StableDiffusionLatentUpscalePipeline(**keep)


@family(KIND, lambda: call(prompt=..., image=picture(), num_inference_steps=2, processing_resolution=0),
        output="prediction")  # fmt: skip
def marigold_depth() -> Any:
    parts = without(sd_parts(unet=unet(in_channels=8)), "safety_checker", "feature_extractor",
                    "requires_safety_checker")  # fmt: skip
    return df.MarigoldDepthPipeline(**parts, prediction_type="depth")


@family(KIND, lambda: image_call(prompt=..., image=picture()))
def image_variation() -> Any:
    parts = without(sd_parts(image_encoder=clip_vision(), feature_extractor=clip_images()), "text_encoder", "tokenizer")
    return df.StableDiffusionImageVariationPipeline(**parts)
