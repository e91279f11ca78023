"""Stand-ins for tokenizers and processors: they answer with tensors of the right shape, from no vocabulary at all.

Padded lengths are exact (``max_length``); unpadded lengths count one token per word or mark, see :func:`count_words`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from math import ceil, sqrt
from typing import Any

from planner.models.layout import Component, pipeline_modules

_WORDS = re.compile(r"<\|[^|<>]*\|>|</?\w+>|\[/?\w+\]|\n+|\w+|[^\w\s]")
_LETTERS_PER_TOKEN = 12
"""A longer word counts as several tokens."""
_UNBOUNDED = 10**9
_FIRST_WORD_ID, _WORD_IDS = 100, 900
_CLIP = {"bos": 49406, "eos": 49407, "pad": 49407, "length": 77}
_T5 = {"bos": None, "eos": 1, "pad": 0, "length": 512}
_ROBERTA = {"bos": 0, "eos": 2, "pad": 1, "length": 512}
_BERT = {"bos": 101, "eos": 102, "pad": 0, "length": 512}
_LLAMA = {"bos": 1, "eos": 2, "pad": 0, "length": None}
_CHAT = {"bos": None, "eos": 2, "pad": 0, "length": None}
_FAMILIES = (("CLIP", _CLIP), ("T5", _T5), ("Roberta", _ROBERTA), ("Bert", _BERT), ("Llama", _LLAMA), ("Gemma", _LLAMA))


def make_standin(component: Component) -> Any:
    """A stand-in when the class name says tokenizer, processor or feature extractor; else None."""
    name = component.class_name.removesuffix("Fast")
    if name.endswith("Tokenizer"):
        return StandInTokenizer(component)
    if name.endswith(("ImageProcessor", "VideoProcessor")) or name == "CLIPFeatureExtractor":
        return StandInImageProcessor(component)
    if name.endswith("FeatureExtractor"):
        return StandInAudioExtractor(component)
    if name.endswith("Processor"):
        return StandInProcessor(component)
    return None


def count_words(text: str) -> list[str]:
    """Pieces of a text, one per token: words, marks, special tokens, runs of newlines; long words in parts."""
    pieces: list[str] = []
    for word in _WORDS.findall(text):
        if len(word) <= _LETTERS_PER_TOKEN or word.startswith("<"):
            pieces.append(word)
        else:
            pieces += [word[i : i + _LETTERS_PER_TOKEN] for i in range(0, len(word), _LETTERS_PER_TOKEN)]
    return pieces


class _StandIn:
    """Looks like an instance of the class it stands for: some pipelines ask ``isinstance``."""

    def __init__(self, component: Component) -> None:
        self._component = component

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        component = self.__dict__.get("_component")
        return type(self) if component is None else _real_class(component) or type(self)

    def save_pretrained(self, *_: Any, **__: Any) -> tuple[str, ...]:
        """A stand-in has nothing to save."""
        return ()


def _real_class(component: Component) -> type | None:
    import importlib

    place = pipeline_modules().get(component.library, component.library)
    try:
        found = getattr(importlib.import_module(place), component.class_name, None)
    except Exception:
        return None
    return found if isinstance(found, type) else None


class StandInTokenizer(_StandIn):
    """Ids from the words' checksums; the special ids and the length limit are those of the tokenizer's family."""

    def __init__(self, component: Component) -> None:
        super().__init__(component)
        config = component.files.get("tokenizer_config.json", {})
        family = next((f for name, f in _FAMILIES if component.class_name.startswith(name)), _CHAT)
        limit: Any = config.get("model_max_length")
        usable = isinstance(limit, int | float) and 0 < limit < _UNBOUNDED
        self.model_max_length: int = int(limit) if usable else family["length"] or _UNBOUNDED
        self.bos_token_id, self.eos_token_id, self.pad_token_id = family["bos"], family["eos"] or 2, family["pad"] or 0
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = "<s>", "</s>", "<pad>", "<unk>"
        self.padding_side = config.get("padding_side", "left" if "ChatGLM" in component.class_name else "right")
        self.name_or_path = component.name
        self.chat_template = None
        self.vocab_size = 49408 if family is _CLIP else 32128
        self.added_tokens_encoder: dict[str, int] = {}
        self.added_tokens_decoder: dict[int, str] = {}
        self.special_tokens_map: dict[str, str] = {}
        self.all_special_ids = [i for i in (self.bos_token_id, self.eos_token_id, self.pad_token_id) if i is not None]
        self.image_token_id = 151655
        self._has_positions = "ChatGLM" in component.class_name
        self._closes = family is not _CHAT and family is not _LLAMA

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: Any = None, *_: Any, **options: Any) -> Any:
        """Encode one text or a list of texts, with the padding, truncation and tensor options of transformers."""
        text = options.pop("text_target", None) if text is None else text
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        rows = [self._ids(item, options.get("add_special_tokens", True)) for item in texts]
        limit = options.get("max_length") or self.model_max_length
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            rows = [self._cut(row, limit) for row in rows]
        return self._pack(rows, options, single)

    def _ids(self, text: Any, special: bool) -> list[int]:
        words = text if isinstance(text, list | tuple) else count_words(str(text))
        ids = [word if isinstance(word, int) else self.convert_tokens_to_ids(word) for word in words]
        if not special:
            return ids
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        return head + ids + ([self.eos_token_id] if self._closes else [])

    def _cut(self, row: list[int], limit: int) -> list[int]:
        if len(row) <= limit:
            return row
        return [*row[: limit - 1], self.eos_token_id] if self._closes else row[:limit]

    def _pack(self, rows: list[list[int]], options: dict[str, Any], single: bool) -> Any:
        """Pad, add masks, and make tensors when asked; one plain text stays one row, as in transformers."""
        padding, tensors = options.get("padding", False), options.get("return_tensors")
        lengths = [len(row) for row in rows]
        width = max(lengths, default=0)
        if padding == "max_length":
            width = max(width, min(options.get("max_length") or self.model_max_length, _UNBOUNDED - 1))
        multiple = options.get("pad_to_multiple_of")
        width = ceil(width / multiple) * multiple if multiple else width
        padded = padding not in (False, None, "do_not_pad")
        data: dict[str, Any] = {
            "input_ids": [self._fill(row, width, self.pad_token_id) if padded else row for row in rows],
            "attention_mask": [self._fill([1] * n, width, 0) if padded else [1] * n for n in lengths],
        }
        if self._has_positions:
            data["position_ids"] = [self._fill(list(range(n)), width, 0) if padded else list(range(n)) for n in lengths]
        if options.get("return_length"):
            data["length"] = [width if padded else n for n in lengths]
        if single and tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return _encoding(data, tensors)

    def _fill(self, row: list[int], width: int, value: int) -> list[int]:
        rest = [value] * (width - len(row))
        return rest + row if self.padding_side == "left" else row + rest

    def pad(self, encoded: Any, padding: Any = True, max_length: int | None = None, **options: Any) -> Any:
        """Pad already encoded rows (a dict of lists or a list of dicts)."""
        items = encoded["input_ids"] if hasattr(encoded, "keys") else [item["input_ids"] for item in encoded]
        rows = [[int(i) for i in row] for row in items]
        return self._pack(rows, {**options, "padding": padding, "max_length": max_length}, single=False)

    def encode(self, text: Any, **options: Any) -> Any:
        """Ids of one text."""
        return self(text, **options)["input_ids"]

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Pieces of a text."""
        return count_words(text)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """A stable id per piece, below 1000 so that small vocabularies hold it."""
        if isinstance(tokens, str):
            return _FIRST_WORD_ID + zlib.crc32(tokens.encode()) % _WORD_IDS
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, **_: Any) -> Any:
        """One word per id."""
        return "word" if isinstance(ids, int) else ["word" for _ in ids]

    def decode(self, ids: Any, **_: Any) -> str:
        """As many words as ids."""
        return " ".join("word" for _ in _flat(ids))

    def batch_decode(self, rows: Iterable[Any], **_: Any) -> list[str]:
        """As many words as ids, row by row."""
        return [self.decode(row) for row in rows]

    def get_vocab(self) -> dict[str, int]:
        """The special tokens; there is no other vocabulary."""
        return dict(self.added_tokens_encoder)

    def add_tokens(self, *_: Any, **__: Any) -> int:
        """Nothing is added."""
        return 0

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:
        """ChatML around each message, which is what most text encoders of this kind were trained with."""
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = conversation if many else [conversation]
        texts = [_render(chat, options.get("add_generation_prompt", False)) for chat in chats]
        if not tokenize:
            return texts if many else texts[0]
        keep = ("padding", "truncation", "max_length", "return_tensors", "return_length")
        encoded = self(texts, **{key: options[key] for key in keep if key in options})
        if options.get("return_dict"):
            return encoded
        return encoded["input_ids"] if many or options.get("return_tensors") else encoded["input_ids"][0]


