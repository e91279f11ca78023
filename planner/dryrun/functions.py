"""What must be seen above the dispatcher: attention as one operation, and values that the code reads back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from planner.dryrun.recorder import ZERO_FALLBACK_LIMIT_BYTES, Recorder
from planner.dryrun.tensors import FLOATING
from planner.dryrun.values import convert, leaves, to_meta, to_zeros

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
"""Made of Python numbers: sizes and grids that the code reads back, so their values are kept."""
_READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.item}


class Functions(TorchFunctionMode):  # type: ignore[misc]
    """Keeps ``scaled_dot_product_attention`` whole and answers moves to the host and reads of ``meta`` tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return self.attention(func, args, kwargs)
        if func is torch.Tensor.cpu and not self.recorder.inside:
            return self._cpu(func, args, kwargs)
        if func in _FROM_DATA and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"})
        if func in _READS and args[0].device.type == "meta":
            return self._read(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "same device" not in str(error):
                raise
            return self._on_zeros(func, args, kwargs)

    def _on_zeros(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function that makes a CPU tensor of its own and then misses its argument on ``meta`` there (``torch.quantile``)."""
        given = [tensor for tensor in leaves((args, kwargs)) if tensor.device.type == "meta"]
        if sum(tensor.numel() * tensor.element_size() for tensor in given) > ZERO_FALLBACK_LIMIT_BYTES:
            raise RuntimeError(f"{func.__name__} does not take tensors on meta, and its arguments are too large to try on zeros")
        self.recorder.frame.fallbacks.add(f"{func.__name__}: mixes devices, run on zeros")
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            out = func(*convert(args, to_zeros, {}), **convert(kwargs, to_zeros, {}))
            return convert(out, to_meta, {})

    def attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``scaled_dot_product_attention`` as one operation."""
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value = named["query"], named["key"], named["value"]
        if not self.recorder.inside and not any(t.device.type == "meta" for t in (query, key, value)):
            return func(*args, **kwargs)
        return self.recorder.attention(query, key, value, named.get("attn_mask"))

    def _cpu(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A result leaves the device: counted, and from here on it is the host's."""
        tensor = args[0]
        if tensor.dtype in FLOATING or tensor.dtype is torch.uint8:
            self.recorder.to_host_bytes += tensor.numel() * tensor.element_size()
        if tensor.device.type != "meta":
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.recorder.to_host(moved)
        return moved

    def _read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if self.recorder.inside:
            self.recorder.frame.fallbacks.add(f"{func.__name__}: computed values are read, answered with zeros")
        with torch.utils._python_dispatch._disable_current_modes():
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            return func(zeros, *args[1:], **kwargs)
