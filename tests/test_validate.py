"""Tables of published measurements: reading, expressing, counting, comparing."""

from __future__ import annotations

import builtins
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ProfileError, UsageError
from planner.types import Device, Estimate
from planner.units import GIB
from planner.validate import (
    Case,
    Prediction,
    PublishedRow,
    RowResult,
    Unexpressed,
    express,
    plot,
    read_table,
    render_text,
    row_record,
    run,
    summarize,
    validate,
    value_from_estimate,
)
from planner.validate.order import faster, ladders
from planner.validate.rows import MAX_FILE_BYTES, columns
from planner.validate.stats import confusion, percentile, statistics
from planner.validate.words import CannotExpress, parse_compile, parse_dtype, parse_offload

PUBLISHED = Path(__file__).parents[1] / "calibration" / "published"
TABLE, TORCH2 = PUBLISHED / "published.csv", PUBLISHED / "torch2_table.csv"


@pytest.fixture(scope="module")
def answers() -> dict[str, Case | Unexpressed]:
    return {answer.row: answer for answer in map(express, read_table(TABLE))}


@pytest.fixture(scope="module")
def torch2() -> list[Case | Unexpressed]:
    return [express(row) for row in read_table(TORCH2)]


def case(answers: dict[str, Case | Unexpressed], row: str) -> Case:
    answer = answers[row]
    assert isinstance(answer, Case), answer
    return answer


# --- the bundled tables ----------------------------------------------------------------------------------------------


def test_every_bundled_row_is_read_with_source_and_grade() -> None:
    rows = read_table(TABLE)
    assert len(rows) == 430
    assert len({row.id for row in rows if isinstance(row, PublishedRow)}) == 430
    assert all(isinstance(row, PublishedRow) and row.source and row.grade in ("A", "B") for row in rows)
    assert len(read_table(TORCH2)) == 216


def test_at_least_85_percent_of_pipeline_and_vae_rows_are_expressed(answers: dict[str, Case | Unexpressed]) -> None:
    rows = {row.id: row for row in read_table(TABLE) if isinstance(row, PublishedRow)}
    wanted = [n for n, row in rows.items() if "forward only" not in row.pipeline_class and "fork" not in row.pipeline_class]
    expressed = [name for name in wanted if isinstance(answers[name], Case)]
    assert len(wanted) == 419
    assert len(expressed) >= 0.85 * len(wanted)
    assert len(expressed) == 398


def test_each_refused_row_has_a_reason(answers: dict[str, Case | Unexpressed], torch2: list[Case | Unexpressed]) -> None:
    refused = [a for a in (*answers.values(), *torch2) if isinstance(a, Unexpressed)]
    assert all(len(answer.reason) > 20 for answer in refused)
    assert "fork" in refused[[a.row for a in refused].index("onediff-072")].reason
    assert {a.metric for a in torch2 if isinstance(a, Unexpressed)} == {"unsupported"}


def test_series_with_hidden_steps_lose_their_times_and_keep_their_memory(answers: dict[str, Case | Unexpressed]) -> None:
    assert isinstance(answers["hfsdxl-006"], Unexpressed)
    assert isinstance(answers["smopt-008"], Unexpressed)
    assert case(answers, "hfsdxl-005").measured_si == 21.72 * GIB
    assert case(answers, "quanto-002").workload.num_inference_steps is None  # said to be the pipeline's default


# --- hand-picked rows, one or more per source ------------------------------------------------------------------------

BASE = {
    "quantization": "none", "attention": "sdpa", "vae_slicing": False, "vae_tiling": False, "offload": "none",
    "compile": "none", "channels_last": False,
}  # fmt: skip


def test_flux_compiled_and_quantized(answers: dict[str, Case | Unexpressed]) -> None:
    got = case(answers, "tao-flux-024")
    assert (got.model, got.pipeline_class, got.subject) == ("flux.1-dev", "FluxPipeline", "pipeline")
    assert got.workload.model_dump(exclude_none=True) == {
        "batch_size": 1, "height": 1024, "width": 1024, "num_inference_steps": 28,
    }  # fmt: skip
    assert got.settings == BASE | {
        "dtype": "bf16", "quantization": "transformer=fp8dq", "compile": "max-autotune",
        "vae.compile": "max-autotune", "transformer.channels_last": True, "vae.channels_last": True,
    }  # fmt: skip
    assert (got.gpu, got.gpu_memory_bytes, got.quantization_library) == ("H100", 80 * GIB, "torchao")
    assert (got.counter, got.measured_si, got.tolerance, got.grade) == ("latency_seconds", 2.981, None, "A")
    assert got.inputs == {"max_sequence_length": 512}