def _render(chat: Iterable[Any], prompt: bool) -> str:
    text = "".join(f"<|im_start|>{turn['role']}\n{_content(turn['content'])}<|im_end|>\n" for turn in chat)
    return text + "<|im_start|>assistant\n" if prompt else text


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, dict) else {"type": "text", "text": str(part)} for part in content)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return "".join(str(part.get("text", "")) if part.get("type") == "text" else image for part in parts)


class StandInImageProcessor(_StandIn):
    """Zeros of the size that the real processor resizes to."""

    def __init__(self, component: Component) -> None:
        super().__init__(component)
        config = component.files.get("preprocessor_config.json", {})
        height, width = _size(config.get("crop_size")) or _size(config.get("size")) or (224, 224)
        self.size = self.crop_size = {"height": height, "width": width}
        self.image_mean, self.image_std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
        self.model_input_names = ["pixel_values"]

    def __call__(self, images: Any = None, *_: Any, return_tensors: Any = "pt", **__: Any) -> Any:
        """``pixel_values`` of shape (images, 3, height, width)."""
        import torch

        shape = (_count(images), 3, self.size["height"], self.size["width"])
        return _encoding({"pixel_values": torch.zeros(shape, dtype=torch.float32)}, return_tensors)

    preprocess = __call__


class StandInAudioExtractor(_StandIn):
    """Log-mel features of CLAP's shape: ten seconds at 48 kHz, hop 480 (transformers' ClapFeatureExtractor)."""

    def __init__(self, component: Component) -> None:
        super().__init__(component)
        config = component.files.get("preprocessor_config.json", {})
        self.sampling_rate = int(config.get("sampling_rate", 48000))
        self.feature_size = int(config.get("feature_size", 64))
        self.frames = 1 + 10 * self.sampling_rate // int(config.get("hop_length", 480))

    def __call__(self, raw_speech: Any = None, *_: Any, return_tensors: Any = "pt", **__: Any) -> Any:
        """``input_features`` of shape (waves, 1, frames, features)."""
        import torch

        features = torch.zeros((_count(raw_speech), 1, self.frames, self.feature_size), dtype=torch.float32)
        return _encoding({"input_features": features}, return_tensors)


