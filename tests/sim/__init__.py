"""A simulated accelerator for tests: torch device `sim`, with a memory limit, counters and faults, and no kernels.

`load()` registers it, once a process and for good; `active()` turns on the patches that let modules move to it and back.
What it proves and what it cannot is in README.md beside this file.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import backend_registration

from . import tensor
from .memory import ALLOCATION, BLOCK_BYTES, COPY, Fault, Memory, out_of_memory, rounded_bytes
from .module import SimModule
from .phases import Phase, mark_weights, phases
from .tensor import SimTensor, memory

__all__ = [
    "ALLOCATION", "BLOCK_BYTES", "COPY", "DEVICE_NAME", "Fault", "Memory", "Phase", "SimTensor", "active", "load",
    "loaded", "mark_weights", "memory", "out_of_memory", "phases", "rounded_bytes",
]  # fmt: skip

DEVICE_NAME = "sim"
_library: torch.library.Library | None = None


def loaded() -> bool:
    return _library is not None


def load() -> torch.device:
    """Register the `sim` device with torch, for the rest of the process, and return it."""
    global _library
    if _library is None:
        backend_registration._setup_privateuseone_for_python_backend(DEVICE_NAME, backend_module=SimModule())
        tensor.DEVICE = torch.device(DEVICE_NAME, 0)
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda func, *args, **kwargs: tensor.dispatch(func, args, kwargs), "PrivateUse1")
    assert tensor.DEVICE is not None
    return tensor.DEVICE


@contextmanager
def active(total_bytes: int = 1 << 50) -> Iterator[Memory]:
    """Use the device in the block, with this much memory and fresh counters. Nothing may be left on it at the end."""
    load()
    gc.collect()
    memory.total_bytes, memory.other_process_bytes = total_bytes, 0
    memory.reset()
    tensor.install_patches()
    try:
        yield memory
    finally:
        tensor.remove_patches()
        memory.total_bytes, memory.other_process_bytes = 1 << 50, 0
