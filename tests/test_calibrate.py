"""Probes rebuild a trace's operations and time them within bounds; the fit recovers what made the numbers; the façade is lazy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibrate import (
    Calibration,
    Store,
    calibrate,
    calibration_for,
    cpu_device_measured,
    cpu_peaks,
    in_variant,
    probe_missing,
    with_host_share,
)
from planner.calibrate import probe as probing
from planner.calibrate.fit import _ASSUMED_RATES, call_of, fit_coefficients, kernel_seconds, rates_of
from planner.calibrate.grid import cpu_peak_signatures, matmul_signature, pointwise_signature, probe_signatures
from planner.calibrate.heap import fresh_bytes, trim_bytes
from planner.calibrate.identity import thread_count
from planner.calibrate.probe import probe_operations
from planner.calibrate.rebuild import RandomTensors, rebuild
from planner.calibrate.samples import Rate, Run, Sample
from planner.calibrate.signature import flops_of, parse_signature, variant_signature
from planner.calibrate.timing import LEAST, time_repetitions
from planner.cost.coefficients import default_coefficients
from planner.cost.kernels import call_time
from planner.dryrun.operations import signature_text
from planner.dryrun.provider import Traces
from planner.dryrun.trace import CallTrace, columns_from_rows
from planner.errors import CalibrationError, HardwareError
from planner.hardware.host import cpu_device
from planner.models import resolve
from planner.recipe import Recipe
from planner.types import Device, Workload
from tests.zoo import FAMILIES

CPU = torch.device("cpu")
NCHW = '{"t": [[2, 8, 4, 6], [192, 24, 6, 1], "fp32"]}'
NHWC_STRIDE = (192, 1, 48, 8)
SILU = f'["aten.silu.default", [{NCHW}], {{}}]'


def gpu(**changes: object) -> Device:
    known = {"name": "Card", "kind": "cuda", "architecture": "ampere", "compute_capability": (8, 0), "total_bytes": 40 << 30,
             "flops_per_second": {"fp16": 3e14, "bf16": 3e14, "fp32": 2e13}, "bandwidth_bytes_per_second": 1.5e12,
             "link_bytes_per_second": 2.5e10, "sm_count": 108, "basis": "datasheet"}  # fmt: skip
    return Device.model_validate(known | changes)


# -- signatures -----------------------------------------------------------------------------------------------------


def test_a_signature_gives_sizes_and_flops() -> None:
    addmm = parse_signature(matmul_signature("fp16", 4, 6, 10))
    assert flops_of(addmm) == 2 * 4 * 6 * 10
    assert addmm.dtype == "fp16"
    assert addmm.tensors()[2].stride == (1, 10), "an nn.Linear weight is transposed"
    key = '{"t": [[2, 3, 9, 7], [189, 63, 7, 1], "bf16"]}'
    attention = parse_signature(f'["attention", [{{"t": [[2, 3, 5, 7], [105, 35, 7, 1], "bf16"]}}, {key}, {key}, null], {{}}]')
    assert flops_of(attention) == 4 * 2 * 3 * 5 * 9 * 7
    broadcast = parse_signature('["aten.exp.default", [{"t": [[4, 1000], [1, 0], "fp32"]}], {}]')
    assert broadcast.tensors()[0].storage_bytes == 16, "an expanded dimension takes no memory"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("{}", "not"),
        ('["os.system", ["ls"], {}]', "no aten operation"),
        ('["aten.__class__.x.y", [], {}]', "no aten operation"),
        ('["aten.silu.default", [{"t": [[-1], [1], "fp32"]}], {}]', "impossible"),
        ('["aten.silu.default", [{"t": [[2], [1, 1], "fp32"]}], {}]', "impossible"),
        ('["aten.silu.default", [{"t": [[true], [1], "fp32"]}], {}]', "impossible"),
        ('["aten.silu.default", [{"t": [[2], [1], "complex64"]}], {}]', "dtype"),
        ('["aten.from_file.default", ["/etc/passwd"], {}]', "text argument"),
        ('["aten.silu.default", [{"other": 3}], {}]', "cannot be made again"),
        ('["aten.silu.default", [], {}] @upside_down', "unknown variant"),
        ("[" * 10_000, "no JSON"),
        ('["aten.silu.default", ' + "[" * 20 + "]" * 20 + ", {}]", "cannot be made again"),
        ("x" * 20_000, "longer"),
    ],
)
def test_what_is_no_signature_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_signature(text)


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=6).map(json.dumps))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_signature_or_a_value_error(text: str) -> None:
    try:
        operation = parse_signature(text)
    except ValueError:
        return
    assert operation.bytes >= 0


def test_channels_last_changes_what_lies_dense_in_nchw_and_nothing_else() -> None:
    key = variant_signature(SILU, "channels_last")
    assert key != SILU
    assert parse_signature(key).tensors()[0].stride == NHWC_STRIDE
    assert parse_signature(key).text == key
    flat = '["aten.silu.default", [{"t": [[2, 8], [8, 1], "fp32"]}], {}]'
    assert variant_signature(flat, "channels_last") == flat
    tokens = '["aten.native_layer_norm.default", [{"t": [[2, 24, 8], [192, 1, 24], "fp32"]}, [8], null, null, 1e-05], {}]'
    assert parse_signature(variant_signature(tokens, "channels_last")).tensors()[0].stride == (192, 8, 1)
    assert variant_signature(SILU, "vanilla") == SILU
    assert variant_signature(SILU, "") == SILU


# -- rebuilding -----------------------------------------------------------------------------------------------------


def test_an_operation_is_made_again_with_its_shapes_strides_and_scalars() -> None:
    given_args = (torch.empty_strided((3, 4), (1, 3)), torch.empty(4, 5, dtype=torch.float32))
    text = signature_text(torch.ops.aten.mm.default, given_args, {})
    runnable = rebuild(parse_signature(text), RandomTensors(CPU), copies=3)
    assert len(runnable.inputs) == 3, "as many weights as asked for"
    first, second = runnable.inputs[0][0], runnable.inputs[1][0]
    assert first[0] is second[0]
    assert first[1] is not second[1]
    assert first[0].stride() == (1, 3)
    assert torch.equal(runnable.run(0), first[0] @ first[1])
    clamped = rebuild(parse_signature(f'["aten.clamp.default", [{NCHW}, 0.75, 0.8], {{}}]'), RandomTensors(CPU)).run(0)
    assert 0.75 <= float(clamped.min()) <= float(clamped.max()) <= 0.8 + 1e-6


@pytest.mark.parametrize(
    "text",
    [
        '["aten.embedding.default", [{"t": [[5, 3], [3, 1], "fp32"]}, {"t": [[2, 40], [40, 1], "int64"]}], {}]',
        '["aten.gather.default", [{"t": [[7, 3], [3, 1], "fp32"]}, 1, {"t": [[7, 30], [30, 1], "int64"]}], {}]',
        '["aten.index_select.default", [{"t": [[2, 9], [9, 1], "fp32"]}, 0, {"t": [[50], [1], "int64"]}], {}]',
        '["aten.index.Tensor", [{"t": [[2, 9], [9, 1], "fp32"]}, [{"t": [[30], [1], "int64"]}, {"t": [[30], [1], "int64"]}]], {}]',
        '["aten.index.Tensor", [{"t": [[9, 2], [2, 1], "fp32"]}, [null, {"t": [[30], [1], "int64"]}]], {}]',
        '["aten.floor_divide.default", [{"t": [[4], [1], "int64"]}, {"t": [[4], [1], "int64"]}], {}]',
        '["aten._to_copy.default", [{"t": [[4], [1], "fp32"]}], {"dtype": {"dtype": "bf16"}, "device": {"other": "meta"}}]',
        '["aten.arange.default", [6], {"device": {"other": "meta"}, "pin_memory": false}]',
        '["aten.cat.default", [[{"t": [[2], [1], "fp32"]}, {"t": [[3], [1], "fp32"]}]], {}]',
        '["aten.gelu.default", [{"t": [[2], [1], "fp32"]}], {"approximate": "tanh"}]',
        '["aten.clone.default", [' + NCHW + '], {"memory_format": {"other": "torch.contiguous_format"}}]',
        '["aten.zeros.default", [[2, 3]], {"dtype": {"dtype": "fp16"}}]',
        '["aten.silu.default", [{"t": [[0, 3], [3, 1], "fp32"]}], {}]',
    ],
)
def test_index_scalar_dtype_and_device_arguments_are_valid(text: str) -> None:
    out = rebuild(parse_signature(text), RandomTensors(CPU)).run(0)
    assert out.device == CPU


def test_an_operation_that_takes_no_tensors_is_not_run() -> None:
    with pytest.raises(ValueError, match="takes no tensors"):
        rebuild(parse_signature('["aten.seed.default", [1], {}]'), RandomTensors(CPU))
    with pytest.raises(ValueError, match="has no"):
        rebuild(parse_signature('["aten.not_there.default", [{"t": [[1], [1], "fp32"]}], {}]'), RandomTensors(CPU))


def test_vanilla_attention_computes_what_sdpa_does() -> None:
    tensors = ", ".join(['{"t": [[2, 4, 9, 8], [288, 72, 8, 1], "fp32"]}'] * 3)
    mask = '{"t": [[2, 1, 9, 9], [81, 81, 9, 1], "fp32"]}'
    for last in ("null", mask):
        text = f'["attention", [{tensors}, {last}], {{}}]'
        plain = rebuild(parse_signature(text), RandomTensors(CPU, 7)).run(0)
        vanilla = rebuild(parse_signature(variant_signature(text, "vanilla")), RandomTensors(CPU, 7)).run(0)
        assert torch.allclose(plain.reshape(-1), vanilla.reshape(-1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_controlnet", "sd3", "flux", "pixart_alpha", "animatediff", "wan21_t2v"])
def test_nearly_all_work_of_real_pipelines_can_be_probed(name: str) -> None:
    case = FAMILIES[name]
    pipe = case.build()
    traces = Traces.of(resolve(pipe), Workload(), case.inputs(pipe))
    texts = [text for call in traces.trace().calls for text in call.shapes]
    samples = probe_operations(texts, "cpu", 120.0, 1 << 30)
    assert set(samples) == set(texts)
    skipped = {text: sample.skipped for text, sample in samples.items() if sample.skipped}
    assert len(skipped) <= 0.05 * len(samples), skipped


# -- probing --------------------------------------------------------------------------------------------------------


def test_every_repetition_is_kept_and_the_median_counts() -> None:
    sample = probe_operations([SILU], "cpu", 5.0, 1 << 30)[SILU]
    assert LEAST <= len(sample.repetitions) <= 64
    assert sample.seconds == sorted(sample.repetitions)[len(sample.repetitions) // 2] or len(sample.repetitions) % 2 == 0
    assert sample.threads == torch.get_num_threads()


def test_the_costliest_operations_come_first_and_a_spent_budget_ends_it() -> None:
    small, large = matmul_signature("fp32", 8, 8, 8), matmul_signature("fp32", 512, 512, 512)
    told: list[str] = []
    assert list(probe_operations({small: 1, large: 1}, "cpu", 30.0, 1 << 30)) == [large, small]
    assert list(probe_operations({small: 10**9, large: 1}, "cpu", 30.0, 1 << 30)) == [small, large], "how often it runs counts"
    assert probe_operations([small, large], "cpu", -1.0, 1 << 30, told.append) == {}
    assert "0 of 2" in told[-1]


def test_what_cannot_be_probed_is_named_with_its_reason() -> None:
    huge = pointwise_signature(1 << 30, "fp32")
    broken = '["aten.mm.default", [{"t": [[2, 3], [3, 1], "fp32"]}, {"t": [[4, 5], [5, 1], "fp32"]}], {}]'
    foreign = '["torchao.secret.default", [], {}]'
    found = probe_operations([huge, broken, foreign, SILU], "cpu", 30.0, 1 << 20)
    assert "more than the limit of 1048576" in (found[huge].skipped or "")
    assert "RuntimeError" in (found[broken].skipped or "")
    assert "no aten operation" in (found[foreign].skipped or "")
    assert found[SILU].seconds is not None
    assert found[huge].seconds is None


def test_an_interrupted_probe_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def interrupted(*args: object) -> tuple[float, ...]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return (1.0, 1.0, 1.0)

    monkeypatch.setattr(probing, "time_repetitions", interrupted)
    texts = [pointwise_signature(count, "fp32") for count in (64, 32, 16)]
    told: list[str] = []
    assert list(probe_operations(texts, "cpu", 30.0, 1 << 30, told.append)) == texts[:1]
    assert "interrupted: 1 of 3" in told[-1]


def test_weights_take_turns_within_the_memory_limit() -> None:
    operation = parse_signature(matmul_signature("fp32", 4, 1024, 1024))
    assert probing._weight_copies(operation, 1 << 40) == 8
    assert probing._weight_copies(operation, operation.bytes + (9 << 20)) == 3, "room for two more of 4 MiB"
    assert probing._weight_copies(operation, operation.bytes) == 1
    assert probing._weight_copies(parse_signature(SILU), 1 << 40) == 1


def test_repetitions_are_at_least_three_and_warm_up_is_not_counted() -> None:
    seen: list[int] = []
    assert len(time_repetitions(seen.append, CPU, -1.0)) == LEAST
    assert seen == [0, 1, 2, 3]
    assert len(time_repetitions(seen.append, CPU, 60.0, most=5)) == 5


def test_scattered_repetitions_are_called_unstable() -> None:
    assert not Sample(signature="a", threads=1, repetitions=(1.0, 1.1, 0.9)).unstable
    assert Sample(signature="a", threads=1, repetitions=(1.0, 2.0, 0.5)).unstable
    assert not Sample(signature="a", threads=1, repetitions=(1.0, 1.0, 90.0)).unstable, "a single outlier is not scatter"


@pytest.mark.slow
def test_a_quick_device_probe_covers_host_and_kernels(tmp_path: Path) -> None:
    told: list[str] = []
    store = Store(tmp_path)
    device = cpu_device_measured(store=store)
    made = calibrate(device, True, told.append, store=store)
    assert made.basis == "measured"
    assert {"launch", "python", "picture", "fresh_memory"} <= set(made.rates)
    assert made.coefficients.matmul_share > 0
    assert "runs 2" in made.coefficients.source("matmul_share")
    assert made.coefficients.source("compile_seconds_per_kernel") == default_coefficients(device).source("compile_seconds_per_kernel")
    assert any("launch overhead" in line for line in told)
    again = calibration_for(device, store=Store(tmp_path))
    assert again.coefficients == made.coefficients


def test_the_grid_probes_both_memory_formats_and_shrinks_to_the_limit() -> None:
    texts = probe_signatures("cuda", ("fp16",), False, 1 << 30)
    assert any(text.endswith("@channels_last") for text in texts)
    assert sum(text.startswith('["attention"') for text in texts) == 5
    assert set(probe_signatures("cuda", ("fp16",), True, 1 << 30)) <= set(texts) | {pointwise_signature(1 << 20, "fp16")}
    assert max(parse_signature(text).bytes for text in probe_signatures("cpu", ("fp32",), True, 64 << 20)) <= 64 << 20


# -- fit ------------------------------------------------------------------------------------------------------------

TRUTH = {"matmul_share": 0.62, "convolution_share": 0.41, "attention_share": 0.33, "bandwidth_share": 0.77, "kernel_seconds": 6e-6}


def synthetic_run(device: Device, number: int, noise: float, wild: bool = False) -> Run:
    """What a device with the coefficients TRUTH would have shown, with lognormal noise and, if asked, one in ten timings off by 5."""
    random = np.random.default_rng(number)
    truth = default_coefficients(device).model_copy(update=TRUTH | dict.fromkeys(_ASSUMED_RATES))
    samples = []
    for index, text in enumerate(probe_signatures("cuda", ("fp16", "fp32"), False, 4 << 30)):
        operation = parse_signature(text)
        recipe = Recipe(channels_last=operation.variant == "channels_last")
        exact = call_time(call_of([operation]), device, truth, recipe).kernel_seconds
        factor = 5.0 if wild and index % 10 == 3 else 1.0
        samples.append(Sample(signature=text, threads=1, repetitions=tuple(exact * factor * np.exp(noise * random.standard_normal(5)))))
    rates = (Rate(name="launch", units=100, repetitions=(3e-3,), threads=1),
             Rate(name="pinned_to_device", units=1e9, repetitions=(0.05,), threads=1),
             Rate(name="pinned_to_host", units=1e9, repetitions=(0.05,), threads=1),
             Rate(name="pageable_to_device", units=1e9, repetitions=(0.1,), threads=1))  # fmt: skip
    return Run(
        id=f"run{number}",
        date=f"2026-01-0{number + 1}T00:00:00",
        quick=False,
        complete=True,
        threads=1,
        samples=tuple(samples),
        rates=rates,
    )


@pytest.mark.parametrize(("noise", "wild", "tolerance"), [(0.0, False, 0.01), (0.05, False, 0.05), (0.05, True, 0.12)])
def test_the_fit_recovers_what_made_the_numbers(noise: float, wild: bool, tolerance: float) -> None:
    device = gpu()
    fit = fit_coefficients([synthetic_run(device, number, noise, wild) for number in range(3)], device, default_coefficients(device))
    for name, value in TRUTH.items():
        assert getattr(fit.coefficients, name) == pytest.approx(value, rel=tolerance), name
    assert fit.coefficients.launch_seconds == pytest.approx(3e-5)
    assert fit.coefficients.link_share == pytest.approx(1e9 / 0.05 / 2.5e10)
    assert fit.coefficients.pageable_share == pytest.approx(1e9 / 0.1 / 2.5e10)
    assert fit.coefficients.basis == "measured"
    assert "run0, run1, run2; n = " in fit.coefficients.source("matmul_share")
    assert fit.coefficients.context_bytes == default_coefficients(device).context_bytes, "what was not probed stays"


@given(st.permutations(range(4)))
@settings(max_examples=6, deadline=None)
def test_the_order_of_runs_does_not_matter(order: list[int]) -> None:
    device = gpu()
    runs = [synthetic_run(device, number, 0.1) for number in range(4)]
    base = default_coefficients(device)
    assert fit_coefficients([runs[place] for place in order], device, base) == fit_coefficients(runs, device, base)


def test_runs_with_other_threads_than_the_newest_are_left_out() -> None:
    device = gpu()
    newest, older = synthetic_run(device, 2, 0.0), synthetic_run(device, 0, 0.0)
    slow = older.model_copy(
        update={
            "threads": 8,
            "samples": tuple(s.model_copy(update={"repetitions": tuple(9 * value for value in s.repetitions)}) for s in older.samples),
        }
    )
    base = default_coefficients(device)
    assert fit_coefficients([slow, newest], device, base).coefficients == fit_coefficients([newest], device, base).coefficients


def test_nothing_usable_is_an_error_that_says_what_to_do() -> None:
    run = Run(id="r", date="2026-01-01", quick=True, complete=False, threads=1)
    with pytest.raises(CalibrationError, match="run planner calibrate"):
        fit_coefficients([run], gpu(), default_coefficients(gpu()))


@pytest.mark.parametrize(
    "device", [gpu(), gpu(architecture="turing", compute_capability=(7, 5)), cpu_device()], ids=lambda device: device.name
)
def test_the_fit_times_operations_as_the_cost_model_does(device: Device) -> None:
    coefficients = default_coefficients(device).model_copy(update=TRUTH)
    operations = [parse_signature(text) for text in probe_signatures("cuda", ("fp16", "fp32"), False, 4 << 30)]
    for recipe in (Recipe(), Recipe(channels_last=True)):
        call = call_of(operations)
        expected = call_time(call, device, coefficients, recipe).kernel_seconds
        assert float(kernel_seconds(call, device, coefficients, recipe).sum()) == pytest.approx(expected)


def test_a_call_made_of_signatures_is_the_one_a_trace_would_have() -> None:
    call = call_of([parse_signature(matmul_signature("bf16", 4, 6, 10)), parse_signature(pointwise_signature(5, "fp32"))])
    assert call.dims[0].tolist()[:4] == [1, 4, 6, 10]
    assert call.read_bytes.tolist() == [2 * (6 + 40 + 60), 40]
    assert call.write_bytes.tolist() == [2 * 24, 20]
    assert call.param_bytes.tolist() == [120, 0]
    strided = '["aten.convolution.default", [{"t": [[2, 3, 9, 9], [243, 81, 9, 1], "fp32"]}, {"t": [[5, 3, 3, 3], [27, 9, 3, 1], "fp32"]}, null, [2, 2], [1, 1], [1, 1], false, [0, 0], 1], {}]'  # noqa: E501
    conv = call_of([parse_signature(strided)])
    assert conv.dims[0].tolist() == [2, 3, 25, 5, 9, 1, 4, 2], "9 pixels with padding 1 and stride 2 give 5"
    assert conv.write_bytes.tolist() == [4 * 2 * 5 * 25]


# -- host share -----------------------------------------------------------------------------------------------------


def traced(spans: list[tuple[int, int, int]], shape: list[int], shapes: tuple[str, ...]) -> CallTrace:
    columns = {name: np.zeros(len(shape), dtype=empty.dtype) for name, empty in columns_from_rows([]).items()}
    columns |= {"shape": np.array(shape, dtype=np.int64), "times": np.ones(len(shape), dtype=np.int64)}
    return CallTrace("unet", "forward", columns, ("",), shapes, 0, 0, (), np.array(spans, dtype=np.int64).reshape(-1, 3))


def test_fresh_memory_is_what_the_heap_gave_back_and_takes_again() -> None:
    """12 MB, then 8 MB more, all freed: a heap that keeps 16 MB is trimmed to 0, one that keeps 20 MB is never trimmed."""
    mb = 10**6
    call = traced([(0, 2, 12 * mb), (1, 2, 8 * mb)], [0, 0, 0], ("a",))
    assert fresh_bytes(call, 16 * mb).tolist() == [12 * mb, 8 * mb, 0]
    assert fresh_bytes(call, 20 * mb).tolist() == [0, 0, 0], "the second time round everything is there"
    assert trim_bytes([call]) == 24 * mb
    large = traced([(0, 1, 100 * mb)], [0], ("a",))
    assert fresh_bytes(large, 0).tolist() == [0], "blocks above 32 MiB are mapped anew in the probe as well"
    assert trim_bytes([large]) == 64 << 20


def test_a_cpu_operation_costs_its_kernel_python_and_fresh_memory() -> None:
    mb = 10**6
    call = traced([(0, 1, 12 * mb), (1, 2, 2 * mb), (2, 3, 30 * mb), (3, 4, 1 * mb)], [0, 1, 0, 1], ("a", "b"))
    kept = trim_bytes([call])
    expected = fresh_bytes(call, kept)
    assert expected.sum() == 0, "60 MB are kept of 30"
    found = with_host_share({"a": 1.0, "b": 2.0}, [call], {"python": 0.25, "fresh_memory": 1e-9})
    assert found == {"a": 1.25, "b": 2.25}
    vanilla = with_host_share({"a @vanilla": 1.0}, [call], {"python": 0.25}, variants=("vanilla",))
    assert vanilla == {"a @vanilla": 1.0 + 8 * 0.25}, "eight operations take the place of one"


# -- façade ---------------------------------------------------------------------------------------------------------


def sample_of(text: str, seconds: float) -> Sample:
    return Sample(signature=text, threads=thread_count(), repetitions=(seconds,) * 3)


def test_known_operations_are_not_timed_again_and_new_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, device = Store(tmp_path), cpu_device()
    call = traced([], [0, 1, 1], (SILU, pointwise_signature(8, "fp32")))
    empty = calibration_for(device, store=store)
    assert empty.basis == default_coefficients(device).basis
    assert "not calibrated" in empty.notes[0]
    asked: list[dict[str, int]] = []

    def measured(shapes: dict[str, int], *rest: object) -> dict[str, Sample]:
        asked.append(dict(shapes))
        return {text: sample_of(text, 0.5) for text in shapes}

    rate = Rate(name="python", units=100, repetitions=(0.025,), threads=thread_count())
    host = Run(id="host", date="2026-01-01", quick=True, complete=False, threads=thread_count(), rates=(rate,))
    monkeypatch.setattr(probing, "probe_operations", measured)
    monkeypatch.setattr(probing, "probe_host", lambda *rest: host)
    assert probe_missing([(call, 3)], device, empty, 9.0) == dict.fromkeys(call.shapes, 0.50025)
    assert asked == [{SILU: 3, call.shapes[1]: 6}]
    later = calibration_for(device, store=Store(tmp_path))
    monkeypatch.delattr(probing, "probe_host")
    assert later.coefficients.basis == default_coefficients(device).basis, "the host alone is no calibration of kernels"
    assert probe_missing([call], device, later, 9.0) == dict.fromkeys(call.shapes, 0.50025)
    assert probe_missing([call], device, later, 9.0) == dict.fromkeys(call.shapes, 0.50025)
    assert probe_missing([call], device, later, 9.0, variants=("channels_last",))[variant_signature(SILU, "channels_last")] == 0.50025
    assert asked[1:] == [{SILU: 1, call.shapes[1]: 2}, {variant_signature(SILU, "channels_last"): 1}], "a spot check, once"


@pytest.mark.parametrize(("then", "trusted"), [(0.5, True), (0.7, True), (5.0, False), (0.1, False)])
def test_timings_of_a_machine_that_was_busy_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: float,
                                                            trusted: bool) -> None:  # fmt: skip
    store, device = Store(tmp_path), cpu_device()
    texts = tuple(pointwise_signature(size, "fp32") for size in (8, 16, 32, 64, 128))
    call = traced([], list(range(len(texts))), texts)
    found = calibration_for(device, store=store)
    assert found.key is not None
    store.add_samples(found.key, [sample_of(text, then) for text in texts])
    quiet = Rate(name="python", units=100, repetitions=(1e-3,), threads=thread_count())
    store.add_run(found.key, Run(id="host", date="2026-01-01", quick=True, complete=False, threads=thread_count(), rates=(quiet,)))
    asked: list[int] = []

    def measured(shapes: dict[str, int], *rest: object) -> dict[str, Sample]:
        asked.append(len(shapes))
        return {text: sample_of(text, 0.5) for text in shapes}

    monkeypatch.setattr(probing, "probe_operations", measured)
    seconds = probe_missing([call], device, calibration_for(device, store=Store(tmp_path)), 9.0)
    assert asked == ([3] if trusted else [3, 2])
    heaviest_only = trusted and then != 0.5
    kept = Store(tmp_path).load(found.key).by_key()
    assert sum(sample.seconds == 0.5 for sample in kept.values()) == (3 if heaviest_only else 5)
    assert sorted(seconds.values()) == pytest.approx(sorted([0.5 + 1e-5] * 3 + [(then if heaviest_only else 0.5) + 1e-5] * 2))


def host_run(number: int, python: tuple[float, ...], picture: tuple[float, ...] = (1e-3,) * 4) -> Run:
    rates = (Rate(name="python", units=100, repetitions=python, threads=2), Rate(name="picture", units=1e6, repetitions=picture, threads=2))
    return Run(id=f"r{number}", date=f"2026-01-0{number}", quick=True, complete=False, threads=2, rates=rates)


def test_host_figures_of_a_busy_machine_do_not_count_beside_quiet_ones() -> None:
    quiet, scattered, stuck = host_run(1, (2e-3,) * 4), host_run(2, (1e-9, 6.0, 0.5, 1e-9)), host_run(3, (3.0,) * 4, (0.1,) * 4)
    assert quiet.quiet
    assert not scattered.quiet
    assert not stuck.quiet, "30 ms for one operation"
    assert stuck.unstable() == ("python",)
    assert rates_of([quiet, scattered, stuck]) == {"python": 2e-5, "picture": 1e-9}
    alone = rates_of([scattered, stuck])
    assert alone["python"] < 1e-8, "the least that was seen: other load only adds"
    assert alone["picture"] == 1e-9


def test_probes_of_another_thread_count_do_not_count(tmp_path: Path) -> None:
    store, device = Store(tmp_path), cpu_device()
    key = calibration_for(device, store=store).key
    assert key is not None
    store.add_samples(key, [sample_of(SILU, 1.0).model_copy(update={"threads": thread_count() + 1})])
    assert probe_missing([traced([], [0], (SILU,))], device, calibration_for(device, store=store), 0.0) == {}


def test_in_variant_puts_other_layouts_under_the_plain_names() -> None:
    plain, other = SILU, pointwise_signature(8, "fp32")
    call = traced([], [0, 1], (plain, other, "never probed"))
    probes = {plain: 1.0, variant_signature(plain, "channels_last"): 2.0, other: 3.0}
    assert in_variant(probes, call, "channels_last") == {plain: 2.0, other: 3.0}
    assert in_variant(probes, call, "") == {plain: 1.0, other: 3.0}


def test_the_cpu_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 2 x 1024 x 512 x 512 FLOP in 1 ms, and a copy of 2 x 64 MiB in 10 ms."""
    copy, product = cpu_peak_signatures()[0], cpu_peak_signatures()[1]
    timed = {copy: sample_of(copy, 0.01), product: sample_of(product, 0.001)}
    runs: list[int] = []
    monkeypatch.setattr(probing, "probe_operations", lambda *args: runs.append(1) or timed)
    for _ in range(2):
        device = cpu_device_measured(store=Store(tmp_path))
        assert device.basis == "measured"
        assert device.flops_per_second["fp32"] == pytest.approx(2 * 1024 * 512 * 512 / 0.001)
        assert device.flops_per_second["bf16"] == device.flops_per_second["fp32"], "no product in bf16 was timed"
        assert device.bandwidth_bytes_per_second == pytest.approx(2 * (64 << 20) / 0.01)
        assert "assumed" not in (device.note or "")
    assert runs == [1]
    assert cpu_peaks([timed[copy]]) is None


