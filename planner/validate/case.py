"""One published number as the planner sees it: what ran, on what, and what was counted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from planner.types import Frozen, KnobValue, Workload

Subject = Literal["pipeline", "vae_decode", "denoiser"]
Quantity = Literal["bytes", "seconds", "per_second", "percent", "flag"]
Counter = Literal[
    "peak_allocated_bytes",
    "resting_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "reserved_share",
    "latency_seconds",
    "step_seconds",
    "steps_per_second",
    "call_steps_per_second",
    "fits",
]


class Case(Frozen):
    """A row in the planner's vocabulary: enough to build an estimate without looking at the table again."""

    row: str
    """The row's ``id``, or its number among the data rows when it has none."""
    series: str
    """Rows measured together: the id without its running number, else the source."""
    source: str
    grade: str | None = None
    model: str
    """Bundled profile name, or a hub id when no bundled profile is known."""
    pipeline_class: str
    subject: Subject
    workload: Workload
    settings: dict[str, KnobValue]
    """Knobs as in ``--set``; ``component.knob`` where the source names one component."""
    inputs: dict[str, KnobValue] = Field(default_factory=dict)
    """Further call arguments the source names (``max_sequence_length``, ``output_type`` …)."""
    without: tuple[str, ...] = ()
    """Components that were not loaded."""
    replaced: dict[str, str] = Field(default_factory=dict)
    """Components exchanged for another checkpoint."""
    second_run: bool = False
    """Counted in a second run, after the first one's search for algorithms."""
    calls: int = 1
    """Pipeline calls that the source is known to have made in one process; a number shows that there was one."""
    scheduler: str | None = None
    quantization_library: str | None = None
    gpu: str | None = None
    """The card as the table names it; None only where the counter does not depend on the card."""
    gpu_memory_bytes: int | None = None
    """The card's nominal size, which tells an A100 40GB from an 80GB."""
    torch_version: str | None = None
    diffusers_version: str | None = None
    metric: str
    counter: Counter
    quantity: Quantity
    measured: float
    """In the row's own unit."""
    measured_si: float
    """Bytes, seconds, per second; percent and flags unchanged."""
    tolerance: float | None = None
    """Relative doubt that the source itself leaves, e.g. 0.07 where GB may mean GB or GiB."""
    tolerance_note: str | None = None
    assumptions: tuple[str, ...] = ()
    """What the row leaves open and was filled in, one sentence each."""


class Unexpressed(Frozen):
    """A row that cannot be put as a :class:`Case`, and why."""

    row: str
    series: str
    source: str
    metric: str
    measured: float
    reason: str


class Prediction(Frozen):
    """What was predicted for one case, in the row's own unit; or ``reason`` when nothing could be."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    fits: bool | None = None
    """Whether the plan was predicted to fit the card; None when unknown."""
    reason: str | None = None
