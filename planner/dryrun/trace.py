"""What a dry run leaves behind: operations, component calls and the order they came in. Plain data, no torch.

A trace is exact about shapes, so FLOPs, bytes and lifetimes are facts; what they cost is the cost model's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planner.types import Frozen

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

_COLUMNS = ("kind", "dtype", "flops", "read_bytes", "write_bytes", "param_bytes", "live_bytes", "new_bytes",
            "fused_read_bytes", "fused_write_bytes", "fused_live_bytes", "fused_head", "module", "shape",
            "d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "times")  # fmt: skip
_INTEGERS = tuple(name for name in _COLUMNS if name != "flops")
_EVENT = ("call", "held_bytes", "glue_operations", "glue_bytes", "glue_peak_bytes", "weight_bytes")


@dataclass(frozen=True, slots=True)
class VaeMode:
    """How the VAE works on its input; the text form names the mode in ``PipelineTrace.variants``."""

    slicing: bool = False
    tile_pixels: int | None = None
    """None: no tiling; 0: tiling with the tile size the VAE is configured for."""

    @property
    def text(self) -> str:
        parts = ["slice"] if self.slicing else []
        if self.tile_pixels is not None:
            parts.append(f"tile={self.tile_pixels}" if self.tile_pixels else "tile")
        return "+".join(parts)

    @classmethod
    def parse(cls, text: str) -> VaeMode:
        """The mode that ``text`` names. Raises ValueError when it names none."""
        parts = text.split("+") if text else []
        tiles = [part for part in parts if part.startswith("tile")]
        mode = cls("slice" in parts, int(tiles[0].partition("=")[2] or 0) if tiles else None)
        if mode.text != text:
            raise ValueError(f"{text!r} is no VAE mode")
        return mode


@dataclass(frozen=True, eq=False)
class CallTrace:
    """Every device operation of one component call, in order, one array entry each (views left out).

    ``live_bytes``: bytes allocated within the call that live while the operation runs, its outputs included.
    ``new_bytes``: bytes of its fresh outputs. ``param_bytes``: part of ``read_bytes`` that are weights.
    ``fused_*``: the same, had neighbouring pointwise operations been compiled into one kernel; ``fused_head`` is 1 where a
    kernel remains. ``dims`` by kind: MATMUL (batch, m, n, k); CONVOLUTION (images, in channels, out elements per channel,
    out channels, kernel elements, groups, stride product, spatial rank); ATTENTION (batch, heads, queries, keys, head dim,
    value dim, mask bytes, key heads).
    ``times``: how often the operation runs; more than once only where equal work was folded (tiles, slices of a VAE).
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
            column: NDArray[Any] = self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None
        return column

    def __len__(self) -> int:
        return len(self.columns["kind"])

    @cached_property
    def dims(self) -> Ints:
        """Shape ``(operations, 8)``."""
        table: Ints = np.stack([self.columns[f"d{i}"] for i in range(8)], axis=1)
        return table

    @cached_property
    def total_flops(self) -> float:
        return float((self.columns["flops"] * self.columns["times"]).sum())

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
    refused: dict[tuple[int, str], str] = field(default_factory=dict)
    """(call, VAE mode) to the reason why the VAE does not run in that mode."""

    modes: frozenset[str] = frozenset()
    """VAE modes that were asked for, whether or not any component has them."""

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Operations that ``meta`` refused and how they were answered, over all calls."""
        return tuple(sorted({name for call in self.calls for name in call.fallbacks}))

    def count(self, call: int) -> int:
        """How often a distinct call was made."""
        return sum(event.call == call for event in self.events)


def to_arrays(trace: PipelineTrace) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A JSON-able header and five arrays, whatever the number of calls: the on-disk form. :func:`from_arrays` is its inverse."""
    keyed = [(str(index), call) for index, call in enumerate(trace.calls)]
    keyed += [(f"{index}|{mode}", call) for (index, mode), call in sorted(trace.variants.items())]
    heads = [
        {"key": key, "component": call.component, "method": call.method, "modules": call.modules, "shapes": call.shapes,
         "output_bytes": call.output_bytes, "input_bytes": call.input_bytes, "fallbacks": call.fallbacks,
         "operations": len(call), "storages": len(call.spans)} for key, call in keyed]  # fmt: skip
    calls = [call for _, call in keyed]
    arrays: dict[str, NDArray[Any]] = {
        "integers": np.concatenate([np.zeros((0, len(_INTEGERS)), np.int64), *(_table(call) for call in calls)]),
        "flops": np.concatenate([np.zeros(0), *(call.columns["flops"] for call in calls)]),
        "spans": np.concatenate([np.zeros((0, 3), np.int64), *(call.spans for call in calls)]),
        "events": np.array([[getattr(event, name) for name in _EVENT] for event in (*trace.events, trace.tail)], dtype=np.int64),
    }
    header = {"calls": heads, "steps": trace.steps, "to_host_bytes": trace.to_host_bytes, "batch_size": trace.batch_size,
              "dtype": trace.dtype, "notes": trace.notes, "output_shape": trace.output_shape,
              "modes": sorted(trace.modes),
              "refused": [[call, mode, reason] for (call, mode), reason in sorted(trace.refused.items())]}  # fmt: skip
    return header, arrays


