"""Makes a trace's operation again with random tensors of the same shape, strides and dtype: something a probe can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planner.calibrate.signature import Operation, TensorSpec, Word, weight_argument

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64, "fp8": torch.float8_e4m3fn,
         "int8": torch.int8, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}  # fmt: skip
_WORDS = {"torch.strided": torch.strided, "torch.contiguous_format": torch.contiguous_format, "torch.channels_last": torch.channels_last,
          "torch.channels_last_3d": torch.channels_last_3d, "torch.preserve_format": torch.preserve_format}  # fmt: skip
_POOL_ELEMENTS = 1 << 18
_INDEXED = {"embedding": (0, 1, 0), "index_select": (0, 2, None), "gather": (0, 2, None), "scatter": (0, 2, None), "scatter_": (0, 2, None)}
"""Operation to (position of the indexed tensor, position of the index, fixed dimension or the one given as argument 1)."""
_FACTORIES = {"arange", "zeros", "ones", "full", "scalar_tensor", "eye", "linspace", "rand", "randn"}


@dataclass(frozen=True, slots=True)
class Runnable:
    """An operation and one or more sets of its arguments, so that repetitions need not find the same weights in cache."""

    call: Callable[..., Any]
    inputs: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, repetition: int) -> Any:
        """Run once with the next set of arguments."""
        args, kwargs = self.inputs[repetition % len(self.inputs)]
        return self.call(*args, **kwargs)


class RandomTensors:
    """Fills tensors from a pool of random numbers: cheap at any size, and the same for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._pools: dict[str, torch.Tensor] = {}

    def make(self, spec: TensorSpec, limit: int | None = None) -> torch.Tensor:
        """A tensor as the spec says. ``limit``: an index tensor with values below it; other integers are ones."""
        storage = torch.empty(spec.storage_elements, dtype=TORCH[spec.dtype], device=self.device)
        if limit is not None:
            storage.copy_(torch.randint(0, max(limit, 1), storage.shape, generator=self._generator))
        elif spec.dtype[:2] in ("fp", "bf"):
            self._fill(storage, spec.dtype)
        else:
            storage.fill_(1)
        return torch.as_strided(storage, spec.shape, spec.stride)

    def _fill(self, storage: torch.Tensor, dtype: str) -> None:
        pool = self._pools.get(dtype)
        if pool is None:
            pool = (torch.rand(_POOL_ELEMENTS, generator=self._generator) + 0.5).to(TORCH[dtype]).to(self.device)
            self._pools[dtype] = pool
        whole = storage.numel() // _POOL_ELEMENTS * _POOL_ELEMENTS
        storage[:whole].view(-1, _POOL_ELEMENTS).copy_(pool.expand(whole // _POOL_ELEMENTS, -1))
        storage[whole:].copy_(pool[: storage.numel() - whole])


def function_of(operation: Operation) -> Callable[..., Any]:
    """What to call. Raises ValueError where the operation is not there, or is none that takes tensors."""
    if operation.name == "attention":
        return _vanilla_attention if operation.variant == "vanilla" else _attention
    _, base, overload = operation.name.split(".")
    if not operation.tensors() and base not in _FACTORIES:
        raise ValueError("it takes no tensors")
    try:
        return getattr(getattr(torch.ops.aten, base), overload)  # type: ignore[no-any-return]
    except AttributeError as error:
        raise ValueError(f"this torch has no {operation.name}") from error


def _attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    grouped = key.dim() > 2 and key.shape[-3] != query.shape[-3]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _vanilla_attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """Scores, softmax, values as separate products: what diffusers' ``AttnProcessor`` does with ``baddbmm`` and ``bmm``."""
    heads = query.shape[:-2]
    query, key, value = (item.expand(*heads, *item.shape[-2:]).reshape(-1, *item.shape[-2:]) for item in (query, key, value))
    scores = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
    scores = torch.baddbmm(scores, query, key.transpose(-1, -2), beta=0, alpha=query.shape[-1] ** -0.5)
    if mask is not None and mask.dtype != torch.bool:
        scores = (scores.view(*heads, *scores.shape[-2:]) + mask).view(scores.shape)
    return torch.bmm(scores.softmax(dim=-1), value)


def rebuild(operation: Operation, random: RandomTensors, copies: int = 1) -> Runnable:
    """The operation, with ``copies`` different weights where it has one. Raises ValueError where it cannot be made again."""
    call = function_of(operation)
    args, kwargs = _arguments(operation, random)
    place = weight_argument(operation)
    if place is None:
        return Runnable(call, ((args, kwargs),))
    others = [random.make(operation.args[place]) for _ in range(copies - 1)]
    return Runnable(call, ((args, kwargs), *(((*args[:place], weight, *args[place + 1 :]), kwargs) for weight in others)))


def _arguments(operation: Operation, random: RandomTensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(_value(item, random, _limit(operation, place)) for place, item in enumerate(operation.args))
    if operation.base in ("index", "index_put", "index_put_", "_index_put_impl_"):
        shape = operation.args[0].shape
        indices = [None if spec is None else random.make(spec, shape[place]) for place, spec in enumerate(operation.args[1])]
        args = (args[0], indices, *args[2:])
    kwargs = {key: _value(item, random, None) for key, item in operation.kwargs}
    if "device" in kwargs:
        kwargs["device"] = random.device
    kwargs.pop("pin_memory", None)
    return args, kwargs


def _limit(operation: Operation, place: int) -> int | None:
    """Upper bound of an index argument's values; None for any other argument."""
    rule = _INDEXED.get(operation.base)
    if rule is None or place != rule[1]:
        return None
    shape = operation.args[rule[0]].shape
    dimension = rule[2] if rule[2] is not None else operation.args[1]
    return shape[dimension] if shape else 1


def _value(item: Any, random: RandomTensors, limit: int | None) -> Any:
    if isinstance(item, TensorSpec):
        return random.make(item, limit)
    if isinstance(item, tuple):
        return [_value(one, random, None) for one in item]
    if isinstance(item, Word):
        return _word(item, random.device)
    return item


def _word(word: Word, device: torch.device) -> Any:
    if word.kind == "dtype":
        if word.text not in TORCH:
            raise ValueError(f"dtype {word.text}")
        return TORCH[word.text]
    if word.text in _WORDS:
        return _WORDS[word.text]
    if word.text.partition(":")[0] in ("meta", "cpu", "cuda"):
        return device
    raise ValueError(f"argument {word.text}")
