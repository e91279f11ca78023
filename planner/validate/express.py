"""From a table's row to a case the planner can price, or the reason why it cannot."""

from __future__ import annotations

import re

from planner.types import Workload
from planner.units import GIB
from planner.validate.case import Case, Quantity, Subject, Unexpressed
from planner.validate.counters import Counted, read_counter
from planner.validate.models import (
    TORCH2_PIPELINES,
    denoiser_name,
    guides_by_embedding,
    profile_name,
    usual_dtype,
    variant_for,
)
from planner.validate.remarks import Remarks, read_remarks
from planner.validate.rows import PublishedRow, Row, Torch2Row
from planner.validate.words import (
    CannotExpress,
    Knobs,
    parse_attention,
    parse_compile,
    parse_dtype,
    parse_offload,
    quantization_value,
)

TORCH2_SOURCE = "diffusers docs optimization/torch2.0.md (May 2023, diffusers 0.17.0.dev0)"
TORCH2_CALLS = 3
"""The scripts printed on that page call the pipeline in ``for _ in range(3)``."""
REFERENCE_GPU = "A100"
"""Card for memory rows that name none: what torch allocates does not depend on the card."""
REFERENCE_GPU_BYTES = 80 * GIB

_CARD = r"(H100|H200|A100|V100|L40S?|A10G?|T4|RTX \d{4})"


def express(row: Row) -> Case | Unexpressed:
    """The row as a case, or unexpressed with a reason. Never raises for a row that was read."""
    try:
        return _published(row) if isinstance(row, PublishedRow) else _torch2(row)
    except CannotExpress as error:
        return _refusal(row, str(error))


def _refusal(row: Row, reason: str) -> Unexpressed:
    series, source = (_series(row), row.source) if isinstance(row, PublishedRow) else ("torch2", TORCH2_SOURCE)
    return Unexpressed(row=_name(row), series=series, source=source, metric=row.metric, measured=row.value, reason=reason)


def _name(row: Row) -> str:
    return row.id if isinstance(row, PublishedRow) and row.id else str(row.number)


def _series(row: PublishedRow) -> str:
    return re.sub(r"-\d+$", "", row.id) or row.source or "?"


def _count(metric: str, value: float, row_id: str, notes: str) -> Counted:
    counted = read_counter(metric, value, row_id, notes)
    if counted is None:
        raise CannotExpress(f"the metric {metric!r} is none that an estimate has")
    return counted


# --- published.csv ---------------------------------------------------------------------------------------------------


def _subject(text: str) -> tuple[str, Subject]:
    """Class name and what of it ran; refuses classes that are not diffusers'."""
    if re.search(r"\bfork\b|not diffusers", text):
        raise CannotExpress(f"{text!r} is not a diffusers pipeline")
    name = re.match(r"[A-Za-z]\w*", text)
    if name is None:
        raise CannotExpress(f"{text!r} names no pipeline class")
    if "forward only" in text:
        return name.group(0), "denoiser"
    return name.group(0), "vae_decode" if text.endswith(".decode") else "pipeline"


def _dtype(row: PublishedRow, name: str, subject: Subject, model: str) -> tuple[Knobs, str | None, list[str]]:
    base, schemes, library = parse_dtype(row.dtype, name)
    notes: list[str] = []
    if base is None and subject == "vae_decode":
        # Same architecture, same card, same size: the table's SDXL VAE takes 1.7-1.9 times as long as SD 1.5's.
        base = "fp32" if model == "stable-diffusion-xl" else "fp16"
        notes.append(f"dtype not stated: {base}" + (", as the pipeline upcasts this VAE" if base == "fp32" else ""))
    elif base is None:
        base = usual_dtype(name)
        notes.append(f"dtype of what is not quantized not stated: {base}")
    return {"dtype": base, "quantization": quantization_value(schemes)}, library, notes


