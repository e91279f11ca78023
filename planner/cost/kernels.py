"""How long the operations of one component call take: a roofline per operation, and the time to launch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.cost.coefficients import Coefficients
from planner.cost.condense import repeats
from planner.cost.workspace import attention_bytes, attention_kernel, dtype_bytes, has_convolution, uses_channels_last_kernels
from planner.dryrun.trace import DTYPES, CallTrace, Floats, Kind
from planner.recipe import Recipe
from planner.types import Bound, Device

TILE_M, TILE_N = 128, 128
"""Usual output tile of tensor-core matmul kernels; decides how a small product fills the multiprocessors."""
ASSUMED_SM_COUNT = 80
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
    compute = compute_seconds(call, device, coefficients, recipe, scheme)
    rate = device.bandwidth_bytes_per_second * coefficients.bandwidth_share
    memory = direct_bytes(call, scheme, fused) / rate
    serial = serial_bytes(call, device, recipe, scheme, fused) / rate
    heads = call.fused_head if fused else np.ones(len(call), dtype=np.int64)
    counts = repeats(call)
    kernels = int((heads * counts).sum())
    times = np.where(heads > 0, np.maximum(compute, memory) + serial + coefficients.kernel_seconds, compute)
    measured = 0.0
    if probes and not fused:
        known = np.array([probes.get(text, np.nan) for text in call.shapes], dtype=np.float64)[call.shape]
        hit = ~np.isnan(known)
        times = np.where(hit, known, times)
        measured = float((times * counts)[hit].sum() / (times * counts).sum()) if times.any() else 0.0
    kernel_seconds = float((times * counts).sum())
    launch_seconds = host_seconds(call, coefficients, recipe, kernels, fused)
    seconds = max(kernel_seconds, launch_seconds)
    moving = ((np.maximum(memory - compute, 0.0) + serial) * counts).sum()
    bound: Bound = "memory" if moving > 0.5 * kernel_seconds else "compute"
    return CallTime(seconds, kernel_seconds, launch_seconds, kernels, "launch" if launch_seconds > kernel_seconds else bound, measured)


def host_seconds(call: CallTrace, coefficients: Coefficients, recipe: Recipe, kernels: int, fused: bool) -> float:
    """Host time to launch a call: per eager operation, per compiled kernel, or once under CUDA graphs."""
    if fused and recipe.cuda_graphs:
        return coefficients.call_seconds
    each = coefficients.compiled_launch_seconds if fused else coefficients.launch_seconds
    return kernels * each + coefficients.call_seconds


def reachable_peaks(device: Device, coefficients: Coefficients) -> dict[str, float]:
    """Datasheet peaks, the 16-bit ones no higher than the silicon feeds and the board's power sustains."""
    peaks = dict(device.flops_per_second)
    caps = []
    if coefficients.peak_over_fp32 is not None and "fp32" in peaks:
        caps.append(coefficients.peak_over_fp32 * peaks["fp32"])
    if coefficients.flops_per_joule is not None and device.power_watts is not None:
        caps.append(coefficients.flops_per_joule * device.power_watts)
    for name in ("fp16", "bf16"):
        if name in peaks and caps:
            peaks[name] = min(peaks[name], *caps)
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
        allowed = (call.kind == Kind.CONVOLUTION) | (recipe.tf32 & (call.kind == Kind.MATMUL))
        out = np.where(fp32 & allowed, peaks["tf32"], out)
    if scheme in ("int8dq", "fp8dq"):
        fast = peaks.get("int8" if scheme == "int8dq" else "fp8")
        if fast:
            out = np.where((call.kind == Kind.MATMUL) & (call.param_bytes > 0), fast, out)
    return out


def compute_seconds(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe, scheme: str | None) -> Floats:
    """FLOPs over the reachable rate; zero for operations that only move bytes."""
    kind = call.kind
    share = np.ones(len(call))
    share = np.where(kind == Kind.MATMUL, coefficients.matmul_share, share)
    share = np.where(kind == Kind.CONVOLUTION, coefficients.convolution_share, share)
    share = np.where(kind == Kind.ATTENTION, _attention_shares(call, device, coefficients, recipe), share)
    padded = call.flops / (share * fill(call, device))
    return np.asarray(padded / peak_flops(call, device, coefficients, recipe, scheme), dtype=np.float64)


