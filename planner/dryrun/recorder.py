"""The hybrid trace: component code runs for real, its heavy tensors on ``meta``, its small and integer tensors on the CPU.

Masks, ids, grids and small vectors keep their values, so control flow that depends on them works; whatever mixes them with
a ``meta`` tensor is lifted to ``meta``. An operation that has no ``meta`` kernel is answered on zeros and named in
``fallbacks``. Lifetimes are the real ones: a storage is freed when the code drops it, as an eager run would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from planner.dryrun import operations
from planner.dryrun.trace import CallTrace, Kind, columns_from_rows

ROUND_BYTES = 512
"""The CUDA caching allocator rounds small blocks to this (``kMinBlockSize`` in c10/cuda/CUDACachingAllocator)."""
SMALL_ELEMENTS = 1024
GLUE_META_BYTES = 4 << 20
META = torch.device("meta")
CPU = torch.device("cpu")
_FLOATING = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128,
             torch.float8_e4m3fn, torch.float8_e5m2}  # fmt: skip
_ZERO_FALLBACK_LIMIT_BYTES = 1 << 30


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "uid", "frame")


class Frame:
    """Operations and storages of one component call, or of the pipeline's own code between calls."""

    def __init__(self, parameters: frozenset[int] = frozenset()) -> None:
        self.rows: list[list[Any]] = []
        self.inputs: list[tuple[int, ...]] = []
        self.outputs: list[tuple[int, ...]] = []
        self.born: list[int] = []
        self.died: list[int | None] = []
        self.bytes: list[int] = []
        self.live_bytes = 0
        self.peak_bytes = 0
        self.parameters = parameters
        self.fallbacks: set[str] = set()
        self.open = True

    def allocate(self, size: int) -> int:
        self.born.append(len(self.rows))
        self.died.append(None)
        self.bytes.append(size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return len(self.bytes) - 1

    def free(self, uid: int) -> None:
        if self.open:
            self.died[uid] = len(self.rows)
            self.live_bytes -= self.bytes[uid]


class Recorder(TorchDispatchMode):
    """Runs operations on ``meta`` or CPU as the hybrid rule says and writes them into the current frame."""

    def __init__(self) -> None:
        super().__init__()
        self.glue = Frame()
        self.frame = self.glue
        self.paths: list[str] = []
        self.modules: dict[str, int] = {"": 0}
        self.shapes: dict[str, int] = {}
        self.to_host_bytes = 0
        self._storages: dict[int, _StorageRef] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def inside(self) -> bool:
        """Within a component call, as opposed to the pipeline's own code."""
        return self.frame is not self.glue

    # -- storages ---------------------------------------------------------------------------------------------------

    def own(self, tensor: torch.Tensor, size: int | None = None) -> int | None:
        """Start counting a tensor's storage in the current frame; its uid, or None when it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return None
        nbytes = storage.nbytes() if size is None else size
        frame = self.frame
        ref = _StorageRef(storage, self._released)
        ref.key, ref.frame = key, frame
        ref.uid = frame.allocate(-(-nbytes // ROUND_BYTES) * ROUND_BYTES)
        self._storages[key] = ref
        return int(ref.uid)

    def _released(self, ref: _StorageRef) -> None:
        if self._storages.get(ref.key) is ref:
            del self._storages[ref.key]
        ref.frame.free(ref.uid)

    def uid_of(self, tensor: torch.Tensor) -> int | None:
        """The uid of a storage counted in the current frame."""
        ref = self._storages.get(tensor.untyped_storage()._cdata)
        return ref.uid if ref is not None and ref.frame is self.frame else None

    # -- dispatch ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs = self._place(func, tensors, args, dict(kwargs))
            if func._schema.name == "aten::_to_copy" and kwargs["device"] == CPU and not self.inside and args[0].device.type == "meta":
                kwargs["device"] = META
        elif func._schema.name == "aten::_to_copy" and args[0].device.type == "meta" and kwargs.get("device") is not None:
            kwargs = dict(kwargs) | {"device": META}
        if any(tensor.device.type == "meta" for tensor in tensors):
            return self._run_meta(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, tensors, out)
        return out

    def _place(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Where a tensor that was asked for on ``meta`` really goes: small and integer ones keep values on the CPU."""
        dtype = kwargs.get("dtype")
        if tensors:
            source = tensors[0]
            small = source.device.type == "cpu" and (source.dtype not in _FLOATING or source.numel() <= SMALL_ELEMENTS or not self.inside)
        else:
            size = _factory_elements(func, args)
            whole = func._schema.name == "aten::arange" and dtype is None
            integer = whole or (dtype is not None and dtype not in _FLOATING)
            small = integer or size <= (SMALL_ELEMENTS if self.inside else GLUE_META_BYTES // 4)
        kwargs["device"] = CPU if small else META
        return kwargs

    def _run_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        name = func._schema.name[6:]
        if func._schema.is_mutable and _mutates_cpu(func, args, kwargs):
            return self._on_zeros(func, args, kwargs, tensors, "writes into a CPU tensor")
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            args = _integer_indices(args)
            tensors = _tensors(args, kwargs)
        key = self._memo_key(func, args, kwargs, tensors)
        known = self._memo.get(key) if key is not None else None
        if known is not None:
            row, text, specs = known
            outs = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in specs]
            row = list(row)
            row[13] = self._shape_id(text)
            self._append(row, tensors, outs)
            return outs[0] if len(outs) == 1 else tuple(outs)
        lifted_args, lifted_kwargs = _lift(args, kwargs, tensors)
        try:
            out = func(*lifted_args, **lifted_kwargs)
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, NotImplementedError) or "meta" in str(error) or "nonzero" in str(error) or "scalar" in str(error):
                return self._on_zeros(func, args, kwargs, tensors, "no meta kernel")
            raise
        row = self._note(func, args, kwargs, tensors, out)
        if key is not None and row is not None:
            outs = list(out) if isinstance(out, tuple | list) else [out]
            if all(isinstance(item, torch.Tensor) for item in outs):
                text = operations.signature_text(func, lifted_args, lifted_kwargs)
                self._memo[key] = (row, text, [(tuple(item.shape), item.stride(), item.dtype) for item in outs])
        return out

    def _memo_key(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """A hashable description of a functional call; None where aliasing or mutation makes replay unsafe."""
        if not _is_functional(func):
            return None
        parameters = self.frame.parameters
        try:
            key = (func, _freeze(args), _freeze(tuple(sorted(kwargs.items()))) if kwargs else None,
                   tuple(t.untyped_storage()._cdata in parameters for t in tensors))  # fmt: skip
            hash(key)
        except TypeError:
            return None
        return key

    def _on_zeros(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], why: str) -> Any:
        """Answer an operation that ``meta`` cannot: run it on zeros. Only its result's shape matters."""
        size = sum(t.numel() * t.element_size() for t in tensors if t.device.type == "meta")
        if size > _ZERO_FALLBACK_LIMIT_BYTES:
            raise RuntimeError(f"{func} has no meta kernel and its arguments ({size} bytes) are too large to try on zeros")
        self.frame.fallbacks.add(f"{func._schema.name[6:]}: {why}, run on zeros")
        swap = {id(t): _zeros_like(t) for t in tensors if t.device.type == "meta"}
        real_args, real_kwargs = _swap(args, swap), _swap(kwargs, swap)
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = CPU
        out = func(*real_args, **real_kwargs)
        self._note(func, args, kwargs, tensors, out)
        return out

    # -- writing rows -----------------------------------------------------------------------------------------------

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> list[Any] | None:
        """Write an executed operation down; None when it launched nothing (views, allocations)."""
        name = func._schema.name.partition("::")[2]
        outs = [item for item in (out if isinstance(out, tuple | list) else (out,)) if isinstance(item, torch.Tensor)]
        if not outs:
            return None
        if name in operations.ALLOCATE_ONLY or (_is_view(func) and tensors):
            for item in outs:
                if not tensors or name in operations.ALLOCATE_ONLY:
                    self.own(item)
            return None
        if not self.inside:
            self._append_glue(tensors, outs)
            return None
        kind = operations.kind_of(name)
        if name == "_to_copy" and outs[0].dtype == tensors[0].dtype and outs[0].device == tensors[0].device and _same_layout(outs[0], tensors[0]):
            kind = Kind.COPY
        parameters = self.frame.parameters
        read = sum(operations.distinct_bytes(t) for t in tensors)
        weights = sum(operations.distinct_bytes(t) for t in tensors if t.untyped_storage()._cdata in parameters)
        if func._schema.is_mutable and name in ("copy_", "fill_", "zero_", "normal_"):
            read -= operations.distinct_bytes(tensors[0])
        write = sum(operations.distinct_bytes(item) for item in outs)
        dims = operations.dims_of(kind, name, args, outs[0])
        shape = self._shape_id(operations.signature_text(func, args, kwargs))
        compute = outs[0] if outs[0].dtype in _FLOATING else (tensors[0] if tensors else outs[0])
        row = [int(kind), operations.dtype_code(compute.dtype), operations.flops_of(func, args, kwargs, out), read, write, weights,
               0, 0, 0, 0, 0, 0, 0, shape, *dims]  # fmt: skip
        self._append(list(row), tensors, outs)
        return row

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Record one attention and return its output on ``meta``, laid out as the fused kernels do it: (batch, length, heads, dim)."""
        shape = (*query.shape[:-1], value.shape[-1])
        order = (*range(len(shape) - 3), len(shape) - 2, len(shape) - 3, len(shape) - 1) if len(shape) > 2 else tuple(range(len(shape)))
        out = torch.empty_permuted(shape, order, dtype=query.dtype, device=META)
        if not self.inside:
            self._append_glue([query, key, value], [out])
            return out
        dims = operations.attention_dims(query, key, value, mask)
        batch, heads, queries, keys, width, value_width, mask_bytes, _ = dims
        flops = 2.0 * batch * heads * queries * keys * (width + value_width)
        tensors = [query, key, value] + ([mask] if mask is not None else [])
        read = sum(operations.distinct_bytes(t) for t in tensors[:3]) + mask_bytes
        text = operations.signature_text("attention", (query, key, value, mask), {})
        self._append([int(Kind.ATTENTION), operations.dtype_code(query.dtype), flops, read, operations.distinct_bytes(out), 0,
                      0, 0, 0, 0, 0, 0, 0, self._shape_id(text), *dims], tensors, [out])  # fmt: skip
        return out

    def _shape_id(self, text: str) -> int:
        return self.shapes.setdefault(text, len(self.shapes))

    def _append(self, row: list[Any], tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        frame = self.frame
        if not self.inside:
            self._append_glue(tensors, outs)
            return
        inputs = tuple(uid for t in tensors if (uid := self.uid_of(t)) is not None)
        fresh = tuple(uid for item in outs if (uid := self.own(item)) is not None)
        row[7] = sum(frame.bytes[uid] for uid in fresh)
        row[12] = self.modules.setdefault(self.paths[-1] if self.paths else "", len(self.modules))
        frame.rows.append(row)
        frame.inputs.append(inputs)
        frame.outputs.append(fresh)

    def _append_glue(self, tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        for item in outs:
            self.own(item)
        moved = sum(operations.distinct_bytes(t) for t in (*tensors, *outs))
        self.glue.rows.append([moved])


class Functions(TorchFunctionMode):
    """Catches what must be seen above the dispatcher: attention as one operation, and explicit moves to the host."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        if func in _TO_HOST and (not self.recorder.inside or (func is not torch.Tensor.cpu and args[0].device.type == "meta")):
            return self._to_host(func, args, kwargs)
        return func(*args, **kwargs)

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value = named["query"], named["key"], named["value"]
        if not any(t.device.type == "meta" for t in (query, key, value)):
            return func(*args, **kwargs)
        return self.recorder.attention(query, key, value, named.get("attn_mask"))

    def _to_host(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if self.recorder.inside:
            self.recorder.frame.fallbacks.add(f"{func.__name__}: computed values are read, answered with zeros")
        elif func is torch.Tensor.cpu and tensor.dtype in _FLOATING | {torch.uint8}:
            self.recorder.to_host_bytes += tensor.numel() * tensor.element_size()
        if tensor.device.type == "meta":
            tensor = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            return tensor if func is torch.Tensor.cpu else func(tensor, *args[1:], **kwargs)
        return func(*args, **kwargs)


_TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.item}