def _memory_format(row: PublishedRow, name: str) -> Knobs:
    """``channels_last`` is the denoiser's; scripts that compile ``vae.decode`` convert the VAE as well."""
    knobs: Knobs = {"channels_last": False}
    if row.channels_last:
        knobs[f"{denoiser_name(name)}.channels_last"] = True
        if "vae.decode" in row.compile:
            knobs["vae.channels_last"] = True
    return knobs


def _settings(row: PublishedRow, name: str, subject: Subject, model: str) -> tuple[Knobs, Remarks, str | None, list[str]]:
    knobs, library, notes = _dtype(row, name, subject, model)
    remarks = read_remarks(row.other, row.notes, str(knobs["dtype"]), name)
    attention, more = parse_attention(row.attention, row.torch_version)
    compiled, compile_notes = parse_compile(row.compile, name)
    offload, offload_notes = parse_offload(row.offload, f"{row.other}; {row.notes}", name)
    knobs |= {"attention": attention, "vae_slicing": bool(row.vae_slicing), "vae_tiling": bool(row.vae_tiling)}
    knobs |= offload | compiled | _memory_format(row, name) | remarks.knobs
    return knobs, remarks, library, notes + more + compile_notes + offload_notes + remarks.assumptions


def _guidance_scale(row: PublishedRow, name: str, remarks: Remarks) -> float | None:
    if remarks.guidance is not None:
        return remarks.guidance
    return 1.0 if row.cfg is False and not guides_by_embedding(name) else None


def _workload(row: PublishedRow, name: str, subject: Subject, remarks: Remarks) -> tuple[Workload, list[str]]:
    blank = [
        word
        for word, value in (("batch", row.batch_size), ("size", row.height or row.width), ("steps", row.steps))
        if value is None and not (subject == "vae_decode" and word == "steps")
    ]
    workload = Workload(
        batch_size=row.batch_size or 1,
        height=row.height,
        width=row.width,
        num_frames=row.frames,
        num_inference_steps=row.steps,
        guidance_scale=_guidance_scale(row, name, remarks),
    )
    return workload, [f"{' and '.join(blank)} not stated: the pipeline's default"] if blank else []


def _check_steps(row: PublishedRow, subject: Subject, counted: Counted) -> None:
    """A call's time follows its steps: a script that is not at hand may use any number."""
    hidden = re.search(r"not stated|\bgist\b|notebook", row.notes) and not re.search(r"pipeline default", row.notes)
    timed = counted.counter in ("latency_seconds", "call_steps_per_second")
    if timed and hidden and row.steps is None and subject == "pipeline":
        raise CannotExpress("the time of a call whose number of steps is neither stated nor said to be the default")


def _card(row: PublishedRow, quantity: Quantity) -> tuple[str, int | None, list[str]]:
    if row.gpu:
        return row.gpu, int(row.gpu_mem_gb * GIB) if row.gpu_mem_gb else None, []
    inferred = re.search(rf"match(?:es)?\b.*?\b{_CARD}", row.notes)
    if inferred:
        return inferred.group(1), None, [f"card not stated: {inferred.group(1)}, whose known figures it matches"]
    if quantity != "bytes":
        raise CannotExpress("the source does not name the card, on which this number depends")
    return REFERENCE_GPU, REFERENCE_GPU_BYTES, [f"card not stated: {REFERENCE_GPU} 80GB; memory hardly depends on it"]


def _calls(notes: str) -> int:
    """Calls that the notes speak of: those of the warm-up and at least one that counts."""
    warm = re.search(r"(\d+) warm-?ups?\b", notes)
    mean = re.search(r"mean of (\d+) calls", notes)
    return (int(warm.group(1)) if warm else 0) + (int(mean.group(1)) if mean else 1)


def _script_removes(row: PublishedRow) -> tuple[str, ...]:
    """onediff's benchmarks/text_to_image.py sets ``pipe.safety_checker = None``."""
    return ("safety_checker",) if "onediff" in row.source else ()


