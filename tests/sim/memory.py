"""The simulated device's memory: what lives on it, its limit, copies, weights, and faults on demand. Pure bookkeeping."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK_BYTES = 512
"""Sizes are rounded up to this, as torch's CUDA caching allocator does (kMinBlockSize in CUDACachingAllocator.cpp)."""
ALLOCATION, COPY = "allocation", "copy"


def out_of_memory(text: str = "injected") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"sim out of memory: {text}")


def rounded_bytes(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


class Tags:
    """A number attached to a tensor's storage until that storage is freed; then `dropped` is called with it."""

    def __init__(self, dropped: Callable[[int], None] = lambda number: None) -> None:
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._dropped = dropped

    def put(self, tensor: torch.Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._numbers[key] = (number, weakref.ref(storage, lambda ref: self._drop(key)))

    def get(self, tensor: torch.Tensor) -> int | None:
        found = self._numbers.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def forget(self) -> None:
        """Drop every number; `dropped` is called for none of them, now or later."""
        self._numbers.clear()  # and with them the weak references that would call back

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._numbers

    def _drop(self, key: int) -> None:
        found = self._numbers.pop(key, None)
        if found is not None:
            self._dropped(found[0])


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At the `number`-th event (from 1, counted since arming): raise `error()`, or let another process hold bytes."""

    event: str
    number: int
    error: Callable[[], BaseException] | None = None
    other_process_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.event not in (ALLOCATION, COPY):
            raise ValueError(f"fault event {self.event!r}: wanted {ALLOCATION!r} or {COPY!r}")
        if (self.error is None) == (self.other_process_bytes is None):
            raise ValueError("a fault either raises an error or changes what another process holds")


@dataclass
class Armed:
    """Faults waiting for their event, and those that happened."""

    faults: tuple[Fault, ...]
    seen: dict[str, int] = field(default_factory=lambda: {ALLOCATION: 0, COPY: 0})
    fired: list[Fault] = field(default_factory=list)


class Memory:
    """Bytes in use on the device and copied over the bus. Raises torch.OutOfMemoryError where the limit is crossed."""

    def __init__(self) -> None:
        self.total_bytes = 1 << 50
        self.other_process_bytes = 0
        self.used_bytes = self.weight_bytes = self.pinned_bytes = 0
        self._sizes = Tags(self._release)
        self._resident_weights = Tags(self._release_weight)
        self._known_weights = Tags()
        self._pinned = Tags(self._unpin)
        self._armed: list[Armed] = []
        self.reset()

    def reset(self) -> None:
        """Start counting again; what lives on the device stays."""
        self.peak_bytes = self.reserved_bytes = self.used_bytes
        self.peak_weight_bytes = self.weight_bytes
        self.h2d_bytes = self.d2h_bytes = self.allocations = self.copies = 0
        self.weight_h2d_bytes = self.weight_d2h_bytes = 0

    def forget(self) -> None:
        """An empty device: what lives on it now is not counted any more, also not when it is freed. Counts from zero."""
        for tags in (self._sizes, self._resident_weights, self._known_weights, self._pinned):
            tags.forget()
        self.used_bytes = self.weight_bytes = self.pinned_bytes = 0
        self.reset()

    def reset_peak(self) -> None:
        self.peak_bytes, self.peak_weight_bytes = self.used_bytes, self.weight_bytes

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - self.other_process_bytes - self.used_bytes)

    def charge(self, raw: torch.Tensor) -> None:
        """Count the storage behind a tensor of the device, once; again if it has grown. Raises torch.OutOfMemoryError."""
        known_bytes = self._sizes.get(raw)
        whole_bytes = rounded_bytes(raw.untyped_storage().nbytes())
        if known_bytes is not None and known_bytes >= whole_bytes:
            return
        size_bytes = whole_bytes - (known_bytes or 0)
        self.allocations += 1
        self._happens(ALLOCATION)
        if size_bytes > self.free_bytes:
            raise out_of_memory(
                f"tried to allocate {size_bytes} bytes; of {self.total_bytes} bytes {self.used_bytes} are in use here "
                f"and {self.other_process_bytes} by another process"
            )
        self._sizes.put(raw, whole_bytes)
        self.used_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.reserved_bytes = max(self.reserved_bytes, self.used_bytes)

    def bytes_of(self, raw: torch.Tensor) -> int:
        """What the storage behind a tensor counts for; 0 where it is not counted."""
        return self._sizes.get(raw) or 0

    def _release(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes

    def empty_cache(self) -> None:
        """Give back the blocks kept for reuse: the caching allocator is modelled by its high-water mark alone."""
        self.reserved_bytes = self.used_bytes

    def copied(self, source: torch.Tensor, target: torch.Tensor, *, to_device: bool) -> None:
        """Count a copy of `target`'s bytes over the bus, and carry over that `source` was a weight."""
        if to_device:
            self.h2d_bytes += target.nbytes
        else:
            self.d2h_bytes += target.nbytes
        if source in self._known_weights:
            self.mark_weight(target)
            if to_device:
                self.weight_h2d_bytes += target.nbytes
            else:
                self.weight_d2h_bytes += target.nbytes

    def before_copy(self) -> None:
        self.copies += 1
        self._happens(COPY)

    def mark_weight(self, raw: torch.Tensor) -> None:
        """From here on this storage, and every copy of it over the bus, counts as weights while on the device."""
        if raw not in self._known_weights:
            self._known_weights.put(raw, 1)
        if raw in self._sizes and raw not in self._resident_weights:
            size_bytes = self._sizes.get(raw) or 0
            self._resident_weights.put(raw, size_bytes)
            self.weight_bytes += size_bytes
            self.peak_weight_bytes = max(self.peak_weight_bytes, self.weight_bytes)

    def _release_weight(self, size_bytes: int) -> None:
        self.weight_bytes -= size_bytes

    def is_weight(self, raw: torch.Tensor) -> bool:
        return raw in self._known_weights

    def pin(self, tensor: torch.Tensor) -> None:
        """Count a host tensor as page-locked until it is freed."""
        if tensor not in self._pinned:
            size_bytes = tensor.untyped_storage().nbytes()
            self._pinned.put(tensor, size_bytes)
            self.pinned_bytes += size_bytes

    def _unpin(self, size_bytes: int) -> None:
        self.pinned_bytes -= size_bytes

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor in self._pinned

    @contextmanager
    def faults(self, *faults: Fault) -> Iterator[Armed]:
        """Arm faults for the block; what another process held before the block is put back after it."""
        armed, before = Armed(faults), self.other_process_bytes
        self._armed.append(armed)
        try:
            yield armed
        finally:
            self._armed.remove(armed)
            self.other_process_bytes = before

    def _happens(self, event: str) -> None:
        for armed in self._armed:
            armed.seen[event] += 1
            for fault in armed.faults:
                if fault.event == event and fault.number == armed.seen[event]:
                    armed.fired.append(fault)
                    if fault.other_process_bytes is not None:
                        self.other_process_bytes = fault.other_process_bytes
                    elif fault.error is not None:
                        raise fault.error()
