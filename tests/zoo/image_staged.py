"""Image pipelines in pixels or in stages: DeepFloyd IF, unCLIP, Kandinsky 2.2 and 3, Wuerstchen, Stable Cascade."""

from __future__ import annotations

from typing import Any

import diffusers as df
import torch

from .case import call, family, image_call, seeded
from .parts import picture, unet
from .text import WIDTH, clip_images, clip_text, clip_text_projected, clip_tokenizer, clip_vision, t5_encoder, t5_tokenizer

KIND = "image_unet"


def noise(*shape: int) -> torch.Tensor:
    """Seeded normal noise, standing in for what an earlier stage hands over."""
    with seeded():
        return torch.randn(*shape)


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


@family(KIND, lambda: image_call(image=picture(16, 16)))
def deepfloyd_if_superres() -> Any:
    model = if_unet(in_channels=6, class_embed_type="timestep", mid_block_scale_factor=1.414)
    return df.IFSuperResolutionPipeline(**if_parts(unet=model, image_noising_scheduler=df.DDPMScheduler()))


def prior(**options: Any) -> Any:
    base: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": WIDTH, "num_layers": 1,
    }  # fmt: skip
    made = df.PriorTransformer(**{**base, **options})
    made.clip_std.data.fill_(1.0)
    return made


def prior_scheduler() -> Any:
    return df.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000,
                              clip_sample_range=5.0)  # fmt: skip


@family(KIND, call(prior_num_inference_steps=2, decoder_num_inference_steps=2, super_res_num_inference_steps=2,
                   num_inference_steps=...))  # fmt: skip
def unclip() -> Any:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    decoder = if_unet(sample_size=16, addition_embed_type=None, encoder_hid_dim=None, cross_attention_norm=None,
                      only_cross_attention=False, class_embed_type="identity", act_fn="silu", cross_attention_dim=WIDTH)
    upscaler: dict[str, Any] = {
        "sample_size": 32, "in_channels": 6, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "norm_num_groups": 8, "attention_head_dim": 8,
    }  # fmt: skip
    return df.UnCLIPPipeline(
        prior=prior(), decoder=decoder, text_encoder=clip_text_projected(), tokenizer=clip_tokenizer(),
        text_proj=UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH),
        super_res_first=df.UNet2DModel(**upscaler), super_res_last=df.UNet2DModel(**upscaler),
        prior_scheduler=prior_scheduler(),
        decoder_scheduler=df.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=df.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )  # fmt: skip


def kandinsky_prior_parts() -> dict[str, Any]:
    return {
        "prior": prior(), "image_encoder": clip_vision(), "text_encoder": clip_text_projected(),
        "tokenizer": clip_tokenizer(), "scheduler": prior_scheduler(), "image_processor": clip_images(),
    }  # fmt: skip


def movq() -> Any:
    return df.VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), layers_per_block=1, latent_channels=4,
        num_vq_embeddings=12, vq_embed_dim=4, norm_type="spatial", norm_num_groups=8,
    )  # fmt: skip


def kandinsky_parts() -> dict[str, Any]:
    model = unet(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH, mid_block_type="UNetMidBlock2DSimpleCrossAttn", class_embed_type=None,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    scheduler = df.DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                 set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    return {"unet": model, "movq": movq(), "scheduler": scheduler}


@family(KIND, lambda: call(output_type="pt"), output="image_embeds")
def kandinsky22_prior() -> Any:
    return df.KandinskyV22PriorPipeline(**kandinsky_prior_parts())


@family(KIND, lambda: image_call(prompt=..., image_embeds=noise(1, WIDTH), negative_image_embeds=noise(1, WIDTH) * 0.5,
                                 height=64, width=64))  # fmt: skip
def kandinsky22() -> Any:
    return df.KandinskyV22Pipeline(**kandinsky_parts())


@family(KIND, image_call(height=64, width=64, prior_num_inference_steps=2))
def kandinsky22_combined() -> Any:
    prior_parts = {f"prior_{name}": part for name, part in kandinsky_prior_parts().items()}
    return df.KandinskyV22CombinedPipeline(**kandinsky_parts(), **prior_parts)


@family(KIND, image_call(height=64, width=64))
def kandinsky3() -> Any:
    model = df.Kandinsky3UNet(in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=2,
                              block_out_channels=(16, 32), cross_attention_dim=4, encoder_hid_dim=WIDTH)  # fmt: skip
    return df.Kandinsky3Pipeline(tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), unet=model, movq=movq(),
                                 scheduler=df.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))  # fmt: skip


