"""One cell, measured: settings in force, the first call, the repetitions, everything undone. Failures are results too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.machine import NvmlReader, watched
from benchmarks.gpu.practices import absent, in_practice
from benchmarks.gpu.records import Cell, Counters, Failure, FailureKind, Seen, Stage
from benchmarks.gpu.sides import Side
from planner.facts import PipelineFacts

LEAST_REPETITIONS, MOST_REPETITIONS = 2, 5
REPEAT_SECONDS = 6.0
"""Repetitions go on until there are enough, or this much time has been spent on them."""
LONG_SECONDS = 20.0
"""A call longer than this is repeated once only."""
_TEXT = 600


@dataclass(slots=True)
class Bench:
    """One pipeline on one device."""

    pipe: Any
    facts: PipelineFacts
    side: Side
    reader: NvmlReader | None = None
    stage: Stage = field(default="apply")
    broken: bool = False
    """The last cell could not be undone: this process is not to be used again."""
    _shelf: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from planner.dryrun.facts import pipeline_modules

        tensors = (tensor for module in pipeline_modules(self.pipe).values() for tensor in (*module.parameters(), *module.buffers()))
        self._shelf = [(tensor, tensor.data) for tensor in {id(tensor): tensor for tensor in tensors}.values()]

    def run(self, cell: Cell) -> Seen | Failure:
        """Measure a plan or a practice. Never raises but for what ends the process."""
        if cell.practice is not None and (reason := absent(cell.practice)) is not None:
            return Failure(kind="absent", stage="apply", text=reason)
        self.stage = "apply"
        try:
            with self.side.capped(cell.cap_bytes, cell.allowed_bytes):
                outcome = self._guarded(cell)
        finally:
            self._clean()
        return outcome

    def _guarded(self, cell: Cell) -> Seen | Failure:
        try:
            return self._measured(cell)
        except Exception as error:
            kind, text = _kind(error), f"{type(error).__name__}: {error}"[:_TEXT]
            counters = self._counters_after_failure()
            error.__traceback__ = None  # its frames hold the tensors that are to be freed
        return Failure(kind=kind, stage=self.stage, text=text, counters=counters)

    def _counters_after_failure(self) -> Counters | None:
        with suppress(Exception):
            return self.side.read()
        return None

    def _clean(self) -> None:
        from planner.force import give_back_memory

        with suppress(Exception):
            give_back_memory(self.pipe)
        with suppress(Exception):
            self.side.release()
        try:
            self._put_back()
            self.broken = self.broken or self.side.dirty()
        except Exception:
            self.broken = True

    # -- one cell -------------------------------------------------------------------------------------------------

    def _measured(self, cell: Cell) -> Seen:
        side = self.side
        side.release()
        side.reset()
        begun = time.perf_counter()
        with self._in_force(cell):
            side.synchronize()
            setup_seconds, setup = time.perf_counter() - begun, side.read()
            call, output = self._call(cell), [None]
            self.stage = "first"
            side.reset()
            first_seconds, _ = self._timed(call, output)
            first, finite = side.read(), _finite(output[0])
            output[0] = None
            self.stage = "repeat"
            side.reset()
            with watched(self.reader) as clocks:
                times, steps = self._repeated(call, output, first_seconds)
            output[0] = None
            steady = side.read(call)
            self.stage = "undo"
        return Seen(setup_seconds=setup_seconds, setup=setup, first_seconds=first_seconds, first=first, repetitions=tuple(times),
                    steps=tuple(steps), steady=steady, clocks=clocks(), output_finite=finite)  # fmt: skip

    @contextmanager
    def _in_force(self, cell: Cell) -> Iterator[None]:
        """The cell's plan or practice; afterwards the pipeline as it was, with the very weights it had."""
        from planner.apply import apply_settings

        device = self.side.device
        if cell.practice is not None:
            with in_practice(cell.practice, self.pipe, device, self.facts, self._put_back):
                yield
        else:
            applied = apply_settings(self.pipe, cell.settings, device, self.facts)
            try:
                yield
            finally:
                self._undo(applied)
        self._put_back()

    def _undo(self, applied: Any) -> None:
        self._put_back()
        try:
            applied.undo()
        except Exception:
            self.broken = True
            raise

    def _put_back(self) -> None:
        """Weights point at the host's copy again, which never changed: copying tens of gigabytes back would take minutes."""
        for tensor, data in self._shelf:
            alike = (tensor.dtype, tensor.shape, type(tensor.data)) == (data.dtype, data.shape, type(data))
            if alike and (tensor.device != data.device or tensor.data_ptr() != data.data_ptr()):
                tensor.data = data

    def _call(self, cell: Cell) -> Callable[[], Any]:
        from planner.batching import share
        from planner.dryrun.inputs import call_arguments

        arguments = call_arguments(self.pipe, cell.workload, {})
        pieces = share(arguments, int(cell.settings.get("batch_split", 1)))

        def call() -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return [self.pipe(**piece) for piece in pieces]

        return call

    def _timed(self, call: Callable[[], Any], output: list[Any]) -> tuple[float, tuple[float, ...]]:
        """Seconds of a whole call, and between its denoising iterations by stamps that do not hold it up."""
        from planner.measure import clocked

        stamps: list[Any] = []
        output[0] = None
        self.side.synchronize()
        begun = time.perf_counter()
        with clocked(self.pipe, lambda: stamps.append(self.side.stamp())):
            output[0] = call()
        self.side.synchronize()
        return time.perf_counter() - begun, self.side.between(stamps)

    def _repeated(self, call: Callable[[], Any], output: list[Any], first_seconds: float) -> tuple[list[float], list[tuple[float, ...]]]:
        times: list[float] = []
        steps: list[tuple[float, ...]] = []
        while not enough(times):
            seconds, between = self._timed(call, output)
            times.append(seconds)
            steps.append(between)
        return times, steps


def enough(times: list[float]) -> bool:
    """Whether a call was repeated often enough."""
    if times and times[0] > LONG_SECONDS:
        return True
    return len(times) >= MOST_REPETITIONS or (len(times) >= LEAST_REPETITIONS and sum(times) > REPEAT_SECONDS)


def repetitions_for(latency_seconds: float) -> int:
    """How many repetitions a call of that length gets: what :func:`enough` comes to."""
    times: list[float] = []
    while not enough(times):
        times.append(max(latency_seconds, 1e-9))
    return len(times)


def _kind(error: Exception) -> FailureKind:
    from planner.errors import ApplyError, UsageError
    from planner.force import is_out_of_memory

    chain: BaseException | None = error
    while chain is not None:
        if is_out_of_memory(chain):
            return "oom"
        chain = chain.__cause__ or chain.__context__
    return "refused" if isinstance(error, ApplyError | UsageError) else "error"


def _finite(output: Any) -> bool | None:
    """Whether all numbers of a result are; None where there are none to look at."""
    import numpy as np

    from planner.verify import as_array

    try:
        arrays = [as_array(part) for part in output]
    except (TypeError, ValueError):
        return None
    found = [bool(np.isfinite(array).all()) for array in arrays if array is not None and array.size]
    return all(found) if found else None


__all__ = ["Bench", "LEAST_REPETITIONS", "MOST_REPETITIONS", "enough", "repetitions_for"]