def fill(call: CallTrace, device: Device) -> Floats:
    """Share of the multiprocessors that a product keeps busy: partial tiles and the last, partly filled wave.

    CUDA only; a matmul of (m, n, k) runs as ceil(m/128) x ceil(n/128) tiles, a convolution as the matmul it is equal to.
    """
    out = np.ones(len(call))
    if device.kind != "cuda":
        return out
    dims = call.dims.astype(np.float64)
    matmul, convolution, attention = (call.kind == kind for kind in (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION))
    batch = np.where(matmul, dims[:, 0], np.where(convolution, np.maximum(dims[:, 5], 1), dims[:, 0] * dims[:, 1]))
    rows = np.where(matmul, dims[:, 1], np.where(convolution, dims[:, 0] * dims[:, 2], dims[:, 2]))
    columns = np.where(matmul, dims[:, 2], np.where(convolution, dims[:, 3] / np.maximum(dims[:, 5], 1), 1))
    heavy = matmul | convolution | attention
    rows, columns = np.maximum(rows, 1), np.maximum(columns, 1)
    tiles_m, tiles_n = np.ceil(rows / TILE_M), np.where(attention, 1, np.ceil(columns / TILE_N))
    tiles = np.maximum(batch, 1) * tiles_m * tiles_n
    processors = device.sm_count or ASSUMED_SM_COUNT
    waves = np.ceil(tiles / processors)
    wave_fill = tiles / (waves * processors)
    tile_fill = np.maximum(rows / (tiles_m * TILE_M), 0.25) * np.where(attention, 1, np.maximum(columns / (tiles_n * TILE_N), 0.25))
    # Libraries choose smaller tiles or split the inner dimension when a product is small: half of the loss is avoided.
    return np.where(heavy, np.sqrt(np.clip(wave_fill * tile_fill, 0.02, 1.0)), out)


def _attention_shares(call: CallTrace, device: Device, coefficients: Coefficients, recipe: Recipe) -> Floats:
    """Reachable share of the peak per attention: head dimensions are padded up to the kernel's next width."""
    out = np.ones(len(call))
    kernels = attention_kernel(call, device, recipe)
    for index in np.flatnonzero(call.kind == Kind.ATTENTION):
        width = int(call.dims[index, 4])
        padded = next((step for step in _ATTENTION_WIDTHS if step >= width), width)
        base = coefficients.cudnn_attention_share if kernels[index] == "cudnn" else coefficients.attention_share
        if kernels[index] in ("vanilla", "math", "sliced"):
            base, padded = coefficients.matmul_share * 0.6, width  # two batched products with an inner dimension of one head
        out[index] = base * width / padded
    return out


def direct_bytes(call: CallTrace, scheme: str | None, fused: bool) -> Floats:
    """Bytes that each operation's own kernel reads and writes. Group norm reads its input twice: statistics, then values."""
    moved = (call.fused_read_bytes + call.fused_write_bytes if fused else call.read_bytes + call.write_bytes).astype(np.float64)
    if not fused:
        twice = (call.kind == Kind.NORMALIZATION) & has_convolution(call)
        moved = moved + twice * np.maximum(call.read_bytes - call.param_bytes, 0)
    return moved + _weight_traffic(call, scheme, fused) if scheme is not None else moved


def serial_bytes(call: CallTrace, device: Device, recipe: Recipe, scheme: str | None, fused: bool) -> Floats:
    """Bytes moved by kernels of their own around an operation: layout copies, and the passes over a score matrix."""
    scores = _score_traffic(call, device, recipe)
    return scores if fused else scores + _layout_traffic(call, device, recipe)  # a compiler folds layout copies into its neighbours


def _layout_traffic(call: CallTrace, device: Device, recipe: Recipe) -> Floats:
    """NCHW tensors are copied to NHWC before a tensor-core convolution and its result back: read and write of each.

    Under ``channels_last`` the input is still copied, and the output by the group norm that follows, which takes NCHW only.
    """
    nhwc = uses_channels_last_kernels(device, call)
    if not nhwc.any():
        return np.zeros(len(call))
    dims = call.dims
    input_bytes = np.maximum(call.read_bytes - call.param_bytes, 0)
    output_bytes = dims[:, 0] * dims[:, 2] * dims[:, 3] * dtype_bytes(call)
    return np.asarray(nhwc * 2.0 * (input_bytes + output_bytes))


def _score_traffic(call: CallTrace, device: Device, recipe: Recipe) -> Floats:
    """Kernels that keep the score matrix write it, read it for softmax, write and read the probabilities."""
    if recipe.attention not in ("vanilla", "sliced", "math") and device.kind == "cuda":
        return np.zeros(len(call))
    full = attention_bytes(call, device, recipe.but(attention="vanilla"))
    kernels = attention_kernel(call, device, recipe)
    held = np.array([kernel in ("vanilla", "sliced", "math") for kernel in kernels], dtype=bool) & (call.kind == Kind.ATTENTION)
    return np.where(held, 2.0 * full, 0.0)


_STORED_SHARE = {"int8wo": 0.5, "fp8wo": 0.5, "int8dq": 0.5, "fp8dq": 0.5, "fp8_layerwise": 0.5, "int4wo": 0.28, "nf4": 0.28}
"""Stored bytes of a quantized weight over its 16-bit bytes; 4-bit with one 16-bit scale per 64 and 32 values."""


def _weight_traffic(call: CallTrace, scheme: str, fused: bool) -> Floats:
    """Weight-only schemes read the small weight, write the 16-bit one and read it again; compiled, only the first."""
    stored = _STORED_SHARE.get(scheme, 1.0)
    weights = np.where((call.kind == Kind.MATMUL) | (scheme == "fp8_layerwise"), call.param_bytes, 0).astype(np.float64)
    if scheme in ("int8dq", "fp8dq") or fused:
        return weights * (stored - 1.0)
    return weights * (stored + 1.0)


def stored_share(scheme: str) -> float:
    """Stored bytes of a quantized weight relative to 16 bit; 1 for an unknown scheme."""
    return _STORED_SHARE.get(scheme, 1.0)
