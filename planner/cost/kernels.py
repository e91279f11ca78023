"""How long the operations of one component call take: a roofline per operation, and the time to launch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cost.coefficients import Coefficients
from planner.cost.condense import per_call, repeats
from planner.cost.dequantize import extra_launches, product_peak, product_seconds, serial_seconds, weight_traffic
from planner.cost.workspace import attention_bytes, attention_kernel, convolution_bytes, dtype_bytes, group_norms, normalization_bytes
from planner.dryrun.trace import DTYPES, CallTrace, Floats, Kind
from planner.recipe import Attention, Recipe
from planner.types import Bound, Device

TILE_M, TILE_N = 128, 128
"""Usual output tile of tensor-core matmul kernels; decides how a small product fills the multiprocessors."""
MOST_SHARE = 0.95
"""No share of a peak is taken to be larger, fitted ones included."""
ASSUMED_SM_COUNT = 80
HEAVY = (int(Kind.MATMUL), int(Kind.CONVOLUTION), int(Kind.ATTENTION))
"""Kinds whose kernels compute; the others only move bytes."""
TENSOR_CORES = (7, 0)
"""First compute capability that has them."""
SCORES = ("vanilla", "sliced", "math")
"""Attention that keeps its score matrix: two batched products and a softmax between them."""
SCORE_KERNELS = 5
"""Two products, a softmax, and copies of heads into the batch and back (diffusers ``Attention.get_attention_scores``)."""
SCORE_PRODUCT_SHARE = 0.6
"""Assumed: rate of those products over that of a large matmul; their inner dimension is one head."""
FUSED_ISSUE = 2.0
"""Elements that a compiled pointwise kernel passes per second over those of eager ones: it does several operations to what it reads
once, which saves loads and stores but no arithmetic. Between 1 and no limit, which fit worse, one way and the other."""
SPLIT_PRODUCTS = 3
"""TF32 products that fused attention makes for one in fp32 from compute capability 8.0 (``OpMultiplyAddFastF32``: 3xTF32; torch
aten/src/ATen/native/transformers/cuda/mem_eff_attention/gemm_kernel_utils.h, xformers likewise). Below, it runs without tensor cores."""
SPLIT_FROM = (8, 0)
SOFTMAX_WIDTH = 21.0
"""FlashAttention 2 on an H100, no mask, 16 thousand tokens: 324 TFLOP/s with heads of 64 and 370 with heads of 128 (FlashAttention-3
paper, figure 5)."""
_ATTENTION_WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256)


@dataclass(frozen=True, slots=True)
class CallTime:
    """Seconds of one component call. ``seconds`` is the larger of device and host time."""

    seconds: float
    kernel_seconds: float
    launch_seconds: float
    kernels: int
    bound: Bound
    measured_share: float
    """Share of the kernel time that comes from probes of the very operations."""


def call_time(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe, scheme: str | None = None,
              probes: Mapping[str, float] | None = None, fused: bool = False) -> CallTime:  # fmt: skip
    """Time of one call. ``probes`` maps operation signatures (``CallTrace.shapes``) to measured seconds on this device."""
    compute = compute_seconds(call, device, coefficients, recipe, scheme, fused)
    memory, serial = moving_seconds(call, device, coefficients, recipe, scheme, fused)
    heads = call.fused_head if fused else np.ones(len(call), dtype=np.int64)
    counts = repeats(call)
    parts = np.where(score_attention(call, device, recipe), SCORE_KERNELS, heads)
    kernels = int((parts * counts).sum())
    times = np.where(heads > 0, np.maximum(compute, memory) + serial + coefficients.kernel_seconds, compute)
    measured = 0.0
    if probes and not fused:
        known = np.array([probes.get(text, np.nan) for text in call.shapes], dtype=np.float64)[call.shape]
        hit = ~np.isnan(known)
        times = np.where(hit, known, times)
        measured = float((times * counts)[hit].sum() / (times * counts).sum()) if times.any() else 0.0
    kernel_seconds = float((times * counts).sum())
    launch_seconds = host_seconds(coefficients, recipe, kernels, fused)
    waiting = 0.0
    if scheme is not None and not fused:
        launched, waiting = extra_launches(call, scheme, counts.astype(np.float64), coefficients.launch_seconds)
        launch_seconds += launched
    seconds = max(kernel_seconds, launch_seconds) + waiting
    moving = ((np.maximum(memory - compute, 0.0) + serial) * counts).sum()
    bound: Bound = "memory" if moving > 0.5 * kernel_seconds else "compute"
    return CallTime(seconds, kernel_seconds, launch_seconds, kernels, "launch" if launch_seconds > kernel_seconds else bound, measured)


def moving_seconds(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe, scheme: str | None = None,
                   fused: bool = False) -> tuple[Floats, Floats]:  # fmt: skip
    """Per operation: seconds that its own kernel needs for its bytes, and seconds of the kernels around it."""
    return _moving_seconds(call, device, coefficients, recipe.attention, recipe.channels_last,
                           recipe.cudnn_benchmark, recipe.settled, scheme, fused)  # fmt: skip


@per_call
def _moving_seconds(call: CallTrace, device: Device, coefficients: Coefficients, attention: Attention, channels_last: bool,
                    cudnn_benchmark: bool, settled: bool, scheme: str | None, fused: bool) -> tuple[Floats, Floats]:  # fmt: skip
    recipe = Recipe(attention=attention, channels_last=channels_last, cudnn_benchmark=cudnn_benchmark, settled=settled)
    streaming = device.bandwidth_bytes_per_second * coefficients.bandwidth_share
    issuing = np.minimum(pointwise_rate(call, device, coefficients) * (FUSED_ISSUE if fused else 1.0), streaming)
    memory = direct_bytes(call, scheme, fused) / np.where(_heavy(call), streaming, issuing)
    serial = score_bytes(call, device, recipe) / streaming
    if not fused:  # a compiler folds layout copies into its neighbours
        without = device.compute_capability is not None and device.compute_capability < TENSOR_CORES
        serial = serial + layout_bytes(call, device, recipe) / (streaming if without else issuing)
    if scheme is not None and not fused:
        serial = serial + serial_seconds(call, scheme, issuing)
    return memory, serial


def pointwise_rate(call: CallTrace, device: Device, coefficients: Coefficients) -> Floats:
    """Bytes per second of pointwise and normalization kernels: memory's, or what the multiprocessors issue if that is less.

    Instructions go by elements: in fp32 they move twice the bytes of 16 bit.
    """
    streaming = device.bandwidth_bytes_per_second * coefficients.bandwidth_share
    single = device.flops_per_second.get("fp32")
    if coefficients.pointwise_per_flop is None or single is None:
        return np.full(len(call), streaming)
    return np.minimum(streaming, single * coefficients.pointwise_per_flop * np.clip(dtype_bytes(call), 2, 4))


def host_seconds(coefficients: Coefficients, recipe: Recipe, kernels: int, fused: bool) -> float:
    """Host time to launch a call: per eager operation, per compiled kernel, or once under CUDA graphs."""
    if fused and recipe.cuda_graphs:
        return coefficients.call_seconds
    each = coefficients.compiled_launch_seconds if fused else coefficients.launch_seconds
    return kernels * each + coefficients.call_seconds


def reachable_peaks(device: Device, coefficients: Coefficients) -> dict[str, float]:
    """Datasheet peaks at the clock that the board's power sustains, those of tensor cores no higher than the silicon feeds."""
    peaks = dict(device.flops_per_second)
    boost = max(peaks.get("fp16", 0.0), peaks.get("bf16", 0.0))
    if coefficients.flops_per_joule is not None and device.power_watts is not None and boost:
        held = min(1.0, coefficients.flops_per_joule * device.power_watts / boost)
        peaks = {name: peak * held for name, peak in peaks.items()}
    if device.compute_capability is not None and device.compute_capability < TENSOR_CORES and "fp32" in peaks:
        peaks |= dict.fromkeys(("fp16", "bf16"), peaks["fp32"])  # torch accumulates 16-bit products in fp32
    if coefficients.peak_over_fp32 is not None and "fp32" in peaks:
        cap = coefficients.peak_over_fp32 * peaks["fp32"]
        for name, share in (("fp16", 1.0), ("bf16", 1.0), ("tf32", 0.5)):  # TF32 goes at half the rate of 16 bit on all silicon
            if name in peaks:
                peaks[name] = min(peaks[name], share * cap)
    return peaks


