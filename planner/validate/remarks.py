"""What the free text beside a row says that changes what ran: the ``other`` and ``notes`` columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from planner.validate.models import component_name
from planner.validate.words import CannotExpress, Knobs

_IGNORED = re.compile(
    # Said elsewhere in the row, read below, or without effect on memory and time.
    r"num_images_per_prompt=.*|dynamic prompt|standard SDXL|row '.*'|VAE component only|not a pipeline|channels_last"
    r"|unet\.set_default_attn_processor\(\)|device_map=balanced.*|compile ~?\d+ s|guidance 7\.5|no safety checker"
    r"|num_blocks_per_group=\d+|use_stream.*|only the \w+ is group-offloaded|max_sequence_length.*|DDIM"
    r"|cudnn\.benchmark|(qkv not )?fused( qkv)?|torch\.jit\.trace unet|traced UNet|text_encoder_\d=None.*"
    r"|text encoders removed|embeds passed in|guidance_scale=.*|tiny VAE|AutoencoderTiny.*",
    re.I,
)


_SEARCHED = re.compile(r"second (?:\w+ )?run\b.*cuDNN", re.I | re.S)


@dataclass(slots=True)
class Remarks:
    """Everything that was found in a row's free text."""

    knobs: Knobs = field(default_factory=dict)
    inputs: Knobs = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    scheduler: str | None = None
    guidance: float | None = None
    second_run: bool = False
    assumptions: list[str] = field(default_factory=list)


def _knobs(other: str, notes: str, dtype: str | None) -> Knobs:
    knobs: Knobs = {}
    if re.search(r"(?<!not )fused qkv", other):
        knobs["fuse_qkv"] = True
    if "cudnn.benchmark" in other or _SEARCHED.search(notes):
        knobs["cudnn_benchmark"] = True
    if re.search(r"jit\.trace|traced unet", other, re.I):
        knobs["compile"] = "jit-trace"
    if dtype == "fp32" and re.search(r"\bTF32\b", notes):
        knobs["tf32"] = True
    return knobs


def _absent(other: str) -> list[str]:
    absent = list(re.findall(r"(text_encoder(?:_\d)?)=None", other))
    if "text encoders removed" in other:
        absent += ["text_encoder", "text_encoder_2"]
    return absent + (["safety_checker"] if "no safety checker" in other else [])


def _exchanged(other: str, notes: str) -> tuple[dict[str, str], list[str]]:
    named = re.search(r"AutoencoderTiny ([\w.-]+/[\w.-]+)", other)
    if named:
        return {"vae": named.group(1)}, []
    if re.search(r"tiny VAE", other, re.I):
        return {"vae": "AutoencoderTiny"}, ["the tiny VAE's checkpoint is not named"]
    fixed = re.search(r"rows use ([\w.-]+/sdxl-vae-fp16-fix)", notes)
    return ({"vae": fixed.group(1)}, []) if fixed else ({}, [])


def _inputs(other: str, notes: str) -> Knobs:
    inputs: Knobs = {}
    length = re.search(r"max_sequence_length(?:=| default )(\d+)", other)
    if length:
        inputs["max_sequence_length"] = int(length.group(1))
    if re.search(r"output_type latent|excludes VAE decode", notes):
        inputs["output_type"] = "latent"
    return inputs


def _guidance(other: str) -> float | None:
    found = re.search(r"guidance(?:_scale)?[ =](\d+(?:\.\d+)?)", other)
    return float(found.group(1)) if found else None


def read_remarks(other: str, notes: str, dtype: str | None, pipeline_class: str) -> Remarks:
    """Meaning of a row's free text. Raises CannotExpress for what no released diffusers does."""
    if re.search(r"not upstream|with the PR patch", notes):
        raise CannotExpress("measured with a patch that no release of diffusers has")
    replaced, notes_vae = _exchanged(other, notes)
    found = Remarks(
        knobs=_knobs(other, notes, dtype),
        inputs=_inputs(other, notes),
        without=_absent(other),
        replaced=replaced,
        scheduler="DDIM" if "DDIM" in other else None,
        guidance=_guidance(other),
        second_run=bool(_SEARCHED.search(notes)),
        assumptions=notes_vae,
    )
    if "device_map=balanced" in other:
        found.assumptions.append("device_map=balanced on one card: everything resident")
    if component_name("transformer", pipeline_class) == "unet" and "LoRA" in other:
        found.assumptions.append("the LoRA counts as fused: no extra work")
    for part in (piece.strip(" +") for piece in re.split(r"[;,](?![^()]*\))|\s\+\s", other)):
        if part and not _IGNORED.fullmatch(part) and "LoRA" not in part:
            found.assumptions.append(f"not modelled: {part}")
    return found