def test_cogvideox_ladder(answers: dict[str, Case | Unexpressed]) -> None:
    got = case(answers, "tao-cogmem-006")
    assert got.settings == BASE | {
        "dtype": "bf16", "quantization": "text_encoder=int8wo,transformer=int8wo,vae=int8wo",
        "vae_tiling": True, "offload": "sequential",
    }  # fmt: skip
    assert (got.workload.num_frames, got.workload.height, got.workload.width) == (49, 480, 720)
    assert (got.counter, got.measured_si) == ("peak_allocated_bytes", 3.1 * GIB)


def test_vae_decode_is_a_subject_of_its_own(answers: dict[str, Case | Unexpressed]) -> None:
    sd, sdxl = case(answers, "vaedec-006"), case(answers, "vaedec-040")
    assert (sd.model, sd.subject, sd.settings["dtype"]) == ("stable-diffusion-v1-5", "vae_decode", "fp16")
    assert (sdxl.model, sdxl.subject, sdxl.settings["dtype"]) == ("stable-diffusion-xl", "vae_decode", "fp32")
    assert (sd.settings["vae_tiling"], sd.counter, sd.measured_si) == (True, "reserved_share", 5.6)
    assert any("dtype not stated" in note for note in sd.assumptions)


def test_sdxl_blog(answers: dict[str, Case | Unexpressed]) -> None:
    got = case(answers, "hfsdxl-015")
    assert got.settings == BASE | {"dtype": "fp16", "vae_slicing": True, "offload": "sequential"}
    assert (got.workload.batch_size, got.gpu_memory_bytes, got.tolerance) == (4, 40 * GIB, 0.25)
    assert case(answers, "hfsdxl-017").without == ("text_encoder", "text_encoder_2")
    assert case(answers, "hfsdxl-019").replaced == {"vae": "madebyollin/taesd"}
    assert case(answers, "hfsdxl-001").settings["attention"] == "vanilla"


def test_sd3_blog(answers: dict[str, Case | Unexpressed]) -> None:
    assert case(answers, "sd3blog-006").without == ("text_encoder_3",)
    assert case(answers, "sd3blog-006").settings["offload"] == "model"
    got = case(answers, "sd3blog-008")
    assert (got.settings["quantization"], got.quantization_library) == ("text_encoder_3=int8dq", "bitsandbytes")
    assert (got.counter, got.tolerance) == ("peak_allocated_bytes", None)


def test_quanto_names_text_encoders_by_family(answers: dict[str, Case | Unexpressed]) -> None:
    all_four = "transformer=fp8wo,text_encoder=fp8wo,text_encoder_2=fp8wo,text_encoder_3=fp8wo"
    assert case(answers, "quanto-031").settings["quantization"] == all_four
    fused = case(answers, "quanto-019")
    assert fused.settings == BASE | {
        "dtype": "fp16", "quantization": "transformer=int8wo,text_encoder=int8wo", "fuse_qkv": True,
    }  # fmt: skip
    assert case(answers, "quanto-029").tolerance == pytest.approx(2.4 / 16.403)
    assert case(answers, "quanto-015").settings["dtype"] == "bf16"


def test_quantization_post(answers: dict[str, Case | Unexpressed]) -> None:
    assert case(answers, "dquant-021").settings["quantization"] == "transformer=gguf_q8_0"
    assert case(answers, "dquant-003").settings["quantization"] == "transformer=nf4,text_encoder_2=nf4"
    grouped = case(answers, "dquant-031")
    assert grouped.settings == BASE | {
        "dtype": "bf16", "quantization": "transformer=fp8_layerwise",
        "transformer.offload": "group_leaf", "transformer.offload_stream": True,
    }  # fmt: skip
    assert (grouped.counter, grouped.measured_si) == ("peak_reserved_bytes", 14.232 * GIB)