class StandInProcessor(_StandIn):
    """Tokenizer and image processor in one, with the image tokens of Qwen2-VL's kind where the class is of it."""

    def __init__(self, component: Component) -> None:
        super().__init__(component)
        self.tokenizer = StandInTokenizer(component)
        self.tokenizer._component = Component(name=component.name, library="transformers", class_name="Qwen2Tokenizer")
        self.image_processor = StandInImageProcessor(component)
        self.image_token, self.image_token_id = "<|image_pad|>", 151655
        self._patches = component.class_name.startswith("Qwen")

    def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
        """Ids and masks of the texts, pixels (or patches and their grid) of the images."""
        data: dict[str, Any] = {}
        grids = [_grid(image) for image in _listed(images)] if self._patches and images is not None else []
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            encoded = self.tokenizer(self._expand(texts, grids), **options)
            data |= {key: encoded[key] for key in encoded}
            data["input_ids"] = self._mark(data["input_ids"])
        if grids:
            data |= _patches(grids)
        elif images is not None:
            data |= dict(self.image_processor(images))
        return _encoding(data, options.get("return_tensors"))

    def _expand(self, texts: list[str], grids: list[tuple[int, int]]) -> list[str]:
        """Each image mark becomes one mark per merged 2×2 patch group."""
        rest = iter(grids)

        def marks(_: re.Match[str]) -> str:
            height, width = next(rest, (2, 2))
            return self.image_token * (height * width // 4)

        return [re.sub(re.escape(self.image_token), marks, text) for text in texts]

    def _mark(self, ids: Any) -> Any:
        plain = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return ids.masked_fill(ids == plain, self.image_token_id) if hasattr(ids, "masked_fill") else ids

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def batch_decode(self, rows: Iterable[Any], **options: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(rows, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(ids, **options)


def _grid(image: Any, patch: int = 14, merged: int = 28, least: int = 56 * 56, most: int = 28 * 28 * 1280) -> tuple[int, int]:
    """Patches down and across after Qwen2-VL's ``smart_resize`` (transformers, image_processing_qwen2_vl)."""
    size = getattr(image, "size", None)
    if isinstance(size, tuple) and len(size) == 2:
        width, height = size
    else:
        height, width = tuple(getattr(image, "shape", (224, 224)))[-2:]
    tall, wide = max(merged, round(height / merged) * merged), max(merged, round(width / merged) * merged)
    if tall * wide > most or tall * wide < least:
        scale = sqrt((most if tall * wide > most else least) / (height * width))
        tall, wide = max(merged, int(height * scale) // merged * merged), max(merged, int(width * scale) // merged * merged)
    return tall // patch, wide // patch


def _patches(grids: list[tuple[int, int]]) -> dict[str, Any]:
    """Flat patches: 3 channels × 2 frames × 14 × 14 values each, and (frames, down, across) per image."""
    import torch

    total = sum(height * width for height, width in grids)
    return {
        "pixel_values": torch.zeros((total, 3 * 2 * 14 * 14), dtype=torch.float32),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in grids], dtype=torch.int64),
    }


def _encoding(data: dict[str, Any], tensors: Any) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(data, tensor_type="pt" if tensors in ("pt", True) else None)


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        side = value.get("shortest_edge")
        height, width = value.get("height", side), value.get("width", side)
        return (int(height), int(width)) if height and width else None
    return None


def _listed(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _listed(item)]
    return [images]


def _count(images: Any) -> int:
    if isinstance(images, list | tuple):
        return len(_listed(images))
    shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
    return int(shape[0]) if len(shape) == 4 else 1


def _flat(ids: Any) -> list[Any]:
    if hasattr(ids, "flatten"):
        return list(ids.flatten())
    return [ids] if isinstance(ids, int) else list(ids)
