"""Equal operations of a call as one row with a count: a denoiser repeats a few hundred of them thousands of times."""

from __future__ import annotations

import numpy as np

from planner.dryrun.trace import CallTrace, Ints

POSITIONAL = ("live_bytes", "new_bytes", "fused_live_bytes", "module")
"""Columns that say where an operation is, not what it is. They are zero in a condensed call."""
_WEIGHTS = np.random.default_rng(0).random(64)
"""Equal rows have equal weighted sums; the rest is checked."""


def condensed(call: CallTrace) -> tuple[CallTrace, Ints]:
    """The distinct operations, with their number in a column ``repeat``, and the distinct one of each operation."""
    names = [name for name in call.columns if name not in POSITIONAL]
    table = np.stack([call.columns[name].astype(np.float64) for name in names], axis=1)
    _, first, which, counts = np.unique(table @ _WEIGHTS[: len(names)], return_index=True, return_inverse=True, return_counts=True)
    if not np.array_equal(table, table[first][which.reshape(-1)]):  # two different rows with one sum: compare them in full
        _, first, which, counts = np.unique(table, axis=0, return_index=True, return_inverse=True, return_counts=True)
    columns = {name: values[first] for name, values in call.columns.items()}
    columns |= {name: np.zeros(len(first), dtype=np.int64) for name in POSITIONAL} | {"repeat": counts.astype(np.int64)}
    slim = CallTrace(call.component, call.method, columns, call.modules, call.shapes, call.output_bytes, call.input_bytes, call.fallbacks)
    return slim, np.asarray(which, dtype=np.int64).reshape(-1)


def repeats(call: CallTrace) -> Ints:
    """How often each row of a call happens: once, unless it is condensed."""
    counts = call.columns.get("repeat")
    return np.ones(len(call), dtype=np.int64) if counts is None else counts
