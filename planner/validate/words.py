"""Rules that turn a table's words into knob values. Each takes one column's text; none looks at a row's id."""

from __future__ import annotations

import re

from planner.types import KnobValue
from planner.validate.models import component_name, denoiser_name

Knobs = dict[str, KnobValue]

_SCHEMES: tuple[tuple[str, str], ...] = (
    # First match wins. LLM.int8 quantizes activations as it goes, so it counts as dynamic.
    (r"layerwise|layer-wise", "fp8_layerwise"),
    (r"\bnf4\b", "nf4"),
    (r"(fp8|float8\w*).*dynamic|float8_dynamic|\bfp8dq\b", "fp8dq"),
    (r"int8.*dynamic|llm\.int8|\bint8dq\b", "int8dq"),
    (r"fp8|float8", "fp8wo"),
    (r"int8", "int8wo"),
    (r"int4", "int4wo"),
)
_LIBRARIES = ("torchao", "bitsandbytes", "quanto", "gguf")
_BASE = re.compile(r"(?:(?:rest|activations|compute|others?)\s+)?(fp16|bf16|fp32|float16|bfloat16|float32)", re.I)
_LONG = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_MODES = ("max-autotune", "reduce-overhead", "regional", "default")


class CannotExpress(Exception):
    """A word has no meaning in the planner's vocabulary; the text is the reason shown to the user."""


def _clauses(text: str) -> list[str]:
    """Split at ``;`` and ``,`` outside parentheses."""
    return [part.strip() for part in re.split(r"[;,](?![^()]*\))", text) if part.strip()]


def _scheme(text: str) -> str:
    gguf = re.search(r"gguf\s+(q\w+)", text, re.I)
    if gguf:
        return f"gguf_{gguf.group(1).lower()}"
    for pattern, scheme in _SCHEMES:
        if re.search(pattern, text, re.I):
            return scheme
    raise CannotExpress(f"the number format {text!r} is none that the planner knows")


def _components(text: str, pipeline_class: str) -> tuple[tuple[str, ...], str]:
    """Components at the head of a clause such as ``transformer+T5 int8 (torchao)``, and what follows them."""
    word = r"[A-Za-z][\w-]*"
    head = re.match(rf"({word}(?:\s*[+/]\s*{word})*)\s+(.*)", text)
    if head is None:
        raise CannotExpress(f"the number format {text!r} does not say which component it is for")
    names = [component_name(part, pipeline_class) for part in re.split(r"[+/]", head.group(1))]
    if None in names:
        raise CannotExpress(f"{head.group(1)!r} in the number format names no component of {pipeline_class}")
    return tuple(str(name) for name in names), head.group(2)


def parse_dtype(text: str, pipeline_class: str) -> tuple[str | None, dict[str, str], str | None]:
    """Base dtype (None: not said), weight scheme per component, and the quantization library.

    >>> parse_dtype("transformer+T5 nf4 (bitsandbytes), rest bf16", "FluxPipeline")
    ('bf16', {'transformer': 'nf4', 'text_encoder_2': 'nf4'}, 'bitsandbytes')
    """
    base: str | None = None
    schemes: dict[str, str] = {}
    for clause in _clauses(text):
        plain = _BASE.fullmatch(clause)
        if plain:
            base = _LONG.get(plain.group(1).lower(), plain.group(1).lower())
            continue
        names, rest = _components(clause, pipeline_class)
        schemes |= dict.fromkeys(names, _scheme(rest))
        inner = re.search(r"compute (fp16|bf16|fp32)", rest)
        base = base or (inner.group(1) if inner else None)
    library = next((name for name in _LIBRARIES if name in text.lower()), None)
    return base, schemes, library if schemes else None


def quantization_value(schemes: dict[str, str]) -> str:
    """The ``quantization`` knob's text: ``none`` or ``component=scheme`` joined by commas."""
    return ",".join(f"{name}={scheme}" for name, scheme in schemes.items()) or "none"