def test_guidance(answers: dict[str, Case | Unexpressed]) -> None:
    assert case(answers, "lcm-001").workload.guidance_scale == 1.0
    assert case(answers, "lcm-002").workload.guidance_scale is None
    assert case(answers, "tao-flux-001").workload.guidance_scale is None  # distilled: the default call
    assert case(answers, "doclowmem-009").workload.guidance_scale is None  # no negative prompt: the default call
    ort = case(answers, "ort15-015")
    assert (ort.workload.guidance_scale, ort.scheduler, ort.without) == (7.5, "DDIM", ("safety_checker",))


def test_old_torch_and_old_knobs(answers: dict[str, Case | Unexpressed]) -> None:
    traced = case(answers, "titan-006")
    assert traced.settings == BASE | {
        "dtype": "fp16", "attention": "xformers", "compile": "jit-trace", "unet.channels_last": True,
    }  # fmt: skip
    assert (traced.model, traced.gpu) == ("stable-diffusion-v1-5", "TITAN RTX")
    assert case(answers, "titan-002").settings["cudnn_benchmark"] is True
    assert case(answers, "titan-002").settings["dtype"] == "fp32"
    xform = case(answers, "xform-005")
    assert (xform.counter, xform.quantity, xform.measured_si) == ("steps_per_second", "per_second", 8.88)
    assert xform.settings["attention"] == "vanilla"


def test_fast_diffusion(answers: dict[str, Case | Unexpressed]) -> None:
    assert case(answers, "dfast-001").settings == BASE | {"dtype": "fp32", "attention": "vanilla", "tf32": True}
    got = case(answers, "dfast-006")
    assert got.settings == BASE | {
        "dtype": "bf16", "quantization": "unet=int8dq,vae=int8dq", "compile": "max-autotune",
        "vae.compile": "max-autotune", "unet.channels_last": True, "vae.channels_last": True, "fuse_qkv": True,
    }  # fmt: skip
    assert got.replaced == {"vae": "madebyollin/sdxl-vae-fp16-fix"}


def test_documentation_pages(answers: dict[str, Case | Unexpressed]) -> None:
    assert case(answers, "doccomp-001").model == "cogvideox-2b"
    assert case(answers, "doccomp-004").settings["vae.compile"] == "default"
    per_component = case(answers, "doclowmem-008")
    assert per_component.settings == BASE | {
        "dtype": "bf16", "transformer.offload": "group_leaf", "transformer.offload_stream": True,
        "text_encoder.offload": "group_block", "text_encoder.offload_stream": False, "text_encoder.offload_blocks": 2,
        "vae.offload": "group_leaf", "vae.offload_stream": False,
    }  # fmt: skip
    assert (per_component.gpu, per_component.gpu_memory_bytes) == ("A100", 80 * GIB)
    assert case(answers, "doclowmem-011").measured_si == 10.47 * GIB
    assert case(answers, "smopt-006").settings["compile"] == "default"


def test_onnxruntime_and_onediff_and_fal(answers: dict[str, Case | Unexpressed]) -> None:
    ort = case(answers, "ort15-016")
    assert ort.settings == BASE | {
        "dtype": "fp16", "compile": "default", "text_encoder.compile": "default", "unet.channels_last": True,
        "cudnn_benchmark": True,
    }  # fmt: skip
    assert ort.second_run, "the first run's search for algorithms is over"
    assert case(answers, "onediff-012").without == ("safety_checker",), "its script takes it away"
    assert (ort.counter, ort.gpu, ort.torch_version) == ("device_used_bytes", "A100-SXM4-40GB", "2.0.0+cu117")
    assert case(answers, "onediff-019").model == "stable-diffusion-2-1"
    assert case(answers, "onediff-053").counter == "fits"
    assert case(answers, "onediff-063").model == "kolors"
    fal = case(answers, "fal-005")
    assert (fal.counter, fal.settings["compile"], fal.settings["unet.channels_last"]) == (
        "latency_seconds", "default", True,
    )  # fmt: skip


