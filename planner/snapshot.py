"""The Python-level state of a pipeline, and of the process-wide switches that plans may turn, without its weights.

A snapshot holds references, never copies: the same ``Parameter`` objects are put back where they were. What changed a
tensor's dtype keeps the originals itself (see the ``dtype`` and ``quantization`` knobs) and restores them first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.dryrun.facts import unwrap

PIPE_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id", "_exclude_from_cpu_offload", "hf_device_map", "_planner")
"""Pipeline attributes that knobs leave behind. What ``__call__`` itself stores there is no concern of a plan."""
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one parameter or buffer was; ``kind`` is ``_parameters`` or ``_buffers``."""

    kind: str
    name: str
    tensor: torch.Tensor
    address: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    checksum: str | None


@dataclass(frozen=True, slots=True)
class _Module:
    path: str
    module: nn.Module
    cls: type
    entries: dict[str, Any]
    tensors: tuple[_Tensor, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of one pipeline. ``of`` takes it, ``differences`` compares, ``restore`` puts it back."""

    modules: tuple[_Module, ...]
    parts: dict[str, Any]
    attributes: dict[str, Any]
    processors: dict[int, dict[str, Any]]
    switches: dict[str, Any]

    @classmethod
    def of(cls, pipe: Any, *, checksums: bool = False) -> Snapshot:
        """Take a snapshot; ``checksums`` also hashes every weight (reads all of them once)."""
        modules = tuple(_module(path, module, checksums) for path, module in _walk(pipe))
        return cls(
            modules=modules,
            parts=_parts(pipe),
            attributes={name: _shallow(vars(pipe)[name]) for name in PIPE_ATTRIBUTES if name in vars(pipe)},
            processors={id(part): dict(vars(part)) for part in _processors(modules)},
            switches=read_switches(),
        )

    def differences(self, pipe: Any, *, addresses: bool = False) -> list[str]:
        """What is not as it was, one line each; empty when nothing differs. ``addresses``: storage moved, too."""
        found = list(_changed("pipe", self.parts, _parts(pipe)))
        now = {name: vars(pipe)[name] for name in PIPE_ATTRIBUTES if name in vars(pipe)}
        found += _changed("pipe", self.attributes, now)
        for state in self.modules:
            found += _module_differences(state, addresses)
        for part in _processors(self.modules):
            found += _changed(type(part).__name__, self.processors[id(part)], vars(part))
        return found + list(_changed("process", self.switches, read_switches()))

    def restore(self, pipe: Any) -> None:
        """Put everything back: components, attributes, hooks, tensors to their devices, process-wide switches."""
        for name, part in self.parts.items():
            if vars(pipe).get(name) is not part:
                setattr(pipe, name, part)
        for name in PIPE_ATTRIBUTES:
            _put(vars(pipe), name, self.attributes.get(name, _ABSENT))
        for state in self.modules:
            _restore_module(state)
        for part in _processors(self.modules):
            _restore_entries(vars(part), self.processors[id(part)])
        write_switches(self.switches)


def read_switches() -> dict[str, Any]:
    """The process-wide settings that knobs may change."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "attention_backend": _AttentionBackendRegistry.get_active_backend()[0],
        "default_dtype": torch.get_default_dtype(),
        "flash_sdp": torch.backends.cuda.flash_sdp_enabled(),
        "math_sdp": torch.backends.cuda.math_sdp_enabled(),
        "mem_efficient_sdp": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(),
    }


def write_switches(switches: dict[str, Any]) -> None:
    """Set the process-wide settings that differ from ``switches``."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    writers: dict[str, Callable[[Any], object]] = {
        "float32_matmul_precision": torch.set_float32_matmul_precision,
        "cudnn.allow_tf32": lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
        "cudnn.benchmark": lambda value: setattr(torch.backends.cudnn, "benchmark", value),
        "attention_backend": _AttentionBackendRegistry.set_active_backend,
        "default_dtype": torch.set_default_dtype,
        "flash_sdp": torch.backends.cuda.enable_flash_sdp,
        "math_sdp": torch.backends.cuda.enable_math_sdp,
        "mem_efficient_sdp": torch.backends.cuda.enable_mem_efficient_sdp,
        "cudnn_sdp": torch.backends.cuda.enable_cudnn_sdp,
    }
    now = read_switches()
    for name, value in switches.items():
        if now[name] != value:
            writers[name](value)


def place(tensor: torch.Tensor, device: torch.device) -> None:
    """Move a tensor's storage to ``device``, keeping the tensor object; no copy when it is there already."""
    if tensor.device == device:
        return
    moved = tensor.detach().to(device)
    if hasattr(type(tensor.data), "__tensor_unflatten__"):
        # ``.data =`` would leave the inner tensors of a quantized weight behind.
        _swap(tensor, _alike(tensor, moved))
    else:
        tensor.data = moved


def _swap(tensor: torch.Tensor, fresh: torch.Tensor) -> None:
    """``swap_tensors``, which takes several steps, the tensors themselves last: all of them or none."""
    before, kept = tensor.device, [(each, type(each), vars(each)) for each in (tensor, fresh)]
    try:
        torch.utils.swap_tensors(tensor, fresh)
    except BaseException:
        for each, kind, entries in kept if tensor.device == before else ():
            each.__class__, each.__dict__ = kind, entries
        raise


