"""What safetensors files say of themselves: 8 bytes of length and a JSON header. No tensor is read.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from planner.errors import ProfileError
from planner.models.jsonfile import parse_json, read_json, safe_path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_SHARDS = 1000
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_ITEM_BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_SHARD = re.compile(r"[\w.\-]{1,200}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stored:
    """A component's tensors as its files name them: ``(dtype, shape)`` by tensor name."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def elements(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """``fp32 fp16 bf16``: the one most elements have; None for another, such as packed quantized weights."""
        counts: Counter[str] = Counter()
        for dtype, shape in self.tensors.values():
            counts[dtype] += prod(shape)
        return DTYPES.get(counts.most_common(1)[0][0]) if counts else None


def read_stored(root: Path, component: str) -> Stored | None:
    """The stored tensors of ``root/component``; None when no complete safetensors set lies there.

    Raises:
        ProfileError: a header that breaks the format, or a shard outside the folder.
    """
    for name in _FILES:
        single = safe_path(root, f"{component}/{name}")
        if single is not None:
            return Stored(read_header(single))
        index = read_json(root, f"{component}/{name}.index.json")
        if index is not None:
            return _sharded(root, component, index)
    return None


def _sharded(root: Path, component: str, index: dict[str, Any]) -> Stored | None:
    where = f"{root / component}: safetensors index"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ProfileError(f"{where}: weight_map is missing.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if len(shards) > MAX_SHARDS:
        raise ProfileError(f"{where}: {len(shards)} shards; at most {MAX_SHARDS} are read.")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise ProfileError(f"{where}: {shard!r} is not a plain safetensors file name.")
        path = safe_path(root, f"{component}/{shard}")
        if path is None:
            return None
        tensors |= read_header(path)
    return Stored(tensors)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``(dtype, shape)`` of every tensor in one file. Raises ProfileError when the header breaks the format."""
    size = path.stat().st_size
    if not path.is_file() or size < 8:
        raise ProfileError(f"{path}: too short to be a safetensors file.")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ProfileError(f"{path}: header of {length} bytes in a file of {size} bytes; the file is cut or broken.")
        header = parse_json(file.read(length), str(path))
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, size - 8 - length) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: object, data_bytes: int) -> tuple[str, tuple[int, ...]]:
    where = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise ProfileError(f"{where}: not a tensor entry.")
    fields: tuple[Any, Any, Any] = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
    dtype, shape, offsets = fields
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ProfileError(f"{where}: dtype, shape or data_offsets are missing or malformed.")
    begin, end = offsets
    bits = _ITEM_BITS.get(dtype)
    if not begin <= end <= data_bytes or (bits is not None and end - begin != prod(shape) * bits // 8):
        raise ProfileError(f"{where}: {dtype} {shape} does not fit its data_offsets {offsets} in this file.")
    return dtype, tuple(shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
