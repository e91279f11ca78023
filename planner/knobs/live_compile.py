"""Compiling live denoisers so that it can be taken back: nothing here outlives its undo but torch's own code cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from planner.knobs.base import Site, Undo
from planner.knobs.live import modules_of, reversible


def whole(site: Site, mode: str) -> Undo:
    """In place, or as a wrapper where model offload follows: its hook must stay outside the graph."""
    modules = modules_of(site, "denoiser")
    wrapped = site.settings.get("offload") == "model"

    def change() -> None:
        for name, module in modules.items():
            if wrapped:
                setattr(site.pipe, name, torch.compile(module, mode=mode))
            else:
                module.compile(mode=mode)
                if mode in ("reduce-overhead", "max-autotune"):
                    module._compiled_call_impl = _own_outputs(module._compiled_call_impl)

    return reversible(site, change)


def _own_outputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA graph overwrites its output at the next call; guidance may need two (diffusers#7420)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))

    return call


def regional(site: Site) -> Undo:
    """Every repeated block on its own. One graph per block unless hooks inside must break it."""
    hooked = site.settings.get("offload") in ("group_block", "group_leaf")
    cached = site.settings.get("cache", "none") != "none"

    def change() -> None:
        for module in modules_of(site, "denoiser").values():
            module.compile_repeated_blocks(fullgraph=not (hooked or cached))

    return reversible(site, change)


def trace(site: Site) -> Undo:
    """``torch.jit.trace`` of each denoiser at the first call with new shapes; other arguments are constants."""

    def change() -> None:
        for module in modules_of(site, "denoiser").values():
            module.forward = _Traced(module)

    return reversible(site, change)


class _Traced:
    """A forward that records itself once per signature."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward = module.forward
        self.graphs: dict[Any, tuple[Any, list[Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = (spec, tuple(map(_signature, leaves)))
        if key not in self.graphs:
            self.graphs[key] = self._record(leaves, spec, tensors)
        graph, layout = self.graphs[key]
        return tree_unflatten(list(graph(*tensors)), layout[0])

    def _record(self, leaves: list[Any], spec: Any, tensors: list[torch.Tensor]) -> tuple[Any, list[Any]]:
        layout: list[Any] = [None]

        def flat(*given: torch.Tensor) -> tuple[Any, ...]:
            source = iter(given)
            filled = [next(source) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, spec)
            outputs, layout[0] = tree_flatten(self.forward(*args, **kwargs))
            return tuple(outputs)

        with torch.no_grad(), _without_gradients(self.module):
            graph = torch.jit.trace(flat, tuple(tensors), check_trace=False, strict=False)
        return graph, layout


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """A trace takes weights in as constants, which may not require gradients meanwhile."""
    flagged = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in flagged:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in flagged:
            weight.requires_grad_(True)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, str(leaf.device)
    return repr(leaf)