def finish(frame: Frame, component: str, method: str, modules: tuple[str, ...], shapes: tuple[str, ...],
           input_bytes: int, output_bytes: int) -> CallTrace:  # fmt: skip
    """Close a frame and turn its rows into a :class:`CallTrace`."""
    frame.open = False
    count = len(frame.rows)
    spans = [(born, died if died is not None else count, size)
             for born, died, size in zip(frame.born, frame.died, frame.bytes, strict=True)]  # fmt: skip
    _fill_live(frame, 6, spans)
    _fuse(frame)
    return CallTrace(component, method, columns_from_rows([tuple(row) for row in frame.rows]), modules, shapes,
                     output_bytes, input_bytes, tuple(sorted(frame.fallbacks)), np.array(spans, dtype=np.int64).reshape(-1, 3))  # fmt: skip


def _fill_live(frame: Frame, column: int, spans: list[tuple[int, int, int]]) -> None:
    """Write the running sum of ``[born, died)`` spans into a column; a storage freed before any operation ran never counts."""
    count = len(frame.rows)
    change = [0] * (count + 1)
    for born, died, size in spans:
        if died > born:
            change[min(born, count)] += size
            change[min(died, count)] -= size
    live = 0
    for index, row in enumerate(frame.rows):
        live += change[index]
        row[column] = live


