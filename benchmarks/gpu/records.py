"""What a campaign plans and what it leaves behind: frozen values, one JSON line each. Importing this needs no torch.

Sizes are bytes, times seconds; None is unknown. Format history of ``SCHEMA``: 1, the first.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from planner.calibrate.samples import Run
from planner.types import Device, Estimate, Frozen, KnobValue, Workload

SCHEMA = "benchmarks.gpu/1"
Kind = Literal["plan", "capped", "practice", "probe"]
Stage = Literal["build", "apply", "first", "repeat", "undo", "probe"]
FailureKind = Literal["oom", "refused", "error", "absent", "overran", "crashed", "cut"]
RETRIED: frozenset[str] = frozenset({"crashed", "cut"})
"""Failures that say nothing of the cell itself: a later run measures it again."""
Text = Annotated[str, Field(max_length=2000)]


class Predicted(Frozen):
    """What the cost model said when the cell was planned; the report predicts anew from the stored settings."""

    fits: bool
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    latency_seconds: float
    setup_seconds: float

    @classmethod
    def of(cls, estimate: Estimate) -> Predicted:
        """The figures of an estimate that a record keeps."""
        return cls(**{name: getattr(estimate, name) for name in cls.model_fields})


class Cell(Frozen):
    """One thing to measure. ``value`` over ``cost_seconds`` decides when, and neither is part of its identity."""

    kind: Kind
    subject: str
    """A bundled profile's name, ``tiny:FAMILY``, or ``device`` for probes that need no model."""
    workload: Workload = Workload()
    settings: dict[str, KnobValue] = Field(default_factory=dict)
    cap_bytes: int | None = None
    """Size of the small card that is played; None: the whole device."""
    allowed_bytes: int | None = None
    """What torch may reserve on that card: its size less the CUDA context."""
    practice: str | None = None
    operations: dict[str, int] = Field(default_factory=dict)
    """Probe cells: signature to how often it occurs. Left out of records, whose samples name them."""
    chosen: bool = False
    """The planner's own choice for this card and workload."""
    note: Text = ""
    predicted: Predicted | None = None
    cost_seconds: Annotated[float, Field(gt=0)] = 1.0
    value: Annotated[float, Field(gt=0)] = 1.0

    @property
    def key(self) -> str:
        """Identity: what is measured, not why or how it was guessed to turn out."""
        what = "practice" if self.practice else "probe" if self.kind == "probe" else "plan"
        content = [what, self.subject, self.workload.model_dump(), dict(self.settings), self.cap_bytes, self.practice]
        text = json.dumps(content, sort_keys=True)
        return f"{self.subject}/{self.kind}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def identity(self) -> str:
        """The key without its readable part: a chosen plan and an alternative that are equal are one cell."""
        return self.key.rpartition("/")[2]


class Counters(Frozen):
    """Memory counters at one moment. ``*_used_bytes`` are the whole device's, other processes included."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    """Total less free by ``cudaMemGetInfo``."""
    nvml_used_bytes: int | None = None
    host_rss_bytes: int | None = None
    host_peak_bytes: int | None = None
    """Most resident memory of this process since the counters were reset (since its start where Linux cannot reset it)."""
    pinned_bytes: int | None = None
    alloc_retries: int | None = None
    """Times the caching allocator had to give blocks back before it could go on."""


class Clocks(Frozen):
    """Readings of NVML while the repetitions ran: (least, median, most)."""

    sm_hertz: tuple[float, float, float] | None = None
    memory_hertz: tuple[float, float, float] | None = None
    watts: tuple[float, float, float] | None = None
    celsius: tuple[float, float, float] | None = None
    throttle_reasons: tuple[int, ...] = ()
    """Distinct bit masks of ``nvmlDeviceGetCurrentClocksEventReasons``."""


class Failure(Frozen):
    """What went wrong, where, and how much memory there was."""

    kind: FailureKind
    stage: Stage
    text: Text
    counters: Counters | None = None


class Machine(Frozen):
    """Where it was measured. ``versions``: package to version; ``context_bytes``: what CUDA takes before torch allocates."""

    device: Device
    uuid: str | None = None
    driver: str | None = None
    power_limit_watts: float | None = None
    max_sm_hertz: float | None = None
    context_bytes: int | None = None
    allocator: str | None = None
    """``PYTORCH_CUDA_ALLOC_CONF`` and the backend's name."""
    cpu: str
    cores: int
    threads: int
    host_bytes: int
    python: str
    versions: dict[str, str]
    commit: str | None = None


class Seen(Frozen):
    """What a cell that ran showed; every repetition is kept."""

    setup_seconds: float
    """Putting the settings in force: moving weights, hooks; compiling happens in the first call."""
    setup: Counters
    first_seconds: float
    first: Counters
    """The first call: compiling, autotuning and their memory are in it."""
    repetitions: Annotated[tuple[float, ...], Field(min_length=1)]
    steps: tuple[tuple[float, ...], ...]
    """Per repetition the seconds between denoising iterations."""
    steady: Counters
    clocks: Clocks | None = None
    output_finite: bool | None = None


class Record(Frozen):
    """One finished cell: either ``seen``, ``probes`` or a ``failure``."""

    schema_: Literal["benchmarks.gpu/1"] = Field(default="benchmarks.gpu/1", alias="schema")
    run: str
    key: str
    cell: Cell
    started: str
    seconds: float
    """All that the cell took, setting up and undoing included."""
    machine: Machine | None = None
    seen: Seen | None = None
    probes: Run | None = None
    failure: Failure | None = None

    @property
    def done(self) -> bool:
        """Whether a later run need not measure it again."""
        return self.failure is None or self.failure.kind not in RETRIED

    def line(self) -> str:
        """One line of JSON, sorted keys, without a line break."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> Record:
        """A record from its line. Raises ValueError (pydantic's ValidationError is one)."""
        return cls.model_validate_json(line)


class CellList(Frozen):
    """Prepared cells: planned where there is time, measured where the GPU is."""

    schema_: Literal["benchmarks.gpu.cells/1"] = Field(default="benchmarks.gpu.cells/1", alias="schema")
    device: Device
    commit: str | None = None
    cells: tuple[Cell, ...]


__all__ = ["Cell", "CellList", "Clocks", "Counters", "Failure", "Kind", "Machine", "Predicted", "RETRIED", "Record", "SCHEMA", "Seen"]
