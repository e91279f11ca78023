"""Runs a pipeline's own ``__call__`` with every heavy component answered by its hybrid trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from planner.dryrun.components import ALWAYS_ENTRY, components, entry_points
from planner.dryrun.finish import finish
from planner.dryrun.functions import Functions
from planner.dryrun.patches import active, no_modes, patched, quiet
from planner.dryrun.recorder import GLUE_META_BYTES, Frame, Recorder
from planner.dryrun.shadow import shadow, steps_of
from planner.dryrun.tensors import META
from planner.dryrun.trace import CallTrace, Event, PipelineTrace
from planner.dryrun.twin import stored_bytes
from planner.dryrun.values import (
    convert,
    holders,
    leaves,
    private_inputs,
    refill,
    shape_of,
    signature,
    storage_bytes,
    to_meta,
    to_zeros,
)

logger = logging.getLogger(__name__)
REAL_RUN_BYTES = 256 << 20
"""A component whose weights are larger is not run for real on zeros."""
INTEGER_SIGNATURES = 8
"""After so many calls that differ in plain integers only (a time step), the integers are taken not to matter."""


@dataclass(slots=True)
class Invocation:
    """A distinct component call: how to run it again and what it answered."""

    component: str
    path: str
    method: str
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    dtype: torch.dtype | None
    answer: Any = None
    left: dict[int, Any] = field(default_factory=dict)
    """What the call left in those of its ``holders`` that it changed, by their number."""
    trace: CallTrace | None = None


@dataclass(slots=True)
class Session:
    """A shadow pipeline and everything that one dry run of it recorded. Can trace a call again in another mode."""

    pipe: Any
    modules: dict[str, nn.Module] = field(default_factory=dict)
    again: bool = False
    """Execute every component call, not only the first of its kind: for pipelines whose components keep state."""
    recorder: Recorder = field(default_factory=Recorder)
    functions: Functions = field(init=False)
    invocations: list[Invocation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    _owners: dict[int, tuple[str, str]] = field(default_factory=dict)
    _stored: dict[str, tuple[Any, int]] = field(default_factory=dict)
    _keys: dict[Any, int] = field(default_factory=dict)
    _integers: dict[Any, list[int]] = field(default_factory=dict)
    _weight_bytes: dict[Any, int] = field(default_factory=dict)
    _tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _glue_seen: tuple[int, int] = (0, 0)
    _cast: set[str] = field(default_factory=set)
    _folding: bool = False
    """Count repeated work on equal shapes instead of tracing it again: tiles and slices of a VAE."""

    def __post_init__(self) -> None:
        self.functions = Functions(self.recorder)

    @classmethod
    def of(cls, pipe: Any, again: bool = False) -> Session:
        """A session on a stand-in of ``pipe``; the pipeline itself is only read."""
        stand_in = shadow(pipe)
        session = cls(stand_in, components(stand_in), again)
        originals = components(pipe)
        for name, module in session.modules.items():
            if name in originals:
                session._stored[name] = (session.state_of(name), stored_bytes(originals[name]))
            for path, part in module.named_modules():
                session._owners.setdefault(id(part), (name, path))
            session._wrap_entry_points(name, module)
        return session

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any]) -> PipelineTrace:
        """Call the pipeline once with ``inputs`` and return the trace. Whatever its code raises comes out."""
        arguments = private_inputs(inputs)
        with self._tracing(), quiet():
            output = self.pipe(**arguments)
            tail = self._glue_event(-1, 0)
        traces = tuple(call.trace for call in self.invocations if call.trace is not None)
        return PipelineTrace(traces, tuple(self.events), tail, steps_of(self.pipe), self.recorder.to_host_bytes, 1, "",
                             output_shape=shape_of(output))  # fmt: skip

    def retrace(self, call: int) -> CallTrace:
        """Trace a recorded call again, with its component in whatever state it is now."""
        invocation = self.invocations[call]
        owner, now = self.modules[invocation.component], self.state_of(invocation.component)
        with self._tracing(), quiet(), torch.no_grad():
            if now != invocation.dtype:
                owner.to(invocation.dtype)
            try:
                with self._folded(owner):
                    _, trace = self._trace(invocation)
            finally:
                if now != invocation.dtype:
                    owner.to(now)
        return trace

    @contextlib.contextmanager
    def _folded(self, owner: nn.Module) -> Iterator[None]:
        """Count equal tiles and slices: calls of the component's children and of its own work on one slice."""
        before = {name: vars(owner).get(name) for name in _SLICE_WORK if hasattr(type(owner), name)}
        for name in before:
            object.__setattr__(owner, name, self._folding_method(getattr(owner, name), (id(owner), name)))
        self._folding = True
        try:
            yield
        finally:
            self._folding = False
            for name, value in before.items():
                if value is None:
                    del owner.__dict__[name]
                else:
                    object.__setattr__(owner, name, value)

    def _folding_method(self, method: Callable[..., Any], key: Any) -> Callable[..., Any]:
        def folding(*args: Any, **kwargs: Any) -> Any:
            if not self.recorder.inside or not _all_meta(args):
                return method(*args, **kwargs)
            return self.recorder.fold((key, signature((args, kwargs))), lambda: method(*args, **kwargs), args)

        return folding

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        previous = getattr(active, "session", None)
        active.session = self
        try:
            with patched(), self.functions, self.recorder:
                yield
        finally:
            active.session = previous

    # -- component calls --------------------------------------------------------------------------------------------

    def enter_module(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``Module.__call__`` while tracing: a component boundary, or a step deeper into one."""
        owner = self._owners.get(id(module))
        paths = self.recorder.paths
        if not self.recorder.inside:
            if owner is None:
                return call(module, *args, **kwargs)
            return self.boundary(owner[0], owner[1], "forward", lambda *a, **k: call(module, *a, **k), args, kwargs)
        paths.append(owner[1] if owner else (paths[-1] if paths else ""))
        try:
            if self._folding and owner is not None and "." not in owner[1] and _all_meta(args) and (lists := _lists(kwargs)) is not None:
                key = (id(module), signature((args, kwargs)))
                return self.recorder.fold(key, lambda: call(module, *args, **kwargs), lists=lists)
            return call(module, *args, **kwargs)
        finally:
            paths.pop()

    def boundary(self, component: str, path: str, method: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call from the pipeline into a component: traced the first time, counted and answered after that."""
        with no_modes():
            exact, loose = signature((args, kwargs)), signature((args, kwargs), integers=False)
        index = self._known((component, path, method, self.state_of(component)), exact, loose)
        for tensor in leaves((args, kwargs)):
            self.recorder.own(tensor)
        event = self._glue_event(-1, self._weights_of(component))
        if index is None or self.again:
            label = method if not path else f"{path}.{method}" if method != "forward" else path
            with no_modes():
                seen: dict[int, Any] = {}
                invocation = Invocation(component, path, label, run, convert(args, to_meta, seen), convert(kwargs, to_meta, seen),
                                        self.state_of(component))  # fmt: skip
            invocation.answer, invocation.trace = self._trace(invocation)
            if index is None:
                index = self._remember((component, path, method, invocation.dtype), exact, loose, invocation)
        else:
            invocation = self.invocations[index]
        self.events.append(replace(event, call=index))
        answer, left = self._answer((invocation.answer, invocation.left))
        given = holders(args, kwargs) if left else []
        for number, content in left.items():
            refill(given[number], content)
        return answer

    def _known(self, what: Any, exact: Any, loose: Any) -> int | None:
        known = self._keys.get((what, exact))
        if known is None:
            alike = self._integers.get((what, loose), [])
            known = alike[-1] if len(alike) >= INTEGER_SIGNATURES else None
        return known

    def _remember(self, what: Any, exact: Any, loose: Any, invocation: Invocation) -> int:
        index = self._keys[what, exact] = len(self.invocations)
        self._integers.setdefault((what, loose), []).append(index)
        self.invocations.append(invocation)
        return index

    def _trace(self, invocation: Invocation) -> tuple[Any, CallTrace]:
        """Hybrid first; where the component's code does not get through, for real on zeros if it is small."""
        try:
            return self._hybrid(invocation)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or not self._can_run_for_real(invocation):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            logger.debug("%s runs on zeros", invocation.component, exc_info=True)
        with _real_zeros(self.modules[invocation.component]):
            self.recorder.all_values = True
            try:
                args, kwargs = convert(invocation.args, to_zeros, {}), convert(invocation.kwargs, to_zeros, {})
                return self._record(invocation, args, kwargs, f"{invocation.component}: run on zeros on the CPU ({reason})")
            finally:
                self.recorder.all_values = False

    def _hybrid(self, invocation: Invocation) -> tuple[Any, CallTrace]:
        try:
            return self._record(invocation, invocation.args, invocation.kwargs)
        except AssertionError:
            self.recorder.truth = True
            try:
                return self._record(invocation, invocation.args, invocation.kwargs)
            finally:
                self.recorder.truth = False

    def _can_run_for_real(self, invocation: Invocation) -> bool:
        if invocation.component not in self.modules:
            return False
        given = storage_bytes((invocation.args, invocation.kwargs))
        return _total_bytes(self._tensors_of(invocation.component)) <= REAL_RUN_BYTES and given <= REAL_RUN_BYTES

    def _record(self, invocation: Invocation, args: Any, kwargs: Any, fallback: str | None = None) -> tuple[Any, CallTrace]:
        recorder = self.recorder
        frame = Frame(self._storages_of(invocation.component))
        if fallback:
            frame.fallbacks.add(fallback)
        outer, recorder.frame = recorder.frame, frame
        recorder.paths.append(invocation.path)
        with no_modes():
            before, (args, kwargs) = holders(args, kwargs), convert((args, kwargs), lambda tensor: tensor, {})
        try:
            answer = invocation.run(*args, **kwargs)
        finally:
            recorder.paths.pop()
            recorder.frame = outer
        trace = finish(frame, invocation.component, invocation.method, storage_bytes((args, kwargs)), storage_bytes(answer))
        with no_modes():
            after = enumerate(zip(before, holders(args, kwargs), strict=True))
            left = {number: now for number, (was, now) in after if signature(was) != signature(now)}
        given = {uid for tensor in leaves((answer, left)) if (uid := self.recorder.uid_in(frame, tensor)) is not None}
        kept = sum(size for uid, size in enumerate(frame.bytes) if frame.died[uid] is None and uid not in given)
        recorder.glue.allocate(kept)  # tables that the component made and keeps, such as rotary frequencies
        with no_modes():
            answer, invocation.left = convert((answer, left), to_meta, {}) if fallback else (answer, left)
        return answer, trace

    def _answer(self, answer: Any) -> Any:
        """Zeros of the right shapes on the CPU; large results stay on ``meta``, which glue code can compute with too."""
        bases: dict[Any, torch.Tensor] = {}

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "meta":
                fresh = tensor.detach().clone()
                self.recorder.own(fresh)
                return fresh
            storage = tensor.untyped_storage()
            base = bases.get((storage._cdata, tensor.dtype))
            if base is None:
                base = bases[storage._cdata, tensor.dtype] = _lazy_zeros(storage.nbytes(), tensor.dtype)
                self.recorder.own(base)
            return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        with no_modes():
            return convert(answer, stand_in, {})

    def _glue_event(self, call: int, weight_bytes: int) -> Event:
        glue = self.recorder.glue
        operations, moved = self._glue_seen
        self._glue_seen = glue.operations, glue.moved_bytes
        cast = self._cast_bytes()
        held, peak = glue.live_bytes - cast, glue.peak_bytes - cast
        event = Event(call, held, glue.operations - operations, glue.moved_bytes - moved, max(peak, held), weight_bytes)
        glue.peak_bytes = glue.live_bytes
        return event

    def _cast_bytes(self) -> int:
        """Weights that the pipeline's own code made by casting a component: they count as weights, not as held tensors."""
        self._cast |= {name for name, (state, _) in self._stored.items() if self.state_of(name) != state}
        with torch._C.DisableTorchFunction():  # thousands of weights, each a call of the function mode otherwise
            return sum(self.recorder.glue_bytes_of(t) for name in self._cast for t in self._tensors_of(name))

    # -- components -------------------------------------------------------------------------------------------------

    def _wrap_entry_points(self, name: str, module: nn.Module) -> None:
        for method in entry_points(type(module)):
            object.__setattr__(module, method, self._entry(name, method, getattr(module, method)))

    def _entry(self, name: str, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def entry(*args: Any, **kwargs: Any) -> Any:
            session = getattr(active, "session", None)
            if session is None or session.recorder.inside or not (method in ALWAYS_ENTRY or leaves((args, kwargs))):
                return original(*args, **kwargs)
            return session.boundary(name, "", method, original, args, kwargs)

        return entry

    def state_of(self, component: str) -> Any:
        """The dtype that a component's first parameter has now: pipelines upcast a VAE and cast it back."""
        first = next(self.modules[component].parameters(), None)
        return None if first is None else first.dtype

    def _weights_of(self, component: str) -> int:
        key = (component, self.state_of(component))
        if key not in self._weight_bytes:
            state, stored = self._stored.get(component, (None, 0))
            same = component in self._stored and state == key[1]
            self._weight_bytes[key] = stored if same else _total_bytes(self._tensors_of(component))
        return self._weight_bytes[key]

    def _storages_of(self, component: str) -> frozenset[int]:
        # Asked anew for every call: a cast gives a component other storages, and freed addresses are used again.
        with torch._C.DisableTorchFunction():
            return frozenset(t.untyped_storage()._cdata for t in self._tensors_of(component))

    def _tensors_of(self, component: str) -> list[torch.Tensor]:
        """A component's parameters and buffers as they are now. Its modules stay the same, so they are looked for once."""
        if component not in self._tables:
            parts = list(self.modules[component].modules())
            self._tables[component] = [table for part in parts for table in (part._parameters, part._buffers)]
        found = {id(t): t for table in self._tables[component] for t in table.values() if t is not None}
        return list(found.values())


def _total_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def _real_zeros(module: nn.Module) -> Iterator[None]:
    """A meta module with real zeros for weights while the block runs."""
    with no_modes():
        tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
        saved = [(table, name, value) for table in tables for name, value in table.items()
                 if value is not None and value.device.type == "meta"]  # fmt: skip
        made: dict[int, torch.Tensor] = {}
        for table, name, value in saved:
            if id(value) not in made:
                zeros = torch.zeros(value.shape, dtype=value.dtype)
                made[id(value)] = nn.Parameter(zeros, requires_grad=False) if isinstance(value, nn.Parameter) else zeros
            table[name] = made[id(value)]
    try:
        yield
    finally:
        for table, name, value in saved:
            table[name] = value


def _lazy_zeros(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system gives only when touched (``torch.zeros`` writes them all); very large ones on ``meta``."""
    elements = max(nbytes // dtype.itemsize, 1)
    if nbytes > GLUE_META_BYTES:
        return torch.zeros(elements, dtype=dtype, device=META)
    return torch.from_numpy(np.zeros(elements * dtype.itemsize, dtype=np.uint8)).view(dtype)


_SLICE_WORK = ("_decode", "_encode", "blend_v", "blend_h", "blend_t")
"""What a VAE calls for each slice of its batch and for each seam between tiles (diffusers ``AutoencoderMixin`` classes)."""


def _all_meta(args: Any) -> bool:
    """Plain tensors on ``meta``: nothing that a call could change or remember."""
    tensors = [item for item in args if isinstance(item, torch.Tensor)]
    return bool(tensors) and all(t.device.type == "meta" for t in tensors) and all(isinstance(item, torch.Tensor | int) for item in args)


def _lists(kwargs: Mapping[str, Any]) -> list[list[Any]] | None:
    """Lists among keyword arguments that a call may change; None where some argument holds more than shapes and plain values."""
    found = [value for value in kwargs.values() if isinstance(value, list)]
    items = [item for value in kwargs.values() for item in (value if isinstance(value, list) else [value])]
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    plain = sum(isinstance(item, bool | int | str | None) for item in items)
    return found if len(tensors) + plain == len(items) and all(t.device.type == "meta" for t in tensors) else None
