"""Small pipelines made of numbers: traces, facts and devices as hypothesis draws them, without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from planner.cost.coefficients import default_coefficients
from planner.cost.model import CostModel
from planner.dryrun.trace import CallTrace, Event, Kind, PipelineTrace, VaeMode
from planner.facts import ComponentFacts, Leaf, PipelineFacts
from planner.knobs import Context
from planner.types import DTYPE_BYTES, Device, Workload

MIB = 1 << 20
DIMS = tuple(f"d{place}" for place in range(8))
DTYPE_PLACES = {"fp32": 0, "fp16": 1, "bf16": 2}


@dataclass(frozen=True)
class Part:
    """A component: layers of equal weights, whose activations are ``width_mib`` per image in 16 bit."""

    name: str
    role: str
    layers: int
    weight_mib: int
    width_mib: int
    calls: int


def call_trace(part: Part, dtype: str, batch: int, scale: float = 1.0) -> CallTrace:
    """One matmul per layer: reads its input and weights, writes an output of the same size."""
    size = DTYPE_BYTES[dtype]
    width = int(part.width_mib * MIB * batch * size / 2 * scale)
    weights = int(part.weight_mib * MIB * size / 2)
    flops = 2.0 * weights / size * batch * 256 * scale
    same = {"kind": int(Kind.MATMUL), "dtype": DTYPE_PLACES[dtype], "read_bytes": width + weights, "write_bytes": width,
            "param_bytes": weights, "live_bytes": 2 * width, "new_bytes": width, "fused_read_bytes": width + weights,
            "fused_write_bytes": width, "fused_live_bytes": 2 * width, "fused_head": 1, "shape": 0, "times": 1,
            **dict(zip(DIMS, (1, 256 * batch, 1024, 1024, 0, 0, 0, 0), strict=True))}  # fmt: skip
    columns = {name: np.full(part.layers, value, dtype=np.int64) for name, value in same.items()}
    columns |= {"flops": np.full(part.layers, flops), "module": np.arange(part.layers)}
    modules = tuple(f"blocks.{layer}" for layer in range(part.layers))
    return CallTrace(part.name, "forward", columns, modules, ("mm",), width, width)


def pipeline_trace(parts: tuple[Part, ...], dtype: str, batch: int, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace:
    """Each part in turn, as often as it is called."""
    calls = tuple(call_trace(part, dtype, batch) for part in parts)
    events = tuple(
        Event(place, batch * MIB, 2, MIB, 2 * MIB, int(part.layers * part.weight_mib * MIB * DTYPE_BYTES[dtype] / 2))
        for place, part in enumerate(parts)
        for _ in range(part.calls)
    )
    variants = {}
    for place, part in enumerate(parts):
        for mode in modes:
            if part.role == "vae":
                share = (1 / batch if mode.slicing else 1.0) * (1.0 if mode.tile_pixels is None else 0.5)
                variants[place, mode.text] = call_trace(part, dtype, batch, share)
    tail = Event(-1, 0, 1, MIB, batch * MIB, 0)
    return PipelineTrace(calls, events, tail, parts[0].calls, batch * MIB, batch, dtype, variants, modes=frozenset(m.text for m in modes))


def facts(parts: tuple[Part, ...], dtype: str = "fp16") -> PipelineFacts:
    """What the knobs ask about such a pipeline."""
    return PipelineFacts(
        class_name="SyntheticPipeline",
        components=tuple(_component(part, dtype) for part in parts),
        offload_sequence=tuple(part.name for part in parts),
        dtype=dtype,
        batch_argument="num_images_per_prompt",
    )


def _component(part: Part, dtype: str) -> ComponentFacts:
    size = int(part.weight_mib * MIB * DTYPE_BYTES[dtype] / 2)
    paths = tuple(f"blocks.{layer}" for layer in range(part.layers))
    return ComponentFacts(
        name=part.name,
        class_name="Synthetic" + part.role,
        library="diffusers",
        role=part.role,
        dtype=dtype,
        parameters=part.layers * part.weight_mib * MIB // 2,
        linear_parameters=part.layers * part.weight_mib * MIB // 2,
        weight_bytes=size * part.layers,
        leaves=tuple(Leaf(path=path, class_name="Linear", bytes=size) for path in paths),
        block_paths=paths if part.role == "denoiser" else (),
        has_tiling=part.role == "vae",
        has_slicing=part.role == "vae",
        tile_pixels=512 if part.role == "vae" else None,
        repeated_blocks=("Block",),
    )


@dataclass
class FixedTraces:
    """Traces that are made up instead of recorded."""

    parts: tuple[Part, ...]
    batch_size: int
    facts: PipelineFacts

    def __post_init__(self) -> None:
        self._made: dict[object, PipelineTrace] = {}

    def trace(self, dtype: str | None, batch_size: int | None, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace:
        key = dtype or self.facts.dtype, batch_size or self.batch_size
        known = self._made.get(key)
        if known is None or not {mode.text for mode in modes} <= known.modes:
            known = self._made[key] = pipeline_trace(self.parts, *key, modes)
        return known


def device(budget_bytes: int | None = None, kind: str = "cuda") -> Device:
    """Round numbers: 100 TFLOP/s in 16 bit, 1 TB/s, a link of 25 GB/s."""
    return Device(
        name="Synthetic",
        kind=kind,
        architecture="Ampere",
        compute_capability=(8, 0) if kind == "cuda" else None,
        total_bytes=64 << 30,
        budget_bytes=budget_bytes,
        flops_per_second={"fp32": 2e13, "fp16": 1e14, "bf16": 1e14},
        bandwidth_bytes_per_second=1e12,
        link_bytes_per_second=2.5e10,
        sm_count=80,
        basis="assumed",
    )


def world(parts: tuple[Part, ...], batch: int, budget_bytes: int | None = None, kind: str = "cuda", quality: str = "lossless",
          usable: dict[str, str | None] | None = None) -> tuple[Context, CostModel]:  # fmt: skip
    """Context and cost model of a made-up pipeline on a made-up device."""
    here = device(budget_bytes, kind)
    known = facts(parts)
    context = Context(facts=known, device=here, workload=Workload(batch_size=batch), quality=quality, usable=usable or {"inductor": None})
    return context, CostModel(FixedTraces(parts, batch, known), here, default_coefficients(here), batch)


UNET = Part("unet", "denoiser", 6, 40, 6, 20)
TEXT = Part("text_encoder", "text_encoder", 3, 60, 1, 1)
VAE = Part("vae", "vae", 4, 5, 60, 1)
SMALL = (TEXT, UNET, VAE)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Part, ...]:
    """One to three components of drawn sizes, a denoiser among them."""
    size = st.integers(1, 80)
    unet = Part("unet", "denoiser", draw(st.integers(1, 4)), draw(size), draw(size), draw(st.integers(1, 8)))
    text = Part("text_encoder", "text_encoder", draw(st.integers(1, 3)), draw(size), 1, 1)
    vae = Part("vae", "vae", draw(st.integers(1, 3)), draw(size), draw(size), 1)
    return tuple(part for part, wanted in ((text, draw(st.booleans())), (unet, True), (vae, draw(st.booleans()))) if wanted)


__all__ = ["MIB", "SMALL", "FixedTraces", "Part", "call_trace", "device", "facts", "pipeline_trace", "pipelines", "world"]