def test_an_unmeasurable_cpu_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "probe_operations", lambda *args: {})
    device = cpu_device_measured(store=Store(tmp_path))
    assert device.basis == "assumed"
    assert "could not be measured" in (device.note or "")


def test_never_reads_nothing_and_absent_devices_are_refused(tmp_path: Path) -> None:
    never = calibration_for(cpu_device(), mode="never", store=Store(tmp_path / "absent"))
    assert never.samples == {}
    assert never.corrections("p") == (1.0, 1.0)
    assert not (tmp_path / "absent").exists()
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="no CUDA device"):
            calibrate(gpu(), True, store=Store(tmp_path))


WITHOUT_TORCH = """
import sys
from planner.calibrate import Store, calibration_for, probe_missing, device_key
from planner.hardware.host import cpu_device
found = calibration_for(cpu_device(), store=Store(__import__("pathlib").Path(sys.argv[1])))
assert probe_missing([], cpu_device(), found, 5.0) == {}
assert not {"torch", "diffusers", "rich"} & set(sys.modules), "torch was imported"
print(found.basis)
"""


@pytest.mark.slow
def test_reading_a_calibration_needs_no_torch(tmp_path: Path) -> None:
    store, device = Store(tmp_path), cpu_device()
    key = calibration_for(device, store=store).key
    assert key is not None
    probes = tuple(sample_of(text, 1e-3) for text in probe_signatures("cpu", ("fp32",), True, 1 << 30))
    store.add_run(key, Run(id="r", date="2026-01-01", quick=True, complete=True, threads=thread_count(), samples=probes))
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "measured\n"


def test_a_calibration_without_a_store_learns_nothing() -> None:
    found = Calibration(default_coefficients(gpu()), {}, "assumed")
    assert found.corrections("p") == (1.0, 1.0)
    assert math.isfinite(found.coefficients.latency_error)
