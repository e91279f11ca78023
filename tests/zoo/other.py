"""Pipelines without text, and one that makes a 3-D object."""

from __future__ import annotations

from typing import Any

import diffusers as df

from .case import call, family
from .image_staged import prior
from .text import WIDTH, clip_text_projected, clip_tokenizer

KIND = "other"
PIXELS: dict[str, Any] = {"batch_size": 1, "num_inference_steps": 2, "output_type": "np"}


def pixel_unet(**options: Any) -> Any:
    return df.UNet2DModel(**{
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, **options})  # fmt: skip


@family(KIND, PIXELS)
def ddpm() -> Any:
    return df.DDPMPipeline(unet=pixel_unet(), scheduler=df.DDPMScheduler())


@family(KIND, PIXELS)
def ddim() -> Any:
    return df.DDIMPipeline(unet=pixel_unet(), scheduler=df.DDIMScheduler())


@family(KIND, {**PIXELS, "class_labels": [3]})
def consistency() -> Any:
    """A consistency model in two steps, conditioned on a class."""
    model = pixel_unet(num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return df.ConsistencyModelPipeline(
        unet=model, scheduler=df.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_max=80.0))


@family(KIND, call(output_type="latent"))
@family(KIND, call(frame_size=32), name="shap_e_rendered", slow=True)
def shap_e() -> Any:
    """Text to a radiance field; `shap_e_rendered` then renders it from twenty sides, 20 x 32 x 32 rays being few."""
    from diffusers.pipelines.shap_e.renderer import ShapERenderer

    field = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=WIDTH // 2, d_hidden=8, n_output=12,
        background=(0.1, 0.1, 0.1))  # fmt: skip
    model = prior(
        attention_head_dim=16, embedding_dim=WIDTH // 2, num_embeddings=WIDTH, additional_embeddings=0,
        embedding_proj_dim=WIDTH, time_embed_dim=64, time_embed_act_fn="gelu", added_emb_type=None, clip_embed_dim=WIDTH,
        encoder_hid_proj_type=None, norm_in_type="layer")  # fmt: skip
    scheduler = df.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True,
        clip_sample=True, clip_sample_range=1.0)  # fmt: skip
    return df.ShapEPipeline(
        prior=model, text_encoder=clip_text_projected(), tokenizer=clip_tokenizer(), scheduler=scheduler,
        shap_e_renderer=field)  # fmt: skip
