"""A real pipeline at real size from a profile: weights of random numbers, made where they will lie, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.subjects import TINY, find_subject, source_of, tiny_pipeline

POOL_ELEMENTS = 1 << 22
"""Random numbers that are made once and used again and again: drawing 17 billion of them would take minutes."""
_SEED = 0


def build(name: str, device: torch.device | str = "cpu") -> Any:
    """The subject's pipeline with weights on ``device``, in the profile's dtype, in eval mode, without a progress bar.

    Host memory: the weights, and 24 MiB for the pool. Raises as ``ModelSource.build`` does.
    """
    pipe = tiny_pipeline(name) if name.startswith(TINY) else source_of(find_subject(name)).build()
    if not name.startswith(TINY):
        with torch.no_grad():
            materialize(pipe, torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def materialize(pipe: Any, device: torch.device) -> int:
    """Give every tensor on ``meta`` memory and values on ``device``; how many bytes that were. Tied tensors stay tied."""
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator("cpu").manual_seed(_SEED)).to(device)
    made: dict[int, torch.Tensor] = {}
    total = 0
    for component in pipe.components.values():
        if not isinstance(component, nn.Module):
            continue
        for module in component.modules():
            for slots, name, value in _meta_slots(module):
                if id(value) not in made:
                    made[id(value)] = _filled(value, name, pool, device)
                    total += value.numel() * value.element_size()
                slots[name] = made[id(value)]
        component.to(device)
        component.eval().requires_grad_(False)
    return total


def _meta_slots(module: nn.Module) -> Iterator[tuple[Any, str, torch.Tensor]]:
    for slots in (module._parameters, module._buffers):
        for name, value in list(slots.items()):
            if value is not None and value.device.type == "meta":
                yield slots, name, value


def _filled(value: torch.Tensor, name: str, pool: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Scales of norms are one, biases nought, all else normal with the width that keeps activations of order one."""
    made = torch.empty(value.shape, dtype=value.dtype, device=device)
    if not value.is_floating_point():
        _fill_other(made)
    elif value.ndim <= 1 and isinstance(value, nn.Parameter):
        made.fill_(1.0 if name == "weight" else 0.0)
    else:
        fan_in = math.prod(value.shape[1:]) if value.ndim > 1 else 1
        _fill_normal(made, min(0.02, 1 / math.sqrt(max(fan_in, 1))), pool)
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made


def _fill_normal(made: torch.Tensor, width: float, pool: torch.Tensor) -> None:
    flat, ready = made.view(-1), (pool * width).to(made.dtype)
    for start in range(0, flat.numel(), ready.numel()):
        part = flat[start : start + ready.numel()]
        part.copy_(ready[: part.numel()])


def _fill_other(made: torch.Tensor) -> None:
    """Indices must be valid ones: positions along the last dimension. Complex tables become ones, masks false."""
    if made.dtype is torch.bool:
        made.fill_(False)
    elif made.is_complex():
        made.fill_(1)
    elif made.ndim:
        made.copy_(torch.arange(made.shape[-1], device=made.device).expand(made.shape))
    else:
        made.fill_(0)


__all__ = ["POOL_ELEMENTS", "build", "materialize"]
