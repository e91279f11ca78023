"""Runs a pipeline's own ``__call__`` with every heavy component answered by its hybrid trace."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from planner.dryrun.recorder import CPU, META, SMALL_ELEMENTS, Frame, Functions, Recorder, finish
from planner.dryrun.trace import CallTrace, Event, PipelineTrace
from planner.dryrun.twin import shadow

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALWAYS_ENTRY = {"generate"}
_BASES_WITHOUT_ENTRY_POINTS = {
    "Module", "ModelMixin", "ConfigMixin", "PushToHubMixin", "PeftAdapterMixin", "PreTrainedModel", "GenerationMixin", "AttentionMixin",
    "FromOriginalModelMixin", "CacheMixin", "UNet2DConditionLoadersMixin", "object", "EmbeddingAccessMixin", "AutoencoderMixin",
    "ModuleUtilsMixin", "ABC", "Generic", "Protocol", "FluxTransformer2DLoadersMixin", "SD3Transformer2DLoadersMixin"}  # fmt: skip
_active = threading.local()


@dataclass(slots=True)
class Invocation:
    """A distinct component call: how to run it again and what it answered."""

    component: str
    path: str
    method: str
    module: nn.Module
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    dtype: torch.dtype | None
    answer: Any = None
    trace: CallTrace | None = None


@dataclass(slots=True)
class Session:
    """A shadow pipeline and everything that one dry run of it recorded. Can trace a call again in another mode."""

    pipe: Any
    recorder: Recorder = field(default_factory=Recorder)
    invocations: list[Invocation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    owners: dict[int, tuple[str, str]] = field(default_factory=dict)
    parameters: dict[str, frozenset[int]] = field(default_factory=dict)
    _keys: dict[Any, int] = field(default_factory=dict)
    _weight_bytes: dict[Any, int] = field(default_factory=dict)
    _glue_rows_seen: int = 0

    @classmethod
    def of(cls, pipe: Any) -> Session:
        """A session on a stand-in of ``pipe``; the pipeline itself is only read."""
        session = cls(shadow(pipe))
        for name, module in _components(session.pipe):
            for path, part in module.named_modules():
                session.owners.setdefault(id(part), (name, path))
            session._wrap_entry_points(name, module)
        return session

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any]) -> PipelineTrace:
        """Call the pipeline once with ``inputs`` and return the trace. Whatever its code raises comes out."""
        with self._tracing(), _quiet():
            output = self.pipe(**_private_inputs(inputs))
            tail = self._glue_event(-1, 0)
        traces = tuple(call.trace for call in self.invocations if call.trace is not None)
        steps = self.pipe.__dict__.get("_dry_run_steps")
        return PipelineTrace(traces, tuple(self.events), tail, steps, self.recorder.to_host_bytes, 1, "", output_shape=_shape_of(output))

    def retrace(self, call: int) -> CallTrace:
        """Trace a recorded call again, with its component in whatever state it is now."""
        invocation = self.invocations[call]
        owner, now = self.pipe.__dict__[invocation.component], self._state_of(invocation.component)
        with self._tracing(), _quiet(), torch.no_grad():
            if now != invocation.dtype:
                owner.to(invocation.dtype)
            _, trace = self._trace(invocation)
            if now != invocation.dtype:
                owner.to(now)
        return trace

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        previous = getattr(_active, "session", None)
        _active.session = self
        with _patched(), Functions(self.recorder), self.recorder:
            try:
                yield
            finally:
                _active.session = previous

    # -- component calls --------------------------------------------------------------------------------------------

    def enter_module(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``Module.__call__`` while tracing: a component boundary, or a step deeper into one."""
        owner = self.owners.get(id(module))
        if not self.recorder.inside:
            if owner is None:
                return call(module, *args, **kwargs)
            return self.boundary(owner[0], owner[1], "forward", module, lambda *a, **k: call(module, *a, **k), args, kwargs)
        self.recorder.paths.append(owner[1] if owner else (self.recorder.paths[-1] if self.recorder.paths else ""))
        try:
            return call(module, *args, **kwargs)
        finally:
            self.recorder.paths.pop()

    def boundary(self, component: str, path: str, method: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call from the pipeline into a component: traced the first time, counted and answered after that."""
        key = (component, path, method, self._state_of(component), _signature((args, kwargs)))
        index = self._keys.get(key)
        self.events.append(self._glue_event(-2 if index is None else index, self._weights_of(component)))
        if index is None:
            label = method if not path else f"{path}.{method}" if method != "forward" else path
            meta_args, meta_kwargs = _convert(args, _to_meta, {}), _convert(kwargs, _to_meta, {})
            invocation = Invocation(component, path, label, module, run, meta_args, meta_kwargs, self._state_of(component))
            invocation.answer, invocation.trace = self._trace(invocation)
            index = self._keys[key] = len(self.invocations)
            self.invocations.append(invocation)
            last = self.events[-1]
            self.events[-1] = Event(index, last.held_bytes, last.glue_operations, last.glue_bytes, last.glue_peak_bytes, last.weight_bytes)
        return self._answer(self.invocations[index].answer)

    def _trace(self, invocation: Invocation) -> tuple[Any, CallTrace]:
        recorder = self.recorder
        outer, recorder.frame = recorder.frame, Frame(self._storages_of(invocation.component))
        recorder.shapes, recorder.modules = {}, {"": 0}
        recorder.paths.append(invocation.path)
        frame = recorder.frame
        try:
            answer = invocation.run(*invocation.args, **invocation.kwargs)
        finally:
            recorder.paths.pop()
            recorder.frame = outer
        outputs = {s.untyped_storage()._cdata: s.untyped_storage().nbytes() for s in _leaves(answer)}
        inputs = {s.untyped_storage()._cdata: s.untyped_storage().nbytes() for s in _leaves((invocation.args, invocation.kwargs))}
        trace = finish(frame, invocation.component, invocation.method, tuple(recorder.modules), tuple(recorder.shapes),
                       sum(inputs.values()), sum(outputs.values()))  # fmt: skip
        return answer, trace

    def _answer(self, answer: Any) -> Any:
        """Zeros of the right shapes on the CPU; very large results stay on ``meta``, which glue code can compute with too."""
        bases: dict[int, torch.Tensor] = {}

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "meta":
                return tensor.detach().clone()
            storage = tensor.untyped_storage()
            if storage.nbytes() > _GLUE_META_BYTES:
                fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
                self.recorder.own(fresh, storage.nbytes())
                return fresh
            base = bases.get(storage._cdata)
            if base is None or base.dtype != tensor.dtype:
                elements = max(storage.nbytes() // tensor.element_size(), 1)
                base = bases[storage._cdata] = torch.zeros(elements, dtype=tensor.dtype)
                self.recorder.own(base)
            return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        with _no_modes():
            return _convert(answer, stand_in, {})

    def _glue_event(self, call: int, weight_bytes: int) -> Event:
        glue = self.recorder.glue
        rows = glue.rows[self._glue_rows_seen :]
        self._glue_rows_seen = len(glue.rows)
        event = Event(call, glue.live_bytes, len(rows), sum(row[0] for row in rows), glue.peak_bytes, weight_bytes)
        glue.peak_bytes = glue.live_bytes
        return event

    # -- components -------------------------------------------------------------------------------------------------

    def _wrap_entry_points(self, name: str, module: nn.Module) -> None:
        for method in _entry_points(type(module)):
            original = getattr(module, method)

            def entry(*args: Any, _method: str = method, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                session = getattr(_active, "session", None)
                carries = any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten((args, kwargs))[0])
                if session is None or session.recorder.inside or not (carries or _method in _ALWAYS_ENTRY):
                    return _original(*args, **kwargs)
                return session.boundary(name, "", _method, module, _original, args, kwargs)

            object.__setattr__(module, method, entry)

    def _state_of(self, component: str) -> Any:
        first = next(self.pipe.__dict__[component].parameters(), None) if component in self.pipe.__dict__ else None
        return None if first is None else first.dtype

    def _weights_of(self, component: str) -> int:
        key = (component, self._state_of(component))
        if key not in self._weight_bytes:
            module = self.pipe.__dict__.get(component)
            tensors = [] if module is None else [*module.parameters(), *module.buffers()]
            self._weight_bytes[key] = sum(t.numel() * t.element_size() for t in tensors)
        return self._weight_bytes[key]

    def _storages_of(self, component: str) -> frozenset[int]:
        module = self.pipe.__dict__.get(component)
        tensors = [] if module is None else [*module.parameters(), *module.buffers()]
        return frozenset(t.untyped_storage()._cdata for t in tensors)


_GLUE_META_BYTES = 4 << 20


def _components(pipe: Any) -> list[tuple[str, nn.Module]]:
    """The modules a pipeline holds, lists of modules included."""
    return [(name, value) for name, value in vars(pipe).items() if isinstance(value, nn.Module)]


def _entry_points(cls: type) -> list[str]:
    """Public methods, other than ``forward``, that a pipeline may call on a component to make it compute."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__name__ in _BASES_WITHOUT_ENTRY_POINTS or base.__module__.startswith(("torch.", "builtins", "typing", "abc")):
            names |= _ALWAYS_ENTRY & set(vars(base))
            continue
        names |= {name for name, value in vars(base).items() if callable(value) and not name.startswith("_")
                  and not isinstance(value, type | staticmethod | classmethod) and not name.startswith(("enable_", "disable_", "set_"))}  # fmt: skip
    return sorted(names - {"forward", "to", "half", "float", "train", "eval", "post_init", "init_weights", "load_state_dict"})


# -- process-wide patches, in force only while a session traces in this thread ------------------------------------------

_patch_lock = threading.RLock()


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """Route ``Module.__call__`` through the active session, as ``torch.fx`` does, and let autocast accept ``meta``."""
    with _patch_lock:
        module_call, autocast_init = nn.Module.__call__, torch.autocast.__init__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            session = getattr(_active, "session", None)
            if session is None:
                return module_call(module, *args, **kwargs)
            return session.enter_module(module, module_call, args, kwargs)

        def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            if device_type == "meta":
                autocast_init(self, "cpu", enabled=False)
            else:
                autocast_init(self, device_type, *args, **kwargs)

        nn.Module.__call__, torch.autocast.__init__ = call, init  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__, torch.autocast.__init__ = module_call, autocast_init  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave every random state as it was, and say nothing that a real run will say again."""
    from diffusers.utils import logging

    python, numpy_state, verbosity = random.getstate(), np.random.get_state(), logging.get_verbosity()
    logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
        yield


# -- arguments and answers ----------------------------------------------------------------------------------------------


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Activations go to ``meta``; integers, masks and small vectors keep their values."""
    if tensor.device.type == "meta":
        return tensor
    if tensor.dtype not in _FLOATS or (tensor.dim() <= 1 and tensor.numel() <= SMALL_ELEMENTS):
        return tensor.detach().to(CPU)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _convert(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any]) -> Any:
    """``value`` with every tensor changed, through containers, model outputs and small library objects."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]
    if value is None or isinstance(value, str | int | float | bool | torch.dtype | torch.device | torch.Generator | nn.Module):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_convert(item, change, seen) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_convert(item, change, seen) for item in value)
    if type(value) is dict:
        return {key: _convert(item, change, seen) for key, item in value.items()}
    if isinstance(value, dict) or type(value).__module__.startswith(("diffusers.", "transformers.")):
        return _convert_object(value, change, seen)
    return value


def _convert_object(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    fresh = copy.copy(value)
    seen[id(value)] = fresh
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(fresh, key, _convert(item, change, seen))
    if hasattr(fresh, "__dict__"):
        for name, item in vars(value).items():
            if not isinstance(item, nn.Module):
                object.__setattr__(fresh, name, _convert(item, change, seen))
    return fresh


def _leaves(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _convert(value, collect, {})
    return found


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, float):
        return "float"
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    return type(value).__name__


def _private_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's arguments with copies of whatever a run would change: generators."""
    return {key: _private(value) for key, value in inputs.items()}


def _private(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        fresh = torch.Generator()
        fresh.manual_seed(value.initial_seed())
        return fresh
    if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
        return [_private(item) for item in value]
    if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta"):
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


def _shape_of(output: Any) -> tuple[int, ...] | None:
    first = output
    for _ in range(3):
        if isinstance(first, dict):
            first = next(iter(first.values()), None)
        elif hasattr(first, "__dict__") and not hasattr(first, "shape") and not isinstance(first, list | tuple):
            first = next(iter(vars(first).values()), None)
    if isinstance(first, list | tuple):
        return (len(first),)
    shape = getattr(first, "shape", None)
    return tuple(int(side) for side in shape) if shape is not None else None
