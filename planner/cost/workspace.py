"""Bytes that operators take besides their inputs and outputs, one function per cause.

Each function gives one value per operation of a call: what lives only while that operation runs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.cost.condense import per_call
from planner.dryrun.trace import DTYPE_CODES, CallTrace, Floats, Ints, Kind
from planner.recipe import Attention, Recipe
from planner.types import Device

FLASH_HEAD_DIM = 256
"""Largest head dimension of torch's flash kernel (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
EFFICIENT_ACCUMULATOR_DIM = 128
"""Above this value dimension the memory-efficient kernel accumulates its output in fp32 (kernel_forward.h)."""
_SIXTEEN_BIT = (DTYPE_CODES["fp16"], DTYPE_CODES["bf16"])


CHANNEL_BLOCK = 16
"""Channels that oneDNN's blocked layouts keep together on AVX-512 (``nChw16c``)."""


@per_call
def dtype_bytes(call: CallTrace) -> Ints:
    """Bytes per element of each operation's compute dtype."""
    sizes = np.full(16, 4, dtype=np.int64)
    for name, size in (("fp16", 2), ("bf16", 2), ("fp64", 8), ("fp8", 1), ("int8", 1), ("int64", 8), ("bool", 1)):
        sizes[DTYPE_CODES[name]] = size
    return sizes[call.dtype]


@per_call
def sixteen_bit(call: CallTrace) -> NDArray[np.bool_]:
    """True where an operation computes in fp16 or bf16."""
    return np.asarray((call.dtype == _SIXTEEN_BIT[0]) | (call.dtype == _SIXTEEN_BIT[1]))


def uses_channels_last_kernels(device: Device, call: CallTrace) -> Ints:
    """1 where cuDNN's tensor-core convolution wants NHWC data: 16-bit from compute capability 7.0, fp32 (TF32) from 8.0."""
    if device.kind != "cuda" or device.compute_capability is None:
        return np.zeros(len(call), dtype=np.int64)
    half = sixteen_bit(call) & (device.compute_capability >= (7, 0))
    single = (call.dtype == DTYPE_CODES["fp32"]) & (device.compute_capability >= (8, 0))
    return ((call.kind == Kind.CONVOLUTION) & (half | single)).astype(np.int64)


COPIES_OUTPUT_FROM = (7, 5)
DIRECT_OUTPUT_LIMIT = 1 << 38
"""Output elements times output channels from which 16-bit convolutions write NCHW themselves. Source: see below."""
DIRECT_TF32_LIMIT = 1 << 36
"""The same for TF32. Source: see below."""


def convolution_bytes(call: CallTrace, device: Device, recipe: Recipe, *, most: bool = False) -> Ints:
    """NHWC copies that cuDNN makes in its workspace for NCHW tensors: of a convolution's input, and mostly of its output.

    Kernels that read NHWC and write NCHW (``..._nhwckrsc_nchw_...``) take over once the output is large. Sources: published
    decode peaks of one VAE architecture at 512x512 to 1024x1024, batch 1 to 16, in fp16, bf16 (FLUX on an H100, SD 2.1, PixArt,
    AnimateDiff) and fp32 (SDXL): each allocated peak is liveness plus these copies within 2 %. The 16-bit limit is where they
    change between batches 1, 4, 8 and 16 of FLUX; the one of TF32 between the SDXL decoder's last upsampling at 1024x1024, which
    cannot have copied its output, and smaller convolutions, without whose copies 2 to 3 GiB that it reserves are missing.
    Algorithms that a search settled on write NCHW, too (ONNX Runtime's SD 1.5 table, second runs).
    Convolutions over frames copy their output at any size: HunyuanVideo's decoder peaks 3.2 GiB above liveness and the input's copy,
    which is that output (Hugging Face blog video_gen, January 2025).
    Volta copies no output: its allocated peaks in diffusers' own benchmark (2023, SD 1.5, batch 1 and 4) are liveness and the input's
    copy within 2 %, and without the output's copy LambdaLabs' reserved ones come out within 4 % as well.
    Under ``channels_last`` the output needs no copy; the input still does, for group norm hands it over in NCHW.
    Beside the tensors lies the weight in the kernel's own order, which is how these kernels' names begin (``nhwckrsc``).
    ``most``: every output is copied, which kernels of some cards and releases do where those above do not.
    """
    return _convolution_bytes(call, device, recipe.channels_last, recipe.cudnn_benchmark and recipe.settled, most)


