"""Tiny tokenizers built in memory and tiny text (and image) encoders. Sizes are chosen to be small, not to be realistic."""

from __future__ import annotations

import string
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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


def clip_vision_plain(**options: Any) -> tf.CLIPVisionModel:
    return tf.CLIPVisionModel(vision_config(**options))


def clip_images(size: int = 32) -> Any:
    """The image processor in front of `clip_vision`."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)


def qwen_tokenizer(length: int = 512) -> tf.Qwen2Tokenizer:
    """Byte-level BPE without merges, with a chat template."""
    vocabulary = {piece: number for number, piece in enumerate([*BYTES, "<|endoftext|>"])}
    made = tf.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=length)
    made.chat_template = CHAT_TEMPLATE
    return made


def _characters(*special: str) -> dict[str, int]:
    return {piece: number for number, piece in enumerate([*special, "▁", *LETTERS])}


def gemma_tokenizer(length: int = 512) -> tf.GemmaTokenizer:
    vocabulary = _characters("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return tf.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def llama_tokenizer(length: int = 256) -> tf.LlamaTokenizer:
    vocabulary = _characters("<unk>", "<s>", "</s>", "<pad>")
    return tf.LlamaTokenizer(vocab=vocabulary, merges=[], model_max_length=length, pad_token="<pad>")


def glm_tokenizer(length: int = 256) -> tf.PreTrainedTokenizerFast:
    """Characters behind two marks, as GLM's tokenizer puts them: an empty prompt is still two tokens."""
    core = Tokenizer(models.BPE(vocab=_characters("<pad>", "<unk>", "[gMASK]", "<sop>"), merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 2), ("<sop>", 3)])  # fmt: skip
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>",
                                      padding_side="left", model_max_length=length)  # fmt: skip


def bert_tokenizer(length: int = 77) -> tf.BertTokenizer:
    """WordPiece over single characters, first of a word or not."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    return tf.BertTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, model_max_length=length)


def roberta_tokenizer(length: int = 77) -> tf.RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES]
    return tf.RobertaTokenizer(vocab={p: n for n, p in enumerate(pieces)}, merges=[], model_max_length=length)


def decoder_config(layers: int = 3, **options: Any) -> dict[str, Any]:
    """Sizes of a decoder-only language model, in the words most of transformers' configurations share."""
    base: dict[str, Any] = {
        "vocab_size": TEXT_VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {**base, **options}


def gemma2_model(**options: Any) -> tf.Gemma2Model:
    return tf.Gemma2Model(tf.Gemma2Config(**decoder_config(**options)))


def qwen3_model(**options: Any) -> tf.Qwen3Model:
    return tf.Qwen3Model(tf.Qwen3Config(**decoder_config(**options)))


def qwen3_causal(**options: Any) -> tf.Qwen3ForCausalLM:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**decoder_config(**options)))


def glm_model() -> tf.GlmModel:
    return tf.GlmModel(tf.GlmConfig(**decoder_config()))


def llama_model() -> tf.LlamaModel:
    return tf.LlamaModel(tf.LlamaConfig(**decoder_config(layers=4)))


def bert_model() -> tf.BertModel:
    return tf.BertModel(tf.BertConfig(vocab_size=TEXT_VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2,
                                      num_attention_heads=4, intermediate_size=37))  # fmt: skip


def qwen25_vl() -> tf.Qwen2_5_VLForConditionalGeneration:
    text = decoder_config(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]})
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": WIDTH,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def mistral3() -> tf.Mistral3ForConditionalGeneration:
    text = {"model_type": "mistral", **decoder_config()}
    vision = {"model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2,
              "num_attention_heads": 4, "head_dim": 8, "image_size": 32, "patch_size": 8}  # fmt: skip
    return tf.Mistral3ForConditionalGeneration(tf.Mistral3Config(text_config=text, vision_config=vision))


def clap_config() -> dict[str, Any]:
    """Sizes of CLAP: a RoBERTa for text and a Swin for sound, both tiny."""
    text = {"vocab_size": TEXT_VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 80, "projection_dim": WIDTH,
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # fmt: skip
    audio = {"spec_size": 64, "window_size": 4, "num_mel_bins": 64, "patch_size": 4, "patch_stride": [4, 4],
             "patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1], "num_attention_heads": [2, 2],
             "projection_dim": WIDTH, "num_classes": 2}  # fmt: skip
    return {"text_config": text, "audio_config": audio, "projection_dim": WIDTH}


def clap_model() -> tf.ClapModel:
    return tf.ClapModel(tf.ClapConfig(**clap_config()))


def clap_text() -> tf.ClapTextModelWithProjection:
    return tf.ClapTextModelWithProjection(tf.ClapTextConfig(**clap_config()["text_config"]))


def gpt2(**options: Any) -> tf.GPT2LMHeadModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{
        "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": TEXT_VOCABULARY, "n_ctx": 99, "n_positions": 99,
        **options}))  # fmt: skip


def vocoder(**options: Any) -> tf.SpeechT5HifiGan:
    """Turns an 8-band spectrogram into sound, 4 samples for each column."""
    return tf.SpeechT5HifiGan(tf.SpeechT5HifiGanConfig(**{
        "model_in_dim": 8, "sampling_rate": 16000, "upsample_initial_channel": 16, "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]], "normalize_before": False, **options}))  # fmt: skip
