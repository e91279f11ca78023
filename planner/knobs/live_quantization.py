"""Quantizing live weights with the originals kept in host memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from planner.knobs.base import Site, Undo
from planner.knobs.live import modules_of, reversible, tensor_slots
from planner.knobs.live_cast import kept_in_fp32
from planner.knobs.quantization import SCHEMES
from planner.snapshot import place

HOST = torch.device("cpu")
LAYERWISE = "layerwise_casting"


def quantize(site: Site, schemes: dict[str, str]) -> Undo:
    """Quantize components in place. Raises what torchao raises, after putting everything back."""
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.device]] = []
    modules = modules_of(site)

    def change() -> None:
        for name, scheme in schemes.items():
            if scheme == "fp8_layerwise":
                _cast_layerwise(modules[name], kept)
            else:
                _quantize_linears(modules[name], scheme)

    def official() -> None:
        for tensor, original, device in reversed(kept):
            tensor.data = original.to(device)
        for name, scheme in schemes.items():
            if scheme == "fp8_layerwise":
                _remove_layerwise(modules[name])
        kept.clear()

    return reversible(site, change, official)


def _quantize_linears(module: nn.Module, scheme: str) -> None:
    """torchao replaces the weights of linear layers; the originals move to the host, undo brings them back."""
    from torchao import quantization as torchao

    chosen = dict(_chosen(module, SCHEMES[scheme].multiple))
    originals = [part.weight for part in chosen.values()]
    wanted = {id(part) for part in chosen.values()}
    config: Any = getattr(torchao, str(SCHEMES[scheme].config))()
    torchao.quantize_(module, config, filter_fn=lambda part, _: id(part) in wanted)
    for weight in originals:
        place(weight, HOST)


def _chosen(module: nn.Module, multiple: int) -> list[tuple[str, nn.Linear]]:
    kept = kept_in_fp32(module, torch.float16)
    linears = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    return [
        (path, part)
        for path, part in linears
        if not kept.intersection(path.split(".")) and part.in_features % multiple == 0 and part.out_features % multiple == 0
    ]


def _cast_layerwise(module: Any, kept: list[tuple[torch.Tensor, torch.Tensor, torch.device]]) -> None:
    for _, tensor in tensor_slots(module):
        if tensor.is_floating_point():
            kept.append((tensor, tensor.data.to(HOST), tensor.device))
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=module.dtype)


def _remove_layerwise(module: nn.Module) -> None:
    """diffusers declares the hook irreversible because the weights lost precision; here the originals are kept."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(LAYERWISE)
        if registry is not None and hook is not None:
            hook.deinitalize_hook = lambda unchanged: unchanged
            # Interrupted while registering: the hook is listed but not in the registry's order yet.
            with contextlib.suppress(ValueError, IndexError):
                registry.remove_hook(LAYERWISE, recurse=False)