def _alike(tensor: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def _parts(pipe: Any) -> dict[str, Any]:
    """Components by name; schedulers and tokenizers included."""
    return {name: vars(pipe)[name] for name in pipe.config if not name.startswith("_") and name in vars(pipe)}


def _walk(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, part in _parts(pipe).items():
        if isinstance(part, nn.Module):
            for path, module in unwrap(part).named_modules(prefix=name):
                if id(module) not in seen:
                    seen.add(id(module))
                    yield path, module


def _processors(modules: tuple[_Module, ...]) -> list[Any]:
    """Attention processors that are plain objects (those that are modules are walked as such)."""
    found = {id(p): p for state in modules if (p := state.entries.get("processor")) is not None}
    return [part for part in found.values() if hasattr(part, "__dict__")]


def _module(path: str, module: nn.Module, checksums: bool) -> _Module:
    tensors = []
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                tensors.append(_tensor(kind, name, tensor, checksums))
    entries = {name: _shallow(value) for name, value in vars(module).items()}
    return _Module(path, module, type(module), entries, tuple(tensors))


def _tensor(kind: str, name: str, tensor: torch.Tensor, checksums: bool) -> _Tensor:
    return _Tensor(
        kind=kind,
        name=name,
        tensor=tensor,
        address=_address(tensor),
        dtype=tensor.dtype,
        device=tensor.device,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        requires_grad=tensor.requires_grad,
        checksum=checksum(tensor) if checksums else None,
    )


def checksum(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bits; of its inner tensors where it is a wrapper around several."""
    if hasattr(type(tensor), "__tensor_unflatten__") or hasattr(type(tensor.data), "__tensor_unflatten__"):
        names = tensor.__tensor_flatten__()[0]
        return "+".join(checksum(getattr(tensor, name)) for name in names)
    if tensor.device.type == "meta":
        return "meta"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()


def _address(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.data_ptr())
    except RuntimeError:  # wrapper subclasses have no storage of their own
        return 0


def _shallow(value: Any) -> Any:
    """A container is copied one level deep, so that later additions to it can be seen."""
    return value.copy() if isinstance(value, dict | list | set) else value


def _changed(where: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys(), key=str):
        old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if not _same(old, new):
            yield f"{where}.{name}: was {_brief(old)}, is {_brief(new)}"


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, torch.Tensor):
        like = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        return like and bool(torch.equal(old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, bool | int | float | str | bytes | set | frozenset | torch.dtype | torch.device):
        return bool(old == new)
    return False


def _brief(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return repr(value)[:60] if isinstance(value, bool | int | float | str) else type(value).__name__


def _module_differences(state: _Module, addresses: bool) -> Iterator[str]:
    if type(state.module) is not state.cls:
        yield f"{state.path}: class was {state.cls.__name__}, is {type(state.module).__name__}"
    tensors = ("_parameters", "_buffers")
    before = {name: value for name, value in state.entries.items() if name not in tensors}
    now = {name: value for name, value in vars(state.module).items() if name not in tensors}
    yield from _changed(state.path, before, now)
    for kind in tensors:
        yield from (
            f"{state.path}.{name}: appeared" for name in getattr(state.module, kind) if name not in state.entries[kind]
        )
    for known in state.tensors:
        yield from _tensor_differences(state, known, addresses)


def _tensor_differences(state: _Module, known: _Tensor, addresses: bool) -> Iterator[str]:
    path = f"{state.path}.{known.name}"
    tensor = getattr(state.module, known.kind).get(known.name)
    if tensor is None:
        yield f"{path}: gone"
        return
    if tensor is not known.tensor:
        yield f"{path}: another object"
    for name in ("dtype", "device", "shape", "stride", "requires_grad"):
        value = getattr(tensor, name)() if name == "stride" else getattr(tensor, name)
        value = tuple(value) if name in ("shape", "stride") else value
        if value != getattr(known, name):
            yield f"{path}: {name} was {getattr(known, name)}, is {value}"
    if addresses and _address(tensor) != known.address:
        yield f"{path}: its storage moved"
    if known.checksum is not None and checksum(tensor) != known.checksum:
        yield f"{path}: its bits changed"


def _put(entries: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        entries.pop(name, None)
    elif not _same(value, entries.get(name, _ABSENT)):
        entries[name] = _shallow(value)


def _restore_module(state: _Module) -> None:
    if type(state.module) is not state.cls:
        state.module.__class__ = state.cls
    _restore_entries(vars(state.module), state.entries)
    for known in state.tensors:
        if known.tensor.device != known.device:
            place(known.tensor, known.device)
        if tuple(known.tensor.stride()) != known.stride and known.tensor.dtype == known.dtype:
            known.tensor.data = _restrided(known)
        if known.tensor.requires_grad != known.requires_grad:
            known.tensor.requires_grad_(known.requires_grad)


def _restrided(known: _Tensor) -> torch.Tensor:
    fresh = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device=known.device)
    return fresh.copy_(known.tensor.detach())


def _restore_entries(entries: dict[str, Any], before: dict[str, Any]) -> None:
    """Containers keep their identity: torch and accelerate hold references to a module's own dictionaries."""
    for name in [name for name in entries if name not in before]:
        del entries[name]
    for name, value in before.items():
        now = entries.get(name, _ABSENT)
        if isinstance(value, dict) and isinstance(now, dict):
            if not _identical(value, now):
                now.clear()
                now.update(value)
        elif not _same(value, now):
            entries[name] = _shallow(value)


def _identical(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return list(old) == list(new) and all(old[key] is new[key] for key in old)
