"""The hybrid trace: component code runs for real, its heavy tensors on ``meta``, its small and integer tensors on the CPU.

Masks, ids, grids and small vectors keep their values, so control flow that depends on them works; whatever mixes them with
a ``meta`` tensor is lifted to ``meta``. An operation that has no ``meta`` kernel is answered on zeros and named in
``fallbacks``. Lifetimes are the real ones: a storage is freed when the code drops it, as an eager run would.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from planner.dryrun import operations
from planner.dryrun.patches import no_modes
from planner.dryrun.tensors import (
    CPU,
    FLOATING,
    META,
    SMALL_ELEMENTS,
    factory_elements,
    frozen,
    integer_indices,
    is_functional,
    is_view,
    lift,
    outputs_in,
    swap,
    tensors_in,
    written,
)
from planner.dryrun.trace import Kind
from planner.dryrun.values import convert

ROUND_BYTES = 512
"""The CUDA caching allocator rounds small blocks to this (``kMinBlockSize`` in c10/cuda/CUDACachingAllocator)."""
GLUE_META_BYTES = 256 << 10
"""Component results above this stay on ``meta`` in the pipeline's own code, which then costs no arithmetic."""
TABLE_ELEMENTS = 1 << 14
VALUE_ELEMENTS = 1 << 22
"""Within a component, larger tensors of whatever dtype lose their values: a mask of all pairs of a video's pixels."""
ZERO_FALLBACK_LIMIT_BYTES = 1 << 30
ENDLESS_PASSES = 512
"""Passes after which a loop that ends on computed values is ended: as many tokens as diffusers' pipelines let prompt rewriters write
(LongCat-Image, FLUX.2)."""
_NOT_THE_MODELS = ("/torch/", "/planner/dryrun/")
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
_NO_META_WORDS = ("meta", "nonzero", "scalar")


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "uid", "frame")
    key: int
    uid: int
    frame: Frame


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
        self.shapes: dict[str, int] = {}
        self.modules: dict[str, int] = {"": 0}
        self.folds: dict[Any, Fold] = {}
        self.asked: Counter[Any] = Counter()
        """By line of code, how often it branched on computed values."""
        self.open = True

    def allocate(self, size: int) -> int:
        """Start a storage; its uid."""
        self.born.append(len(self.rows))
        self.died.append(None)
        self.bytes.append(size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return len(self.bytes) - 1

    def free(self, uid: int) -> None:
        """End a storage; ignored once the frame is closed."""
        if self.open:
            self.died[uid] = len(self.rows)
            self.live_bytes -= self.bytes[uid]


class Fold:
    """Work that a call repeats on equal shapes, such as one tile of many: rows written once, counted ``times``."""

    __slots__ = ("argument", "end", "extra_bytes", "live_bytes", "lists", "result", "start", "times")
    result: Any
    """What it returned, for its shapes: on ``meta``, counted nowhere."""

    def __init__(self, start: int, live_bytes: int) -> None:
        self.start, self.live_bytes = start, live_bytes
        self.end, self.times, self.extra_bytes = start, 1, 0
        self.result = None
        self.lists: list[Any] = []
        """What it left in the lists it was given, such as a video decoder's cache of frames."""
        self.argument: int | None = None
        """Place of the argument that it returns, changed in place."""

    def answer(self, own: Callable[[torch.Tensor], Any], lists: list[list[Any]]) -> Any:
        """A result like the first one, its tensors fresh and counted; the lists are left as the first call left its own."""

        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            made = _shape_only(tensor)
            own(made)
            return made

        with no_modes():
            for given, left in zip(lists, self.lists, strict=True):
                given[:] = convert(left, fresh, {})
            return convert(self.result, fresh, {})


class Glue(Frame):
    """The pipeline's own code: what it holds and moves, not which operations it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.moved_bytes = 0

    def allocate(self, size: int) -> int:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return size

    def free(self, uid: int) -> None:
        self.live_bytes -= uid


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Runs operations on ``meta`` or CPU as the hybrid rule says and writes them into the current frame."""

    def __init__(self) -> None:
        super().__init__()
        self.glue = Glue()
        self.frame: Frame = self.glue
        self.paths: list[str] = []
        self.to_host_bytes = 0
        self.all_values = False
        """A component runs for real: nothing is lifted to ``meta``."""
        self.truth = False
        """How a condition on computed values is answered: zeros say False, the code's own assertions want True."""
        self._storages: dict[int, _StorageRef] = {}
        self._host: dict[int, _StorageRef] = {}
        self._memo: dict[Any, tuple[list[Any], str, list[Any]]] = {}

    @property
    def inside(self) -> bool:
        """Within a component call, as opposed to the pipeline's own code."""
        return self.frame is not self.glue

    # -- storages ---------------------------------------------------------------------------------------------------

    def own(self, tensor: torch.Tensor) -> int | None:
        """Start counting a tensor's storage in the current frame; its uid, or None when it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._host:
            return None
        ref = self._watch(storage, self._storages)
        ref.uid = self.frame.allocate(-(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES)
        return ref.uid

    def to_host(self, tensor: torch.Tensor) -> None:
        """Mark a fresh tensor as lying in host memory: neither it nor what is made of it alone is on the device."""
        self._watch(tensor.untyped_storage(), self._host).uid = 0

    def _watch(self, storage: Any, table: dict[int, _StorageRef]) -> _StorageRef:
        def released(ref: Any) -> None:
            if ref.key in table and table[ref.key] is ref:
                del table[ref.key]
            if table is self._storages:
                ref.frame.free(ref.uid)

        ref: _StorageRef = _StorageRef(storage, released)
        ref.key, ref.frame = storage._cdata, self.frame
        table[ref.key] = ref
        return ref

    def glue_bytes_of(self, tensor: torch.Tensor) -> int:
        """Bytes of a storage that the pipeline's own code allocated; 0 for any other."""
        ref = self._storages.get(tensor.untyped_storage()._cdata)
        return ref.uid if ref is not None and ref.frame is self.glue else 0

    def uid_of(self, tensor: torch.Tensor) -> int | None:
        """The uid of a storage counted in the current frame."""
        return self.uid_in(self.frame, tensor)

    def uid_in(self, frame: Frame, tensor: torch.Tensor) -> int | None:
        """The uid of a storage counted in ``frame``."""
        ref = self._storages.get(tensor.untyped_storage()._cdata)
        return ref.uid if ref is not None and ref.frame is frame else None

    def _on_host(self, tensors: list[torch.Tensor]) -> bool:
        return bool(self._host) and bool(tensors) and all(t.untyped_storage()._cdata in self._host for t in tensors if t.dim())

    # -- dispatch ---------------------------------------------------------------------------------------------------

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self._run_higher_order(func, args, kwargs or {})
        kwargs = self._placed(func, args, kwargs) if kwargs and kwargs.get("device") is not None else kwargs or {}
        tensors = tensors_in(args, kwargs)
        if any(tensor.device.type == "meta" for tensor in tensors) or self._is_table(func, kwargs, tensors):
            return self._run_meta(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, tensors, out)
        return out

    def _run_higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on functions. ``flex_attention`` is one attention, of all pairs; any other runs on values only."""
        if func.name() == "flex_attention":
            query, key, value = args[:3]
            self.frame.fallbacks.add("flex_attention: counted as attention of all pairs, its mask left out")
            out = self.attention(query, key, value, None)
            statistics = [torch.zeros(query.shape[:-1], dtype=torch.float32, device=out.device) for _ in range(2)]
            return (out, *statistics)
        if any(tensor.device.type == "meta" for tensor in tensors_in(args, kwargs)):
            raise NotImplementedError(f"{func.name()} has no rule for meta tensors")
        with no_modes():
            return func(*args, **kwargs)

    def _is_table(self, func: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        """Large real numbers made of values (position tables): from here on only their shape matters, arithmetic is saved."""
        if not self.inside or self.all_values or not is_functional(func):
            return False
        largest = max((tensor.numel() for tensor in tensors), default=0)
        if largest <= TABLE_ELEMENTS:
            return False
        if largest > VALUE_ELEMENTS or (len(tensors) > 1 and _broadcast_elements(tensors) > VALUE_ELEMENTS):
            return True
        return kwargs.get("dtype") in FLOATING or any(tensor.dtype in FLOATING for tensor in tensors)

    def _placed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Where the result really goes: what has a value stays on the CPU, what is on ``meta`` stays there."""
        tensors = tensors_in(args, {})
        if torch.device(kwargs["device"]).type == "meta":
            return kwargs | {"device": CPU if self._keeps_values(func, tensors, args, kwargs.get("dtype")) else META}
        if tensors and tensors[0].device.type == "meta":
            return kwargs | {"device": META}
        return kwargs

    def _keeps_values(self, func: Any, tensors: list[torch.Tensor], args: Any, dtype: torch.dtype | None) -> bool:
        if tensors:
            source = tensors[0]
            if source.device.type == "meta":
                return False
            return source.dtype not in FLOATING or source.numel() <= SMALL_ELEMENTS or not self.inside
        if (dtype is None and func._schema.name == "aten::arange") or (dtype is not None and dtype not in FLOATING):
            return True
        return factory_elements(func, args) <= (SMALL_ELEMENTS if self.inside else GLUE_META_BYTES // 4)

    def _run_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        if func._schema.is_mutable and any(t.device.type == "cpu" for t in written(func, args, kwargs)):
            return self._on_zeros(func, args, kwargs, tensors, "writes into a CPU tensor")
        if func._schema.name[6:] in _INDEXING:
            args = integer_indices(args)
            tensors = tensors_in(args, kwargs)
        key = self._memo_key(func, args, kwargs, tensors)
        known = self._memo.get(key) if key is not None else None
        if known is not None:
            row, text, specs = known
            outs = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in specs]
            self._append(list(row), text, tensors, outs)
            return outs[0] if len(outs) == 1 else tuple(outs)
        return self._run_meta_first(func, args, kwargs, tensors, key)

    def _run_meta_first(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], key: Any) -> Any:
        lifted_args, lifted_kwargs = lift(args, kwargs, tensors)
        try:
            out = func(*lifted_args, **lifted_kwargs)
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, NotImplementedError) or any(word in str(error) for word in _NO_META_WORDS):
                return self._on_zeros(func, args, kwargs, tensors, "no meta kernel")
            raise
        described = self._note(func, args, kwargs, tensors, out)
        outs = outputs_in(out)
        if key is not None and described is not None and len(outs) == (len(out) if isinstance(out, tuple | list) else 1):
            self._memo[key] = (*described, [(tuple(item.shape), item.stride(), item.dtype) for item in outs])
        return out

    def _memo_key(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """A hashable description of a functional call; None where aliasing or mutation makes replay unsafe."""
        if not is_functional(func):
            return None
        parameters = self.frame.parameters
        try:
            key = (func, frozen(args), frozen(tuple(sorted(kwargs.items()))) if kwargs else None,
                   tuple(t.untyped_storage()._cdata in parameters for t in tensors))  # fmt: skip
            hash(key)
        except TypeError:
            return None
        return key

    def _on_zeros(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], why: str) -> Any:
        """Answer an operation that ``meta`` cannot: run it on zeros. Only its result's shape matters."""
        size = sum(t.numel() * t.element_size() for t in tensors if t.device.type == "meta")
        if size > ZERO_FALLBACK_LIMIT_BYTES:
            raise RuntimeError(f"{func} has no meta kernel and its arguments ({size} bytes) are too large to try on zeros")
        if func._schema.name == "aten::_local_scalar_dense" and tensors[0].dtype is torch.bool:
            if self.truth:
                self.frame.fallbacks.add("condition on computed values: taken as true")
                return True
            if self._goes_on_for_ever():
                self.frame.fallbacks.add(f"loop until computed values say so: ended after {ENDLESS_PASSES} passes")
                return True
        self.frame.fallbacks.add(f"{func._schema.name[6:]}: {why}, run on zeros")
        table = {id(t): torch.zeros(t.shape, dtype=t.dtype) for t in tensors if t.device.type == "meta"}
        real_args, real_kwargs = swap(args, table), swap(kwargs, table)
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = CPU
        out = func(*real_args, **real_kwargs)
        self._note(func, args, kwargs, tensors, out)
        return out

    def _goes_on_for_ever(self) -> bool:
        """Whether a loop of the component's own code, not of a part, asks the same over and over: on zeros it would never end."""
        if len(self.paths) != 1:
            return False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and any(part in frame.f_code.co_filename for part in _NOT_THE_MODELS):
            frame = frame.f_back
        if frame is None:
            return False
        place = (frame.f_code, frame.f_lineno)
        self.frame.asked[place] += 1
        return self.frame.asked[place] % ENDLESS_PASSES == 0

    # -- repeated work --------------------------------------------------------------------------------------------------

    def fold(self, key: Any, call: Callable[[], Any], args: tuple[Any, ...] = (), lists: Sequence[list[Any]] = ()) -> Any:
        """Run ``call`` the first time a key is seen; after that only count it, and answer with a result of the same shape.

        ``args``: it may return one of them, changed in place. ``lists``: it may put other things into them.

        What has piled up in the meantime (earlier tiles' results) is added to the live bytes of the rows at the end.
        """
        frame = self.frame
        known = frame.folds.get(key)
        if known is not None:
            known.times += 1
            known.extra_bytes = max(known.extra_bytes, frame.live_bytes - known.live_bytes)
            return args[known.argument] if known.argument is not None else known.answer(self.own, list(lists))
        fold = Fold(len(frame.rows), frame.live_bytes)
        result = call()
        if len(frame.rows) > fold.start:
            fold.end = len(frame.rows)
            fold.argument = next((place for place, item in enumerate(args) if item is result), None)
            with no_modes():
                fold.result = convert(result, _shape_only, {}) if fold.argument is None else None
                fold.lists = [convert(each, _shape_only, {}) for each in lists]
            frame.folds[key] = fold
        return result

    # -- writing rows -----------------------------------------------------------------------------------------------

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> tuple[list[Any], str] | None:
        """Write an executed operation down; its row and signature, or None when it launched nothing (views, allocations)."""
        name = func._schema.name.partition("::")[2]
        outs = outputs_in(out)
        if not outs:
            return None
        if name in operations.ALLOCATE_ONLY or (is_view(func) and tensors):
            if not tensors or name in operations.ALLOCATE_ONLY:
                for item in outs:
                    self.own(item)
            return None
        row, text = self._described(func, name, args, kwargs, tensors, out)
        self._append(list(row), text, tensors, outs)
        return row, text

    def _described(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> tuple[list[Any], str]:
        outs = outputs_in(out)
        kind = operations.kind_of(name)
        if name == "_to_copy" and (outs[0].dtype, outs[0].stride()) == (tensors[0].dtype, tensors[0].stride()):
            kind = Kind.COPY
        sizes = [operations.distinct_bytes(t) for t in tensors]
        weights = sum(size for t, size in zip(tensors, sizes, strict=True) if t.untyped_storage()._cdata in self.frame.parameters)
        read = sum(sizes) - (sizes[0] if func._schema.is_mutable and name in _OVERWRITING else 0)
        write = sum(operations.distinct_bytes(item) for item in outs)
        compute = outs[0] if outs[0].dtype in FLOATING else (tensors[0] if tensors else outs[0])
        row = [int(kind), operations.dtype_code(compute.dtype), operations.flops_of(func, args, kwargs, out), read, write, weights,
               0, 0, 0, 0, 0, 0, 0, 0, *operations.dims_of(kind, name, args, outs[0])]  # fmt: skip
        return row, operations.signature_text(func, args, kwargs)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Record one attention and return its output, laid out as the fused kernels do it: (batch, length, heads, dim)."""
        shape = (*query.shape[:-1], value.shape[-1])
        rank = len(shape)
        order = (*range(rank - 3), rank - 2, rank - 3, rank - 1) if rank > 2 else tuple(range(rank))
        tensors = [query, key, value] + ([mask] if mask is not None else [])
        place = META if any(t.device.type == "meta" for t in tensors) else CPU
        out = torch.empty_permuted(shape, order, dtype=query.dtype, device=place)
        if place == CPU:
            out.zero_()
        dims = operations.attention_dims(query, key, value, mask)
        batch, heads, queries, keys, width, value_width, mask_bytes, _ = dims
        flops = 2.0 * batch * heads * queries * keys * (width + value_width)
        read = sum(operations.distinct_bytes(t) for t in tensors[:3]) + mask_bytes
        text = operations.signature_text("attention", (query, key, value, mask), {})
        row = [int(Kind.ATTENTION), operations.dtype_code(query.dtype), flops, read, operations.distinct_bytes(out),
               0, 0, 0, 0, 0, 0, 0, 0, 0, *dims]  # fmt: skip
        self._append(row, text, tensors, [out])
        return out

    def _append(self, row: list[Any], text: str, tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        frame = self.frame
        if isinstance(frame, Glue):
            self._append_glue(frame, row, tensors, outs)
            return
        inputs = tuple(uid for t in tensors if (uid := self.uid_of(t)) is not None)
        fresh = tuple(uid for item in _fresh(tensors, outs) if (uid := self.own(item)) is not None)
        row[7] = sum(frame.bytes[uid] for uid in fresh)
        row[12] = frame.modules.setdefault(self.paths[-1] if self.paths else "", len(frame.modules))
        row[13] = frame.shapes.setdefault(text, len(frame.shapes))
        frame.rows.append(row)
        frame.inputs.append(inputs)
        frame.outputs.append(fresh)

    def _append_glue(self, glue: Glue, row: list[Any], tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        if self._on_host(tensors):
            for item in _fresh(tensors, outs):
                self.to_host(item)
            return
        for item in _fresh(tensors, outs):
            self.own(item)
        glue.operations += 1
        glue.moved_bytes += row[3] + row[4]


def _fresh(tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results with a storage of their own: what an operation writes in place was there before."""
    given = {tensor.untyped_storage()._cdata for tensor in tensors}
    return [item for item in outs if item.untyped_storage()._cdata not in given]


def _broadcast_elements(tensors: list[torch.Tensor]) -> int:
    """Elements of the tensors broadcast against each other, as pointwise work would; of the first one where they do not fit."""
    try:
        return int(math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors))))
    except RuntimeError:
        return int(tensors[0].numel())


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
