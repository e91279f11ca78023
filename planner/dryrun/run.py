"""From a pipeline and a workload to traces in every dtype, batch and VAE mode that the search may ask for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planner.batching import longest_texts, share
from planner.dryrun.inputs import call_arguments, complete_workload, remember_needs, speaks
from planner.dryrun.operations import TORCH_DTYPES
from planner.dryrun.patches import uncollected
from planner.dryrun.session import Session
from planner.dryrun.trace import PipelineTrace, VaeMode
from planner.dtypes import parse_dtypes
from planner.errors import PlannerError, UnsupportedPipeline, UsageError
from planner.types import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to get through a call: with a stand-in prompt, with pictures for optional images, every component call executed."""

    prompt: bool = False
    images: bool = False
    again: bool = False


def _ways(inputs: Mapping[str, Any]) -> list[_Way]:
    """The user's call as it is comes first; where there are no arguments at all it gets a prompt from the start."""
    prompts = (False,) if any(name.startswith("prompt") for name in inputs) else (False, True) if inputs else (True,)
    fills = [*((prompt, False) for prompt in prompts), (prompts[-1], True)]
    return [_Way(prompt, images, again) for again in (False, True) for prompt, images in fills]


@dataclass(slots=True)
class DryRun:
    """Traces of one pipeline for one workload, made when asked for and kept."""

    pipe: Any
    workload: Workload
    inputs: Mapping[str, Any] = field(default_factory=dict)
    _sessions: dict[tuple[str | None, int], tuple[Session, PipelineTrace]] = field(default_factory=dict)
    _way: _Way | None = None

    def __post_init__(self) -> None:
        self.workload = complete_workload(self.pipe, self.workload, self.inputs)

    def trace(self, dtype: str | None = None, batch_size: int | None = None, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace:
        """The trace in ``dtype`` (None: as the pipeline is) of one call with ``batch_size``, its VAE calls also in ``modes``.

        Raises:
            UnsupportedPipeline: the pipeline's code did not get through with these inputs; says where it stopped.
            UsageError: the workload does not fit the pipeline's call.
        """
        with uncollected():
            return self._traced(dtype, batch_size or self.workload.batch_size, modes)

    def _traced(self, dtype: str | None, batch: int, modes: tuple[VaeMode, ...]) -> PipelineTrace:
        key = (dtype, batch)
        if key not in self._sessions:
            ran = self._run(dtype, batch)
            if batch < self.workload.batch_size:
                _check_share(self.trace(dtype), ran[1])
            self._sessions[key] = ran
        session, trace = self._sessions[key]
        wanted = {mode.text: mode for mode in modes if mode.text and mode.text not in trace.modes}
        for index, invocation in enumerate(session.invocations):
            module = session.modules[invocation.component]
            if hasattr(module, "use_tiling") or hasattr(module, "use_slicing"):
                for mode in wanted.values():
                    _add_variant(session, trace, index, module, mode)
        if wanted:
            trace = replace(trace, modes=trace.modes | set(wanted))
            self._sessions[key] = session, trace
        return trace

    def _arguments(self, batch: int, way: _Way) -> dict[str, Any]:
        """The whole call's arguments, or its share with the longest texts where ``batch`` is a part of the workload's."""
        whole = self.workload.batch_size
        if batch >= whole or whole % batch:
            workload = self.workload.model_copy(update={"batch_size": batch})
            return call_arguments(self.pipe, workload, self.inputs, way.images, way.prompt)
        shares = share(call_arguments(self.pipe, self.workload, self.inputs, way.images, way.prompt), whole // batch)
        return max(shares, key=longest_texts)

    def _run(self, dtype: str | None, batch: int) -> tuple[Session, PipelineTrace]:
        failures: list[Exception] = []
        for way in [self._way] if self._way else _ways(self.inputs):
            session = Session.of(self.pipe, way.again)
            if dtype is not None:
                cast_meta(session, dtype)
            try:
                arguments = self._arguments(batch, way)
                trace = session.run(arguments)
            except PlannerError:
                raise
            except Exception as error:
                failures.append(error)
                logger.debug("dry run failed", exc_info=True)
                continue
            self._way = way
            remember_needs(self.pipe, self.inputs, way.prompt, way.images)
            return session, replace(trace, batch_size=batch, dtype=dtype or _dtype_of(session.pipe), notes=_notes(way, speaks(self.inputs)))
        reasons = list(dict.fromkeys(f"{type(error).__name__}: {_first_line(error)}" for error in failures))
        raise UnsupportedPipeline(
            f"{type(self.pipe).__name__}: its call did not get through the dry run: {'; and tried otherwise, '.join(reasons[:2])}. "
            "Pass the arguments of your own call as inputs={…}; if it still stops, please report it with that message."
        ) from failures[0]


_EQUAL_WORK = 0.98
"""Shares repeat what a call does once, so together they do at least its work; less than this fraction means something was lost."""


def _check_share(whole: PipelineTrace, part: PipelineTrace) -> None:
    """A share of the batch must do its part of the work and make its part of the output.

    Raises UsageError where it does not: a list among the arguments (reference pictures, say) is then not one entry per sample.
    """
    parts = whole.batch_size // part.batch_size
    work, made = (sum(trace.calls[event.call].total_flops for event in trace.events) for trace in (whole, part))
    outputs = [trace.output_shape[0] if trace.output_shape else 0 for trace in (whole, part)]
    if parts * made < _EQUAL_WORK * work or parts * outputs[1] != outputs[0]:
        raise UsageError(
            f"the batch does not split: {parts} calls with a share of the arguments each would do {parts * made:.3g} operations and "
            f"make {parts * outputs[1]} outputs instead of {work:.3g} and {outputs[0]}; some argument is not one entry per sample."
        )


def _add_variant(session: Session, trace: PipelineTrace, call: int, module: Any, mode: VaeMode) -> None:
    try:
        with _vae_mode(module, mode):
            trace.variants[call, mode.text] = session.retrace(call)
    except Exception as error:
        trace.refused[call, mode.text] = f"{type(error).__name__}: {_first_line(error)}"


def _notes(way: _Way, gave: bool) -> tuple[str, ...]:
    found = ["image arguments were filled with stand-in pictures of the default size"] if way.images else []
    if way.prompt and gave:
        found.append("the arguments give no prompt and the call needs one: a stand-in was used")
    if way.again:
        found.append("a component keeps state between calls: every call was executed, not only the first of its kind")
    return tuple(found)


def cast_meta(session: Session, dtype: str) -> None:
    """Cast the floating weights of a shadow pipeline, keeping what the class keeps in fp32 (``_keep_in_fp32_modules``)."""
    wanted = parse_dtypes(dtype)
    for component, module in session.modules.items():
        name = wanted.parts.get(component) or wanted.base
        if name is not None:
            _cast_module(module, name)


def _cast_module(module: Any, dtype: str) -> None:
    target = TORCH_DTYPES[dtype]
    library = type(module).__module__.split(".")[0]
    keep = () if library == "transformers" and dtype != "fp16" else tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            wanted = torch.float32 if any(part in name.split(".") for part in keep) else target
            parameter.data = parameter.data.to(wanted)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(target)


def _dtype_of(pipe: Any) -> str:
    from planner.dryrun.facts import read_facts

    return read_facts(pipe).dtype


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else "no message"


@contextlib.contextmanager
def _vae_mode(module: Any, mode: VaeMode) -> Iterator[None]:
    """A meta VAE in another mode, and back: the switches that the knobs use, on a module nobody else sees."""
    from planner.knobs.vae import tile_sizes

    saved = {name: value for name, value in vars(module).items() if name.startswith(("tile_", "use_"))}
    if hasattr(module, "use_slicing"):
        module.use_slicing = mode.slicing
    if hasattr(module, "use_tiling"):
        module.use_tiling = mode.tile_pixels is not None
        own = getattr(module, "tile_sample_min_size", None) or getattr(module, "tile_sample_min_height", None)
        if mode.tile_pixels and own:
            for name, size in tile_sizes(module, mode.tile_pixels, int(own)).items():
                setattr(module, name, size)
    try:
        yield
    finally:
        for name, value in saved.items():
            object.__setattr__(module, name, value)