def peak_flops(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe, scheme: str | None) -> Floats:
    """Reachable peak per operation for its dtype, tensor cores where torch uses them."""
    peaks = reachable_peaks(device, coefficients)
    single = peaks.get("fp32") or min(peaks.values())
    table = np.full(len(DTYPES), single)
    for index, name in enumerate(DTYPES):
        table[index] = peaks.get(name, single / 2 if name == "fp64" else single)
    out = table[call.dtype]
    if "tf32" in peaks:
        fp32 = call.dtype == DTYPES.index("fp32")
        products = (call.kind == Kind.MATMUL) | ((call.kind == Kind.ATTENTION) & (recipe.attention in SCORES))
        out = np.where(fp32 & ((call.kind == Kind.CONVOLUTION) | (recipe.tf32 & products)), peaks["tf32"], out)
    out = np.where(split_attention(call, device, recipe), peaks.get("tf32", single) / SPLIT_PRODUCTS, out)
    doubled = product_peak(scheme, peaks)
    if doubled is not None:
        out = np.where((call.kind == Kind.MATMUL) & (call.param_bytes > 0), doubled, out)
    return out


def compute_seconds(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe, scheme: str | None,
                    fused: bool = False) -> Floats:  # fmt: skip
    """FLOPs over the reachable rate; zero for operations that only move bytes."""
    return _compute_seconds(call, device, coefficients, recipe.attention, recipe.tf32, scheme, fused)


