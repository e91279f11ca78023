"""Laws of the model of time, on made-up calls and devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.coefficients import Coefficients, default_coefficients
from planner.cost.dequantize import SCHEMES
from planner.cost.kernels import CallTime, call_time
from planner.cost.residency import Residency
from planner.cost.transfer import transfer_seconds
from planner.dryrun.trace import DTYPE_CODES, CallTrace, Kind, columns_from_rows
from planner.recipe import Recipe
from planner.types import Device
from tests.property.strategies import Part, pipelines, world

FEW = settings(max_examples=60, deadline=None)
CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
DTYPES = ("fp32", "fp16", "bf16")


def row(kind: Kind, dtype: str, flops: float, read: int, write: int, parameters: int, dims: tuple[int, ...],
        head: bool = True) -> dict[str, float]:  # fmt: skip
    """One operation's columns; compiled, an operation that is no head moves its bytes within the kernel before it."""
    sizes = {"read_bytes": read, "write_bytes": write, "fused_read_bytes": read if head else 0, "fused_write_bytes": write if head else 0}
    named = {"kind": int(kind), "dtype": DTYPE_CODES[dtype], "flops": flops, "param_bytes": parameters, "fused_head": int(head), "times": 1}
    return {**named, **sizes, **{f"d{place}": value for place, value in enumerate(dims + (0,) * (8 - len(dims)))}}


def matmul(dtype: str, rows: int, columns: int, inner: int) -> dict[str, float]:
    size = 4 if dtype == "fp32" else 2
    weights = columns * inner * size
    return row(Kind.MATMUL, dtype, 2.0 * rows * columns * inner, rows * inner * size + weights, rows * columns * size, weights,
               (1, rows, columns, inner))  # fmt: skip


def convolution(dtype: str, images: int, channels: int, pixels: int) -> dict[str, float]:
    size = 4 if dtype == "fp32" else 2
    weights, field = channels * channels * 9 * size, images * channels * pixels * size
    return row(Kind.CONVOLUTION, dtype, 2.0 * images * channels * channels * 9 * pixels, field + weights, field, weights,
               (images, channels, pixels, channels, 9, 1, 1, 2))  # fmt: skip


def attention(dtype: str, images: int, heads: int, tokens: int, width: int) -> dict[str, float]:
    size = 4 if dtype == "fp32" else 2
    field = images * heads * tokens * width * size
    return row(Kind.ATTENTION, dtype, 4.0 * images * heads * tokens * tokens * width, 3 * field, field, 0,
               (images, heads, tokens, tokens, width, width, 0, heads))  # fmt: skip


def pointwise(dtype: str, elements: int, head: bool) -> dict[str, float]:
    size = 4 if dtype == "fp32" else 2
    return row(Kind.POINTWISE, dtype, 0.0, elements * size, elements * size, 0, (), head)


def call_of(rows: list[dict[str, float]]) -> CallTrace:
    columns = {name: np.zeros(len(rows), dtype=empty.dtype) for name, empty in columns_from_rows([]).items()}
    for place, one in enumerate(rows):
        for name in columns.keys() & one.keys():
            columns[name][place] = one[name]
    return CallTrace("unet", "forward", columns, ("",), ("",), 0, 0)


@st.composite
def networks(draw: st.DrawFn):
    """A function from batch to a call: operations whose rows, images or elements grow with the batch."""
    dtype = draw(st.sampled_from(DTYPES))
    makers = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(("matmul", "convolution", "attention", "pointwise")))
        size = draw(st.integers(1, 4096))
        width = 8 * draw(st.integers(1, 160))
        head = draw(st.booleans())
        makers.append({
            "matmul": lambda batch, s=size, w=width: matmul(dtype, s * batch, w, w),
            "convolution": lambda batch, s=size, w=width: convolution(dtype, batch, w, s),
            "attention": lambda batch, s=size, w=width: attention(dtype, batch, 8, s, min(w, 256)),
            "pointwise": lambda batch, s=size, w=width, h=head: pointwise(dtype, s * w * batch, h),
        }[kind])  # fmt: skip
    return lambda batch: call_of([matmul(dtype, batch, 64, 64), *(make(batch) for make in makers)])


@st.composite
def devices(draw: st.DrawFn) -> Device:
    single = draw(st.floats(5e12, 1e14))
    half = single * draw(st.floats(2.0, 16.0))
    peaks = {"fp32": single, "fp16": half, "bf16": half, "int8": 2 * half, "fp8": 2 * half}
    capability = draw(st.sampled_from(CAPABILITIES))
    if capability >= (8, 0):
        peaks["tf32"] = half / 2
    name = draw(st.sampled_from(("NVIDIA GeForce RTX 4090", "NVIDIA A100")))
    return Device(name=name, kind="cuda", architecture="any", compute_capability=capability,
                  total_bytes=80 << 30, flops_per_second=peaks, bandwidth_bytes_per_second=draw(st.floats(2e11, 4e12)),
                  link_bytes_per_second=draw(st.floats(1e10, 6e10)), sm_count=draw(st.integers(20, 150)),
                  power_watts=draw(st.sampled_from((None, 70.0, 300.0))), basis="assumed")  # fmt: skip


