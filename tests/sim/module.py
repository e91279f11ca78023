"""`torch.sim`: what torch, diffusers and accelerate expect of a device's module. Streams and events do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import backend_registration

from .tensor import memory


class Event:
    """Work is done when it is asked for, so every event has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream(Event):
    """A stream that runs everything at once and in order: it shows that code with streams runs, not that it overlaps."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class SimModule(backend_registration._DummyBackendModule):
    """The functions of `torch.cuda` that offloading and measuring code call, answered from the simulator's memory."""

    Stream, Event, OutOfMemoryError = Stream, Event, torch.OutOfMemoryError
    _current = Stream()

    def synchronize(self, device: Any = None) -> None:
        pass

    def set_device(self, device: Any) -> None:
        pass

    def empty_cache(self) -> None:
        memory.empty_cache()

    def manual_seed(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self, *args: Any) -> bool:
        return True

    def current_stream(self, device: Any = None) -> Stream:
        return self._current

    def default_stream(self, device: Any = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        yield

    def memory_allocated(self, device: Any = None) -> int:
        return memory.used_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.peak_bytes

    def memory_reserved(self, device: Any = None) -> int:
        return memory.reserved_bytes

    max_memory_reserved = memory_reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory.reset_peak()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes. Cached blocks are not free to others."""
        taken = max(memory.used_bytes, memory.reserved_bytes) + memory.other_process_bytes
        return max(0, memory.total_bytes - taken), memory.total_bytes

    def get_device_name(self, device: Any = None) -> str:
        return "simulated accelerator"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=self.get_device_name(), total_memory=memory.total_bytes)