def paella() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    model = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=24)
    for name, weight in model.named_parameters():
        if name.endswith("gammas"):  # zeros from the start: the block would do nothing
            torch.nn.init.normal_(weight, std=0.5)
    return model


@family(KIND, lambda: image_call(height=64, width=64, output_type="pt"), output="image_embeddings")
def wuerstchen_prior() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    model = WuerstchenPrior(c_in=2, c=16, depth=1, c_cond=WIDTH, c_r=16, nhead=2)
    return df.WuerstchenPriorPipeline(
        prior=model, tokenizer=clip_tokenizer(), text_encoder=clip_text(), scheduler=df.DDPMWuerstchenScheduler(),
    )  # fmt: skip


@family(KIND, lambda: call(image_embeddings=noise(1, 4, 4, 4), guidance_scale=2.0))
def wuerstchen_decoder() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

    model = WuerstchenDiffNeXt(c_cond=WIDTH, c_hidden=[16, 16, 16, 16], nhead=[-1, 2, 2, 2], blocks=[1, 1, 1, 1],
                               level_config=["CT", "CTA", "CTA", "CTA"], inject_effnet=[False, True, True, True],
                               effnet_embd=4, clip_embd=WIDTH)  # fmt: skip
    return df.WuerstchenDecoderPipeline(
        decoder=model, tokenizer=clip_tokenizer(), text_encoder=clip_text(), vqgan=paella(), latent_dim_scale=4.0,
        scheduler=df.DDPMWuerstchenScheduler())  # fmt: skip


CASCADE: dict[str, Any] = {
    "block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": WIDTH, "conditioning_dim": 24,
}  # fmt: skip


def cascade_prior_unet() -> Any:
    return df.StableCascadeUNet(
        **CASCADE, in_channels=16, out_channels=16, timestep_ratio_embedding_dim=16, clip_text_in_channels=WIDTH,
        clip_image_in_channels=WIDTH, switch_level=(False,))  # fmt: skip


def cascade_decoder_parts() -> dict[str, Any]:
    model = df.StableCascadeUNet(
        **{**CASCADE, "block_out_channels": (8, 16), "num_attention_heads": (-1, 2)}, in_channels=4, out_channels=4,
        timestep_ratio_embedding_dim=8, effnet_in_channels=16, pixel_mapper_in_channels=3, patch_size=2,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                               ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")))  # fmt: skip
    return {
        "decoder": model, "tokenizer": clip_tokenizer(), "text_encoder": clip_text_projected(), "vqgan": paella(),
        "scheduler": df.DDPMWuerstchenScheduler(), "latent_dim_scale": 4.0,
    }  # fmt: skip


def cascade_prior_parts() -> dict[str, Any]:
    return {
        "prior": cascade_prior_unet(), "tokenizer": clip_tokenizer(), "text_encoder": clip_text_projected(),
        "scheduler": df.DDPMWuerstchenScheduler(), "image_encoder": None, "feature_extractor": None,
    }  # fmt: skip


@family(KIND, lambda: image_call(height=128, width=128, output_type="pt"), output="image_embeddings")
def cascade_prior() -> Any:
    return df.StableCascadePriorPipeline(**cascade_prior_parts())


@family(KIND, lambda: call(image_embeddings=noise(1, 16, 4, 4), guidance_scale=2.0))
def cascade_decoder() -> Any:
    return df.StableCascadeDecoderPipeline(**cascade_decoder_parts())


@family(KIND, image_call(height=128, width=128, prior_num_inference_steps=2))
def cascade_combined() -> Any:
    decoder = {k: v for k, v in cascade_decoder_parts().items() if k != "latent_dim_scale"}
    return df.StableCascadeCombinedPipeline(
        **decoder, **{f"prior_{name}": part for name, part in cascade_prior_parts().items()})