_FUSIBLE = {int(Kind.POINTWISE), int(Kind.NORMALIZATION), int(Kind.REDUCTION), int(Kind.COPY)}
_MAX_FUSED_READERS = 4


def _fuse(frame: Frame) -> None:
    """What a compiler that merges neighbouring pointwise work would leave: kernels, traffic and live bytes (``fused_*``)."""
    rows, count = frame.rows, len(frame.rows)
    readers: list[list[int]] = [[] for _ in frame.bytes]
    for index, inputs in enumerate(frame.inputs):
        for uid in inputs:
            readers[uid].append(index)
    inlined = _inlined(frame, readers)
    external: list[frozenset[int]] = []
    producer: dict[int, int] = {}
    last_use = list(frame.born)
    for index, row in enumerate(rows):
        reads: set[int] = set()
        for uid in frame.inputs[index]:
            reads |= external[producer[uid]] if uid in inlined else {uid}
        external.append(frozenset(reads))
        for uid in frame.outputs[index]:
            producer[uid] = index
        own_inputs = sum(frame.bytes[uid] for uid in set(frame.inputs[index]))
        head = not frame.outputs[index] or any(uid not in inlined for uid in frame.outputs[index])
        row[11] = int(head)
        if head:
            foreign = max(row[3] - own_inputs, 0)
            row[8] = sum(frame.bytes[uid] for uid in reads) + foreign
            row[9] = row[4]
            for uid in (*reads, *frame.outputs[index]):
                last_use[uid] = index
    spans = [(born, count if frame.died[uid] is None else last_use[uid] + 1, frame.bytes[uid])
             for uid, born in enumerate(frame.born) if uid not in inlined]  # fmt: skip
    _fill_live(frame, 10, spans)


