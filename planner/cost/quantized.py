"""Bytes of weights as each scheme stores them, module by module."""

from __future__ import annotations

import re

from planner.facts import ComponentFacts, Leaf
from planner.types import DTYPE_BYTES

STORED_BYTES: dict[str, float] = {
    # Bytes per weight with its scales. torchao: int8 and fp8 keep one scale per row, which is below a thousandth;
    # int4 keeps a 16-bit scale and zero per 128 weights. bitsandbytes nf4: an fp32 maximum per 64 weights.
    "int8wo": 1.0,
    "int8dq": 1.0,
    "int8dq_2024": 1.0,
    "fp8wo": 1.0,
    "fp8dq": 1.0,
    "int4wo": 0.5 + 4 / 128,
    "int4wo_2024": 0.5 + 4 / 128,
    "nf4": 0.5 + 4 / 64,
    "llm_int8": 1.0,
    "quanto_int8": 1.0,
    "quanto_fp8": 1.0,
    "quanto_int4": 0.5 + 4 / 128,
    "fp8_layerwise": 1.0,
    # GGUF block sizes: ggml-quants.h (bytes per block over weights per block).
    "gguf_q2_k": 84 / 256,
    "gguf_q3_k": 110 / 256,
    "gguf_q4_0": 18 / 32,
    "gguf_q4_1": 20 / 32,
    "gguf_q4_k": 144 / 256,
    "gguf_q5_0": 22 / 32,
    "gguf_q5_1": 24 / 32,
    "gguf_q5_k": 176 / 256,
    "gguf_q6_k": 210 / 256,
    "gguf_q8_0": 34 / 32,
    "gguf_bf16": 2.0,
    "gguf_f16": 2.0,
}
KEPT_ALONE = frozenset({"int8wo", "int8dq", "int8dq_2024", "int4wo", "int4wo_2024", "fp8wo", "fp8dq"})
"""torchao schemes: applying them, and loading with them, leaves modules alone that the class keeps in fp32 (T5's ``wo``).
Source: planner.knobs.live_quantization; transformers quantizers/base.py, ``get_modules_to_not_convert``. After loading
FLUX.1-dev in int8 that is 17.0 GiB instead of 16.0; 17.02 was published (blog diffusers-quantization)."""
LAYERWISE_SKIPS = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""diffusers hooks/layerwise_casting.py, DEFAULT_SKIP_MODULES_PATTERN."""
LAYERWISE_CLASSES = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_BITSANDBYTES = ("nf4", "llm_int8")
IMMOVABLE = frozenset({"llm_int8"})
"""Schemes whose modules refuse to leave the device (transformers: "`.to` is not supported for 8-bit models")."""
LOADED_ON_DEVICE = frozenset(_BITSANDBYTES)
"""Schemes whose weights are quantized on the device while loading, whatever offload follows."""


def leaf_bytes(component: ComponentFacts, scheme: str | None, scale: float = 1.0) -> list[int]:
    """Stored bytes of each of the component's leaves; ``scale`` casts from the dtype that the facts were read in."""
    if scheme is None or scheme == "none" or component.quantization:
        return [round(leaf.bytes * scale) for leaf in component.leaves]
    return [_stored(component, leaf, scheme, scale) for leaf in component.leaves]


def fused_bytes(component: ComponentFacts, scheme: str | None, scale: float = 1.0) -> list[int]:
    """Stored bytes of the projections that ``fuse_qkv_projections`` lays beside the separate ones, which stay.

    Query, key and value, and those of added inputs; of attention over another input key and value alone. Source: diffusers
    ``AttentionModuleMixin.fuse_projections``; FLUX.1-dev weighs 2.0 GiB more in int8 (diffusers-torchao).
    """
    stored = zip(component.leaves, leaf_bytes(component, scheme, scale), strict=True) if component.can_fuse_qkv else ()
    return [size for leaf, size in stored if _is_fused(leaf.path)]


def _is_fused(path: str) -> bool:
    around, _, name = path.rpartition(".")
    crosses = around.endswith("attn2")
    return name in ("to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj") or (name == "to_q" and not crosses)


def _stored(component: ComponentFacts, leaf: Leaf, scheme: str, scale: float) -> int:
    each = _element_bytes(component, leaf)
    kept_in_fp32 = _is_kept(component, leaf.path)
    if scheme == "fp8_layerwise":
        skipped = kept_in_fp32 or any(re.search(pattern, leaf.path) for pattern in LAYERWISE_SKIPS)
        casts = leaf.class_name in LAYERWISE_CLASSES and not skipped
        return round(leaf.bytes / each if casts else leaf.bytes * scale)
    elements = leaf.linear_weight_bytes / each
    if not elements or leaf.path.endswith("lm_head") or (kept_in_fp32 and scheme in KEPT_ALONE):
        return round(leaf.bytes * scale)
    if kept_in_fp32 and scheme in _BITSANDBYTES:
        return round(leaf.bytes / each * 4)  # transformers keeps these modules in fp32 and out of bitsandbytes' hands
    return round((leaf.bytes - leaf.linear_weight_bytes) * scale + elements * STORED_BYTES.get(scheme, 2.0))


def _element_bytes(component: ComponentFacts, leaf: Leaf) -> float:
    """Bytes per weight that the facts count: 4 for a module that fp16 loading keeps in fp32."""
    if component.dtype == "fp16" and _is_kept(component, leaf.path):
        return 4
    return DTYPE_BYTES.get(component.dtype, 4)


def _is_kept(component: ComponentFacts, path: str) -> bool:
    return any(name in path.split(".") for name in component.keep_in_fp32)
