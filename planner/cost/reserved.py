"""Reserved bytes of a whole pipeline call: weights and activations of every phase through one caching allocator."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.cost.allocator import Block, CachingAllocator, replay
from planner.cost.model import Cost, CostModel, PhaseCost, localized
from planner.cost.quantized import IMMOVABLE, leaf_bytes
from planner.cost.residency import resting_bytes, tied_bytes
from planner.cost.workspace import operator_bytes
from planner.facts import ComponentFacts
from planner.recipe import Recipe

LOOP_PASSES = 2
"""Passes of a call that repeats: the second finds what the first left behind, further ones are like it."""


def reserved_bytes(model: CostModel, recipe: Recipe, cost: Cost) -> int:
    """Peak of the caching allocator's segments: weights as they come, then every distinct call in the order of first use."""
    run = _Run(model, recipe, cost)
    run.load()
    for phase in cost.phases:
        run.enter(phase)
        run.call(phase)
    return run.allocator.peak_reserved_bytes


@dataclass(slots=True)
class _Run:
    model: CostModel
    recipe: Recipe
    cost: Cost
    allocator: CachingAllocator = field(init=False)
    _weights: dict[str, list[Block]] = field(default_factory=dict)
    _resting: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        limit = self.model.device.total_bytes - self.model.coefficients.context_bytes
        self.allocator = CachingAllocator(limit_bytes=limit if self.model.device.kind == "cuda" else None)
        self._resting = resting_bytes(self.model.traces.facts, self.cost.trace)

    def load(self) -> None:
        """Components that are on the device from the start, in the pipeline's order; then cuBLAS takes its workspace."""
        for component in self.model.traces.facts.components:
            if self._stays(component):
                self.bring(component)
        if self.cost.blas_bytes:
            self.allocator.allocate(self.cost.blas_bytes)

    def _stays(self, component: ComponentFacts) -> bool:
        facts, own = self.model.traces.facts, self.recipe.of(component.name).offload
        kept = component.name in facts.excluded_from_offload or self.recipe.weights.get(component.name) in IMMOVABLE
        kept |= component.name in self.recipe.resident and component.name not in self.recipe.only
        return own == "none" or kept

    def bring(self, component: ComponentFacts) -> None:
        """Allocate a component's weights; quantizing on the device leaves the holes of the originals behind."""
        resting = self._resting[component.name]
        scale = resting / component.weight_bytes if component.weight_bytes else 1.0
        scheme = self.recipe.weights.get(component.name)
        plain = leaf_bytes(component, None, scale)
        blocks = self._weights[component.name] = []
        tied = round(tied_bytes(component) * scale)
        for before, after in zip(plain, leaf_bytes(component, scheme, scale), strict=True):
            if tied and after == tied:
                tied = 0
                continue
            if before == after:
                blocks.append(self.allocator.allocate(after))
                continue
            original = self.allocator.allocate(before)
            blocks.append(self.allocator.allocate(after))
            self.allocator.free(original)

    def enter(self, phase: PhaseCost) -> None:
        """Under model offload a component's predecessor leaves, the cache is emptied, and it comes in itself."""
        name = self.cost.trace.calls[phase.call].component
        if self.recipe.offload != "model" or name in self._weights:
            return
        chain = list(self.model.traces.facts.offload_sequence)
        for other in chain[: chain.index(name)] if name in chain else ():
            for block in self._weights.pop(other, ()):
                self.allocator.free(block)
        self.allocator.empty_cache()
        self.bring(self.model.traces.facts.component(name))

    def call(self, phase: PhaseCost) -> None:
        """All passes of one distinct call, with what the pipeline holds meanwhile and what the weights grow by an upcast."""
        trace, index = self.cost.trace, phase.call
        call = self.model.variant(trace, index, self.recipe)
        local = localized(self.recipe, self.model.role(call.component), call.component)
        scheme = None if local.fused else local.scheme
        workspace = operator_bytes(call, self.model.device, local.recipe(), scheme)
        if self.model.device.kind != "cuda":
            workspace = np.zeros(len(call), dtype=np.int64)
        upcast = max((event.weight_bytes for event in trace.events if event.call == index), default=0) - self._resting[call.component]
        extra = [self.allocator.allocate(size) for size in (phase.held_bytes, upcast) if size > 0]
        for _ in range(min(phase.count, LOOP_PASSES)):
            replay(self.allocator, call, workspace, self.cost.residency.window[index])
        for block in extra:
            self.allocator.free(block)
