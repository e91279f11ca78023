"""The two kinds of device that cells run on: their clocks, counters and caps behind one face.

CUDA's half takes ``torch.cuda`` as an argument, so that its every call can be answered by a recording in tests.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, Protocol

import torch

from benchmarks.gpu.records import Counters

LEFT_BEHIND_BYTES = 256 << 20
"""Memory still allocated on the device after a cell was undone that means: start again in a new process."""


class Side(Protocol):
    """What measuring needs of a device."""

    device: torch.device

    def synchronize(self) -> None: ...
    def reset(self) -> None: ...
    def read(self, call: Callable[[], Any] | None = None) -> Counters: ...
    def stamp(self) -> Any: ...
    def between(self, stamps: list[Any]) -> tuple[float, ...]: ...
    def release(self) -> None: ...
    def dirty(self) -> bool: ...
    def capped(self, cap_bytes: int | None, allowed_bytes: int | None) -> Any: ...


class CpuSide:
    """The host. Peaks are those of torch's CPU allocator, recorded in a call of their own, plus the weights."""

    def __init__(self, pipe: Any = None) -> None:
        self.device, self.pipe = torch.device("cpu"), pipe

    def synchronize(self) -> None:
        """Nothing runs behind the host's back."""

    def reset(self) -> None:
        gc.collect()
        reset_host_peak()

    def read(self, call: Callable[[], Any] | None = None) -> Counters:
        from planner.measure import cpu_peak_bytes, weight_bytes

        peak = None
        if call is not None and self.pipe is not None:
            peak = weight_bytes(self.pipe) + cpu_peak_bytes(call)
        rss, most = host_memory_now()
        return Counters(peak_allocated_bytes=peak, host_rss_bytes=rss, host_peak_bytes=most)

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, stamps: list[float]) -> tuple[float, ...]:
        return tuple(max(b - a, 0.0) for a, b in pairwise(stamps))

    def release(self) -> None:
        reset_compiler()
        gc.collect()

    def dirty(self) -> bool:
        return False

    @contextmanager
    def capped(self, cap_bytes: int | None, allowed_bytes: int | None) -> Iterator[None]:
        if cap_bytes is not None:
            raise RuntimeError("a CPU cannot play a smaller card")
        yield


class CudaSide:
    """One CUDA device. ``cuda`` is ``torch.cuda``; ``nvml_used`` reads the driver's count of the whole device."""

    def __init__(self, device: torch.device, cuda: Any = None, nvml_used: Callable[[], int | None] = lambda: None) -> None:
        self.device, self.cuda, self.nvml_used = device, cuda if cuda is not None else torch.cuda, nvml_used
        self.mem_get_info = self.cuda.mem_get_info

    def synchronize(self) -> None:
        self.cuda.synchronize(self.device)

    def reset(self) -> None:
        gc.collect()
        self.cuda.synchronize(self.device)
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats(self.device)
        reset_host_peak()

    def read(self, call: Callable[[], Any] | None = None) -> Counters:
        """Counters since ``reset``; on CUDA no call is needed for them."""
        free, total = self.mem_get_info(self.device)
        stats = self.cuda.memory_stats(self.device)
        rss, most = host_memory_now()
        return Counters(
            peak_allocated_bytes=self.cuda.max_memory_allocated(self.device),
            peak_reserved_bytes=self.cuda.max_memory_reserved(self.device),
            allocated_bytes=self.cuda.memory_allocated(self.device), reserved_bytes=self.cuda.memory_reserved(self.device),
            device_used_bytes=int(total) - int(free), nvml_used_bytes=self.nvml_used(), host_rss_bytes=rss, host_peak_bytes=most,
            pinned_bytes=self._pinned(), alloc_retries=stats.get("num_alloc_retries"))  # fmt: skip

    def _pinned(self) -> int | None:
        """Bytes in torch's pinned allocator (``torch.cuda.host_memory_stats``, torch 2.8 and newer)."""
        read = getattr(self.cuda, "host_memory_stats", None)
        if read is None:
            return None
        with suppress(RuntimeError):
            found = read().get("allocated_bytes.current")
            return None if found is None else int(found)
        return None

    def stamp(self) -> Any:
        """An event behind what is enqueued; the host does not wait, so that stamping a step does not slow it."""
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, stamps: list[Any]) -> tuple[float, ...]:
        self.synchronize()
        return tuple(max(float(a.elapsed_time(b)) * 1e-3, 0.0) for a, b in pairwise(stamps))

    def release(self) -> None:
        """Forget compiled code and its graph pools, and give cached blocks back."""
        with suppress(RuntimeError):
            self.cuda.synchronize(self.device)
        reset_compiler()
        gc.collect()
        self.cuda.empty_cache()
        empty_pinned_cache()

    def dirty(self) -> bool:
        """Whether the last cell broke the device, or left much on it, which later cells would be charged with."""
        try:
            self.cuda.synchronize(self.device)
        except RuntimeError:  # an illegal access stays with the process
            return True
        return bool(self.cuda.memory_allocated(self.device) > LEFT_BEHIND_BYTES)

    @contextmanager
    def capped(self, cap_bytes: int | None, allowed_bytes: int | None) -> Iterator[None]:
        """Play a card of ``cap_bytes``: torch may reserve ``allowed_bytes``, and ``mem_get_info`` tells of that card."""
        if cap_bytes is None or allowed_bytes is None:
            yield
            return
        whole = int(self.cuda.get_device_properties(self.device).total_memory)
        self.cuda.set_per_process_memory_fraction(min(allowed_bytes / whole, 1.0), self.device)

        def told(device: Any = None) -> tuple[int, int]:
            return max(allowed_bytes - int(self.cuda.memory_reserved(self.device)), 0), cap_bytes

        places = [self.cuda] + ([torch.cuda.memory] if self.cuda is torch.cuda else [])
        try:
            for place in places:
                place.mem_get_info = told
            yield
        finally:
            for place in places:
                place.mem_get_info = self.mem_get_info
            self.cuda.set_per_process_memory_fraction(1.0, self.device)


def reset_compiler() -> None:
    """Drop torch.compile's code, guards and CUDA graph trees of this process; only where it was used."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def empty_pinned_cache() -> None:
    """Give cached pinned memory back to the system; torch keeps it otherwise, and a large model's copy is half of a host's RAM."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


def reset_host_peak() -> None:
    """Let ``VmHWM`` start again from now (Linux: ``5`` into ``/proc/self/clear_refs``, proc(5)); nothing elsewhere."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def host_memory_now() -> tuple[int | None, int | None]:
    """(resident now, most since the reset) of this process."""
    found: dict[str, int] = {}
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(rest.split()[0]) * 1024
    most = found.get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found.get("VmRSS"), most


__all__ = ["CpuSide", "CudaSide", "LEFT_BEHIND_BYTES", "Side", "host_memory_now", "reset_compiler", "reset_host_peak"]
