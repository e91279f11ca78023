"""Audio pipelines: spectrogram latents with a vocoder, and a waveform autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers as df
import torch
import transformers as tf

from .case import call, family, seeded
from .parts import unet, vae
from .text import WIDTH, clap_model, clap_text, gpt2, roberta_tokenizer, t5_encoder, t5_tokenizer, vocoder

KIND = "audio"
SOUND = call(audio_length_in_s=0.016, max_new_tokens=4)
"""256 samples at 16 kHz."""


def ddim() -> Any:
    return df.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                            set_alpha_to_one=False, steps_offset=1)  # fmt: skip


def mel_vae() -> Any:
    return vae(in_channels=1, out_channels=1)


@family(KIND, SOUND, output="audios")
def audioldm2() -> Any:
    """Two text encoders, a projection and a language model that writes part of the prompt: `generate` runs too."""
    model = df.AudioLDM2UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(None, WIDTH), attention_head_dim=4)
    projection = df.AudioLDM2ProjectionModel(text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH,
                                             langauge_model_dim=WIDTH)  # fmt: skip
    return df.AudioLDM2Pipeline(
        vae=mel_vae(), unet=model, text_encoder=clap_model(), text_encoder_2=t5_encoder(),
        projection_model=projection, language_model=gpt2(), tokenizer=roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(), feature_extractor=tf.ClapFeatureExtractor(feature_size=64), scheduler=ddim(),
        vocoder=vocoder())  # fmt: skip


def class_conditioned_unet() -> Any:
    """The text embedding comes in as the UNet's class embedding; there is no cross attention to text."""
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 32), class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH, class_embeddings_concat=True)  # fmt: skip


@family(KIND, call(audio_length_in_s=0.016), output="audios")
def audioldm() -> Any:
    return df.AudioLDMPipeline(
        vae=mel_vae(), unet=class_conditioned_unet(), text_encoder=clap_text(), tokenizer=roberta_tokenizer(),
        scheduler=ddim(), vocoder=vocoder())  # fmt: skip


def musicldm_call() -> dict[str, Any]:
    """Text embeddings are given: diffusers 0.42 reads CLAP's answer as transformers 4 gave it and fails on 5's."""
    with seeded():
        positive, negative = torch.randn(2, 1, WIDTH)
    return call(prompt=..., prompt_embeds=positive, negative_prompt_embeds=negative, audio_length_in_s=0.016)


@family(KIND, musicldm_call, output="audios")
def musicldm() -> Any:
    return df.MusicLDMPipeline(
        vae=mel_vae(), unet=class_conditioned_unet(), text_encoder=clap_model(), tokenizer=roberta_tokenizer(),
        feature_extractor=tf.ClapFeatureExtractor(feature_size=64), scheduler=ddim(), vocoder=vocoder())  # fmt: skip


@family(KIND, call(audio_end_in_s=4.0, negative_prompt="noise"), output="audios")
def stable_audio() -> Any:
    transformer = df.StableAudioDiTModel(
        sample_size=16, in_channels=3, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=4, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=4)  # fmt: skip
    autoencoder = df.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4)  # fmt: skip
    projection = df.StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=4, min_value=0, max_value=32)
    return df.StableAudioPipeline(
        vae=autoencoder, transformer=transformer, projection_model=projection, text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(), scheduler=df.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"))  # fmt: skip
