"""Small questions about tensors and aten operations that the recorder asks again and again."""

from __future__ import annotations

from typing import Any

import torch

META = torch.device("meta")
CPU = torch.device("cpu")
SMALL_ELEMENTS = 1024
"""Floating tensors up to this size keep their values within a component: norms, scales, timesteps."""
FLOATING = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128,
                      torch.float8_e4m3fn, torch.float8_e5m2})  # fmt: skip
_UNDECLARED_VIEWS = {"aten::_unsafe_view", "aten::lift_fresh"}
_FUNCTIONAL: dict[Any, bool] = {}
_VIEW: dict[Any, bool] = {}
_WRITES: dict[Any, tuple[tuple[int, str], ...]] = {}


def tensors_in(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Tensor arguments of an aten call, those in lists included."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return found


def outputs_in(out: Any) -> list[torch.Tensor]:
    """Tensor results of an aten call."""
    items = out if isinstance(out, tuple | list) else (out,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def swap(value: Any, table: dict[int, torch.Tensor]) -> Any:
    """``value`` with tensors exchanged by identity."""
    if isinstance(value, torch.Tensor):
        return table.get(id(value), value)
    if isinstance(value, list | tuple):
        return type(value)(swap(item, table) for item in value)
    if isinstance(value, dict):
        return {key: swap(item, table) for key, item in value.items()}
    return value


def lift(args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
    """The arguments with CPU tensors (0-dim ones excepted) replaced by ``meta`` ones of the same layout."""
    table = {id(t): meta_like(t) for t in tensors if t.device.type != "meta" and t.dim()}
    return (swap(args, table), swap(kwargs, table)) if table else (args, kwargs)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A fresh ``meta`` tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def integer_indices(args: Any) -> Any:
    """Boolean index tensors with values become integer ones: ``meta`` cannot count what a mask selects."""
    indices: list[Any] = []
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and index.device.type == "cpu":
            indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def frozen(value: Any) -> Any:
    """A hashable description of an argument: tensors by layout, everything else by value."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if isinstance(value, float | int | bool):
        return (type(value), value)
    return value


def is_functional(func: Any) -> bool:
    """Whether an operation neither writes to nor aliases its arguments, so that its result can be replayed."""
    known = _FUNCTIONAL.get(func)
    if known is None:
        schema = func._schema
        aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
        known = _FUNCTIONAL[func] = not aliases and not schema.is_mutable and schema.name not in _UNDECLARED_VIEWS
    return known


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its argument's storage in another way."""
    known = _VIEW.get(func)
    if known is None:
        schema = func._schema
        declared = any(r.alias_info is not None for r in schema.returns)
        known = _VIEW[func] = not schema.is_mutable and (declared or schema.name in _UNDECLARED_VIEWS)
    return known


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that a mutating operation writes into."""
    places = _WRITES.get(func)
    if places is None:
        arguments = enumerate(func._schema.arguments)
        places = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
        _WRITES[func] = places
    values = (args[place] if place < len(args) else kwargs.get(name) for place, name in places)
    return [value for value in values if isinstance(value, torch.Tensor)]


def factory_elements(func: Any, args: Any) -> int:
    """Elements that a factory call (``zeros``, ``arange``, …) makes; 0 where that is not plain to see."""
    name = func._schema.name
    if name == "aten::arange":
        numbers = [value for value in args if isinstance(value, int | float)]
        start, end = (numbers[0], numbers[1]) if len(numbers) > 1 else (0, numbers[0] if numbers else 0)
        return int(abs(end - start))
    if name in ("aten::linspace", "aten::logspace"):
        return int(args[2]) if len(args) > 2 else 0
    count = 1
    for side in args[0] if args and isinstance(args[0], list | tuple) else (0,):
        count *= int(side)
    return count
