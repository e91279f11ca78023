"""Equal operations of a call as one row with a count: a denoiser repeats a few hundred of them thousands of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from planner.dryrun.trace import CallTrace, Ints

POSITIONAL = ("live_bytes", "new_bytes", "fused_live_bytes", "module", "times")
"""Columns that say where or how often an operation runs, not what it is. All but ``times`` are zero in a condensed call."""
_WEIGHTS = np.sin(np.arange(1, 65))
"""Equal rows have equal weighted sums, different ones hardly ever; that is checked."""

P = ParamSpec("P")
R = TypeVar("R")


class _Same:
    """An argument known by being the very same object; kept, so that no other gets its id."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing


def per_call(function: Callable[Concatenate[CallTrace, P], R]) -> Callable[Concatenate[CallTrace, P], R]:
    """Compute a pure function of a call once for each set of further arguments; what it returns is only read."""
    known: WeakKeyDictionary[CallTrace, dict[Any, R]] = WeakKeyDictionary()

    def remembering(call: CallTrace, /, *args: P.args, **kwargs: P.kwargs) -> R:
        table = known.setdefault(call, {})
        key = tuple(item if isinstance(item, str | int | float | tuple | None) else _Same(item) for item in (*args, *kwargs.items()))
        found = table.get(key)
        if found is None:
            found = table[key] = function(call, *args, **kwargs)
        return found

    return remembering


def condensed(call: CallTrace) -> tuple[CallTrace, Ints]:
    """The distinct operations, with how often each runs in ``times``, and the distinct one of each operation."""
    names = [name for name in call.columns if name not in POSITIONAL]
    table = np.stack([call.columns[name].astype(np.float64) for name in names], axis=1)
    _, first, which = np.unique(table @ _WEIGHTS[: len(names)], return_index=True, return_inverse=True)
    if not np.array_equal(table, table[first][which.reshape(-1)]):  # two different rows with one sum: compare them in full
        _, first, which = np.unique(table, axis=0, return_index=True, return_inverse=True)
    which = np.asarray(which, dtype=np.int64).reshape(-1)
    columns = {name: values[first] for name, values in call.columns.items()}
    columns |= {name: np.zeros(len(first), dtype=np.int64) for name in POSITIONAL}
    columns["times"] = np.bincount(which, weights=repeats(call), minlength=len(first)).astype(np.int64)
    slim = CallTrace(call.component, call.method, columns, call.modules, call.shapes, call.output_bytes, call.input_bytes, call.fallbacks)
    return slim, which


def repeats(call: CallTrace) -> Ints:
    """How often each row of a call runs: once, unless it was folded or condensed."""
    times = call.columns.get("times")
    return np.ones(len(call), dtype=np.int64) if times is None else times
