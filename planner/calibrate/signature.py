"""Operation signatures of a trace (``CallTrace.shapes``) as values: sizes, a cost estimate to order probes by, other layouts.

A signature comes from a file that others may have written, so nothing in it is believed: limits first, then the shape of the
JSON, and only names of aten operations. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

MAX_TEXT = 16_384
MAX_ARGUMENTS = 64
MAX_NESTED_TENSORS = 256
_NAME = re.compile(r"aten\.[A-Za-z_][A-Za-z0-9_]{0,63}\.[A-Za-z_][A-Za-z0-9_]{0,63}")
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "fp8": 1, "int8": 1, "int64": 8, "int32": 4, "bool": 1}

Variant = Literal["", "channels_last", "vanilla"]
_VARIANT_MARK = "@"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor argument. ``storage_elements`` is what its strides reach."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def storage_elements(self) -> int:
        if 0 in self.shape:
            return 0
        return 1 + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))

    @property
    def storage_bytes(self) -> int:
        return self.storage_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Operation:
    """A parsed signature: ``name`` is ``aten.<operation>.<overload>`` or ``attention``; tensors stand where they were."""

    text: str
    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    variant: Variant = ""

    @property
    def base(self) -> str:
        """``addmm`` for ``aten.addmm.default``."""
        return self.name.split(".")[1] if "." in self.name else self.name

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor argument, in order."""
        return tuple(_walk((self.args, tuple(value for _, value in self.kwargs))))

    @property
    def dtype(self) -> str:
        """The dtype it computes in: that of its first floating tensor, else of its first tensor."""
        found = self.tensors()
        floating = [spec.dtype for spec in found if spec.dtype[:2] in ("fp", "bf")]
        return floating[0] if floating else found[0].dtype if found else "other"

    @property
    def bytes(self) -> int:
        """Bytes of its tensor arguments and about as much for what it writes."""
        sizes = [spec.storage_bytes for spec in self.tensors()]
        return sum(sizes) + max(sizes, default=0)


def parse_signature(text: str) -> Operation:
    """The operation that a signature names.

    Raises:
        ValueError: it is none, is too large, or has arguments that cannot be made again; says which.
    """
    body, mark, variant = text.partition(_VARIANT_MARK) if text.rfind(_VARIANT_MARK) > text.rfind("]") else (text, "", "")
    body, variant = body.rstrip(), variant.strip()
    if len(text) > MAX_TEXT:
        raise ValueError(f"signature is longer than {MAX_TEXT} characters")
    if mark and variant not in ("channels_last", "vanilla"):
        raise ValueError(f"unknown variant {variant[:40]!r}")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("signature is no JSON") from error
    if not (isinstance(content, list) and len(content) == 3 and isinstance(content[1], list) and isinstance(content[2], dict)):
        raise ValueError("signature is not [name, arguments, keywords]")
    name, args, kwargs = content
    if not isinstance(name, str) or (name != "attention" and _NAME.fullmatch(name) is None):
        raise ValueError(f"{str(name)[:60]!r} is no aten operation")
    if len(args) + len(kwargs) > MAX_ARGUMENTS:
        raise ValueError("too many arguments")
    read = tuple(_decode(item, 0) for item in args), tuple((key, _decode(value, 0)) for key, value in sorted(kwargs.items()))
    operation = Operation(text, name, *read, variant)  # type: ignore[arg-type]
    if len(operation.tensors()) > MAX_NESTED_TENSORS:
        raise ValueError("too many tensors")
    return _as_channels_last(operation) if variant == "channels_last" else operation


@dataclass(frozen=True, slots=True)
class Word:
    """A dtype, device, layout or memory format argument by its name."""

    kind: Literal["dtype", "other"]
    text: str


def _decode(item: Any, depth: int) -> Any:
    if item is None or isinstance(item, bool | int | float):
        return item
    if isinstance(item, str):
        if re.fullmatch(r"[a-z_]{0,16}", item) is None:
            raise ValueError(f"text argument {item[:20]!r}")
        return item
    if isinstance(item, list) and depth < 2 and len(item) <= MAX_NESTED_TENSORS:
        return tuple(_decode(one, depth + 1) for one in item)
    if isinstance(item, dict) and len(item) == 1:
        ((kind, value),) = item.items()
        if kind == "t":
            return _tensor(value)
        if kind in ("dtype", "other") and isinstance(value, str) and len(value) <= 40:
            return Word(kind, value)
    raise ValueError("an argument that cannot be made again")


