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
from .leftovers import left_behind
from .memory import ALLOCATION, BLOCK_BYTES, COPY, Fault, Memory, out_of_memory, rounded_bytes
from .module import SimModule
from .phases import Phase, mark_weights, phases
from .tensor import SimTensor, memory

__all__ = [
    "ALLOCATION", "BLOCK_BYTES", "COPY", "DEVICE_NAME", "Fault", "Memory", "Phase", "SimTensor", "active", "left_behind",
    "load", "loaded", "mark_weights", "memory", "out_of_memory", "phases", "rounded_bytes",
]  # fmt: skip

DEVICE_NAME = "sim"
_libraries: list[torch.library.Library] = []


def loaded() -> bool:
    return bool(_libraries)


def load() -> torch.device:
    """Register the `sim` device with torch, for the rest of the process, and return it."""
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(DEVICE_NAME, backend_module=SimModule())
        tensor.DEVICE = torch.device(DEVICE_NAME, 0)
        everything, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        everything.fallback(lambda func, *args, **kwargs: tensor.dispatch(func, args, kwargs), "PrivateUse1")
        # torch.tensor(..., device="sim") and torch.Tensor([...]) call these two below the subclass, where torch 2.13
        # does not find the fallback ("func != nullptr INTERNAL ASSERT FAILED") but does find a kernel of their own.
        copy_, item = torch.ops.aten.copy_.default, torch.ops.aten._local_scalar_dense.default
        ours.impl("copy_", lambda *args, **kwargs: tensor.dispatch(copy_, args, kwargs), "PrivateUse1")
        ours.impl("_local_scalar_dense", lambda *args: tensor.dispatch(item, args, {}), "PrivateUse1")
        _libraries.extend((everything, ours))
        gc.collect()
        gc.freeze()  # left_behind() collects after most tests, and need not look at all of torch again
    assert tensor.DEVICE is not None
    return tensor.DEVICE


@contextmanager
def active(total_bytes: int = 1 << 50) -> Iterator[Memory]:
    """Use the device in the block, with this much memory, empty, counters at zero. What is on it already is not counted."""
    load()
    memory.forget()
    memory.total_bytes, memory.other_process_bytes = total_bytes, 0
    tensor.install_patches()
    try:
        yield memory
    finally:
        tensor.remove_patches()
        memory.total_bytes, memory.other_process_bytes = 1 << 50, 0
