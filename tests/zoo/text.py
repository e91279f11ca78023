"""Tiny tokenizers built in memory and tiny text (and image) encoders. Sizes are chosen to be small, not to be realistic."""

from __future__ import annotations

import string
from typing import Any

import transformers as tf
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 32
"""Hidden size of every text encoder, unless a family needs another one."""
TEXT_VOCABULARY = 640
"""Rows of every embedding table: above the largest id of every tokenizer here."""

BYTES = sorted(bytes_to_unicode().values())
LETTERS = string.ascii_letters + string.digits + string.punctuation


def clip_tokenizer(length: int = 77, **options: Any) -> tf.CLIPTokenizer:
    """Byte-level BPE without merges: each letter is a token. Ids 512 and 513 are start and end, as in CLIP last."""
    pieces = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return tf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length, **options)


def t5_tokenizer(length: int = 64) -> tf.T5Tokenizer:
    """Unigram over single characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return tf.T5Tokenizer(vocab=[*special, *((c, -3.0) for c in LETTERS)], extra_ids=0, model_max_length=length)


def clip_config(**options: Any) -> tf.CLIPTextConfig:
    base: dict[str, Any] = {
        "vocab_size": TEXT_VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": WIDTH,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 77,
        "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    return tf.CLIPTextConfig(**{**base, **options})


def clip_text(**options: Any) -> tf.CLIPTextModel:
    return tf.CLIPTextModel(clip_config(**options))


def clip_text_projected(**options: Any) -> tf.CLIPTextModelWithProjection:
    return tf.CLIPTextModelWithProjection(clip_config(**options))


def t5_config(**options: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "vocab_size": TEXT_VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4,
        "relative_attention_num_buckets": 8, "is_encoder_decoder": False, "use_cache": False,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return {**base, **options}


def t5_encoder(**options: Any) -> tf.T5EncoderModel:
    return tf.T5EncoderModel(tf.T5Config(**t5_config(**options)))


def umt5_encoder(**options: Any) -> tf.UMT5EncoderModel:
    return tf.UMT5EncoderModel(tf.UMT5Config(**t5_config(**options)))


def vision_config(**options: Any) -> tf.CLIPVisionConfig:
    base: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return tf.CLIPVisionConfig(**{**base, **options})


def clip_vision(**options: Any) -> tf.CLIPVisionModelWithProjection:
    return tf.CLIPVisionModelWithProjection(vision_config(**options))


def clip_images(size: int = 32) -> Any:
    """The image processor in front of `clip_vision`."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