@per_call
def _compute_seconds(call: CallTrace, device: Device, coefficients: Coefficients, attention: Attention, tf32: bool, scheme: str | None,
                     fused: bool) -> Floats:  # fmt: skip
    recipe = Recipe(attention=attention, tf32=tf32)
    kind, peaks = call.kind, peak_flops(call, device, coefficients, recipe, scheme)
    share = np.ones(len(call))
    share = np.where(kind == Kind.MATMUL, coefficients.matmul_share, share)
    share = np.where(kind == Kind.CONVOLUTION, coefficients.convolution_share, share)
    share = np.where(kind == Kind.ATTENTION, _attention_shares(call, device, coefficients, recipe), share)
    share = np.minimum(share * room(device, coefficients), np.maximum(share, MOST_SHARE))
    rate, single = share * peaks, reachable_peaks(device, coefficients).get("fp32")
    if coefficients.vector_share is not None and single is not None:
        vector = coefficients.vector_share * np.minimum(peaks, single)  # ordinary instructions also split the numbers of attention
        either = np.where(split_attention(call, device, recipe), np.minimum(rate, vector), np.maximum(rate, vector))
        rate = np.where(_heavy(call), either, rate)
    seconds = call.flops / (rate * fill(call, device.sm_count or ASSUMED_SM_COUNT) if device.kind == "cuda" else rate)
    slow = product_seconds(call, scheme, device, fused)
    return np.asarray(seconds if slow is None else np.maximum(seconds, slow), dtype=np.float64)


def room(device: Device, coefficients: Coefficients) -> float:
    """How much larger a share of its tensor peak a card reaches than those of the fit: what feeds the cores was not cut with them."""
    half, single = device.flops_per_second.get("fp16"), device.flops_per_second.get("fp32")
    if coefficients.tensor_over_fp32 is None or half is None or single is None:
        return 1.0
    return max(1.0, coefficients.tensor_over_fp32 * single / half)


def split_attention(call: CallTrace, device: Device, recipe: Recipe) -> NDArray[np.bool_]:
    """True where an attention in fp32 is fused, whose products tensor cores make in parts."""
    if recipe.attention in SCORES or device.kind != "cuda" or (device.compute_capability or (0, 0)) < SPLIT_FROM:
        return np.zeros(len(call), dtype=np.bool_)
    return np.asarray((call.kind == Kind.ATTENTION) & (call.dtype == DTYPES.index("fp32")))


@per_call
def _heavy(call: CallTrace) -> NDArray[np.bool_]:
    return np.asarray(sum(call.kind == kind for kind in HEAVY), dtype=np.bool_)