@per_call
def _convolution_bytes(call: CallTrace, device: Device, channels_last: bool, searched: bool, most: bool) -> Ints:
    if device.kind == "cpu":
        return _onednn_bytes(call, channels_last)
    if device.compute_capability is not None and device.compute_capability < (7, 0):
        return _winograd_bytes(call)
    nhwc = uses_channels_last_kernels(device, call)
    if not nhwc.any():
        return np.zeros(len(call), dtype=np.int64)
    dims = call.dims
    input_bytes = np.maximum(call.read_bytes - call.param_bytes, 0)
    out_elements = dims[:, 0] * dims[:, 2] * dims[:, 3]
    limit = np.where(sixteen_bit(call), DIRECT_OUTPUT_LIMIT, DIRECT_TF32_LIMIT)
    copies_output = out_elements * dims[:, 3] < limit
    copies_output &= not searched and (device.compute_capability or COPIES_OUTPUT_FROM) >= COPIES_OUTPUT_FROM
    copies_output = (copies_output | most | (dims[:, 7] == 3)) & (not channels_last)
    weight_bytes = 0 if channels_last else call.param_bytes
    return nhwc * (input_bytes + copies_output * out_elements * dtype_bytes(call) + weight_bytes)


WINOGRAD_POINTS = 36
"""F(4x4, 3x3): output tiles of 4x4 pixels, each made of 6x6 transformed ones."""


def _winograd_bytes(call: CallTrace) -> Ints:
    """Without tensor cores cuDNN computes 16-bit 3x3 convolutions in fp32: input and output there, and the weight's Winograd transform.

    Source: allocated peaks of SD 1.4, SD 2.1, SDXL and Kandinsky on a GTX 1070 and a P100 (gperdrizet/unit-6-assignments): the
    transform from 2560 to 1280 channels, 450 MiB, sets the denoisers' peaks, the last upsampling the decoders'. In fp32 there is
    none of it.
    """
    dims = call.dims
    plain = (call.kind == Kind.CONVOLUTION) & sixteen_bit(call) & (dims[:, 4] == 9) & (dims[:, 6] == 1)
    plain &= (dims[:, 7] == 2) & (dims[:, 5] == 1)
    pixels = dims[:, 0] * dims[:, 2] * (dims[:, 1] + dims[:, 3])
    return np.where(plain, 4 * (pixels + WINOGRAD_POINTS * dims[:, 1] * dims[:, 3]), 0)


