"""A pipeline as a table's row had it: some components missing, or one component alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from planner.cost.model import TraceSource
from planner.dryrun.trace import CallTrace, Event, PipelineTrace, VaeMode
from planner.facts import ComponentFacts, PipelineFacts
from planner.types import Workload
from planner.validate.case import Case
from planner.validate.history import cogvideox_kept_one_cache, layers_reached, with_one_cache

NOTHING = Event(-1, 0, 0, 0, 0, 0)


class WholeTraces(TraceSource, Protocol):
    """What a filter needs of :class:`planner.dryrun.provider.Traces`."""

    @property
    def workload(self) -> Workload: ...


@dataclass(slots=True)
class Part:
    """Traces seen through a filter: components that were not loaded are neither resident nor run.

    ``alone`` keeps the calls of one component's method and drops what the pipeline does around them.
    """

    source: WholeTraces
    absent: frozenset[str]
    alone: tuple[str, str] | None = None
    change: Callable[[CallTrace], CallTrace] | None = None
    """What an earlier release made of the VAE's decode."""
    stored: Callable[[ComponentFacts], ComponentFacts] | None = None
    """Which layers the row's way of quantizing reached."""
    _kept: dict[int, PipelineTrace] = field(default_factory=dict)

    @property
    def facts(self) -> PipelineFacts:
        facts = self.source.facts
        components = tuple(part for part in facts.components if part.name not in self.absent)
        if self.alone is not None:
            components = tuple(part for part in components if part.name == self.alone[0])
        if self.stored is not None:
            components = tuple(self.stored(part) for part in components)
        return facts.model_copy(update={"components": components})

    @property
    def workload(self) -> Workload:
        return self.source.workload

    def trace(self, dtype: str | None, batch_size: int | None, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace:
        """The trace without the calls that did not happen."""
        whole = self.source.trace(dtype, batch_size, modes)
        if id(whole) not in self._kept:
            self._kept[id(whole)] = self._filtered(whole)
        return self._kept[id(whole)]

    def _filtered(self, trace: PipelineTrace) -> PipelineTrace:
        def happened(component: str, method: str) -> bool:
            return component not in self.absent and self.alone in (None, (component, method))

        kept = [index for index, call in enumerate(trace.calls) if happened(call.component, call.method)]
        place = {index: number for number, index in enumerate(kept)}
        events = tuple(replace(event, call=place[event.call]) for event in trace.events if event.call in place)
        changes: dict[str, object] = {
            "calls": tuple(self._as_then(trace.calls[index]) for index in kept),
            "events": events,
            "variants": {(place[index], mode): self._as_then(call) for (index, mode), call in trace.variants.items() if index in place},
            "refused": {(place[index], mode): why for (index, mode), why in trace.refused.items() if index in place},
        }
        if self.alone is not None:
            inputs = [trace.calls[event.call].input_bytes for event in trace.events if event.call in place]
            bare = tuple(
                replace(event, held_bytes=size, glue_operations=0, glue_bytes=0, glue_peak_bytes=0)
                for event, size in zip(events, inputs, strict=True)
            )
            changes |= {"events": bare, "tail": NOTHING, "to_host_bytes": 0}
        return replace(trace, **changes)  # type: ignore[arg-type]


    def _as_then(self, call: CallTrace) -> CallTrace:
        return self.change(call) if self.change is not None and call.method == "decode" else call


def part_of(case: Case, traces: WholeTraces) -> Part:
    """The traces as the row's subject and its missing components leave them."""
    alone = None
    if case.subject == "vae_decode":
        alone = (traces.facts.of_role("vae")[0].name, "decode")
    elif case.subject == "denoiser":
        alone = (traces.facts.of_role("denoiser")[0].name, "forward")
    change = with_one_cache if cogvideox_kept_one_cache(case) else None
    return Part(traces, frozenset(case.without), alone, change, layers_reached(case))