def parse_compile(text: str, pipeline_class: str) -> tuple[Knobs, list[str]]:
    """``compile`` for the denoiser, ``vae.compile`` where ``decode`` itself was compiled, and assumptions.

    >>> parse_compile("max-autotune fullgraph (unet+vae.decode)", "StableDiffusionXLPipeline")[0]
    {'compile': 'max-autotune', 'vae.compile': 'max-autotune'}
    """
    if text in ("", "none"):
        return {"compile": "none"}, []
    mode = next((name for name in _MODES if name in text), "default")
    named = re.search(r"\(([^)]*)\)", text)
    targets = named.group(1).split("+") if named else [denoiser_name(pipeline_class)]
    knobs: Knobs = {"compile": mode}
    notes = [] if mode in text else [f"compile mode not named in {text!r}: default"]
    for target in (part.strip() for part in targets):
        if target == "vae.decode":
            knobs["vae.compile"] = mode
        elif target == "vae":
            # Pipelines call vae.decode, which a compiled module forwards to the plain one.
            notes.append("torch.compile(pipe.vae) leaves vae.decode uncompiled")
        elif target not in ("unet", "transformer"):
            knobs[f"{target}.compile"] = mode
    return knobs, notes


def parse_attention(text: str, torch_version: str) -> tuple[str, list[str]]:
    """The ``attention`` knob; empty text is what diffusers does by itself on that torch."""
    if text:
        return text, []
    old = re.match(r"(0|1)\.", torch_version)
    default = "vanilla" if old else "sdpa"
    return default, [f"attention not stated: {default}, the default of diffusers on torch {'1' if old else '2'}"]


def _group(level: str, stream: bool, blocks: int | None, prefix: str = "") -> Knobs:
    knobs: Knobs = {"offload": "none"} if prefix else {}
    knobs |= {f"{prefix}offload": f"group_{level}", f"{prefix}offload_stream": stream}
    return knobs | ({f"{prefix}offload_blocks": blocks} if blocks else {})


def _group_by_component(notes: str, pipeline_class: str) -> Knobs:
    """``transformer leaf_level+stream, T5 block_level 2`` in the notes: one setting per component."""
    knobs: Knobs = {}
    for word, level, stream, blocks in re.findall(r"([\w-]+) (leaf|block)_level(\+stream)?(?: (\d+))?", notes):
        name = component_name(word, pipeline_class)
        if name:
            knobs.setdefault("offload", "none")
            knobs |= _group(level, bool(stream), int(blocks) if blocks else None, f"{name}.")
    return knobs


def _group_offload(text: str, remarks: str, pipeline_class: str) -> tuple[Knobs, list[str]]:
    own = _group_by_component(remarks, pipeline_class)
    if own:
        return own, []
    notes: list[str] = []
    blocks = re.search(r"num_blocks_per_group=(\d+)", remarks)
    alone = re.search(r"only the (transformer|unet) is group-offloaded", remarks)
    level = next((name for name in ("leaf", "block") if name in text), "")
    stream = "stream" in text or bool(re.search(r"use_stream(=True| implied)", remarks))
    if not level:
        # PR 11682: 33.85 - 11.68 = 22.17 GiB is the bf16 weights of the FLUX transformer and of nothing else.
        # 47.7 s are 14 GB/s one way; without a stream the weights would also go back, which pageable memory takes at 1 to 3.
        notes.append("group offload of unstated kind: leaf level, on a stream, on the denoiser alone")
        return _group("leaf", True, None, f"{denoiser_name(pipeline_class)}."), notes
    if level == "block" and not blocks:
        raise CannotExpress("block-level group offload without the number of blocks per group")
    prefix = f"{denoiser_name(pipeline_class)}." if alone else ""
    return _group(level, stream, int(blocks.group(1)) if blocks else None, prefix), notes


def parse_offload(text: str, remarks: str, pipeline_class: str) -> tuple[Knobs, list[str]]:
    """``offload`` and its companions; ``remarks`` is the row's ``other`` and ``notes`` together."""
    if text in ("", "none"):
        return {"offload": "none"}, []
    if text in ("model", "sequential"):
        return {"offload": text}, []
    if not text.startswith("group"):
        raise CannotExpress(f"the offload {text!r} is none that diffusers has")
    knobs, notes = _group_offload(text, remarks, pipeline_class)
    if "offload_to_disk" in remarks:
        place = next(name for name, value in knobs.items() if value != "none").removesuffix("offload")
        knobs[f"{place}offload_disk"] = True
    return knobs, notes