def _onednn_bytes(call: CallTrace, channels_last: bool) -> Ints:
    """What oneDNN convolutions take on a CPU: plain NCHW data is reordered to blocks of 16 channels, and the result back.

    First the input's copy, the reordered weight and the blocked result; the input's copy is freed before the plain result is
    made. ``channels_last`` data needs the weight only. Convolutions of rank 3 build columns (``slow_conv3d``). Source:
    allocator events of single convolutions, torch 2.13, fp32 and bf16, 1x1 and 3x3, stride 1 and 2, 3 to 128 channels.
    """
    dims, size = call.dims, dtype_bytes(call)
    convolution = call.kind == Kind.CONVOLUTION
    out_bytes = dims[:, 0] * dims[:, 2] * dims[:, 3] * size
    columns = dims[:, 0] * dims[:, 1] * dims[:, 4] * dims[:, 2] * size
    if channels_last:
        flat = call.param_bytes
    else:
        blocked = dims[:, 0] * dims[:, 2] * -(-dims[:, 3] // CHANNEL_BLOCK) * CHANNEL_BLOCK * size
        input_bytes = np.where(dims[:, 1] >= CHANNEL_BLOCK, np.maximum(call.read_bytes - call.param_bytes, 0), 0)
        flat = np.maximum(input_bytes + call.param_bytes + blocked - out_bytes, blocked)
    return np.where(convolution, np.where(dims[:, 7] == 3, columns, flat), 0)


def attention_kernel(call: CallTrace, device: Device, recipe: Recipe) -> list[Attention]:
    """Which kernel each operation would use; ``default`` entries of the recipe are resolved as torch's SDPA does."""
    return _attention_kernel(call, device, recipe.attention)


@per_call
def _attention_kernel(call: CallTrace, device: Device, chosen: Attention) -> list[Attention]:
    dims = call.dims
    kernels: list[Attention] = ["default"] * len(call)
    for index in np.flatnonzero(call.kind == int(Kind.ATTENTION)).tolist():
        if chosen == "default" or (chosen in ("flash", "cudnn") and call.dtype[index] not in _SIXTEEN_BIT):
            kernels[index] = _default_kernel(device, int(call.dtype[index]), int(dims[index, 4]), bool(dims[index, 6]))
        else:
            kernels[index] = chosen
    return kernels


def _default_kernel(device: Device, dtype: int, head_dim: int, masked: bool) -> Attention:
    if device.kind != "cuda":
        return "flash" if head_dim <= FLASH_HEAD_DIM else "math"
    modern = device.compute_capability is not None and device.compute_capability >= (8, 0)
    if modern and dtype in _SIXTEEN_BIT and head_dim <= FLASH_HEAD_DIM and not masked:
        return "flash"
    return "efficient" if device.compute_capability is None or device.compute_capability >= (5, 0) else "math"


def attention_bytes(call: CallTrace, device: Device, recipe: Recipe, slices: int = 2) -> Ints:
    """Scores, probabilities, accumulators and log-sum-exp rows of attention, by kernel.

    ``vanilla`` and ``math`` hold the whole score matrix twice (before and after softmax, diffusers
    ``Attention.get_attention_scores``); ``sliced`` one slice of it; flash one fp32 row per query.
    """
    return _attention_bytes(call, device, recipe.attention, slices)


@per_call
def _attention_bytes(call: CallTrace, device: Device, attention: Attention, slices: int) -> Ints:
    out = np.zeros(len(call), dtype=np.int64)
    if not (call.kind == Kind.ATTENTION).any():
        return out
    kernels = _attention_kernel(call, device, attention)
    sizes, dims = dtype_bytes(call), call.dims
    for index in np.flatnonzero(call.kind == Kind.ATTENTION):
        batch, heads, queries, keys, width, value_width = (int(value) for value in dims[index, :6])
        size = int(sizes[index])
        scores = batch * heads * queries * keys * size
        copies = batch * heads * (queries * width + keys * (width + value_width)) * size
        rows = batch * heads * queries * 4
        kernel = kernels[index]
        if kernel in ("vanilla", "math"):
            out[index] = 2 * scores + copies
        elif kernel == "sliced":
            out[index] = 2 * scores // max(min(batch * heads, slices * batch), 1) + copies
        elif kernel == "efficient":
            accumulator = batch * heads * queries * value_width * 4 if value_width > EFFICIENT_ACCUMULATOR_DIM and size < 4 else 0
            out[index] = accumulator
        else:
            out[index] = rows + (copies if kernel == "cudnn" else 0)
    return out


def normalization_bytes(call: CallTrace, device: Device, recipe: Recipe) -> Ints:
    """Under ``channels_last`` group norm first copies its input to NCHW (aten/src/ATen/native/group_norm.cpp)."""
    if not recipe.channels_last or device.kind != "cuda":
        return np.zeros(len(call), dtype=np.int64)
    return group_norms(call) * np.maximum(call.read_bytes - call.param_bytes, 0)


@per_call
def group_norms(call: CallTrace) -> Ints:
    """1 where an operation is a group norm; layer norms keep whatever layout they are given."""
    named = _named_group_norm(call.shapes)
    return np.asarray((call.kind == Kind.NORMALIZATION) * named[np.minimum(call.shape, len(named) - 1)])


@lru_cache(maxsize=512)
def _named_group_norm(shapes: tuple[str, ...]) -> Ints:
    return np.array([not text or "group_norm" in text[:40] for text in shapes] or [False], dtype=np.int64)


def dequantization_bytes(call: CallTrace, scheme: str | None) -> Ints:
    """Weight-only schemes rebuild a 16-bit weight for each matmul that runs eagerly."""
    if scheme is None or not scheme.endswith(("wo", "nf4", "layerwise")):
        return np.zeros(len(call), dtype=np.int64)
    heavy = (call.kind == Kind.MATMUL) | ((call.kind == Kind.CONVOLUTION) & (scheme == "fp8_layerwise"))
    return heavy * call.param_bytes


def operator_bytes(call: CallTrace, device: Device, recipe: Recipe, scheme: str | None = None, *, most: bool = False) -> Ints:
    """Sum of all operator workspace, per operation; ``most`` as in :func:`convolution_bytes`."""
    return np.asarray(sum(operator_pieces(call, device, recipe, scheme, most=most)))


def operator_pieces(call: CallTrace, device: Device, recipe: Recipe, scheme: str | None = None, *, most: bool = False) -> tuple[Ints, ...]:
    """The blocks that :func:`operator_bytes` is the sum of: scores and probabilities are one each, and copies of heads a third."""
    attention = attention_bytes(call, device, recipe)
    scores = score_matrix_bytes(call, device, recipe)
    return (convolution_bytes(call, device, recipe, most=most), scores, scores, attention - 2 * scores,
            normalization_bytes(call, device, recipe), dequantization_bytes(call, scheme))  # fmt: skip


def score_matrix_bytes(call: CallTrace, device: Device, recipe: Recipe) -> Ints:
    """One of the two score matrices that :func:`attention_bytes` counts; 0 for kernels that keep none."""
    return _score_matrix_bytes(call, device, recipe.attention)


@per_call
def _score_matrix_bytes(call: CallTrace, device: Device, attention: Attention) -> Ints:
    if attention not in ("vanilla", "math", "default"):
        return np.zeros(len(call), dtype=np.int64)
    dims = call.dims
    kept = np.isin(_attention_kernel(call, device, attention), ("vanilla", "math")) & (call.kind == Kind.ATTENTION)
    return np.where(kept, dims[:, 0] * dims[:, 1] * dims[:, 2] * dims[:, 3] * dtype_bytes(call), 0)


__all__ = ["Floats", "attention_bytes", "attention_kernel", "convolution_bytes", "dequantization_bytes", "dtype_bytes",
           "normalization_bytes", "operator_bytes", "operator_pieces", "score_matrix_bytes", "sixteen_bit",
           "uses_channels_last_kernels"]  # fmt: skip