def _inlined(frame: Frame, readers: list[list[int]]) -> set[int]:
    """Storages that a fused kernel never writes: made by pointwise work and read only by a little more of it."""
    rows = frame.rows
    out = set()
    for index, row in enumerate(rows):
        if row[0] not in _FUSIBLE:
            continue
        for uid in frame.outputs[index]:
            used = readers[uid]
            if used and frame.died[uid] is not None and len(used) <= _MAX_FUSED_READERS and all(rows[r][0] in _FUSIBLE for r in used):
                out.add(uid)
    return out


# -- small helpers --------------------------------------------------------------------------------------------------


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return found


def _swap(value: Any, table: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return table.get(id(value), value)
    if isinstance(value, list | tuple):
        return type(value)(_swap(item, table) for item in value)
    if isinstance(value, dict):
        return {key: _swap(item, table) for key, item in value.items()}
    return value


def _lift(args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
    table = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META) for t in tensors
             if t.device.type != "meta" and t.dim()}  # fmt: skip
    if not table:
        return args, kwargs
    return _swap(args, table), _swap(kwargs, table)


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _integer_indices(args: Any) -> Any:
    """Boolean index tensors with values become integer ones: ``meta`` cannot count what a mask selects."""
    indices: list[Any] = []
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and index.device.type == "cpu":
            indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def _freeze(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, float | int | bool):
        return (type(value), value)
    return value


_UNDECLARED_VIEWS = {"aten::_unsafe_view", "aten::lift_fresh"}
_FUNCTIONAL: dict[Any, bool] = {}
_VIEW: dict[Any, bool] = {}


def _is_functional(func: Any) -> bool:
    known = _FUNCTIONAL.get(func)
    if known is None:
        schema = func._schema
        aliases = any(a.alias_info is not None for a in schema.arguments) or any(r.alias_info is not None for r in schema.returns)
        known = _FUNCTIONAL[func] = not aliases and not schema.is_mutable and schema.name not in _UNDECLARED_VIEWS
    return known


def _is_view(func: Any) -> bool:
    known = _VIEW.get(func)
    if known is None:
        schema = func._schema
        declared = any(r.alias_info is not None for r in schema.returns)
        known = _VIEW[func] = not schema.is_mutable and (declared or schema.name in _UNDECLARED_VIEWS)
    return known


def _mutates_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                return True
    return False


def _same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.stride() == right.stride()


def _factory_elements(func: Any, args: Any) -> int:
    name = func._schema.name
    if name == "aten::arange":
        numbers = [value for value in args if isinstance(value, int | float)]
        start, end = (numbers[0], numbers[1]) if len(numbers) > 1 else (0, numbers[0] if numbers else 0)
        return int(abs(end - start))
    if name in ("aten::linspace", "aten::logspace"):
        return int(args[2]) if len(args) > 2 else 0
    if args and isinstance(args[0], list | tuple):
        count = 1
        for side in args[0]:
            count *= int(side)
        return count
    return 0
