"""What is resident while each component of a pipeline runs: one record for each outermost component call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from .tensor import SimTensor, memory

ENTRIES = ("encode", "decode", "generate", "get_text_features", "get_image_features", "decode_to_image",
           "decode_to_mesh", "embed_prompt")  # fmt: skip
"""Entry points of components besides calling them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One call of a component. Peaks are over the whole call: what was there at its start, until a hook sends it away,
    and what hooks bring in."""

    component: str
    entry: str
    weight_bytes_before: int
    weight_bytes_after: int
    peak_weight_bytes: int
    used_bytes_before: int
    peak_bytes: int
    h2d_bytes: int
    d2h_bytes: int


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def weight_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, and the host copies that accelerate's and diffusers' hooks keep of them."""
    for part in module.modules():
        yield from part.parameters(recurse=False)
        yield from part.buffers(recurse=False)
        weights = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            stored = getattr(weights, "dataset", weights)  # behind accelerate's prefix
            yield from getattr(stored, "state_dict", stored).values()
        registry = getattr(part, "_diffusers_hook", None)
        for hook in (registry.hooks if registry is not None else {}).values():
            group = getattr(hook, "group", None)
            for tensors in (getattr(group, "cpu_param_dict", {}).values(), getattr(group, "parameters", ()), getattr(group, "buffers", ())):
                yield from tensors


def mark_weights(pipe: Any) -> None:
    """Tell the simulator which storages are weights; copies of them over the bus are weights too."""
    for module in modules_of(pipe).values():
        for tensor in weight_tensors(module):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                memory.mark_weight(tensor.raw if isinstance(tensor, SimTensor) else tensor.detach())


class Recorder:
    def __init__(self, pipe: Any) -> None:
        self.names = {id(module): name for name, module in modules_of(pipe).items()}
        self.phases: list[Phase] = []
        self._inside = False

    def wrap(self, entry: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
            name = self.names.get(id(module))
            if name is None or self._inside:
                return original(module, *args, **kwargs)
            with self._recording(name, entry):
                return original(module, *args, **kwargs)

        return watched

    @contextmanager
    def _recording(self, name: str, entry: str) -> Iterator[None]:
        outer_peak, outer_weights = memory.peak_bytes, memory.peak_weight_bytes
        weights, used, h2d, d2h = memory.weight_bytes, memory.used_bytes, memory.h2d_bytes, memory.d2h_bytes
        memory.reset_peak()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self.phases.append(Phase(
                component=name, entry=entry, weight_bytes_before=weights, used_bytes_before=used,
                weight_bytes_after=memory.weight_bytes, peak_weight_bytes=memory.peak_weight_bytes, peak_bytes=memory.peak_bytes,
                h2d_bytes=memory.h2d_bytes - h2d, d2h_bytes=memory.d2h_bytes - d2h))  # fmt: skip
            memory.peak_bytes = max(memory.peak_bytes, outer_peak)
            memory.peak_weight_bytes = max(memory.peak_weight_bytes, outer_weights)


@contextmanager
def phases(pipe: Any) -> Iterator[list[Phase]]:
    """Record every outermost call of a component of `pipe` in the block, under whatever hooks it has or gets."""
    mark_weights(pipe)
    recorder = Recorder(pipe)
    with ExitStack() as stack:
        original = torch.nn.Module.__call__
        stack.enter_context(mock.patch.object(torch.nn.Module, "__call__", recorder.wrap("forward", original)))
        for kind in {type(module) for module in modules_of(pipe).values()}:
            for entry in ENTRIES:
                method = getattr(kind, entry, None)
                if callable(method):
                    stack.enter_context(mock.patch.object(kind, entry, recorder.wrap(entry, method)))
        yield recorder.phases
