"""The model of time against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from planner.cost.coefficients import Coefficients, default_coefficients, host_of
from planner.cost.dequantize import HOST_SECONDS_PER_PRODUCT, HOST_SECONDS_PER_WEIGHT, SCHEMES, VECTOR_FLOPS_PER_CLOCK
from planner.cost.kernels import call_time, compute_seconds, moving_seconds, reachable_peaks
from planner.cost.quantized import STORED_BYTES
from planner.cost.residency import Residency
from planner.cost.transfer import transfer_seconds
from planner.dryrun.trace import CallTrace
from planner.hardware.profiles import device_from_profile, load_gpus
from planner.recipe import Recipe
from planner.types import Device
from planner.validate.calibrated import fit_rows, predicted_seconds, scaled
from planner.validate.predict import quantized
from tests.property.strategies import SMALL, world
from tests.property.test_latency_laws import attention, call_of, convolution, matmul, pointwise

PLAIN = Recipe()


def gpu(**changes: object) -> Device:
    """100 TFLOP/s in 16 bit and 20 in fp32, 1 TB/s, 100 multiprocessors."""
    return Device(name="NVIDIA A100", kind="cuda", architecture="Ampere", compute_capability=(8, 0), total_bytes=80 << 30,
                  flops_per_second={"fp32": 2e13, "tf32": 5e13, "fp16": 1e14, "bf16": 1e14, "int8": 2e14},
                  bandwidth_bytes_per_second=1e12, link_bytes_per_second=2e10, sm_count=100,
                  basis="assumed").model_copy(update=changes)  # fmt: skip


def shares(**changes: object) -> Coefficients:
    plain = {"matmul_share": 0.5, "convolution_share": 0.4, "attention_share": 0.25, "bandwidth_share": 0.8, "vector_share": 0.75,
             "pointwise_per_flop": None, "kernel_seconds": 0.0, "launch_seconds": 0.0, "call_seconds": 0.0, "peak_over_fp32": None,
             "pageable_share": 0.25, "link_share": 0.5, "fresh_bytes_per_second": 1e9, "stream_bytes_per_second": 8e9,
             "onload_module_seconds": 0.0, "sequential_module_seconds": 0.001}  # fmt: skip
    return default_coefficients(gpu()).model_copy(update=plain | changes)


def seconds(call: CallTrace, recipe: Recipe = PLAIN, scheme: str | None = None, fused: bool = False, device: Device | None = None,
            **changes: object) -> float:  # fmt: skip
    return call_time(call, device or gpu(), shares(**changes), recipe, scheme, None, fused).seconds


def test_a_product_takes_its_flops_over_the_share_of_the_peak() -> None:
    full = call_of([matmul("fp16", 12800, 12800, 1024)])  # 100 x 100 tiles on 100 multiprocessors: nothing idle
    assert seconds(full) == pytest.approx(2 * 12800 * 12800 * 1024 / (0.5 * 1e14))


def test_half_of_what_a_partly_filled_wave_loses_is_avoided() -> None:
    quarter = call_of([matmul("fp16", 5 * 128, 5 * 128, 65536)])  # 25 tiles on 100 multiprocessors
    assert seconds(quarter) == pytest.approx(2 * 640 * 640 * 65536 / (0.5 * 1e14 * math.sqrt(0.25)))


def test_fp32_products_run_on_tensor_cores_only_as_tf32() -> None:
    product = call_of([matmul("fp32", 12800, 12800, 4096)])
    flops = 2 * 12800 * 12800 * 4096
    assert seconds(product) == pytest.approx(flops / (0.75 * 2e13))
    assert seconds(product, Recipe(tf32=True)) == pytest.approx(flops / (0.5 * 5e13))
    field = call_of([convolution("fp32", 16, 1280, 12800)])  # cuDNN may use TF32 by default
    assert compute_seconds(field, gpu(), shares(), PLAIN, None)[0] == pytest.approx(field.flops[0] / (0.4 * 5e13))


def test_score_matrices_of_fp32_attention_follow_tf32() -> None:
    heads = call_of([attention("fp32", 8, 100, 128 * 8, 64)])
    quick = gpu(flops_per_second=gpu().flops_per_second | {"tf32": 1e14})
    slow, fast = (compute_seconds(heads, quick, shares(), Recipe(attention="vanilla", tf32=tf32), None)[0] for tf32 in (False, True))
    assert slow == pytest.approx(heads.flops[0] / (0.75 * 2e13))
    assert fast == pytest.approx(heads.flops[0] / (0.5 * 0.6 * 1e14))


def test_fused_attention_in_fp32_makes_three_products_of_one() -> None:
    heads = call_of([attention("fp32", 8, 100, 1024, 64)])

    def per_flop(**changes: object) -> float:
        return compute_seconds(heads, gpu(**changes), shares(), PLAIN, None)[0] / heads.flops[0]

    assert per_flop() == pytest.approx(1 / (0.5 * 5e13 / 3))  # TF32 at a third of its rate, whatever TF32 is allowed to
    strong = gpu().flops_per_second | {"tf32": 1e15}
    assert per_flop(flops_per_second=strong) == pytest.approx(1 / (0.75 * 2e13))  # ordinary instructions split the numbers
    assert per_flop(compute_capability=(7, 5)) == pytest.approx(1 / (0.75 * 2e13))  # without tensor cores


def test_a_board_that_cannot_hold_its_clock_is_slower_at_everything() -> None:
    held = reachable_peaks(gpu(power_watts=100.0), shares(flops_per_joule=0.25e12))
    assert (held["fp16"], held["fp32"]) == pytest.approx((2.5e13, 5e12))
    assert reachable_peaks(gpu(power_watts=1000.0), shares(flops_per_joule=0.25e12)) == gpu().flops_per_second


def test_fewer_tensor_cores_are_kept_busier() -> None:
    product = call_of([matmul("fp16", 12800, 12800, 1024)])
    whole, cut = (gpu(flops_per_second=gpu().flops_per_second | {"fp16": peak}) for peak in (1e14, 4e13))
    times = [seconds(product, device=device, tensor_over_fp32=5.0) for device in (whole, cut)]
    assert times[1] == pytest.approx(times[0] * 0.5 / (0.95 * 0.4))  # more would exceed what any share is taken to be
    assert seconds(product, device=cut) == pytest.approx(times[0] / 0.4)


def test_head_dimensions_are_padded_to_what_the_kernel_has() -> None:
    calls = (call_of([attention("fp16", 8, 100, 1024, width)]) for width in (40, 64))
    forty, sixty_four = (compute_seconds(call, gpu(), shares(vector_share=0.1), PLAIN, None)[0] for call in calls)
    assert forty == pytest.approx(sixty_four)  # 40 is computed as 64


def test_the_softmax_of_narrow_heads_costs_a_fused_kernel_its_rate() -> None:
    per_flop = {}
    for width in (64, 128):
        call = call_of([attention("fp16", 8, 100, 1024, width)])
        per_flop[width] = compute_seconds(call, gpu(), shares(), PLAIN, None)[0] / call.flops[0]
    assert per_flop[128] == pytest.approx(1 / (0.25 * 1e14))
    assert per_flop[64] / per_flop[128] == pytest.approx(370 / 324, rel=0.01)  # published for an H100


def test_silicon_that_limits_16_bit_limits_tf32_to_half_of_that() -> None:
    peaks = reachable_peaks(gpu(flops_per_second=gpu().flops_per_second | {"tf32": 1e14}), shares(peak_over_fp32=2.0))
    assert (peaks["fp16"], peaks["tf32"]) == (4e13, 2e13)


def test_without_tensor_cores_16_bit_products_run_at_the_rate_of_fp32() -> None:
    peaks = reachable_peaks(gpu(compute_capability=(6, 0)), shares())
    assert peaks["fp16"] == peaks["bf16"] == peaks["fp32"] == 2e13


def test_pointwise_kernels_are_limited_by_memory_or_by_instructions() -> None:
    call = call_of([pointwise("fp16", 10**9, True), pointwise("fp32", 10**9, True)])  # 4 and 8 GB moved
    memory, _ = moving_seconds(call, gpu(), shares(), PLAIN)
    assert memory == pytest.approx([4e9 / 0.8e12, 8e9 / 0.8e12])
    issued, _ = moving_seconds(call, gpu(), shares(pointwise_per_flop=0.01), PLAIN)  # 2e11 elements per second
    assert issued == pytest.approx([4e9 / (2e11 * 2), 8e9 / 0.8e12])
    bare = call_of([pointwise("fp16", 10**9, True)])
    eager, compiled = (moving_seconds(bare, gpu(), shares(pointwise_per_flop=0.005), PLAIN, fused=fused)[0] for fused in (False, True))
    assert (4e9 / eager[0], bare.fused_read_bytes[0]) == pytest.approx((2e11, bare.read_bytes[0]))
    assert compiled == pytest.approx(eager / 2)  # several operations to what is read once


def test_layer_norms_are_not_group_norms() -> None:
    from planner.cost.kernels import direct_bytes
    from planner.dryrun.trace import Kind

    norm = {**pointwise("fp16", 1000, True), "kind": int(Kind.NORMALIZATION)}
    call = call_of([norm, norm])
    call.columns["shape"][1] = 1
    texts = ('["aten.native_group_norm.default"', '["aten.native_layer_norm.default"')
    named = CallTrace("unet", "forward", call.columns, ("",), texts, 0, 0)
    assert direct_bytes(named, None, False).tolist() == [6000.0, 4000.0]


def test_launches_set_the_pace_of_small_steps_until_a_graph_replays_them() -> None:
    call = call_of([pointwise("fp16", 1, True)] * 1000)
    slow = {"launch_seconds": 3e-5, "compiled_launch_seconds": 5e-6, "kernel_seconds": 1e-6, "call_seconds": 1e-4}
    assert seconds(call, **slow) == pytest.approx(1000 * 3e-5 + 1e-4)
    assert seconds(call, fused=True, **slow) == pytest.approx(1000 * 5e-6 + 1e-4)
    assert seconds(call, Recipe(cuda_graphs=True), fused=True, **slow) == pytest.approx(1000 * 1e-6, rel=0.01)
    eager = call_time(call, gpu(), shares(**slow), PLAIN)
    assert eager.bound == "launch"


# -- quantized weights --------------------------------------------------------------------------------------------------


LINEAR = [matmul("bf16", 4096, 3072, 3072)] * 10


def test_weight_only_int8_rebuilds_weights_and_rescales_results() -> None:
    plain, quantized_ = (seconds(call_of(LINEAR), scheme=scheme) for scheme in (None, "int8wo"))
    added = 10 * (3 * 3072 * 3072 + 8 * 4096 * 3072) / 0.8e12
    assert quantized_ == pytest.approx(plain + added)


def test_eager_int4_is_slower_than_bf16_and_compiled_int4_is_not() -> None:
    plain, eager = (seconds(call_of(LINEAR), scheme=scheme) for scheme in (None, "int4wo"))
    flops = 10 * 2 * 4096 * 3072 * 3072
    assert eager == pytest.approx(flops / (VECTOR_FLOPS_PER_CLOCK * 2e13 / 128), rel=1e-6), "64 lanes per multiprocessor"
    assert eager > 2 * plain
    assert seconds(call_of(LINEAR), scheme="int4wo", fused=True) <= seconds(call_of(LINEAR), fused=True)
    assert seconds(call_of(LINEAR), scheme="int4wo_2024", fused=True) == pytest.approx(eager, rel=0.01)


def test_dynamic_int8_gains_compiled_and_loses_eagerly() -> None:
    assert seconds(call_of(LINEAR), scheme="int8dq", fused=True) < seconds(call_of(LINEAR), fused=True)
    assert seconds(call_of(LINEAR), scheme="int8dq") > seconds(call_of(LINEAR))


def test_products_of_few_rows_went_to_the_host() -> None:
    modulation = call_of([matmul("bf16", 4, 18432, 3072)])
    weights = 18432 * 3072
    expected = weights * (HOST_SECONDS_PER_WEIGHT + 4 * HOST_SECONDS_PER_PRODUCT)
    assert seconds(modulation, scheme="int8dq_2024") == pytest.approx(expected, rel=0.01)
    assert seconds(modulation, scheme="int8dq") < 0.01 * expected
    many = call_of([matmul("bf16", 17, 18432, 3072)])
    assert seconds(many, scheme="int8dq_2024") < 0.01 * expected


def test_the_library_s_age_decides_where_few_rows_go() -> None:
    assert quantized("unet=int8dq", "torchao", "nightly (Sep 2024)") == {"unet": "int8dq_2024"}
    assert quantized("unet=int8dq", "torchao", "2.8") == {"unet": "int8dq"}
    assert quantized("unet=int8dq", "bitsandbytes", "2.4") == {"unet": "llm_int8"}


def test_outliers_make_the_device_wait_for_the_host() -> None:
    slow = {"launch_seconds": 3e-5}
    plain, waiting = (seconds(call_of(LINEAR), scheme=scheme, **slow) for scheme in ("int8dq", "llm_int8"))
    assert waiting - plain > 0.8 * 10 * SCHEMES["llm_int8"].waits * 3e-5 - plain


def test_every_scheme_that_stores_small_weights_has_a_time() -> None:
    assert not {name for name in STORED_BYTES if name not in SCHEMES} - {"gguf_bf16", "gguf_f16"}


# -- copies -------------------------------------------------------------------------------------------------------------


def moved(recipe: Recipe, onload: int, offload: int, units: int, count: int, compute: float) -> float:
    from planner.cost.kernels import CallTime

    placed = Residency((0,), (None,), (onload,), (offload,), (units * count,), 0, 0, 0)
    return transfer_seconds(placed, 0, count, CallTime(compute, compute, 0.0, 1, "compute", 0.0), gpu(), shares(), recipe)


def test_pageable_copies_block_and_fresh_host_memory_is_slow() -> None:
    # 5 GB/s up, 1 GB/s down into memory that has to be faulted in.
    assert moved(Recipe(offload="model"), 10 * 10**9, 10 * 10**9, 1, 1, 100.0) == pytest.approx(2.0 + 10.0)


def test_sequential_offload_takes_the_host_time_for_every_module() -> None:
    assert moved(Recipe(offload="sequential"), 10**9, 0, 100, 2, 1.0) == pytest.approx(0.2 + 200 * 0.001)


def test_a_stream_hides_copies_behind_compute() -> None:
    stream = Recipe(offload="group_leaf", offload_stream=True)  # 8 GB/s: the stream's limit, below half of the link
    assert moved(stream, 8 * 10**9, 0, 10, 1, 2.0) == pytest.approx(0.1)  # only the first unit shows
    assert moved(stream, 8 * 10**9, 0, 10, 1, 0.4) == pytest.approx(1.0 + 0.1 - 0.4)
    assert moved(stream, 8 * 10**9, 0, 1, 1, 0.0) == pytest.approx(1.0)


# -- coefficients -------------------------------------------------------------------------------------------------------


def test_desktops_launch_faster_than_servers() -> None:
    desktop, server = (default_coefficients(gpu(name=name)) for name in ("NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"))
    assert (host_of(gpu(name="NVIDIA GeForce RTX 4090")), host_of(gpu(name="Tesla T4"))) == ("desktop", "server")
    assert desktop.launch_seconds < server.launch_seconds


def test_every_card_has_coefficients_whose_numbers_have_sources() -> None:
    for profile in load_gpus():
        coefficients = default_coefficients(device_from_profile(profile))
        assert all(coefficients.source(name) for name in Coefficients.model_fields), profile.name
        assert reachable_peaks(device_from_profile(profile), coefficients)


# -- fits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a fit asks of a row."""

    model: object
    measured_seconds: float

    def seconds(self, coefficients: Coefficients) -> float | None:
        return predicted_seconds(self.model, PLAIN, coefficients, False)  # type: ignore[arg-type]


def test_three_rows_recover_a_card_s_pace() -> None:
    models = {batch: world(SMALL, batch)[1] for batch in (1, 4, 16, 8)}
    base = models[1].coefficients
    true = scaled(base, np.array([math.log(0.7), math.log(0.8), math.log(2e-5)]))
    jobs = [Measured(models[batch], predicted_seconds(models[batch], PLAIN, true, False) or 0.0) for batch in (1, 4, 16)]
    expected = predicted_seconds(models[8], PLAIN, true, False)
    fitted = fit_rows(jobs, base)  # type: ignore[arg-type]
    assert predicted_seconds(models[8], PLAIN, fitted, False) == pytest.approx(expected, rel=0.02)
    assert fit_rows(jobs[::-1], base).matmul_share == pytest.approx(fitted.matmul_share, rel=1e-3)  # type: ignore[arg-type]
