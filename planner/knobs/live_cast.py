"""Casting live weights with the originals kept, so that the way back is exact to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from planner.knobs.base import Site, Undo
from planner.knobs.live import modules_of, reversible, tensor_slots

HALF = (torch.float16, torch.bfloat16)


def cast(site: Site, dtypes: Mapping[str, torch.dtype]) -> Undo:
    """Cast components, given by name, in place. The originals stay in host memory until undone."""
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.device]] = []

    def change() -> None:
        for name, module in modules_of(site).items():
            for tensor in castable(module, dtypes[name]) if name in dtypes else ():
                original, device = tensor.data, tensor.device
                cast_tensor = original.to(dtypes[name])
                kept.append((tensor, original.to("cpu"), device))
                tensor.data = cast_tensor

    def official() -> None:
        for tensor, original, device in reversed(kept):
            tensor.data = original.to(device)
        kept.clear()

    return reversible(site, change, official)


def castable(module: nn.Module, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Floating tensors to cast: all but those the model keeps in float32 and those in ``dtype`` already.

    ``.to(dtype)`` does not respect ``_keep_in_fp32_modules``; loading does (diffusers modeling_utils.py:1217), and
    for transformers' plain list only in float16. Computed buffers of transformers stay as loading leaves them.
    """
    kept = kept_in_fp32(module, dtype)
    computed = _computed_buffers(module) if not hasattr(module, "enable_layerwise_casting") else set()
    for name, tensor in tensor_slots(module):
        if not tensor.is_floating_point() or tensor.dtype == dtype or name in computed:
            continue
        if not kept.intersection(name.split(".")):
            yield tensor


def kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of path segments that stay in float32 when the model is loaded in ``dtype``."""
    if dtype not in HALF:
        return set()
    from_diffusers = hasattr(module, "enable_layerwise_casting")
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    for part in module.modules():
        if from_diffusers or dtype is torch.float16:
            names |= set(getattr(part, "_keep_in_fp32_modules", None) or ())
    return names


def _computed_buffers(module: nn.Module) -> set[str]:
    return {f"{path}.{name}" if path else name for path, part in module.named_modules() for name in part._non_persistent_buffers_set}