def _table(call: CallTrace) -> Ints:
    return np.stack([call.columns[name] for name in _INTEGERS], axis=1).astype(np.int64)


def from_arrays(header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> PipelineTrace:
    """The trace written by :func:`to_arrays`. Raises ValueError or KeyError on anything malformed."""
    head = _TraceHead.model_validate(header)
    table, flops, spans = _typed(arrays, "integers", 2), _typed(arrays, "flops", 1), _typed(arrays, "spans", 2)
    events = _typed(arrays, "events", 2)
    if table.shape != (len(flops), len(_INTEGERS)) or spans.shape[1] != 3 or events.shape[1] != len(_EVENT) or not len(events):
        raise ValueError("arrays of a trace have the wrong shape")
    calls: list[CallTrace] = []
    variants: dict[tuple[int, str], CallTrace] = {}
    row = span = 0
    for one in head.calls:
        call = _call_from(one, table[row : row + one.operations], flops[row : row + one.operations], spans[span : span + one.storages])
        row, span = row + one.operations, span + one.storages
        index, _, mode = one.key.partition("|")
        if mode:
            variants[int(index), mode] = call
        else:
            calls.append(call)
    if row != len(flops) or span != len(spans) or events[:-1, 0].max(initial=-1) >= len(calls):
        raise ValueError("a trace's header and arrays disagree")
    *before, tail = (Event(*(int(value) for value in values)) for values in events)
    return PipelineTrace(
        tuple(calls), tuple(before), tail, head.steps, head.to_host_bytes, head.batch_size, head.dtype, variants, head.notes,
        head.output_shape, {(call, mode): reason for call, mode, reason in head.refused}, head.modes)  # fmt: skip


def _typed(arrays: Mapping[str, NDArray[Any]], name: str, rank: int) -> NDArray[Any]:
    array = arrays[name]
    if array.ndim != rank or array.dtype != (np.float64 if name == "flops" else np.int64):
        raise ValueError(f"{name} of a trace has rank {array.ndim} and type {array.dtype}")
    return array


def _call_from(head: _CallHead, table: Ints, flops: Floats, spans: Ints) -> CallTrace:
    columns = {name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(_INTEGERS)} | {"flops": flops}
    if len(flops) != head.operations or len(spans) != head.storages:
        raise ValueError("a trace's header and arrays disagree")
    for name, size in (("module", len(head.modules)), ("shape", len(head.shapes)), ("kind", len(Kind)), ("dtype", len(DTYPES))):
        if len(flops) and (columns[name].min() < 0 or columns[name].max() >= size):
            raise ValueError(f"a trace's {name} column points outside its table")
    return CallTrace(head.component, head.method, columns, head.modules, head.shapes, head.output_bytes, head.input_bytes,
                     head.fallbacks, spans)  # fmt: skip


class _CallHead(Frozen):
    key: Annotated[str, Field(pattern=r"^\d{1,6}(\|[a-z0-9=+]{1,64})?$")]
    component: str
    method: str
    modules: tuple[str, ...]
    shapes: tuple[str, ...]
    output_bytes: int
    input_bytes: int
    fallbacks: tuple[str, ...]
    operations: Annotated[int, Field(ge=0)]
    storages: Annotated[int, Field(ge=0)]


class _TraceHead(Frozen):
    calls: tuple[_CallHead, ...]
    steps: int | None
    to_host_bytes: int
    batch_size: int
    dtype: str
    notes: tuple[str, ...]
    output_shape: tuple[int, ...] | None
    refused: tuple[tuple[int, str, str], ...]
    modes: frozenset[str]


def columns_from_rows(rows: list[tuple[Any, ...]], times: list[int] | None = None) -> dict[str, NDArray[Any]]:
    """Column arrays from operation rows in the order of ``_COLUMNS``, ``times`` (default: once each) given apart."""
    names = _COLUMNS[:-1]
    table = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    columns = {name: np.array(values, dtype=np.float64 if name == "flops" else np.int64) for name, values in zip(names, table, strict=True)}
    return columns | {"times": np.array(times if times is not None else [1] * len(rows), dtype=np.int64)}
