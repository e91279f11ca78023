"""From the rows of a component call to its :class:`CallTrace`: liveness, and what a fusing compiler would leave."""

from __future__ import annotations

import numpy as np

from planner.dryrun.recorder import Frame
from planner.dryrun.trace import CallTrace, Kind, columns_from_rows

_FUSIBLE = {int(Kind.POINTWISE), int(Kind.NORMALIZATION), int(Kind.REDUCTION), int(Kind.COPY)}
_MAX_FUSED_READERS = 1
"""A storage with more readers (a residual stream) is written once rather than computed again by each of them."""
_LIVE, _FUSED_READ, _FUSED_WRITE, _FUSED_LIVE, _HEAD = 6, 8, 9, 10, 11
Span = tuple[int, int, int]


def finish(frame: Frame, component: str, method: str, input_bytes: int, output_bytes: int) -> CallTrace:
    """Close a frame and turn its rows into a :class:`CallTrace`."""
    frame.open = False
    count = len(frame.rows)
    ends = (count if died is None else died for died in frame.died)
    spans = list(zip(frame.born, ends, frame.bytes, strict=True))
    _fill_live(frame, _LIVE, spans)
    _fuse(frame)
    times = _unfold(frame)  # before the rows are copied: it adds to them
    spans += [(fold.start, fold.end, fold.extra_bytes) for fold in frame.folds.values() if fold.extra_bytes]
    columns = columns_from_rows([tuple(row) for row in frame.rows], times)
    return CallTrace(component, method, columns, tuple(frame.modules), tuple(frame.shapes),
                     output_bytes, input_bytes, tuple(sorted(frame.fallbacks)), np.array(spans, dtype=np.int64).reshape(-1, 3))  # fmt: skip


def _unfold(frame: Frame) -> list[int]:
    """How often each row ran; rows of repeated work also carry what the repetitions before the last had piled up."""
    times = [1] * len(frame.rows)
    for fold in frame.folds.values():
        for index in range(fold.start, fold.end):
            times[index] *= fold.times
            frame.rows[index][_LIVE] += fold.extra_bytes
            frame.rows[index][_FUSED_LIVE] += fold.extra_bytes
    return times


def _fill_live(frame: Frame, column: int, spans: list[Span]) -> None:
    """Write the running sum of ``[born, died)`` spans into a column; a storage freed before any operation ran never counts."""
    count = len(frame.rows)
    change = [0] * (count + 1)
    for born, died, size in spans:
        if died > born:
            change[min(born, count)] += size
            change[min(died, count)] -= size
    live = 0
    for index, row in enumerate(frame.rows):
        live += change[index]
        row[column] = live


def _fuse(frame: Frame) -> None:
    """What a compiler that merges neighbouring pointwise work would leave: kernels, traffic and live bytes (``fused_*``).

    A storage that is never written lives nowhere; one that a later kernel now reads lives until that kernel. Where moving
    work later would make the sum exceed eager's, the compiler is taken to keep eager's order: inductor's own scheduler
    reorders for peak memory (``torch/_inductor/memory.py``), so ``fused_live_bytes`` never exceeds ``live_bytes``.
    """
    inlined = _inlined(frame)
    last_use = _fuse_rows(frame, inlined)
    spans = [(born, _fused_end(frame, uid, last_use[uid]), frame.bytes[uid]) for uid, born in enumerate(frame.born) if uid not in inlined]
    _fill_live(frame, _FUSED_LIVE, spans)
    for row in frame.rows:
        row[_FUSED_LIVE] = min(row[_FUSED_LIVE], row[_LIVE])


def _fused_end(frame: Frame, uid: int, last_use: int) -> int:
    """A compiled graph frees at last use, not when a Python name goes; results live on."""
    died = frame.died[uid]
    return len(frame.rows) if died is None else last_use + 1


def _fuse_rows(frame: Frame, inlined: set[int]) -> list[int]:
    """Fill heads and traffic; the last kernel that touches each storage."""
    external: list[frozenset[int]] = []
    producer: dict[int, int] = {}
    last_use = list(frame.born)
    for index, row in enumerate(frame.rows):
        reads: set[int] = set()
        for uid in frame.inputs[index]:
            reads |= external[producer[uid]] if uid in inlined else {uid}
        external.append(frozenset(reads))
        producer |= dict.fromkeys(frame.outputs[index], index)
        outputs = frame.outputs[index]
        row[_HEAD] = int(not outputs or any(uid not in inlined for uid in outputs))
        if row[_HEAD]:
            own_inputs = sum(frame.bytes[uid] for uid in set(frame.inputs[index]))
            row[_FUSED_READ] = sum(frame.bytes[uid] for uid in reads) + max(row[3] - own_inputs, 0)
            row[_FUSED_WRITE] = row[4]
            for uid in (*reads, *outputs):
                last_use[uid] = index
    return last_use


def _inlined(frame: Frame) -> set[int]:
    """Storages that a fused kernel never writes: made by pointwise work and read only by a little more of it."""
    rows = frame.rows
    readers: list[list[int]] = [[] for _ in frame.bytes]
    for index, inputs in enumerate(frame.inputs):
        for uid in inputs:
            readers[uid].append(index)

    def vanishes(uid: int) -> bool:
        used = readers[uid]
        return bool(used) and frame.died[uid] is not None and len(used) <= _MAX_FUSED_READERS and all(rows[r][0] in _FUSIBLE for r in used)

    return {uid for index, row in enumerate(rows) if row[0] in _FUSIBLE for uid in frame.outputs[index] if vanishes(uid)}