@per_call
def fill(call: CallTrace, processors: int) -> Floats:
    """Share of the multiprocessors of a CUDA device that a product keeps busy: partial tiles and the last, partly filled wave.

    A matmul of (m, n, k) runs as ceil(m/128) x ceil(n/128) tiles, a convolution as the matmul it is equal to.
    """
    dims = call.dims.astype(np.float64)
    matmul, convolution, attention = (call.kind == kind for kind in (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION))
    batch = np.where(matmul, dims[:, 0], np.where(convolution, np.maximum(dims[:, 5], 1), dims[:, 0] * dims[:, 1]))
    rows = np.where(matmul, dims[:, 1], np.where(convolution, dims[:, 0] * dims[:, 2], dims[:, 2]))
    columns = np.where(matmul, dims[:, 2], np.where(convolution, dims[:, 3] / np.maximum(dims[:, 5], 1), 1))
    heavy = matmul | convolution | attention
    rows, columns = np.maximum(rows, 1), np.maximum(columns, 1)
    tiles_m, tiles_n = np.ceil(rows / TILE_M), np.where(attention, 1, np.ceil(columns / TILE_N))
    tiles = np.maximum(batch, 1) * tiles_m * tiles_n
    waves = np.ceil(tiles / processors)
    wave_fill = tiles / (waves * processors)
    tile_fill = np.maximum(rows / (tiles_m * TILE_M), 0.25) * np.where(attention, 1, np.maximum(columns / (tiles_n * TILE_N), 0.25))
    # Libraries choose smaller tiles or split the inner dimension when a product is small: half of the loss is avoided.
    return np.where(heavy, np.sqrt(np.clip(wave_fill * tile_fill, 0.02, 1.0)), 1.0)


def _attention_shares(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe) -> Floats:
    """Reachable share of the peak per attention: head dimensions are padded up to the kernel's next width."""
    kernels = np.array(attention_kernel(call, device, recipe))
    width = np.maximum(call.dims[:, 4], 1).astype(np.float64)
    place = np.minimum(np.searchsorted(_ATTENTION_WIDTHS, width), len(_ATTENTION_WIDTHS) - 1)
    padded = np.maximum(np.array(_ATTENTION_WIDTHS)[place], width)
    cudnn = coefficients.cudnn_attention_share or coefficients.attention_share
    fused = np.where(kernels == "cudnn", cudnn, coefficients.attention_share) * _softmax_share(padded)
    # Beside products this slow the softmax hardly counts: they go as those of a matmul do.
    fused = np.where(split_attention(call, device, recipe), coefficients.matmul_share, fused) * width / padded
    return np.where(np.isin(kernels, SCORES), coefficients.matmul_share * SCORE_PRODUCT_SHARE, fused)


def _softmax_share(width: Floats) -> Floats:
    """What is left of a fused kernel's rate beside its softmax, which costs each score as much as products of so many dimensions.

    1 from the widest head that is common on, so that the share means that one.
    """
    return np.minimum(width / (width + SOFTMAX_WIDTH) * (1 + SOFTMAX_WIDTH / 128), 1.0)


@per_call
def direct_bytes(call: CallTrace, scheme: str | None, fused: bool) -> Floats:
    """Bytes that each operation's own kernel reads and writes. Group norm reads its input twice: statistics, then values."""
    moved = (call.fused_read_bytes + call.fused_write_bytes if fused else call.read_bytes + call.write_bytes).astype(np.float64)
    if not fused:
        moved = moved + group_norms(call) * np.maximum(call.read_bytes - call.param_bytes, 0)
    return moved + weight_traffic(call, scheme, fused) if scheme is not None else moved


def layout_bytes(call: CallTrace, device: Device, recipe: Recipe) -> Floats:
    """Read and write of each copy that convolutions and group norms make between NCHW and NHWC."""
    return np.asarray(2.0 * (convolution_bytes(call, device, recipe) + normalization_bytes(call, device, recipe)))


def score_attention(call: CallTrace, device: Device, recipe: Recipe) -> NDArray[np.bool_]:
    """True where an attention is two products and a softmax with a kernel each."""
    return _score_attention(call, device, recipe.attention)


@per_call
def _score_attention(call: CallTrace, device: Device, attention: Attention) -> NDArray[np.bool_]:
    kernels = np.array(attention_kernel(call, device, Recipe(attention=attention)))
    return np.asarray(np.isin(kernels, SCORES) & (call.kind == Kind.ATTENTION))


def score_bytes(call: CallTrace, device: Device, recipe: Recipe) -> Floats:
    """Kernels that keep the score matrix write it, read it for softmax, write and read the probabilities."""
    if recipe.attention not in SCORES and device.kind == "cuda":
        return np.zeros(len(call))
    return np.where(score_attention(call, device, recipe), 2.0 * attention_bytes(call, device, recipe.but(attention="vanilla")), 0.0)
