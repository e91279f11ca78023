"""Arguments and answers of component calls: walked, copied, described, whatever containers they come in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from planner.dryrun.tensors import CPU, FLOATING, SMALL_ELEMENTS, meta_like

_ATOMS = (str, int, float, bool, torch.dtype, torch.device, torch.Generator, nn.Module)
_LIBRARIES = ("diffusers.", "transformers.")
_CALLBACKS = frozenset({"callback", "callback_on_step_end"})
_MASK_ELEMENTS = 1 << 16
_COPIED_BYTES = 16 << 20
"""User tensors above this are replaced by zeros, which the system maps lazily, instead of copied."""


def convert(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any]) -> Any:
    """``value`` with every tensor changed, through containers, model outputs and small library objects."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]
    if value is None or isinstance(value, _ATOMS):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(item, change, seen) for item in value))
    if type(value) in (list, tuple):
        return type(value)(convert(item, change, seen) for item in value)
    if type(value) is dict:
        return {key: convert(item, change, seen) for key, item in value.items()}
    if isinstance(value, dict) or type(value).__module__.startswith(_LIBRARIES):
        return _convert_object(value, change, seen)
    return value


def _convert_object(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    fresh = copy.copy(value)
    seen[id(value)] = fresh
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(fresh, key, convert(item, change, seen))
    for name, item in vars(value).items() if hasattr(value, "__dict__") else ():
        if not isinstance(item, nn.Module):
            object.__setattr__(fresh, name, convert(item, change, seen))
    return fresh


def holders(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments that a call may fill for its caller: lists, dictionaries, library objects such as a cache of keys and values."""
    return [value for value in (*args, *kwargs.values()) if type(value) in (list, dict) or _is_object(value)]


def _is_object(value: Any) -> bool:
    return type(value).__module__.startswith(_LIBRARIES) and not isinstance(value, dict | nn.Module) and hasattr(value, "__dict__")


def refill(holder: Any, content: Any) -> None:
    """Put into ``holder`` what its copy ``content`` holds."""
    if isinstance(holder, list):
        holder[:] = content
    elif isinstance(holder, dict):
        holder.clear()
        holder.update(content)
    else:
        vars(holder).update(vars(content))


def leaves(value: Any) -> list[torch.Tensor]:
    """Every tensor in ``value``, each once."""
    found: dict[int, Any] = {}
    convert(value, lambda tensor: tensor, found)
    return [item for item in found.values() if isinstance(item, torch.Tensor)]


def storage_bytes(value: Any) -> int:
    """Bytes of all storages behind ``value``, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in leaves(value)}
    return sum(storages.values())


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in that shares nothing: activations on ``meta``; integers, masks and small vectors with their values."""
    if tensor.device.type == "meta":
        return meta_like(tensor)
    if tensor.dtype not in FLOATING or (tensor.dim() <= 1 and tensor.numel() <= SMALL_ELEMENTS):
        return tensor.detach().to(CPU, copy=True)
    return meta_like(tensor)


def to_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros on the CPU for a ``meta`` tensor; everything else as it is."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor


def signature(value: Any, integers: bool = True) -> Any:
    """What decides a component call's trace: shapes, dtypes, flags; with ``integers`` also plain integers."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, _mask_value(value))
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return value if integers else "int"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list | tuple):
        return tuple(signature(item, integers) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), signature(item, integers)) for key, item in value.items())
    if type(value).__module__.startswith(_LIBRARIES) and not isinstance(value, nn.Module):
        return (type(value).__name__, tuple(signature(tensor) for tensor in leaves(value)))
    return type(value).__name__


def _mask_value(tensor: torch.Tensor) -> bytes | None:
    """A mask's content, for code drops what it masks; ids and time steps are not looked at."""
    if tensor.dtype in FLOATING or tensor.dim() < 2 or tensor.device.type != "cpu" or not 0 < tensor.numel() <= _MASK_ELEMENTS:
        return None
    if tensor.dtype is not torch.bool and int(tensor.max()) > 1:
        return None
    return bytes(tensor.detach().to(torch.uint8).numpy().tobytes())


def private_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's arguments without their callbacks, and with copies of whatever a run would change or read far away."""
    return {key: _private(value) for key, value in inputs.items() if key not in _CALLBACKS}


def _private(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(value.initial_seed())
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Generator) for item in value):
        return [_private(item) for item in value]
    return convert(value, _private_tensor, {})


def _private_tensor(tensor: torch.Tensor) -> torch.Tensor:
    far = tensor.device.type != "cpu" and tensor.dtype in FLOATING
    if tensor.device.type == "meta" or far or tensor.numel() * tensor.element_size() > _COPIED_BYTES:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.detach().to(CPU, copy=True)


def shape_of(output: Any) -> tuple[int, ...] | None:
    """Shape of a pipeline's main output; a list's length where it is a list."""
    first = output
    for _ in range(3):
        if isinstance(first, dict):
            first = next(iter(first.values()), None)
        elif hasattr(first, "__dict__") and not hasattr(first, "shape") and not isinstance(first, list | tuple):
            first = next(iter(vars(first).values()), None)
    if isinstance(first, list | tuple):
        return (len(first),)
    shape = getattr(first, "shape", None)
    return tuple(int(side) for side in shape) if shape is not None else None