def test_pull_requests_and_issues(answers: dict[str, Case | Unexpressed]) -> None:
    disk = case(answers, "pr11682-010")
    assert disk.settings == BASE | {
        "dtype": "bf16", "transformer.offload": "group_leaf", "transformer.offload_stream": True,
        "transformer.offload_disk": True,
    }  # fmt: skip
    assert disk.gpu == "H100"
    assert case(answers, "pr11081-001").settings == BASE | {
        "dtype": "bf16", "offload": "group_leaf", "offload_stream": True,
    }  # fmt: skip
    assert (case(answers, "pr11106-004").subject, case(answers, "pr11106-004").model) == ("denoiser", "flux.1-dev")
    fp8 = case(answers, "pr9177-004").settings
    assert (fp8["quantization"], fp8["dtype"]) == ("unet=fp8_layerwise,vae=fp8_layerwise", "fp16")
    step = case(answers, "pr12910-001")
    assert (step.counter, step.settings["offload"], step.settings["offload_blocks"]) == (
        "step_seconds", "group_block", 1,
    )  # fmt: skip
    assert case(answers, "pr10503-002").inputs == {"output_type": "latent"}
    assert case(answers, "pr10503-001").gpu == "A100"
    assert case(answers, "iss1934-002").settings["offload"] == "none"


def test_torch2_rows(torch2: list[Case | Unexpressed]) -> None:
    controlnet = torch2[14]
    assert isinstance(controlnet, Case)
    assert (controlnet.row, controlnet.model) == ("15", "stable-diffusion-v1-5-controlnet")
    assert controlnet.settings == BASE | {
        "dtype": "fp16", "compile": "reduce-overhead", "controlnet.compile": "reduce-overhead",
        "unet.channels_last": True, "controlnet.channels_last": True,
    }  # fmt: skip
    assert (controlnet.gpu, controlnet.measured, controlnet.counter) == ("A100", 32.13, "steps_per_second")
    sizes = {c.model: c.workload.height for c in torch2 if isinstance(c, Case)}
    assert sizes["stable-diffusion-xl"] == 1024
    assert sizes["stable-diffusion-v1-5-inpainting"] == 512
    assert (sizes["deepfloyd-if-i-m"], sizes["deepfloyd-if-ii-m"], sizes["stable-diffusion-x4-upscaler"]) == (64, 256, 256)
    assert sum(isinstance(c, Case) and c.counter == "fits" for c in torch2) == 9


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (None, {}, None)),
        ("float16", ("fp16", {}, None)),
        ("transformer int4 weight-only (torchao, group size 64), rest bf16", ("bf16", {"transformer": "int4wo"}, "torchao")),
        ("transformer/T5 qint4 (quanto); fp16", ("fp16", {"transformer": "int4wo", "text_encoder_2": "int4wo"}, "quanto")),
    ],
)
def test_number_formats(text: str, wanted: tuple[str | None, dict[str, str], str | None]) -> None:
    assert parse_dtype(text, "FluxPipeline") == wanted


@pytest.mark.parametrize("text", ["transformer mxfp4, rest bf16", "gizmo int8 (torchao)", "int8"])
def test_unknown_number_formats_are_refused(text: str) -> None:
    with pytest.raises(CannotExpress):
        parse_dtype(text, "FluxPipeline")


def test_compile_reaches_the_vae_only_through_decode() -> None:
    assert parse_compile("default (unet+vae)", "StableDiffusionPipeline") == (
        {"compile": "default"}, ["torch.compile(pipe.vae) leaves vae.decode uncompiled"],
    )  # fmt: skip


def test_offload_words() -> None:
    assert parse_offload("group-block", "num_blocks_per_group=4, use_stream=True", "FluxPipeline")[0] == {
        "offload": "group_block", "offload_stream": True, "offload_blocks": 4,
    }  # fmt: skip
    with pytest.raises(CannotExpress, match="number of blocks"):
        parse_offload("group-block", "", "FluxPipeline")
    with pytest.raises(CannotExpress, match="none that diffusers has"):
        parse_offload("zero-3", "", "FluxPipeline")


# --- broken files ----------------------------------------------------------------------------------------------------

