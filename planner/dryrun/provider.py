"""Traces and facts of a model for one workload: from disk when they are known, from a dry run when not.

Nothing here imports torch; only a dry run does, and a model that is cached needs none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.dryrun import store
from planner.dryrun.trace import PipelineTrace, VaeMode, from_arrays, to_arrays
from planner.errors import PlannerError
from planner.facts import PipelineFacts
from planner.models import ModelSource
from planner.types import Frozen, Workload

if TYPE_CHECKING:
    from planner.dryrun.run import DryRun

_Key = tuple[str | None, int]


class _Known(Frozen):
    """What is kept of a model besides its traces."""

    facts: PipelineFacts
    workload: Workload
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Traces:
    """What the planner knows of a pipeline: facts, the completed workload, and traces in any dtype, batch and VAE mode."""

    facts: PipelineFacts
    workload: Workload
    notes: tuple[str, ...]
    _source: ModelSource
    _asked: Workload
    _inputs: Mapping[str, Any]
    _dtype: str | None
    _content: dict[str, Any] | None
    """What the disk cache's keys are made of; None: nothing is read from or written to disk."""
    _dry_run: DryRun | None = None
    _traces: dict[_Key, PipelineTrace] = field(default_factory=dict)
    _failed: dict[_Key, PlannerError] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: ModelSource,
        workload: Workload,
        inputs: Mapping[str, Any] | None = None,
        *,
        dtype: str | None = None,
        cache: bool = True,
    ) -> Traces:
        """Traces of ``source`` for ``workload``.

        ``dtype`` is the one to build the model in (None: as published; a live pipeline stays as it is). ``cache`` lets
        models that are not live be kept on disk; inputs that JSON cannot express are never kept.

        Raises:
            UsageError: the workload does not fit the pipeline's call, or contradicts ``inputs``.
            UnsupportedPipeline, ProfileError: the model does not build.
        """
        inputs = dict(inputs or {})
        content = _content(source, workload, inputs, dtype) if cache and source.kind != "live" else None
        if content is not None:
            known = store.load(store.entry_key(content), lambda header, arrays: _Known.model_validate(header))
            if known is not None:
                return cls(known.facts, known.workload, known.notes, source, workload, inputs, dtype, content)
        return cls._by_building(source, workload, inputs, dtype, content)

    @classmethod
    def _by_building(
        cls, source: ModelSource, workload: Workload, inputs: Mapping[str, Any], dtype: str | None, content: dict[str, Any] | None
    ) -> Traces:
        from planner.dryrun.facts import read_facts
        from planner.dryrun.run import DryRun

        pipe = source.build(dtype=dtype)
        dry_run = DryRun(pipe, workload, inputs)
        known = _Known(facts=read_facts(pipe), workload=dry_run.workload, notes=source.notes)
        if content is not None:
            store.save(store.entry_key(content), known.model_dump(mode="json"), {})
        return cls(known.facts, known.workload, known.notes, source, workload, inputs, dtype, content, dry_run)

    def trace(self, dtype: str | None = None, batch_size: int | None = None, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace:
        """The trace in ``dtype`` (None: as the pipeline is) of one call with ``batch_size``, VAE calls also in ``modes``.

        A mode that a VAE does not run in is in ``PipelineTrace.refused`` with the reason.

        Raises:
            UnsupportedPipeline: the pipeline's code did not get through with these inputs; says where it stopped.
            UsageError: the batch does not fit the pipeline's call.
        """
        key = (dtype, batch_size or self.workload.batch_size)
        if key in self._failed:
            raise self._failed[key]
        known = self._traces.get(key) or self._stored(key)
        if known is None or not _covers(known, modes):
            dry_run = self._running()
            try:
                known = dry_run.trace(*key, (*modes, *(_modes_of(known) if known else ())))
            except PlannerError as error:
                self._failed[key] = error
                raise
            known = self._store(key, known)
        self._traces[key] = known
        return known

    def _running(self) -> DryRun:
        if self._dry_run is None:
            from planner.dryrun.run import DryRun

            self._dry_run = DryRun(self._source.build(dtype=self._dtype), self._asked, self._inputs)
        return self._dry_run

    def _entry(self, key: _Key) -> str | None:
        return None if self._content is None else store.entry_key({**self._content, "trace": list(key)})

    def _stored(self, key: _Key) -> PipelineTrace | None:
        entry = self._entry(key)
        return None if entry is None else store.load(entry, from_arrays)

    def _store(self, key: _Key, trace: PipelineTrace) -> PipelineTrace:
        """Keep a trace, and answer with it as it will be read back: the same bytes whether it was cached or not."""
        entry = self._entry(key)
        if entry is None:
            return trace
        header, arrays = to_arrays(trace)
        store.save(entry, header, arrays)
        return from_arrays(json.loads(json.dumps(header)), arrays)


def _content(source: ModelSource, workload: Workload, inputs: Mapping[str, Any], dtype: str | None) -> dict[str, Any] | None:
    """A JSON-able description of everything that decides the traces; None where ``inputs`` cannot be described."""
    content = {"model": source.digest, "workload": workload.model_dump(), "inputs": dict(inputs), "dtype": dtype or source.dtype}
    try:
        json.dumps(content, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return content


def _covers(trace: PipelineTrace, modes: tuple[VaeMode, ...]) -> bool:
    return {mode.text for mode in modes if mode.text} <= trace.modes


def _modes_of(trace: PipelineTrace) -> tuple[VaeMode, ...]:
    return tuple(VaeMode.parse(text) for text in sorted(trace.modes))
