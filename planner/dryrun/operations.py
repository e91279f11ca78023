"""Names, FLOPs and dimensions of aten operations, as far as a cost model needs to tell them apart."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from planner.dryrun.trace import DTYPE_CODES, Kind

_MATMUL = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm", "mv", "addmv", "dot", "_weight_int8pack_mm", "_weight_int4pack_mm"}
_CONVOLUTION = {"convolution", "_convolution", "convolution_overrideable"}
_NORMALIZATION = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
                  "_native_batch_norm_legit_no_training", "_fused_rms_norm", "rms_norm", "_batch_norm_no_update"}  # fmt: skip
_REDUCTION = {"_softmax", "_log_softmax", "softmax", "sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "argmax",
              "argmin", "cumsum", "cumprod", "topk", "sort", "all", "any", "prod", "norm", "linalg_vector_norm", "logsumexp"}  # fmt: skip
_COPY = {"clone", "copy_", "_to_copy", "cat", "stack", "repeat", "constant_pad_nd", "fill_", "zero_", "slice_scatter", "roll", "flip",
         "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange", "new_zeros", "new_ones", "new_full", "fill",
         "contiguous", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
         "replication_pad3d", "pixel_shuffle", "pixel_unshuffle", "randn", "rand", "normal_", "scalar_tensor", "select_scatter", "tril",
         "triu", "eye", "linspace"}  # fmt: skip
_GATHER = {"embedding", "index", "index_put_", "index_put", "_index_put_impl_", "gather", "scatter", "scatter_", "index_select",
           "index_add", "grid_sampler_2d", "masked_select", "nonzero", "index_copy", "masked_scatter"}  # fmt: skip
ALLOCATE_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "set_"}
_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "int8",
                torch.uint8: "int8", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool", torch.float8_e4m3fn: "fp8",
                torch.float8_e5m2: "fp8"}  # fmt: skip
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32`` for ``torch.float32`` and so on; ``other`` where the planner has no word."""
    return _DTYPE_NAMES.get(dtype, "other")


def kind_of(name: str) -> Kind:
    """Class of an aten operation by its base name (``addmm``, not ``addmm.default``)."""
    if name in _MATMUL:
        return Kind.MATMUL
    if name in _CONVOLUTION:
        return Kind.CONVOLUTION
    if name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention")):
        return Kind.ATTENTION
    if name in _NORMALIZATION:
        return Kind.NORMALIZATION
    if name in _REDUCTION:
        return Kind.REDUCTION
    if name in _COPY:
        return Kind.COPY
    if name in _GATHER or name.startswith(("upsample", "_upsample", "_adaptive_avg", "avg_pool", "max_pool")):
        return Kind.GATHER
    return Kind.POINTWISE


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs by torch's own formulas (``torch.utils.flop_counter``); 0 where it counts none."""
    formula = flop_registry.get(func._overloadpacket)
    return float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0


def dims_of(kind: Kind, name: str, args: tuple[Any, ...], out: Any) -> tuple[int, ...]:
    """The eight ``dims`` of :class:`~planner.dryrun.trace.CallTrace`; zeros where the kind has none."""
    if kind is Kind.MATMUL:
        return _matmul_dims(name, args, out)
    if kind is Kind.CONVOLUTION:
        return _convolution_dims(args, out)
    return (0,) * 8


def _matmul_dims(name: str, args: tuple[Any, ...], out: torch.Tensor) -> tuple[int, ...]:
    left = args[1] if name in ("addmm", "baddbmm", "addmv") else args[0]
    inner = left.shape[-1]
    columns = out.shape[-1] if out.dim() > 1 else 1
    rows = out.shape[-2] if out.dim() > 1 else max(out.numel(), 1)
    batch = out.shape[0] if out.dim() == 3 else 1
    return (batch, rows, columns, inner, 0, 0, 0, 0)


def _convolution_dims(args: tuple[Any, ...], out: torch.Tensor) -> tuple[int, ...]:
    image, weight, stride, groups = args[0], args[1], args[3], args[8]
    rank = image.dim() - 2
    spatial = 1
    for side in out.shape[2:]:
        spatial *= side
    kernel = 1
    for side in weight.shape[2:]:
        kernel *= side
    strides = 1
    for step in stride:
        strides *= step
    return (out.shape[0], image.shape[1], spatial, out.shape[1], kernel, groups, strides, rank)


def attention_dims(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, ...]:
    """(batch, heads, queries, keys, head dim, value dim, mask bytes, key heads) of ``(..., heads, length, dim)`` tensors."""
    batch = 1
    for side in query.shape[:-3]:
        batch *= side
    heads, key_heads = (query.shape[-3], key.shape[-3]) if query.dim() > 2 else (1, 1)
    mask_bytes = distinct_bytes(mask) if mask is not None else 0
    return (batch, heads, query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1], mask_bytes, key_heads)


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes a kernel must touch to read the tensor once; broadcast dimensions count once."""
    count = 1
    for side, step in zip(tensor.shape, tensor.stride(), strict=True):
        if step:
            count *= side
        elif side == 0:
            return 0
    return int(count * tensor.element_size())


def signature_text(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A JSON text from which a probe can rebuild the operation with random tensors."""
    return json.dumps([str(func), [_encode(arg) for arg in args], {key: _encode(value) for key, value in kwargs.items()}], sort_keys=True)


def _encode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"t": [list(value.shape), list(value.stride()), dtype_name(value.dtype)]}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"other": str(value)}


def dtype_code(dtype: torch.dtype) -> int:
    """Position of the dtype in :data:`planner.dryrun.trace.DTYPES`."""
    return DTYPE_CODES[dtype_name(dtype)]