MINI = "id,pipeline_class,model,metric,value,gpu,steps"


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UsageError, "neither of the two table formats"),
        ("a,b\n1,2\n", UsageError, "column 'metric' is missing"),
        (f"{MINI},colour\n", UsageError, "column 'colour' is unknown"),
        (f"{MINI},steps\n", UsageError, "column 'steps' appears twice"),
        (f"{MINI}\n", ProfileError, "no rows"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,1.0,T4\n", ProfileError, "line 2: 6 fields where the header has 7"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,1.0,T4,28\n\ny,FluxPipeline,m/n,latency_s,fast,T4,28\n",
         ProfileError, "line 4, column 'value': 'fast'"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,nan,T4,28\n", ProfileError, "column 'value'"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,-1,T4,28\n", ProfileError, "column 'value'"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,1.0,T4,2.5\n", ProfileError, "column 'steps': '2.5'"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,1.0,T4,0\n", ProfileError, "column 'steps'"),
        (f"{MINI}\nx,FluxPipeline,m/n,latency_s,1.0,T4,65537\n", ProfileError, "column 'steps'"),
        (f"{MINI}\nx,,m/n,latency_s,1.0,T4,28\n", ProfileError, "column 'pipeline_class'"),
        (f'{MINI}\nx,"FluxPipeline,m/n,latency_s,1.0,T4,28\n', ProfileError, "line 2: not a CSV record"),
        (f"{MINI}\n{'x' * 30000},FluxPipeline,m/n,latency_s,1.0,T4,28\n", ProfileError, "not a CSV record"),
    ],
)  # fmt: skip
def test_broken_tables(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_table(table(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_table(tmp_path / "absent.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"id\xff\xfe")
    with pytest.raises(ProfileError, match="byte 2 is not UTF-8"):
        read_table(binary)
    big = tmp_path / "big.csv"
    with big.open("wb") as handle:
        handle.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="are refused"):
        read_table(big)


def test_columns_in_any_order_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffvalue,metric,model,pipeline_class\n3.5,latency_s,org/model,NewPipeline\n"
    (row,) = read_table(table(tmp_path, text))
    assert isinstance(row, PublishedRow)
    assert (row.value, row.model, row.number, row.line) == (3.5, "org/model", 1, 2)


def test_what_is_unknown_is_refused_per_row_not_per_table(tmp_path: Path) -> None:
    lines = [
        "a-1,FluxPipeline,some model without a name,latency_s,1,T4,28",
        "a-2,FluxPipeline,org/model,watts,300,T4,28",
        "a-3,FluxPipeline,org/model,latency_s,1,T4,28",
        "a-4,FluxPipeline,org/model,latency_s,1,,28",
    ]
    answers = [express(row) for row in read_table(table(tmp_path, "\n".join([MINI, *lines])))]
    assert [isinstance(answer, Case) for answer in answers] == [False, False, True, False]
    assert [a.reason.split()[:2] for a in answers if isinstance(a, Unexpressed)] == [
        ["the", "model"], ["the", "metric"], ["the", "source"],
    ]  # fmt: skip


@given(st.lists(st.text(max_size=40), min_size=4, max_size=4), st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_expressed_or_refused_never_a_crash(words: list[str], other: str, notes: str) -> None:
    dtype, offload, compiled, model = words
    row = PublishedRow(
        number=1, line=2, pipeline_class="FluxPipeline", model=model.strip() or "m", dtype=dtype, offload=offload,
        compile=compiled, other=other, notes=notes, metric="latency_s", value=1.0, gpu="T4",
    )  # fmt: skip
    assert isinstance(express(row), Case | Unexpressed)


# --- counters --------------------------------------------------------------------------------------------------------


def estimate(**changes: object) -> Estimate:
    fields: dict[str, object] = {"fits": True, "phases": (), "basis": "assumed"}
    values = {
        "peak_allocated_bytes": 10 * GIB, "peak_reserved_bytes": 12 * GIB, "device_used_bytes": 13 * GIB,
        "host_bytes": GIB, "latency_seconds": 5.0, "step_seconds": 0.2, "setup_seconds": 1.0,
    }  # fmt: skip
    for name, value in values.items():
        fields |= {name: value, f"{name}_low": value // 2 if isinstance(value, int) else value / 2, f"{name}_high": value * 2}
    return Estimate.model_validate(fields | changes)


DEVICE = Device(
    name="card", kind="cuda", architecture="ada", total_bytes=24 * GIB, flops_per_second={"fp16": 1e12},
    bandwidth_bytes_per_second=1e12, basis="assumed",
)  # fmt: skip


def one_case(metric: str, *, notes: str = "", steps: int | None = 20) -> Case:
    row = PublishedRow(
        number=1, line=2, id="x-1", pipeline_class="FluxPipeline", model="black-forest-labs/FLUX.1-dev", dtype="bf16",
        metric=metric, value=1.0, gpu="T4", steps=steps, notes=notes,
    )  # fmt: skip
    answer = express(row)
    assert isinstance(answer, Case)
    return answer


@pytest.mark.parametrize(
    ("metric", "notes", "value", "low", "high"),
    [
        ("peak_allocated_gb", "", 10, 5, 20),
        ("peak_unknown_gb", "", 10, 5, 26),  # the device's counter may be meant
        ("peak_reserved_gb", "", 12, 6, 24),
        ("nvidia_smi_gb", "", 13, 6.5, 26),
        ("peak_pct_gpu", "", 50, 25, 100),
        ("latency_s", "", 5, 2.5, 10),
        ("latency_s", "per denoising step", 0.2, 0.1, 0.4),
        ("it_per_s", "", 5, 2.5, 10),  # one step takes 0.2 s, at most 0.4 s
        ("it_per_s", "steps/e2e time", 4, 2, 8),  # 20 steps in 5 s
    ],
)
def test_counters(metric: str, notes: str, value: float, low: float, high: float) -> None:
    got = value_from_estimate(one_case(metric, notes=notes), estimate(), DEVICE)
    assert (got.value, got.low, got.high, got.fits) == (pytest.approx(value), pytest.approx(low), pytest.approx(high), True)


def test_oom_and_missing_step_time() -> None:
    oom = value_from_estimate(one_case("oom"), estimate(fits=False), DEVICE)
    assert (oom.value, oom.fits) == (1.0, False)
    assert value_from_estimate(one_case("oom"), estimate(), DEVICE).value == 0.0
    unknown = estimate(step_seconds=None, step_seconds_low=None, step_seconds_high=None)
    got = value_from_estimate(one_case("it_per_s"), unknown, DEVICE)
    assert got.value is None
    assert "per denoising step" in str(got.reason)
    assert value_from_estimate(one_case("it_per_s", notes="steps/e2e", steps=None), estimate(), DEVICE).value is None


def test_a_vague_gigabyte_is_read_as_gib_with_doubt() -> None:
    assert one_case("peak_allocated_gb").tolerance == 0.07
    assert one_case("peak_allocated_gb", notes="max_memory_allocated()/1024**3").tolerance is None
    assert one_case("latency_s").tolerance is None


# --- statistics ------------------------------------------------------------------------------------------------------


def result(row: str, measured: float, predicted: float | None, **fields: object) -> RowResult:
    base: dict[str, object] = {
        "row": row, "line": 2, "series": "s", "source": "s", "metric": "latency_s", "measured": measured,
        "predicted": predicted, "expressed": predicted is not None, "gpu": "T4", "job": "j", "plan": row,
    }  # fmt: skip
    return RowResult.model_validate(base | fields)


def test_statistics_by_hand() -> None:
    rows = [
        result("a", 10, 11, low=9, high=12),  # +10 %, inside
        result("b", 10, 8, low=7, high=9),  # -20 %, outside
        result("c", 10, 10.5, low=10, high=11),  # +5 %, inside (on the edge)
        result("d", 100, 60),  # -40 %, no interval
        result("e", 5, None),
    ]
    got = statistics(rows)
    assert (got.n, got.worst) == (4, ("d", "b", "a"))
    assert got.median_absolute == pytest.approx(0.15)
    assert got.mean_absolute == pytest.approx(0.1875)
    assert got.bias == pytest.approx(-0.075)
    assert got.percentile_90 == pytest.approx(0.34)  # rank 2.7 of 5, 10, 20, 40
    assert got.coverage == pytest.approx(2 / 3)
    assert statistics(rows[4:]).median_absolute is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_percentiles_lie_within_and_are_ordered(values: list[float]) -> None:
    points = [percentile(values, share) for share in (0.0, 0.5, 0.9, 1.0)]
    assert points[0] == min(values)
    assert points[-1] == max(values)
    assert points == sorted(points)


def test_confusion_by_hand() -> None:
    rows = [
        result("ok", 5, 5, fits=True),
        result("false alarm", 5, 5, fits=False),
        result("caught", 1, 1, metric="oom", fits=False),
        result("missed", 1, 0, metric="oom", fits=True),
        result("no oom", 0, 0, metric="oom", fits=True),
        result("unknown", 5, 5),
        result("refused", 5, None, fits=True),
    ]
    got = confusion(rows)
    assert (got.fit_as_fit, got.fit_as_oom, got.oom_as_oom, got.oom_as_fit) == (2, 1, 1, 1)
    assert got.wrong == ("false alarm", "missed")


def test_faster_pairs_by_hand() -> None:
    rows = [
        result("a", 10, 10),
        result("b", 10.9, 1),  # within 10 % of a: not asked
        result("c", 20, 19),  # slower than a (right) and than b (right)
        result("d", 40, 19),  # a tie with c: wrong
        result("e", 90, 5, plan="a"),  # same plan as a: not asked; wrong against c and d, right against b
        result("f", 90, 5, job="other"),
        result("g", 90, 5, gpu="A100"),
    ]
    got = faster(rows)
    assert got.wrong == (("c", "d"), ("c", "e"), ("d", "e"))
    assert (got.pairs, got.right, got.share) == (8, 5, 0.625)


def test_ladder_by_hand() -> None:
    rows = [
        result("none", 30, 31, metric="peak_allocated_gb", offload="none"),
        result("model", 20, 20, metric="peak_allocated_gb", offload="model"),
        result("sequential", 5, 21, metric="peak_allocated_gb", offload="sequential"),
        result("tiled", 29, 1, metric="peak_allocated_gb", offload="none"),
    ]
    got = ladders(rows)["s"]
    assert got.wrong == (("model", "sequential"), ("model", "tiled"), ("sequential", "tiled"))
    assert (got.pairs, got.right) == (5, 2)


# --- running ---------------------------------------------------------------------------------------------------------


def echo(one: Case) -> Prediction:
    if one.model == "kolors":
        return Prediction(reason="no profile")
    if one.model == "latte":
        raise UsageError("no such model")
    return Prediction(value=one.measured, low=one.measured, high=one.measured, fits=one.metric != "oom")


def test_run_writes_one_line_per_row(tmp_path: Path) -> None:
    report = run(TABLE, echo, out=tmp_path / "rows.jsonl", plot_path=tmp_path / "plot.png")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 430
    assert set(lines[0]) == {"id", "metric", "measured", "predicted", "low", "high", "expressed", "reason"}
    by_id = {line["id"]: line for line in lines}
    assert by_id["onediff-053"]["predicted"] == 1
    assert by_id["onediff-063"]["expressed"] is False
    assert by_id["onediff-063"]["reason"] == "no profile"
    assert by_id["doccomp-003"]["reason"] == "no such model"
    assert all(line["expressed"] == (line["predicted"] is not None) == (line["reason"] is None) for line in lines)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert report.by_metric["latency_s"].percentile_90 == 0
    assert (report.oom.oom_as_oom, report.oom.wrong, report.faster.share) == (2, (), 1.0)
    assert set(report.ladders) >= {"pr11682", "tao-cogmem", "sd3blog", "dquant"}


def test_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    run(TORCH2, echo, out=tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(1, 217))


def test_text_is_the_same_for_the_same_rows_and_names_every_reason() -> None:
    rows = read_table(TABLE)
    text = render_text(validate(rows, echo))
    assert text == render_text(validate(rows, echo))
    assert text.startswith("430 rows, 392 expressed (91.2 %)\n")
    assert "     6  no profile: onediff-063" in text
    widths = [line.index("  n  ") for line in text.splitlines() if line.startswith(("metric ", "source, metric"))]
    assert len(widths) == 2


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        run(TORCH2, echo, out=tmp_path / "absent" / "rows.jsonl")
    with pytest.raises(UsageError, match="cannot be written"):
        run(TORCH2, echo, plot_path=tmp_path / "plot.nonsense")
    with pytest.raises(UsageError, match="nothing to plot"):
        plot(summarize([result("a", 1, None)]), tmp_path / "plot.png")


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'diffusers-planner\[plot\]'"):
        plot(summarize([result("a", 1, 1)]), tmp_path / "plot.png")


def test_record_keeps_unknown_as_null() -> None:
    assert row_record(result("007", 2.0, None, reason="why")) == {
        "id": "007", "metric": "latency_s", "measured": 2.0, "predicted": None, "low": None, "high": None,
        "expressed": False, "reason": "why",
    }  # fmt: skip


def test_validation_imports_no_torch() -> None:
    code = "import sys, planner.validate; print(sorted({'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PUBLISHED.parents[1])
    assert done.stdout.strip() == "[]"


def test_bundled_headers_are_the_documented_formats() -> None:
    for path, form in ((TABLE, "published"), (TORCH2, "torch2")):
        with path.open(encoding="utf-8", newline="") as handle:
            assert tuple(next(csv.reader(handle))) == columns(form)  # type: ignore[arg-type]
