"""Measuring one pipeline call: time by the clock, memory by the device's own counters.

On CUDA the counters are torch's caching allocator and the driver's; on the CPU, torch's allocator events (``profile_memory``),
taken in a run of their own because recording them costs time. Weights count on both.
"""

from __future__ import annotations

import gc
import math
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
    deadline: float = math.inf
    """On the clock of ``time.perf_counter``."""

    def tick(self) -> None:
        self.synchronize()
        self.stamps.append(time.perf_counter())
        if self.stamps[-1] > self.deadline:
            raise TimeoutError("the call takes longer than it may")

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


def measure_call(pipe: Any, call: Callable[[], Any], device: Any, *, repetitions: int = 1, warmup: int = 0,
                 counters: bool = True, limit_seconds: float = math.inf) -> tuple[Any, Measurement]:  # fmt: skip
    """Run ``call`` and measure it; the last output and the counters. Times are medians over ``repetitions``.

    On the CPU one more run before the timed ones records the allocator's events (unless ``counters`` is false).
    Raises TimeoutError after the step in which a call has taken longer than ``limit_seconds``.
    """
    synchronize = _synchronizer(device)
    for _ in range(warmup):
        call()
    seen = _cpu_counters(pipe, call) if device.type == "cpu" and counters else {}
    reset_peak(device)
    times: list[float] = []
    output = None
    with clocked(pipe, synchronize) as clock:
        for _ in range(repetitions):
            output = None
            clock.stamps.clear()
            synchronize()
            start = time.perf_counter()
            clock.deadline = start + limit_seconds
            output = call()
            synchronize()
            times.append(time.perf_counter() - start)
    if device.type != "cpu":
        seen = _device_counters(device)
    middle = sorted(times)[len(times) // 2]
    timed = Measurement(latency_seconds=middle, step_seconds=clock.step_seconds, repetitions=tuple(times))
    return output, timed.model_copy(update=seen)


def weight_bytes(pipe: Any, device_type: str | None = None) -> int:
    """Bytes of all distinct parameters and buffers of the pipeline's modules (on one device type)."""
    from torch import nn

    seen: dict[int, int] = {}
    for module in vars(pipe).values():
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                if device_type is None or tensor.device.type == device_type:
                    key, size = _storage(tensor)
                    seen[key] = size
    return sum(seen.values())


def _storage(tensor: Any) -> tuple[int, int]:
    """What tells two storages apart, and its bytes; a wrapper without storage counts its own elements."""
    try:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        address = 0
    if not address:
        return -id(tensor), tensor.numel() * tensor.element_size()
    return address, storage.nbytes()


# -- the device's own counters ----------------------------------------------------------------------------------------


def accelerators() -> list[Any]:
    """The modules (``torch.cuda`` and the like) of accelerators that this process can use."""
    import torch

    found = [torch.cuda] if torch.cuda.is_available() else []
    return found + ([torch.sim] if hasattr(torch, "sim") else [])


def accelerator(device: Any) -> Any:
    """``torch.cuda`` for a CUDA device, the module of the same name for any other accelerator; None for the CPU."""
    import torch

    return None if device.type == "cpu" else getattr(torch, device.type)


def available_bytes(device: Any, pipe: Any = None) -> int | None:
    """What can be had on the device now: free, cached by torch but unused, and what ``pipe`` already holds there."""
    held = weight_bytes(pipe, device.type) if pipe is not None else 0
    module = accelerator(device)
    if module is None:
        from planner.hardware.host import host_memory

        return host_memory().free_bytes + held
    free, _ = module.mem_get_info(device)
    return int(free + max(module.memory_reserved(device) - module.memory_allocated(device), 0) + held)


def peak_so_far(device: Any) -> int | None:
    """Most bytes allocated at once since :func:`reset_peak`; None on the CPU, where nobody counts."""
    module = accelerator(device)
    return None if module is None else int(module.max_memory_allocated(device))


def reset_peak(device: Any) -> None:
    """Forget the peak so far; cached blocks go back, so that reserved bytes start from what is used."""
    module = accelerator(device)
    if module is not None:
        gc.collect()
        module.empty_cache()
        module.reset_peak_memory_stats(device)


def _synchronizer(device: Any) -> Callable[[], None]:
    module = accelerator(device)
    return (lambda: None) if module is None else lambda: module.synchronize(device)


def _device_counters(device: Any) -> dict[str, int]:
    module = accelerator(device)
    free, total = module.mem_get_info(device)
    return {"peak_allocated_bytes": module.max_memory_allocated(device), "peak_reserved_bytes": module.max_memory_reserved(device),
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
