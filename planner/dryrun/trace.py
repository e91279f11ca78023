"""What a dry run leaves behind: operations, component calls and the order they came in. Plain data, no torch.

A trace is exact about shapes, so FLOPs, bytes and lifetimes are facts; what they cost is the cost model's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Kind(IntEnum):
    """Classes of operations that a device runs with different efficiency."""

    MATMUL = 0
    CONVOLUTION = 1
    ATTENTION = 2
    NORMALIZATION = 3
    POINTWISE = 4
    REDUCTION = 5
    COPY = 6
    GATHER = 7
    VIEW = 8
    TRANSFER = 9
    """A copy between device and host that the code asks for (``.cpu()``); ``write_bytes`` is its size."""


DTYPES = ("fp32", "fp16", "bf16", "fp64", "fp8", "int8", "int64", "int32", "bool", "other")
DTYPE_CODES = {name: code for code, name in enumerate(DTYPES)}

_COLUMNS = ("kind", "dtype", "flops", "read_bytes", "write_bytes", "param_bytes", "live_bytes", "new_bytes", "fused_read_bytes",
            "fused_write_bytes", "fused_live_bytes", "fused_head", "module", "shape", "d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7")  # fmt: skip


@dataclass(frozen=True, eq=False)
class CallTrace:
    """Every device operation of one component call, in order, one array entry each (views left out).

    ``live_bytes``: bytes allocated within the call that live while the operation runs, its outputs included.
    ``new_bytes``: bytes of its fresh outputs. ``param_bytes``: part of ``read_bytes`` that are weights.
    ``fused_*``: the same, had neighbouring pointwise operations been compiled into one kernel; ``fused_head`` is 1 where a
    kernel remains. ``dims`` by kind: MATMUL (batch, m, n, k); CONVOLUTION (images, in channels, out elements per channel,
    out channels, kernel elements, groups, stride product, spatial rank); ATTENTION (batch, heads, queries, keys, head dim, value dim, mask bytes, key heads).
    ``module`` indexes ``modules`` (leaf paths); ``shape`` indexes ``shapes`` (distinct operation signatures, for probes).
    """

    component: str
    method: str
    columns: dict[str, NDArray[Any]]
    modules: tuple[str, ...]
    shapes: tuple[str, ...]
    output_bytes: int
    input_bytes: int
    fallbacks: tuple[str, ...] = ()
    spans: Ints = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    """One row per storage: operation before which it was allocated, operation before which it was freed, bytes."""

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.columns["kind"])

    @cached_property
    def dims(self) -> Ints:
        """Shape ``(operations, 8)``."""
        return np.stack([self.columns[f"d{i}"] for i in range(8)], axis=1)

    @cached_property
    def total_flops(self) -> float:
        return float(self.columns["flops"].sum())

    @cached_property
    def live_peak_bytes(self) -> int:
        """Liveness peak above the call's inputs and weights, workspace not counted."""
        return int(self.columns["live_bytes"].max(initial=0))

    @property
    def name(self) -> str:
        return self.component if self.method == "forward" else f"{self.component}.{self.method}"


@dataclass(frozen=True, slots=True)
class Event:
    """One component call as the pipeline made it, with what the pipeline's own code did before it.

    ``held_bytes``: tensors the pipeline itself holds when the call starts (its arguments among them).
    ``glue_*``: device operations of the pipeline's own code since the previous call; ``glue_peak_bytes`` is the most that
    it held in between. ``weight_bytes``: the component's weights as they are at this moment (an upcast VAE shows here).
    """

    call: int
    held_bytes: int
    glue_operations: int
    glue_bytes: int
    glue_peak_bytes: int
    weight_bytes: int


@dataclass(frozen=True, eq=False)
class PipelineTrace:
    """One pipeline call. ``calls`` are the distinct component calls, ``events`` all calls in order."""

    calls: tuple[CallTrace, ...]
    events: tuple[Event, ...]
    tail: Event
    """What came after the last call (``call`` is -1)."""
    steps: int | None
    """Denoising iterations as the pipeline's own progress bar counted them."""
    to_host_bytes: int
    batch_size: int
    dtype: str
    variants: dict[tuple[int, str], CallTrace] = field(default_factory=dict)
    """(call, VAE mode) to the same call in another VAE mode, such as ``slice`` or ``slice+tile=512``."""
    notes: tuple[str, ...] = ()
    output_shape: tuple[int, ...] | None = None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Operations that ``meta`` refused and how they were answered, over all calls."""
        return tuple(sorted({name for call in self.calls for name in call.fallbacks}))

    def count(self, call: int) -> int:
        """How often a distinct call was made."""
        return sum(event.call == call for event in self.events)


def to_arrays(trace: PipelineTrace) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A JSON-able header and named arrays: the on-disk form. :func:`from_arrays` is its inverse."""
    arrays: dict[str, NDArray[Any]] = {}
    keys = [(str(i), call) for i, call in enumerate(trace.calls)]
    keys += [(f"{i}|{mode}", call) for (i, mode), call in sorted(trace.variants.items())]
    heads = []
    for key, call in keys:
        heads.append({"key": key, "component": call.component, "method": call.method, "modules": call.modules, "shapes": call.shapes,
                      "output_bytes": call.output_bytes, "input_bytes": call.input_bytes, "fallbacks": call.fallbacks})  # fmt: skip
        arrays |= {f"{key}:{name}": column for name, column in call.columns.items()}
        arrays[f"{key}:spans"] = call.spans
    arrays["events"] = _event_rows([*trace.events, trace.tail])
    header = {"calls": heads, "steps": trace.steps, "to_host_bytes": trace.to_host_bytes, "batch_size": trace.batch_size,
              "dtype": trace.dtype, "notes": trace.notes, "output_shape": trace.output_shape}  # fmt: skip
    return header, arrays


def from_arrays(header: dict[str, Any], arrays: Any) -> PipelineTrace:
    """The trace written by :func:`to_arrays`. Raises KeyError, TypeError or ValueError on anything malformed."""
    calls: list[CallTrace] = []
    variants: dict[tuple[int, str], CallTrace] = {}
    for head in header["calls"]:
        columns = {name: arrays[f"{head['key']}:{name}"] for name in _COLUMNS}
        call = CallTrace(head["component"], head["method"], columns, tuple(head["modules"]), tuple(head["shapes"]),
                         int(head["output_bytes"]), int(head["input_bytes"]), tuple(head["fallbacks"]), arrays[f"{head['key']}:spans"])  # fmt: skip
        index, _, mode = head["key"].partition("|")
        if mode:
            variants[int(index), mode] = call
        else:
            calls.append(call)
    *events, tail = (Event(*map(int, row)) for row in arrays["events"])
    shape = header["output_shape"]
    return PipelineTrace(
        tuple(calls), tuple(events), tail, header["steps"], int(header["to_host_bytes"]), int(header["batch_size"]),
        header["dtype"], variants, tuple(header["notes"]), tuple(shape) if shape else None)  # fmt: skip


def _event_rows(events: Iterable[Event]) -> Ints:
    return np.array([[e.call, e.held_bytes, e.glue_operations, e.glue_bytes, e.glue_peak_bytes, e.weight_bytes] for e in events], dtype=np.int64)


def columns_from_rows(rows: list[tuple[Any, ...]]) -> dict[str, NDArray[Any]]:
    """Column arrays from operation rows in the order of ``_COLUMNS``."""
    table = list(zip(*rows, strict=True)) if rows else [()] * len(_COLUMNS)
    return {name: np.array(values, dtype=np.float64 if name == "flops" else np.int64) for name, values in zip(_COLUMNS, table, strict=True)}
