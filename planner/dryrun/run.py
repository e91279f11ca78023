"""From a pipeline and a workload to traces in every dtype, batch and VAE mode that the search may ask for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planner.batching import share
from planner.dryrun.inputs import call_arguments, complete_workload
from planner.dryrun.operations import TORCH_DTYPES
from planner.dryrun.patches import uncollected
from planner.dryrun.session import Session
from planner.dryrun.trace import PipelineTrace, VaeMode
from planner.errors import PlannerError, UnsupportedPipeline
from planner.types import Workload

logger = logging.getLogger(__name__)


_ATTEMPTS = [(False, False), (True, False), (False, True), (True, True)]
"""Ways to get through a call: with stand-in pictures for optional images, with every component call executed."""


@dataclass(slots=True)
class DryRun:
    """Traces of one pipeline for one workload, made when asked for and kept."""

    pipe: Any
    workload: Workload
    inputs: Mapping[str, Any] = field(default_factory=dict)
    _sessions: dict[tuple[str | None, int], tuple[Session, PipelineTrace]] = field(default_factory=dict)
    _how: tuple[bool, bool] | None = None

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
            self._sessions[key] = self._run(dtype, batch)
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

    def _arguments(self, batch: int, with_images: bool) -> dict[str, Any]:
        """The whole call's arguments, or the first share of it where ``batch`` is a part of the workload's."""
        whole = self.workload.batch_size
        if batch >= whole or whole % batch:
            return call_arguments(self.pipe, self.workload.model_copy(update={"batch_size": batch}), self.inputs, with_images)
        return share(call_arguments(self.pipe, self.workload, self.inputs, with_images), whole // batch)[0]

    def _run(self, dtype: str | None, batch: int) -> tuple[Session, PipelineTrace]:
        attempts = [self._how] if self._how else _ATTEMPTS
        failures: list[Exception] = []
        for with_images, again in attempts:
            session = Session.of(self.pipe, again)
            if dtype is not None:
                cast_meta(session, dtype)
            try:
                arguments = self._arguments(batch, with_images)
                trace = session.run(arguments)
            except PlannerError:
                raise
            except Exception as error:
                failures.append(error)
                logger.debug("dry run failed", exc_info=True)
                continue
            self._how = with_images, again
            return session, replace(trace, batch_size=batch, dtype=dtype or _dtype_of(session.pipe), notes=_notes(with_images, again))
        reasons = list(dict.fromkeys(f"{type(error).__name__}: {_first_line(error)}" for error in failures))
        raise UnsupportedPipeline(
            f"{type(self.pipe).__name__}: its call did not get through the dry run: {'; and tried otherwise, '.join(reasons[:2])}. "
            "Pass the arguments of your own call as inputs={…}; if it still stops, please report it with that message."
        ) from failures[0]


def _add_variant(session: Session, trace: PipelineTrace, call: int, module: Any, mode: VaeMode) -> None:
    try:
        with _vae_mode(module, mode):
            trace.variants[call, mode.text] = session.retrace(call)
    except Exception as error:
        trace.refused[call, mode.text] = f"{type(error).__name__}: {_first_line(error)}"


def _notes(with_images: bool, again: bool) -> tuple[str, ...]:
    found = ["image arguments were filled with stand-in pictures of the default size"] if with_images else []
    if again:
        found.append("a component keeps state between calls: every call was executed, not only the first of its kind")
    return tuple(found)


def cast_meta(session: Session, dtype: str) -> None:
    """Cast the floating weights of a shadow pipeline, keeping what the class keeps in fp32 (``_keep_in_fp32_modules``)."""
    target = TORCH_DTYPES[dtype]
    for module in session.modules.values():
        keep = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
        library = type(module).__module__.split(".")[0]
        if library == "transformers" and dtype != "fp16":
            keep = ()
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
