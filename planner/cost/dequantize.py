"""Time that quantized weights cost beside their product: kernels that rebuild weights, convert activations, rescale results.

Counted from the libraries' eager code, one read and one write per elementwise kernel; a compiler folds all of it into the
product. Only products with weights count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.cost.quantized import STORED_BYTES
from planner.dryrun.trace import CallTrace, Floats, Kind
from planner.types import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantization:
    """What one linear layer does besides its product, eagerly."""

    weight_bytes: float = 0.0
    """Moved per weight element before the product reads its 16-bit copy."""
    input_bytes: float = 0.0
    """Moved per element of the activation."""
    output_bytes: float = 0.0
    """Moved per element of the result."""
    launches: int = 0
    waits: int = 0
    """Launches during which the device is idle, for the host reads a value back in between."""
    peak: Literal["fp8", "int8"] | None = None
    """Tensor-core rate of the product itself."""
    few_rows: Literal["host", "single"] | None = None
    """Products of up to 16 rows: on the host in int32, or on the device in fp32."""
    vector: bool = False
    """The product runs in a kernel made for one row."""
    opaque: bool = False
    """A compiler calls that kernel as it is."""


_INT4 = Dequantization(vector=True, launches=2)
_GGUF_SHORT = Dequantization(weight_bytes=12, launches=3)
_GGUF = Dequantization(weight_bytes=40, launches=8)
"""Six elementwise kernels over blocks of 16 or 32 bytes, none vectorised: as long as 40 bytes per weight moved by whole
rows. Published: FLUX.1-dev, Q8_0, Q4_1 and Q2_K on an H100 (Hugging Face blog diffusers-quantization, May 2025)."""

SCHEMES: dict[str, Dequantization] = {
    # torchao Int8Tensor, weight only: int8 -> 16 bit (1 + 2), result x scale (2 + 2), += bias (2 + 2).
    "int8wo": Dequantization(weight_bytes=3, output_bytes=8, launches=3),
    # torchao Float8Tensor, weight only: -> fp32 (1 + 4), x scale -> 16 bit (4 + 2).
    "fp8wo": Dequantization(weight_bytes=11, launches=3),
    # torchao: |x| (2 + 2), max (2), fp32 (2 + 4), / scale (4 + 4), round or clamp (4 + 4), cast (4 + 1);
    # int32 result -> fp32 x row scale (4 + 4), -> 16 bit (4 + 2), x column scale (2 + 2), += bias (2 + 2).
    "int8dq": Dequantization(input_bytes=31, output_bytes=22, launches=14, peak="int8", few_rows="single"),
    "int8dq_2024": Dequantization(input_bytes=31, output_bytes=22, launches=14, peak="int8", few_rows="host"),
    # The same on the way in; torch._scaled_mm rescales and adds the bias itself.
    "fp8dq": Dequantization(input_bytes=31, launches=10, peak="fp8"),
    "int4wo": _INT4,
    # With torch 2.5 and older compiled calls took as long as eager ones: published CogVideoX rows of diffusers-torchao.
    "int4wo_2024": Dequantization(vector=True, launches=2, opaque=True),
    "quanto_int4": _INT4,
    # optimum-quanto qbytes_mm: cast (1 + 2, fp8 only), x scale (2 or 1, + 2); WeightQBytesLinearFunction adds the bias (2 + 2).
    "quanto_int8": Dequantization(weight_bytes=3, output_bytes=4, launches=4),
    "quanto_fp8": Dequantization(weight_bytes=7, output_bytes=4, launches=5),
    # bitsandbytes: dequantize_4bit after its nested absmax (0.5 + 2).
    "nf4": Dequantization(weight_bytes=2.5, launches=3),
    # bitsandbytes LLM.int8: outlier columns are looked up (the host waits), split off and added back in 16 bit; rows are
    # quantized (2 + 2 + 1), int32 results rescaled (4 + 2).
    "llm_int8": Dequantization(input_bytes=9, output_bytes=10, launches=4, waits=16, peak="int8"),
    # diffusers LayerwiseCastingHook: up before the layer (1 + 2), down after it (2 + 1), weight and bias.
    "fp8_layerwise": Dequantization(weight_bytes=6, launches=4),
    "gguf_q8_0": _GGUF_SHORT, "gguf_q5_0": _GGUF, "gguf_q5_1": _GGUF, "gguf_q4_0": _GGUF, "gguf_q4_1": _GGUF,
    "gguf_q2_k": _GGUF, "gguf_q3_k": _GGUF, "gguf_q4_k": _GGUF, "gguf_q5_k": _GGUF, "gguf_q6_k": _GGUF,
}  # fmt: skip
FEW_ROWS = 16
"""cuBLAS refuses int8 products of fewer rows than this plus one (torchao kernel/intmm.py, safe_int_mm)."""
HOST_SECONDS_PER_WEIGHT, HOST_SECONDS_PER_PRODUCT = 1.1e-9, 0.25e-9
"""int8 weight copied to the host and widened, and one int32 multiply-add there: published eager int8 rows of
diffusers-torchao, whose time beyond bf16 is a + b x batch in FLUX's modulation layers (one row per image)."""
VECTOR_FLOPS_PER_CLOCK = 110
"""``_weight_int4pack_mm`` (tinygemm) on each multiprocessor, for many rows: weights are unpacked anew for every 16 of them. 16
TFLOP/s of an RTX A6000 (pytorch/ao, prototype/hqq README), 30 of an H100 (Hugging Face blog quanto-diffusers), 17 of an A100
(diffusers-torchao) are one number per multiprocessor and clock, and three shares of the fp32 peak."""
WIDE = ((6, 0), (7, 0), (7, 5), (8, 0))
"""Compute capabilities whose multiprocessors have 64 fp32 lanes; the others have 128 (CUDA C++ programming guide, throughput)."""


