"""What a real CPU run of a pipeline does, measured without any of the planner's code: component calls, work, bytes.

Attention counts as one operation, as on a device with fused kernels; bytes are rounded to 512 as CUDA's allocator does.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "lift_fresh",
             "_unsafe_view", "detach", "alias"}  # fmt: skip
PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, nn.Module)


@dataclass
class Call:
    """One component call of the real run."""

    name: str
    held_bytes: int
    peak_bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)


class Meter(TorchDispatchMode):
    """Counts operations and the bytes of storages that are alive, by weak references."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.live = self.peak = 0
        self.operations: Counter[str] = Counter()
        self.references: dict[int, weakref.ref] = {}

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = -(-storage.nbytes() // 512) * 512
        self.live += self.alive[key]
        self.peak = max(self.peak, self.live)
        self.references[key] = weakref.ref(storage, lambda _, key=key: self.gone(key))

    def gone(self, key: int) -> None:
        self.live -= self.alive.pop(key, 0)
        self.references.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        results = tensors_of(out)
        fresh = [t for t in results if t.untyped_storage()._cdata not in before]
        for tensor in fresh:
            if func._schema.name != "aten::lift_fresh":
                self.see(tensor)
        name = func._schema.name.partition("::")[2]
        if results and name not in NO_KERNEL and (fresh or func._schema.is_mutable):
            self.operations[name] += 1
        return out


class WholeAttention(TorchFunctionMode):
    """Runs ``scaled_dot_product_attention`` unseen and reports it as one operation with one output."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            out = func(*args, **(kwargs or {}))
            if out.dim() == 4:
                out = out.transpose(1, 2).contiguous().transpose(1, 2)
        self.meter.operations["attention"] += 1
        self.meter.see(out)
        return out


def tensors_of(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Tensors in containers and library objects."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PLAIN):
        return []
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    items: list[Any] = []
    if isinstance(value, Mapping):
        items += value.values()
    elif isinstance(value, list | tuple):
        items += value
    if type(value).__module__.startswith(("diffusers", "transformers")):
        items += vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for item in items for tensor in tensors_of(item, seen)]


def measure(pipe: Any, inputs: Mapping[str, Any], methods: set[tuple[str, str]]) -> list[Call]:
    """Run ``pipe`` and list its component calls. ``methods`` names entry points besides ``forward``, by component."""
    meter, calls, depth = Meter(), [], [0]
    owners: dict[int, tuple[str, str]] = {}
    for name, component in pipe.components.items():
        for path, part in component.named_modules() if isinstance(component, nn.Module) else ():
            owners.setdefault(id(part), (name, path))

    def boundary(name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for tensor in tensors_of((args, kwargs)):
            meter.see(tensor)
        call = Call(name, meter.live)
        calls.append(call)
        before, operations, meter.peak = meter.live, meter.operations.copy(), meter.live
        depth[0] += 1
        try:
            return run(*args, **kwargs)
        finally:
            depth[0] -= 1
            call.peak_bytes, call.operations = meter.peak - before, meter.operations - operations

    with _spied(owners, boundary, depth), _wrapped(pipe, methods, boundary, depth):
        gc.collect()
        gc.disable()
        try:
            with WholeAttention(meter), meter:
                pipe(**inputs)
        finally:
            gc.enable()
    return calls


@contextmanager
def _spied(owners: Mapping[int, tuple[str, str]], boundary: Callable[..., Any], depth: list[int]):
    original = nn.Module.__call__

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owner = owners.get(id(module))
        if depth[0] or owner is None:
            return original(module, *args, **kwargs)
        name = ".".join(part for part in owner if part)
        return boundary(name, lambda *a, **k: original(module, *a, **k), args, kwargs)

    nn.Module.__call__ = spy
    try:
        yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _wrapped(pipe: Any, methods: set[tuple[str, str]], boundary: Callable[..., Any], depth: list[int]):
    parts = pipe.components
    found = [(parts[name], name, method) for name, method in methods if callable(getattr(parts[name], method, None))]
    for module, name, method in found:

        object.__setattr__(module, method, _entry(f"{name}.{method}", getattr(module, method), boundary, depth))
    try:
        yield
    finally:
        for module, _, method in found:
            object.__delattr__(module, method)


def _entry(name: str, run: Callable[..., Any], boundary: Callable[..., Any], depth: list[int]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(*args, **kwargs) if depth[0] else boundary(name, run, args, kwargs)


def real_flops(pipe: Any, inputs: Mapping[str, Any]) -> int:
    """FLOPs of a real run by torch's own counter, attention by its mathematical definition."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipe(**inputs)
    return counter.get_total_flops()
