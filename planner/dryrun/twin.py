"""Stand-ins for components: same classes, same code, weights on ``meta``. The originals are only read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from planner.dryrun.facts import own_tensors, tensor_bytes, unwrap
from planner.dryrun.tensors import meta_like

SMALL_BUFFER_BYTES = 1 << 20
_HOOK_ATTRIBUTES = ("_hf_hook", "_diffusers_hook", "_old_forward", "_compiled_call_impl")
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_OWN_TABLES = {"_parameters", "_buffers", "_modules", *_HOOK_ATTRIBUTES, *_HOOK_TABLES}


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters are on ``meta`` and that has no hooks and no compiled code.

    No byte of a parameter is read or copied; small buffers are cloned so that their values stay usable. Quantized
    parameters become plain ones of the dtype they present, and layer-wise cast ones get the dtype they compute in.
    """
    module = unwrap(module)
    memo: dict[int, Any] = {}
    compute = {id(part): dtype for part in module.modules() if (dtype := _layerwise_dtype(part)) is not None}
    for part in module.modules():
        _replace_tensors(part, memo, compute.get(id(part)))
        for name in _HOOK_ATTRIBUTES:
            _skip(part.__dict__.get(name), memo)
        for name in _HOOK_TABLES:
            memo |= {id(hook): None for hook in part.__dict__.get(name, {}).values() if not _is_of_the_model(hook)}
        # Nearly all of a module's dozen tables are empty; made here, they need not go through deepcopy's reduce protocol.
        memo |= {id(value): OrderedDict() for value in part.__dict__.values() if type(value) is OrderedDict and not value}
        _skip_foreign_forward(part, memo)
    try:
        twin = _deepcopy(module, dict(memo))
    except Exception:
        _share_what_resists(module, memo)
        twin = _deepcopy(module, memo)
    for part in twin.modules():
        _strip_hooks(part)
    return twin.eval() if not module.training else twin


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for part in [part for part in module.modules() if unwrap(part) is not part]:
        memo[id(part)] = copy.deepcopy(unwrap(part), memo)
    return copy.deepcopy(module, memo)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a component's weights as they are stored now, quantized or kept on the host by accelerate."""
    tensors = {id(tensor): tensor for part in unwrap(module).modules() for _, tensor in own_tensors(part)}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def _replace_tensors(part: nn.Module, memo: dict[int, Any], compute: torch.dtype | None) -> None:
    values = dict(own_tensors(part))
    for parameter in part._parameters.values():
        if parameter is not None and id(parameter) not in memo:
            stand_in = meta_like(parameter)
            floating = compute is not None and stand_in.is_floating_point()
            # requires_grad is kept: at::matmul folds batches only for weights that have it (should_fold in LinearAlgebra.cpp).
            memo[id(parameter)] = nn.Parameter(stand_in.to(compute) if floating else stand_in, parameter.requires_grad)
    for name, buffer in part._buffers.items():
        if buffer is not None and id(buffer) not in memo:
            memo[id(buffer)] = _buffer_like(values[name])
    for value in part.__dict__.values():
        if isinstance(value, torch.Tensor) and id(value) not in memo:
            memo[id(value)] = meta_like(value) if value.requires_grad else _buffer_like(value)


def _buffer_like(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.device.type == "meta" or buffer.numel() * buffer.element_size() > SMALL_BUFFER_BYTES:
        return meta_like(buffer)
    return buffer.detach().to("cpu", copy=True)


def _layerwise_dtype(part: nn.Module) -> torch.dtype | None:
    """The dtype that diffusers' layer-wise casting computes in, where it is on."""
    registry = part.__dict__.get("_diffusers_hook")
    hook = registry.get_hook("layerwise_casting") if registry is not None else None
    return getattr(hook, "compute_dtype", None)


def _skip(value: Any, memo: dict[int, Any]) -> None:
    """Keep deepcopy out of hooks, which hold weights, streams and other modules."""
    if value is not None and not isinstance(value, bool | int | str):
        memo[id(value)] = None


def _is_of_the_model(hook: Any) -> bool:
    """Hooks that are part of how a module computes: ``weight_norm``'s, and those by which transformers collects outputs."""
    return str(getattr(hook, "__module__", "")).startswith(("torch.nn.utils.", "transformers.utils."))


def _skip_foreign_forward(part: nn.Module, memo: dict[int, Any]) -> None:
    """A ``forward`` put on the instance by a hook or by ``torch.compile`` would call the original: the class's is used."""
    forward = part.__dict__.get("forward")
    if forward is not None and not isinstance(forward, MethodType):
        memo[id(forward)] = None


def _share_what_resists(module: nn.Module, memo: dict[int, Any]) -> None:
    """Attributes that cannot be copied (locks, handles, compiled functions) are shared: nothing writes to them."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name in _OWN_TABLES or id(value) in memo or isinstance(value, bool | int | float | str | type(None) | nn.Module):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                memo[id(value)] = value


def _strip_hooks(part: nn.Module) -> None:
    for name in _HOOK_TABLES:
        table = part.__dict__.get(name)
        for key in [key for key, hook in (table or {}).items() if hook is None or hook is True]:
            del table[key]
    for name in ("_hf_hook", "_diffusers_hook", "_old_forward"):
        part.__dict__.pop(name, None)
    if part.__dict__.get("forward", part) is None:
        del part.__dict__["forward"]
    part.__dict__["_compiled_call_impl"] = None
