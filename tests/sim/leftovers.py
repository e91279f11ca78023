"""What a test leaves on the simulated device. diffusers itself keeps two things there, which are no one's leak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .tensor import SimTensor, memory


def left_behind() -> tuple[int, int]:
    """Bytes on the device and bytes pinned on the host that nothing in diffusers accounts for, once garbage is collected."""
    if memory.used_bytes or memory.pinned_bytes:
        gc.collect()
    kept_bytes = 0
    if memory.used_bytes or memory.pinned_bytes:
        # Whatever was there when the simulator was loaded is exempt from collection (`load`), a pipeline of that test too.
        gc.unfreeze()
        for clear in rotary_caches():
            clear()
        see_untracked_modules()
        gc.collect()
        kept_bytes = scheduler_bytes() if memory.used_bytes else 0
        gc.freeze()
    return memory.used_bytes - kept_bytes, memory.pinned_bytes


def see_untracked_modules() -> None:
    """Let the collector look into modules that Python 3.13 before 3.13.4 hides from it, with all that they refer to, for good.

    There a ``__dict__`` that is asked for early and then grows stays untracked: github.com/python/cpython/issues/133543.
    """
    for each in gc.get_objects():
        if issubclass(type(each), torch.nn.Module) and not gc.is_tracked(vars(each)):
            vars(each)["tracked"] = []  # a container makes its dictionary tracked
            del vars(each)["tracked"]


def rotary_caches() -> Iterator[Callable[[], Any]]:
    """What empties each `lru_cache` of a method in diffusers' models: Qwen-Image's positions stay there for good, by device."""
    for kind in _subclasses(torch.nn.Module):
        if kind.__module__.startswith("diffusers.models."):
            for method in vars(kind).values():
                for cell in getattr(method, "__closure__", None) or ():
                    if isinstance(cell.cell_contents, _lru_cache_wrapper):
                        yield cell.cell_contents.cache_clear
                if isinstance(method, _lru_cache_wrapper):
                    yield method.cache_clear


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def scheduler_bytes() -> int:
    """What schedulers of living pipelines keep of their last run: time steps, sigmas, the last predictions of a multistep one."""
    from diffusers import SchedulerMixin

    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), SchedulerMixin):
            for leaf in tree_leaves(vars(each)):
                if isinstance(leaf, SimTensor):
                    storages[leaf.raw.untyped_storage()._cdata] = memory.bytes_of(leaf.raw)
    return sum(storages.values())
