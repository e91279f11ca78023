"""The chain of values: Workload -> Candidate -> Estimate -> Plan -> Measurement.

All are immutable. Sizes are bytes, times are seconds; ``None`` means unknown. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

KnobValue = bool | int | str
Settings = Mapping[str, KnobValue]
"""Knob name to value, in the vocabulary of the command line and of plan files."""

Basis = Literal["datasheet", "published", "measured", "assumed"]
Bound = Literal["compute", "memory", "transfer", "launch"]
Quality = Literal["exact", "lossless", "lossy"]
Objective = Literal["latency", "throughput", "memory"]
DTYPES = ("fp32", "fp16", "bf16")
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "tf32": 4, "fp8": 1, "int8": 1, "int4": 0.5, "nf4": 0.5}


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Workload(Frozen):
    """What the user will ask of the pipeline in one call. ``None`` is the pipeline's own default."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    height: Annotated[int, Field(ge=1, le=65536)] | None = None
    width: Annotated[int, Field(ge=1, le=65536)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=65536)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=100000)] | None = None
    guidance_scale: float | None = None


class Device(Frozen):
    """A compute device as the cost model sees it. Peaks are dense (no sparsity), per second.

    ``flops_per_second`` is keyed by ``fp32 tf32 fp16 bf16 fp8 int8``; a missing key means the device lacks it.
    ``budget_bytes`` is what a plan's tensors may take; ``headroom_bytes`` what is left above it for the holes between them;
    ``free_bytes`` what is free now.
    """

    name: str
    kind: Literal["cuda", "cpu", "sim"]
    architecture: str
    compute_capability: tuple[int, int] | None = None
    total_bytes: int
    free_bytes: int | None = None
    budget_bytes: int | None = None
    headroom_bytes: Annotated[int, Field(ge=0)] = 0
    host_free_bytes: int | None = None
    flops_per_second: dict[str, float]
    bandwidth_bytes_per_second: float
    link_bytes_per_second: float | None = None
    l2_bytes: int | None = None
    sm_count: int | None = None
    power_watts: float | None = None
    """Board power limit, where it is known and matters for the clock that can be held."""
    basis: Basis
    note: str | None = None


class Phase(Frozen):
    """One kind of component call and all its repetitions within one pipeline call."""

    name: str
    component: str
    calls: int
    seconds: float
    weights_bytes: int
    activations_bytes: int
    workspace_bytes: int
    peak_allocated_bytes: int
    bound: Bound


class Term(Frozen):
    """One named line of a sum, with where its number comes from."""

    name: str
    bytes: int | None = None
    seconds: float | None = None
    basis: Basis
    source: str


class Estimate(Frozen):
    """What is predicted for one candidate; ``_low``/``_high`` bound a 90 % interval."""

    fits: bool
    peak_allocated_bytes: int
    peak_allocated_bytes_low: int
    peak_allocated_bytes_high: int
    peak_reserved_bytes: int
    peak_reserved_bytes_low: int
    peak_reserved_bytes_high: int
    device_used_bytes: int
    device_used_bytes_low: int
    device_used_bytes_high: int
    host_bytes: int
    host_bytes_low: int
    host_bytes_high: int
    latency_seconds: float
    latency_seconds_low: float
    latency_seconds_high: float
    step_seconds: float | None
    step_seconds_low: float | None
    step_seconds_high: float | None
    setup_seconds: float
    setup_seconds_low: float
    setup_seconds_high: float
    phases: tuple[Phase, ...]
    terms: tuple[Term, ...] = ()
    basis: Basis


class Measurement(Frozen):
    """What one checked run showed. A counter that the device does not have is ``None``."""

    latency_seconds: float
    step_seconds: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    host_bytes: int | None = None
    repetitions: tuple[float, ...] = ()
    output_finite: bool | None = None
    output_difference: float | None = None
    note: str | None = None


class Alternative(Frozen):
    """A candidate that was priced."""

    settings: dict[str, KnobValue]
    predicted: Estimate


class Rejection(Frozen):
    """A candidate, or a group of candidates that share ``settings``, and why it was not taken.

    ``kind``: ``rule`` (a knob forbids it), ``memory`` (``shortfall_bytes`` missing), ``host`` (host RAM missing),
    ``time`` (slower), ``dominated`` (another candidate needs no more memory and no more time).
    """

    settings: dict[str, KnobValue]
    kind: Literal["rule", "memory", "host", "time", "dominated"]
    reason: str
    count: int = 1
    shortfall_bytes: int | None = None
    phase: str | None = None


JSON = Mapping[str, Any]
