"""Stand-ins for a pipeline and its components: same classes, same code, weights on ``meta``. The originals are only read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

SMALL_BUFFER_BYTES = 1 << 20
_HOOK_ATTRIBUTES = ("_hf_hook", "_diffusers_hook", "_old_forward", "_is_hf_initialized", "_compiled_call_impl")
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters are on ``meta`` and that has no hooks and no compiled code.

    No byte of a parameter is read or copied; small buffers are cloned so that their values stay usable. Quantized
    parameters become plain ones of the dtype they present.
    """
    module = getattr(module, "_orig_mod", module)
    memo: dict[int, Any] = {}
    kept: list[Any] = []
    for part in module.modules():
        part = getattr(part, "_orig_mod", part)
        _replace_tensors(part, memo, kept)
        for name in _HOOK_ATTRIBUTES:
            if name in part.__dict__:
                _skip(part.__dict__[name], memo)
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        _strip_hooks(part)
    return twin.eval() if not module.training else twin


def _replace_tensors(part: nn.Module, memo: dict[int, Any], kept: list[Any]) -> None:
    for parameter in part._parameters.values():
        if parameter is not None and id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(_meta_like(parameter), requires_grad=False)
    for buffer in part._buffers.values():
        if buffer is not None and id(buffer) not in memo:
            memo[id(buffer)] = _buffer_like(buffer)


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _buffer_like(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.device.type == "meta" or buffer.numel() * buffer.element_size() > SMALL_BUFFER_BYTES:
        return _meta_like(buffer)
    return buffer.detach().to("cpu", copy=True)


def _skip(value: Any, memo: dict[int, Any]) -> None:
    """Keep deepcopy out of hooks, which hold weights, streams and other modules."""
    if value is not None and not isinstance(value, bool | int | str):
        memo[id(value)] = None


def _strip_hooks(part: nn.Module) -> None:
    for name in _HOOK_TABLES:
        table = part.__dict__.get(name)
        if table:
            table.clear()
    for name in (*_HOOK_ATTRIBUTES, "forward"):
        if name != "_compiled_call_impl":
            part.__dict__.pop(name, None)
    part.__dict__["_compiled_call_impl"] = None


def shadow(pipe: Any) -> Any:
    """A stand-in pipeline: a subclass that calls itself the same, with meta twins for modules and copied schedulers."""
    cls = type(pipe)
    shadow_class = type(cls.__name__, (_ShadowMixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    stand_in = object.__new__(shadow_class)
    twins: dict[int, Any] = {}
    for name, value in vars(pipe).items():
        object.__setattr__(stand_in, name, _stand_in_for(value, twins))
    return stand_in


def _stand_in_for(value: Any, twins: dict[int, Any]) -> Any:
    if id(value) in twins:
        return twins[id(value)]
    module_name = type(value).__module__
    if isinstance(value, nn.Module):
        made: Any = meta_twin(value)
    elif "scheduler" in module_name or "scheduling" in module_name or "guiders" in module_name:
        made = copy.deepcopy(value)
    elif "image_processor" in module_name or "video_processor" in module_name:
        made = _light_processor(value)
    elif isinstance(value, list) and any(isinstance(item, nn.Module) for item in value):
        made = [_stand_in_for(item, twins) for item in value]
    elif type(value) is dict:
        made = dict(value)
    else:
        made = value
    twins[id(value)] = made
    return made


def _light_processor(processor: Any) -> Any:
    """An image processor that does not build real pictures from zeros: only their number matters."""
    light = copy.copy(processor)
    if hasattr(light, "numpy_to_pil"):
        light.numpy_to_pil = _few_pixels
    return light


def _few_pixels(images: Any) -> list[Any]:
    from PIL import Image

    count = images.shape[0] if getattr(images, "ndim", 0) == 4 else 1
    return [Image.new("RGB", (8, 8))] * count


class _ShadowMixin:
    """What a stand-in answers instead of asking modules that are on ``meta``."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def _execution_device(self) -> torch.device:
        return torch.device("cpu")

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return _StepCounter(self.__dict__, iterable, total)

    def maybe_free_model_hooks(self) -> None:
        return None

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        return None

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]:
        return _few_pixels(images)


class _StepCounter:
    """A silent progress bar that counts the denoising iterations of the longest loop."""

    def __init__(self, state: dict[str, Any], iterable: Any, total: int | None) -> None:
        self.state, self.iterable, self.n = state, iterable, 0
        self.total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)

    def _done(self) -> None:
        self.state["_dry_run_steps"] = max(self.state.get("_dry_run_steps", 0), self.n)

    def __iter__(self) -> Any:
        for item in self.iterable:
            yield item
            self.n += 1
            self._done()

    def update(self, amount: int = 1) -> None:
        self.n += amount
        self._done()

    def __enter__(self) -> _StepCounter:
        return self

    def __exit__(self, *args: Any) -> None:
        self._done()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