def _tensor(value: Any) -> TensorSpec:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], list) and isinstance(value[1], list)):
        raise ValueError("a tensor without shape, strides and dtype")
    shape, stride, dtype = value
    if len(shape) != len(stride) or len(shape) > 12 or not all(type(n) is int and 0 <= n < 1 << 40 for n in (*shape, *stride)):
        raise ValueError("a tensor with impossible shape or strides")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {str(dtype)[:20]} is not kept in signatures")
    return TensorSpec(tuple(shape), tuple(stride), dtype)


def _walk(value: Any) -> Iterator[TensorSpec]:
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _walk(item)


def cost_weight(operation: Operation) -> float:
    """A rough cost for ordering probes, in bytes: products count 1/20 byte per FLOP, as on machines of 20 FLOP per byte."""
    return operation.bytes + flops_of(operation) / 20


def flops_of(operation: Operation) -> float:
    """FLOPs of products, convolutions that keep the size (divided by their stride) and attention; 0 for the rest."""
    specs = operation.tensors()
    sizes = [math.prod(spec.shape) for spec in specs]
    base = operation.base
    if base == "attention" and len(specs) >= 3:
        return 4.0 * sizes[0] * (specs[1].shape[-2] if len(specs[1].shape) > 1 else 1)
    if base in ("addmm", "baddbmm") and len(specs) == 3:
        return 2.0 * sizes[1] * specs[2].shape[-1]
    if base in ("mm", "bmm") and len(specs) == 2:
        return 2.0 * sizes[0] * specs[1].shape[-1]
    if "convolution" in base and len(specs) >= 2 and specs[1].shape:
        stride = operation.args[3] if len(operation.args) > 3 and isinstance(operation.args[3], tuple) else (1,)
        return 2.0 * specs[0].shape[0] * math.prod(specs[0].shape[2:]) * sizes[1] / math.prod(stride)
    return 0.0


def variant_signature(text: str, variant: Variant) -> str:
    """The key under which the same operation is stored in another layout or attention kernel.

    ``channels_last``: its 4-D tensors lie in NHWC; the text itself when it has none. ``vanilla``: attention as two products
    and a softmax; the text itself for anything else.
    """
    if variant == "vanilla":
        return f"{text} {_VARIANT_MARK}vanilla" if text.startswith('["attention"') else text
    return f"{text} {_VARIANT_MARK}channels_last" if variant and _changes_in_channels_last(text) else text


@lru_cache(maxsize=65_536)
def _changes_in_channels_last(text: str) -> bool:
    try:
        operation = parse_signature(text)
    except ValueError:
        return False
    return _as_channels_last(operation).tensors() != operation.tensors()


_WEIGHT_ARGUMENT = {"addmm": 2, "mm": 1, "convolution": 1}


def weight_argument(operation: Operation) -> int | None:
    """Position of the argument that is a model's weight rather than data, where that is clear."""
    place = _WEIGHT_ARGUMENT.get(operation.base)
    if place is None or place >= len(operation.args) or not isinstance(operation.args[place], TensorSpec):
        return None
    return place


def weight_bytes(operation: Operation) -> int:
    """Bytes of :func:`weight_argument`; 0 where there is none."""
    place = weight_argument(operation)
    return operation.args[place].storage_bytes if place is not None else 0


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention")


def _as_channels_last(operation: Operation) -> Operation:
    """Dense NCHW tensors of rank 4 lie in NHWC, weights of convolutions too, and what was flattened from them is dense."""
    rank_3 = operation.base not in _PRODUCTS
    args = tuple(_swap(item, rank_3) for item in operation.args)
    kwargs = tuple((key, _swap(item, rank_3)) for key, item in operation.kwargs)
    return Operation(operation.text, operation.name, args, kwargs, operation.variant)


def _swap(item: Any, rank_3: bool) -> Any:
    if isinstance(item, tuple):
        return tuple(_swap(one, rank_3) for one in item)
    if not isinstance(item, TensorSpec):
        return item
    if len(item.shape) == 4:
        _, channels, height, width = item.shape
        if item.stride == (channels * height * width, height * width, width, 1):
            return TensorSpec(item.shape, (channels * height * width, 1, width * channels, channels), item.dtype)
    if rank_3 and len(item.shape) == 3:
        _, length, channels = item.shape
        if item.stride == (length * channels, 1, length):
            return TensorSpec(item.shape, (length * channels, channels, 1), item.dtype)
    return item
