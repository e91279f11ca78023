"""`SimTensor`: a tensor that says it lives on `sim:0` and keeps its bytes in a plain CPU tensor.

Every operation reaches `dispatch`, which unwraps, runs the CPU kernel and wraps again. Residency is charged by storage,
so views cost nothing. Mixing devices is refused as CUDA refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .memory import Memory

memory = Memory()
TYPE = "sim"
DEVICE: torch.device | None = None
"""Set when the backend is registered: before that, torch does not know the name."""

MAY_MIX_DEVICES = {
    "aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::set_",
    "aten::lift_fresh",
}  # fmt: skip
"""Operations that also on CUDA take a CPU tensor beside one of the device: copies, and indices."""
TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_same_size", "aten::_fused_sdp_choice"}
"""Operations that answer with a Python value."""


class SimTensor(torch.Tensor):
    """A tensor on the simulated device; `.raw` is the CPU tensor behind it."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **ignored: Any) -> torch.Tensor:
        # accelerate rebuilds a parameter from the class of the old one, whatever device the new data is on.
        if isinstance(data, SimTensor):
            return _wrapper(data.raw, requires_grad)
        return torch.nn.Parameter(data, requires_grad=requires_grad)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copied: torch.Tensor = wrap(self.raw.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.raw!r} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _wrapper(raw: torch.Tensor, requires_grad: bool = False) -> SimTensor:
    made = torch.Tensor._make_wrapper_subclass(
        SimTensor, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
        layout=raw.layout, device=DEVICE, requires_grad=requires_grad)  # fmt: skip
    made.raw = raw
    return made


def wrap(raw: torch.Tensor) -> SimTensor:
    """A tensor on the device around `raw`, charged to the device's memory. Raises torch.OutOfMemoryError."""
    memory.charge(raw)
    return _wrapper(raw)


def _unwrap(value: Any) -> Any:
    if isinstance(value, SimTensor):
        return value.raw
    if isinstance(value, torch.device) and value.type == TYPE:
        return torch.device("cpu")
    return value


_modules_moving: list[Any] = []
"""Modules in the middle of `Module.to()` and its like."""


def _to_copy(args: Any, kwargs: Any) -> Any:
    """`aten::_to_copy` of a tensor that is on the device: to the host, to meta, or staying with another dtype."""
    source = args[0]
    device = source.device if kwargs.get("device") is None else torch.device(kwargs["device"])
    dtype = kwargs.get("dtype") or source.dtype
    if device.type == "meta":
        return torch.empty_strided(source.size(), source.stride(), dtype=dtype, device="meta")
    layout = {} if kwargs.get("memory_format") is None else {"memory_format": kwargs["memory_format"]}
    raw = _unwrap(source)
    if device.type == TYPE and isinstance(source, SimTensor):
        return _like_source(source, wrap(raw.to(dtype, copy=True, **layout)))
    memory.before_copy()
    out = raw.to(dtype, copy=True, **layout)
    to_device = device.type == TYPE
    made = wrap(out) if to_device else out
    memory.copied(raw, out, to_device=to_device)
    return made


def _like_source(source: SimTensor, made: SimTensor) -> SimTensor:
    """A weight that its module casts on the device is still a weight; one that a call casts for itself is its activation."""
    if _modules_moving and memory.is_weight(source.raw):
        memory.mark_weight(made.raw)
    return made


def _copy_(args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    to_device, from_device = isinstance(target, SimTensor), isinstance(source, SimTensor)
    if to_device != from_device:
        memory.before_copy()
    _unwrap(target).copy_(_unwrap(source))
    if to_device != from_device:
        memory.copied(_unwrap(source), _unwrap(target), to_device=to_device)
    return target


def _refuse_mixed_devices(name: str, leaves: list[Any]) -> None:
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    on_sim = any(isinstance(x, SimTensor) for x in tensors)
    # A number in a 0-dim CPU tensor may go with tensors of any device.
    elsewhere = [x for x in tensors if not isinstance(x, SimTensor) and x.dim()]
    if on_sim and elsewhere and name not in MAY_MIX_DEVICES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
            f"{elsewhere[0].device}! ({name}, shape {tuple(elsewhere[0].shape)})"
        )


