"""Measuring one pipeline call: time by the clock, memory by the device's own counters.

On CUDA the counters are torch's caching allocator and the driver's; on the CPU, torch's allocator events (``profile_memory``),
taken in a run of their own because recording them costs time. Weights count on both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from planner.types import Measurement


@dataclass(slots=True)
class StepClock:
    """Times of the denoising iterations, read off the pipeline's own progress bar."""

    stamps: list[float] = field(default_factory=list)
    synchronize: Callable[[], None] = lambda: None

    def tick(self) -> None:
        self.synchronize()
        self.stamps.append(time.perf_counter())

    @property
    def step_seconds(self) -> float | None:
        """Median interval between iterations after the first; None with fewer than two."""
        intervals = sorted(b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False))
        return intervals[len(intervals) // 2] if intervals else None


class _ClockedBar:
    """A progress bar that passes everything on and ticks the clock at every update."""

    def __init__(self, bar: Any, clock: StepClock) -> None:
        self.bar, self.clock = bar, clock

    def __enter__(self) -> _ClockedBar:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        for item in self.bar:
            yield item
            self.clock.tick()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.tick()
        return self.bar.update(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)


@contextmanager
def clocked(pipe: Any, synchronize: Callable[[], None] = lambda: None) -> Iterator[StepClock]:
    """Tick at every denoising iteration of ``pipe`` while the context is open; the pipeline is as before afterwards."""
    clock = StepClock(synchronize=synchronize)
    had = "progress_bar" in vars(pipe)
    original = pipe.progress_bar if hasattr(pipe, "progress_bar") else None
    if original is not None:
        object.__setattr__(pipe, "progress_bar", lambda *args, **kwargs: _ClockedBar(original(*args, **kwargs), clock))
    try:
        yield clock
    finally:
        if original is not None:
            if had:
                object.__setattr__(pipe, "progress_bar", original)
            else:
                vars(pipe).pop("progress_bar", None)


def measure_call(pipe: Any, call: Callable[[], Any], device: Any, *, repetitions: int = 1, warmup: int = 0) -> tuple[Any, Measurement]:
    """Run ``call`` and measure it; the last output and the counters. Times are medians over ``repetitions``.

    On the CPU one more run, not timed, records the allocator's events.
    """
    cuda = device.type == "cuda"
    synchronize = _synchronizer(device)
    for _ in range(warmup):
        call()
    if cuda:
        _reset_cuda(device)
    times: list[float] = []
    output = None
    with clocked(pipe, synchronize) as clock:
        for _ in range(repetitions):
            output = None
            clock.stamps.clear()
            synchronize()
            start = time.perf_counter()
            output = call()
            synchronize()
            times.append(time.perf_counter() - start)
    if cuda:
        counters = _cuda_counters(device)
    else:
        counters = _cpu_counters(pipe, call) if device.type == "cpu" else {}
    middle = sorted(times)[len(times) // 2]
    seen = Measurement(latency_seconds=middle, step_seconds=clock.step_seconds, repetitions=tuple(times))
    return output, seen.model_copy(update=counters)


def weight_bytes(pipe: Any, device_type: str | None = None) -> int:
    """Bytes of all distinct parameters and buffers of the pipeline's modules (on one device type)."""
    from torch import nn

    seen: dict[int, int] = {}
    for module in vars(pipe).values():
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                if device_type is None or tensor.device.type == device_type:
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _synchronizer(device: Any) -> Callable[[], None]:
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _reset_cuda(device: Any) -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _cuda_counters(device: Any) -> dict[str, int]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {"peak_allocated_bytes": torch.cuda.max_memory_allocated(device), "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_used_bytes": total - free}  # fmt: skip


def _cpu_counters(pipe: Any, call: Callable[[], Any]) -> dict[str, int]:
    return {"peak_allocated_bytes": weight_bytes(pipe) + cpu_peak_bytes(call)}


def cpu_peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator had handed out at once during ``call``, above what was there before.

    Source: the memory events of ``torch.profiler`` (each allocation and free of the CPU allocator, in order).
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    inner: Any = profiler.profiler
    events = [(event.start_ns(), event.nbytes()) for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return peak