def priced(call: CallTrace, device: Device, recipe: Recipe, fused: bool = False, scheme: str | None = None,
           coefficients: Coefficients | None = None) -> CallTime:  # fmt: skip
    return call_time(call, device, coefficients or default_coefficients(device), recipe, scheme, None, fused)


recipes = st.builds(Recipe, attention=st.sampled_from(("default", "vanilla", "efficient", "cudnn")), channels_last=st.booleans(),
                    tf32=st.booleans())  # fmt: skip
schemes = st.sampled_from((None, *sorted(SCHEMES)))


@FEW
@given(networks(), devices(), recipes, st.booleans(), schemes, st.integers(1, 8), st.integers(0, 8))
def test_more_of_everything_never_takes_less_time(network, device, recipe, fused, scheme, batch, more) -> None:  # type: ignore[no-untyped-def]
    small, large = (priced(network(size), device, recipe, fused, scheme).seconds for size in (batch, batch + more))
    if scheme != "int8dq_2024":  # there, more than 16 rows leave the host for the device, which is faster
        assert large >= small * (1 - 1e-9)


@FEW
@given(networks(), devices(), recipes, st.booleans(), st.integers(1, 8))
def test_time_is_never_below_the_roofline(network, device, recipe, fused, batch) -> None:  # type: ignore[no-untyped-def]
    call = network(batch)
    time = priced(call, device, recipe, fused).kernel_seconds
    moved = call.fused_read_bytes + call.fused_write_bytes if fused else call.read_bytes + call.write_bytes
    fastest = max(device.flops_per_second[name] for name in ("fp32", "fp16", "tf32") if name in device.flops_per_second)
    assert time >= max(call.flops.sum() / fastest, moved.sum() / device.bandwidth_bytes_per_second)


@FEW
@given(networks(), devices(), recipes, st.booleans(), schemes, st.floats(1, 4), st.floats(1, 4), st.floats(1, 4))
def test_a_device_faster_in_every_respect_is_never_slower(  # type: ignore[no-untyped-def]
    network, device, recipe, fused, scheme, compute, bandwidth, wider
) -> None:
    """More multiprocessors come with rates that keep each of them as fast, and with power to feed them."""
    processors = int(device.sm_count * wider)
    rate = compute * processors / device.sm_count
    better = device.model_copy(update={
        "flops_per_second": {name: value * rate for name, value in device.flops_per_second.items()}, "sm_count": processors,
        "bandwidth_bytes_per_second": device.bandwidth_bytes_per_second * bandwidth,
        "power_watts": None if device.power_watts is None else device.power_watts * rate,
    })  # fmt: skip
    call = network(2)
    assert priced(call, better, recipe, fused, scheme).seconds <= priced(call, device, recipe, fused, scheme).seconds * (1 + 1e-9)


@FEW
@given(networks(), devices(), recipes, schemes, st.integers(1, 4))
def test_compiled_kernels_are_never_slower_than_eager_ones(network, device, recipe, scheme, batch) -> None:  # type: ignore[no-untyped-def]
    call = network(batch)
    compiled, eager = (priced(call, device, recipe, fused, scheme) for fused in (True, False))
    assert compiled.kernel_seconds <= eager.kernel_seconds * (1 + 1e-9)
    graphs = priced(call, device, replace(recipe, cuda_graphs=True), True, scheme)
    assert graphs.launch_seconds <= compiled.launch_seconds <= eager.launch_seconds


@FEW
@given(devices(), st.sampled_from(("group_block", "group_leaf")), st.integers(0, 40 << 30), st.integers(1, 500), st.integers(1, 50),
       st.floats(0, 5))  # fmt: skip
def test_overlapped_copies_never_cost_more_than_serial_ones(  # type: ignore[no-untyped-def]
    device, level, onload, units, count, compute
) -> None:
    placed = Residency((0,), (None,), (onload,), (0,), (units * count,), 0, 0, 0)
    time = CallTime(compute, compute, 0.0, 1, "compute", 0.0)
    coefficients = default_coefficients(device)
    ways = (Recipe(offload=level, offload_stream=stream) for stream in (False, True))
    serial, overlapped = (transfer_seconds(placed, 0, count, time, device, coefficients, way) for way in ways)
    assert 0 <= overlapped <= serial * (1 + 1e-9)


@FEW
@given(pipelines(), st.integers(1, 4), st.integers(1, 30))
def test_more_steps_never_take_less_time(parts: tuple[Part, ...], batch: int, more: int) -> None:
    longer = tuple(replace(part, calls=part.calls + more) if part.role == "denoiser" else part for part in parts)
    first, second = (world(chosen, batch)[1].cost(Recipe()).seconds for chosen in (parts, longer))
    assert second >= first


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shipped_shares_stay_below_the_datasheet(capability: tuple[int, int]) -> None:
    device = Device(name="any", kind="cuda", architecture="any", compute_capability=capability, total_bytes=1,
                    flops_per_second={"fp32": 1.0}, bandwidth_bytes_per_second=1.0, basis="assumed")  # fmt: skip
    coefficients = default_coefficients(device)
    for name in ("matmul_share", "convolution_share", "attention_share", "bandwidth_share", "vector_share"):
        assert 0 < getattr(coefficients, name) <= 0.95, name