def dequantization(scheme: str | None) -> Dequantization:
    """What a scheme costs eagerly; nothing for one that is not known."""
    return SCHEMES.get(scheme or "", Dequantization())


def quantized_layers(call: CallTrace, scheme: str) -> Floats:
    """1 where an operation's weight is stored by the scheme."""
    held = (call.kind == Kind.MATMUL) | ((call.kind == Kind.CONVOLUTION) & (scheme == "fp8_layerwise"))
    return np.asarray(held & (call.param_bytes > 0), dtype=np.float64)


def weight_traffic(call: CallTrace, scheme: str, fused: bool) -> Floats:
    """Change of the bytes that the product itself reads: the stored weight, unless a 16-bit copy is made for it."""
    saved = call.param_bytes * (1.0 - STORED_BYTES.get(scheme, 2.0) / 2.0) * quantized_layers(call, scheme)
    how = dequantization(scheme)
    return -saved if fused or how.peak is not None or how.vector else np.zeros(len(call))


def serial_seconds(call: CallTrace, scheme: str, bytes_per_second: Floats) -> Floats:
    """Device time of the kernels around each product, and the time the device waits for products made on the host."""
    how, layers = dequantization(scheme), quantized_layers(call, scheme)
    weights = call.param_bytes / 2.0
    rows, columns, inner = (call.dims[:, place].astype(np.float64) for place in (1, 2, 3))
    products = call.kind == Kind.MATMUL
    moved = how.weight_bytes * weights + np.where(products, rows * (how.input_bytes * inner + how.output_bytes * columns), 0.0)
    few = products & (rows <= FEW_ROWS)
    if how.few_rows == "single":
        moved = moved + np.where(few, 7.0 * weights, 0.0)  # int8 -> fp32 (1 + 4), and read again in 4 bytes for 2
    seconds = moved / bytes_per_second
    if how.few_rows == "host":
        seconds = seconds + np.where(few, weights * (HOST_SECONDS_PER_WEIGHT + HOST_SECONDS_PER_PRODUCT * rows), 0.0)
    return np.asarray(seconds * layers)


def product_seconds(call: CallTrace, scheme: str | None, device: Device, fused: bool) -> Floats | None:
    """Seconds of products that run in a kernel made for one row; None when the scheme has none, or a compiler replaces it."""
    single, how = device.flops_per_second.get("fp32"), dequantization(scheme)
    if scheme is None or single is None or not how.vector or (fused and not how.opaque):
        return None
    lanes = 64 if device.compute_capability in WIDE else 128
    rate = single * VECTOR_FLOPS_PER_CLOCK / (2 * lanes)
    return np.asarray(call.flops / rate * quantized_layers(call, scheme))


def product_peak(scheme: str | None, peaks: Mapping[str, float]) -> float | None:
    """Tensor-core peak of products under the scheme; None when they stay in 16 bit or the device lacks the rate."""
    rate = dequantization(scheme).peak
    return None if rate is None else peaks.get(rate)


def extra_launches(call: CallTrace, scheme: str, times: Floats, launch_seconds: float) -> tuple[float, float]:
    """Host seconds of the added launches of a call, and those of them that the device sits through."""
    how = dequantization(scheme)
    layers = float((quantized_layers(call, scheme) * times).sum())
    return layers * how.launches * launch_seconds, layers * how.waits * launch_seconds