def _published(row: PublishedRow) -> Case:
    name, subject = _subject(row.pipeline_class)
    model = profile_name(row.model)
    if model is None:
        raise CannotExpress(f"the model {row.model!r} is neither a known name nor a hub id")
    model = variant_for(model, name)
    counted = _count(row.metric, row.value, row.id, row.notes)
    settings, remarks, library, notes = _settings(row, name, subject, model)
    workload, more = _workload(row, name, subject, remarks)
    _check_steps(row, subject, counted)
    gpu, gpu_bytes, about_gpu = _card(row, counted.quantity)
    return Case(
        row=_name(row), series=_series(row), source=row.source, grade=row.grade or None, model=model,
        pipeline_class=name, subject=subject, workload=workload, settings=settings, inputs=remarks.inputs,
        without=(*remarks.without, *_script_removes(row)), replaced=remarks.replaced, scheduler=remarks.scheduler,
        second_run=remarks.second_run, calls=_calls(row.notes) + remarks.second_run,
        quantization_library=library, gpu=gpu, gpu_memory_bytes=gpu_bytes,
        torch_version=row.torch_version or None, diffusers_version=row.diffusers_version or None,
        metric=row.metric, counter=counted.counter, quantity=counted.quantity, measured=row.value,
        measured_si=counted.si, tolerance=counted.tolerance, tolerance_note=counted.note,
        assumptions=tuple(notes + more + about_gpu),
    )  # fmt: skip


# --- torch2_table.csv ------------------------------------------------------------------------------------------------


def _torch2_settings(row: Torch2Row, name: str) -> Knobs:
    """fp16, SDPA, ``channels_last`` denoiser (and ControlNet); compile is reduce-overhead on the same modules."""
    if row.execution not in ("eager", "compile"):
        raise CannotExpress(f"the execution {row.execution!r} is neither eager nor compile")
    mode = "reduce-overhead" if row.execution == "compile" else "none"
    knobs: Knobs = {"dtype": "fp16", "quantization": "none", "attention": "sdpa"}
    knobs |= {"vae_slicing": False, "vae_tiling": False, "offload": "none", "compile": mode, "channels_last": False}
    for component in ("unet", "controlnet") if "ControlNet" in name else ("unet",):
        knobs[f"{component}.channels_last"] = True
    return knobs | ({"controlnet.compile": mode} if "ControlNet" in name and mode != "none" else {})


def _torch2_inputs(row: Torch2Row) -> tuple[Knobs, tuple[str, ...]]:
    """IF ran from embeddings of two tokens without its text encoder; stage 3 upscales a 64x64 image."""
    if row.pipeline.startswith("SDXL"):  # 16 images decoded in fp32 need 60 GiB; an RTX 4090 ran them
        return {"output_type": "latent"}, ()
    if row.stage in ("stage 1", "stage 2"):
        return {"prompt_tokens": 2}, ("text_encoder",)
    return ({"image_size": 64}, ()) if row.stage == "stage 3" else ({}, ())


def _torch2(row: Torch2Row) -> Case:
    if row.metric == "unsupported":
        raise CannotExpress("the source marks this combination as not working; nothing was measured")
    found = TORCH2_PIPELINES.get((row.pipeline, row.stage))
    if found is None:
        raise CannotExpress(f"the pipeline {row.pipeline!r} {row.stage!r} is none of this table's")
    model, name, side = found
    counted = _count(row.metric, row.value, "torch2", row.note)
    inputs, without = _torch2_inputs(row)
    hidden = "size and steps not stated: the pipeline's default; no decoding, which would not have fitted"
    notes = [hidden] if name.startswith("StableDiffusionXL") else []
    return Case(
        row=_name(row), series="torch2", source=TORCH2_SOURCE, model=model, pipeline_class=name, subject="pipeline",
        workload=Workload(batch_size=row.batch_size, height=side, width=side),
        settings=_torch2_settings(row, name), inputs=inputs, without=without, gpu=row.gpu, calls=TORCH2_CALLS,
        torch_version=row.torch or None, diffusers_version="0.17.0.dev0", metric=row.metric,
        counter=counted.counter, quantity=counted.quantity, measured=row.value, measured_si=counted.si,
        tolerance=counted.tolerance, tolerance_note=counted.note, assumptions=tuple(notes),
    )  # fmt: skip