def _answer(out: Any, leaves: list[Any]) -> Any:
    """Wrap results; a result that is one of the inputs (in-place, out=) is answered with that input itself."""
    owners = {id(x.raw): x for x in leaves if isinstance(x, SimTensor)}

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        owner = owners.get(id(value))
        if owner is None:
            return wrap(value)
        if owner.shape != value.shape or owner.stride() != value.stride():
            _set_data(owner, wrap(value))  # squeeze_(), or an empty out= that the operation has grown
        return owner

    return tree_map(one, out)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one aten operation that has a tensor or a device argument on `sim`."""
    name = func._schema.name
    if name == "aten::_to_copy":
        return _to_copy(args, kwargs)
    if name == "aten::copy_":
        return _copy_(args, kwargs)
    if name == "aten::record_stream":
        return None
    leaves = tree_leaves((args, kwargs))
    _refuse_mixed_devices(name, leaves)
    out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if name in TO_HOST:
        return out
    return _answer(out, leaves)


# Patches that last only while the simulator is active. `param.data = other` across devices is what Module.to() and
# group offloading do; for a wrapper subclass torch can only swap the two tensors.

_get_data, _set_data = torch._C.TensorBase.data.__get__, torch._C.TensorBase.data.__set__
_may_set_data = torch._has_compatible_shallow_copy_type


def _set(self: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(self, SimTensor) and isinstance(value, SimTensor):
        _set_data(self, value)
        self.raw = value.raw
    elif not isinstance(self, SimTensor) and not isinstance(value, SimTensor):
        _set_data(self, value)
    else:
        _swap(self, value.detach())


def _swap(self: torch.Tensor, new: torch.Tensor) -> None:
    attributes = {k: v for k, v in self.__dict__.items() if k not in ("raw", "_is_param")}
    if isinstance(self, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=self.requires_grad)
    torch.utils.swap_tensors(self, new)
    self.__dict__.update(attributes)


def _compatible(first: torch.Tensor, second: torch.Tensor) -> bool:
    """CPU and device tensors may take each other's place behind one Parameter, as CPU and CUDA tensors may."""
    kinds = {isinstance(first, SimTensor), isinstance(second, SimTensor)}
    if kinds == {True, False}:
        return first.device.type != "meta" and second.device.type != "meta"
    return kinds == {True} or _may_set_data(first, second)


def _pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if isinstance(self, SimTensor):
        raise RuntimeError(f"cannot pin a tensor of {DEVICE}: only dense CPU tensors can be pinned")
    if memory.is_pinned(self):
        return self
    copied = self.detach().clone()
    if memory.is_weight(self):
        memory.mark_weight(copied)
    memory.pin(copied)
    return copied


def _is_pinned(self: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    return not isinstance(self, SimTensor) and memory.is_pinned(self)


_original_apply = torch.nn.Module._apply


def _apply(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    _modules_moving.append(self)
    try:
        return _original_apply(self, *args, **kwargs)
    finally:
        _modules_moving.pop()


_attention = torch.nn.functional.scaled_dot_product_attention


def _sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    """One operation, as the fused kernels of a GPU are, instead of the matrices it is made of."""
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(x, SimTensor) for x in leaves):
        return _attention(*args, **kwargs)
    _refuse_mixed_devices("scaled_dot_product_attention", leaves)
    return wrap(_attention(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs)))


def install_patches() -> None:
    torch.nn.functional.scaled_dot_product_attention = _sdpa
    torch.Tensor.data = property(lambda self: _get_data(self), _set)
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = _pin_memory, _is_pinned
    torch._has_compatible_shallow_copy_type = _compatible
    torch.nn.Module._apply = _apply


def remove_patches() -> None:
    for name in ("data", "pin_memory", "is_pinned"):
        delattr(torch.Tensor, name)  # what torch._C.TensorBase defines shows again
    torch._has_compatible_shallow_copy_type = _may_set_data
    torch.nn.Module._apply = _original_apply
    torch.nn.functional.scaled_dot_product_attention = _attention
