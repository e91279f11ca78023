"""Reserved bytes of repeated pipeline calls: weights and activations of every phase through one caching allocator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.cost.allocator import Block, CachingAllocator, Script
from planner.cost.model import Cost, CostModel, PhaseCost, localized
from planner.cost.quantized import IMMOVABLE, LOADED_ON_DEVICE, fused_bytes, leaf_bytes
from planner.cost.residency import fuses, resting_bytes
from planner.cost.windows import tied_bytes
from planner.cost.workspace import operator_pieces, score_matrix_bytes
from planner.dryrun.trace import CallTrace, Ints
from planner.facts import ComponentFacts
from planner.recipe import Recipe

LOOP_PASSES = 2
"""Passes of a component call that repeats: the second finds what the first left behind, further ones are like it."""
CALLS = 3
"""Calls of the pipeline, for each finds the cache as the one before left it: published runs came as far as "OOM after 2nd
iteration" (diffusers docs optimization/torch2.0.md)."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """What the caching allocator takes from the device over some calls of the pipeline."""

    peak_bytes: int
    short_bytes: int
    """What the device lacked for a segment when nothing cached was left to give back; 0: never."""
    limited: bool
    """The limit was reached: with more to take, cached segments would not have been given back."""


def reserved_bytes(model: CostModel, recipe: Recipe, cost: Cost) -> int:
    """Peak of the caching allocator's segments: weights as they come, then every distinct call in the order of first use."""
    return replayed(model, recipe, cost).peak_bytes


def replayed(model: CostModel, recipe: Recipe, cost: Cost, limit_bytes: int | None = None, *, calls: int = CALLS,
             most: bool = False) -> Reserved:  # fmt: skip
    """Replay calls of the pipeline where the allocator may take ``limit_bytes`` (None: all of the device but the context,
    which is the most).

    ``most``: with the largest workspaces that convolutions are known to take.
    """
    device, tables = model.device, model.known.replays
    own = device.total_bytes - model.coefficients.context_bytes if device.kind == "cuda" else None
    limit = own if limit_bytes is None else limit_bytes
    # All of the device that decides what a pass allocates: cards that are alike in it share what never met a limit.
    alike = (recipe, device.kind, device.compute_capability, cost.blas_bytes, model.memory_scale, calls, most)
    found = tables.get(alike)
    if found is None or (limit is not None and found.peak_bytes > limit):
        found = tables.get((alike, limit))
    if found is None:
        found = _Run(model, recipe, cost, CachingAllocator(limit_bytes=limit), most).over(min(calls, CALLS))
        tables[(alike, limit) if found.limited else alike] = found
    return found


def lacking_bytes(model: CostModel, recipe: Recipe, cost: Cost | None = None) -> int:
    """What the allocator lacks, within the budget and its headroom, for a segment of a plan whose tensors alone would fit.

    The holes between blocks in use are too small for it. 0: nothing. Only CUDA's allocator is modelled, and only as it is
    by default: expandable segments leave no such holes.
    """
    device = model.device
    if device.kind != "cuda" or device.budget_bytes is None or (device.free_bytes is not None and expandable_segments()):
        return 0
    return replayed(model, recipe, cost or model.cost(recipe), device.budget_bytes + device.headroom_bytes).short_bytes


def lodged_bytes(model: CostModel, recipe: Recipe, cost: Cost) -> int:
    """The largest matrix of scores: a tensor that outlives it may come to lie in its cached block, and then a further one is taken.

    Published reserved bytes of one job are apart by just that matrix, from card to card and from batch to batch
    (LambdaLabsML/lambda-diffusers, runs without xformers).
    """
    if model.device.kind != "cuda":
        return 0
    most = 0
    for phase in cost.phases:
        call = model.variant(cost.trace, phase.call, recipe)
        local = localized(recipe, model.role(call.component), call.component)
        most = max(most, int(score_matrix_bytes(call, model.device, local.recipe()).max(initial=0)))
    return most


def expandable_segments() -> bool:
    """Whether this process's environment asks torch for segments that grow (torch notes/cuda.md, PYTORCH_CUDA_ALLOC_CONF)."""
    asked = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return "expandable_segments:true" in asked.lower().replace(" ", "")


@dataclass(slots=True)
class _Run:
    model: CostModel
    recipe: Recipe
    cost: Cost
    allocator: CachingAllocator
    most: bool = False
    _weights: dict[str, list[Block]] = field(default_factory=dict)
    _resting: dict[str, int] = field(init=False)
    _chain: list[str] = field(init=False)
    """Components that model offload moves, in the order of its hooks."""
    _captured: set[int] = field(default_factory=set)
    _scripts: dict[int, Script] = field(default_factory=dict)
    _idle: set[object] = field(default_factory=set)
    """Calls with states of the allocator in which a pass leaves it as it was."""

    def __post_init__(self) -> None:
        facts = self.model.traces.facts
        self._resting = resting_bytes(facts, self.cost.trace)
        moving = {component.name for component in facts.components if not self._stays(component)}
        self._chain = [name for name in facts.offload_sequence if name in moving]

    def over(self, calls: int) -> Reserved:
        """Some calls of the pipeline, or as many as change anything."""
        allocator = self.allocator
        self.load()
        for _ in range(calls):
            state = allocator.reserved_bytes, allocator.peak_reserved_bytes
            for phase in self.cost.phases:
                self.enter(phase)
                self.call(phase)
            self.leave()
            if state == (allocator.reserved_bytes, allocator.peak_reserved_bytes):
                break
        return Reserved(allocator.peak_reserved_bytes, allocator.short_bytes, allocator.limited)

    def load(self) -> None:
        """Components that are on the device from the start, in the pipeline's order; then cuBLAS takes its workspace.

        What is quantized on the device while loading comes by, whatever offload follows.
        """
        passing = [name for name in self._chain if self.recipe.weights.get(name) in LOADED_ON_DEVICE]
        for component in self.model.traces.facts.components:
            if self._stays(component) or component.name in passing:
                self.bring(component, fresh=True)
        for name in passing:
            self._send(name)
        if self.cost.blas_bytes:
            self.allocator.allocate(self.cost.blas_bytes)

    def _stays(self, component: ComponentFacts) -> bool:
        facts, own = self.model.traces.facts, self.recipe.of(component.name).offload
        # A class's ``_exclude_from_cpu_offload`` binds accelerate's offloading, not group offload (pipeline_utils.py).
        excluded = component.name in facts.excluded_from_offload and own in ("model", "sequential")
        kept = excluded or self.recipe.weights.get(component.name) in IMMOVABLE
        kept |= component.name in self.recipe.resident and component.name not in self.recipe.only
        return own == "none" or kept

    def bring(self, component: ComponentFacts, *, fresh: bool = False) -> None:
        """Allocate a component's weights; the first time, quantizing on the device leaves the originals' holes behind."""
        scale = self._resting[component.name] / component.weight_bytes if component.weight_bytes else 1.0
        blocks = self._weights[component.name] = []
        for before, after in _tensors(component, self.recipe.weights.get(component.name), scale):
            if before == after or not fresh:
                blocks.append(self.allocator.allocate(after))
                continue
            original = self.allocator.allocate(before)
            blocks.append(self.allocator.allocate(after))
            self.allocator.free(original)
        if fuses(component, self.recipe):
            blocks += [self.allocator.allocate(size) for size in fused_bytes(component, self.recipe.weights.get(component.name), scale)]

    def enter(self, phase: PhaseCost) -> None:
        """Under model offload a component's predecessor leaves, the cache is emptied, and it comes in itself.

        Source: accelerate hooks.py, ``CpuOffload.pre_forward``.
        """
        name = self.cost.trace.calls[phase.call].component
        if name not in self._chain or self.recipe.offload != "model":
            return
        place = self._chain.index(name)
        if place and self._chain[place - 1] in self._weights:
            self._send(self._chain[place - 1])
        if name not in self._weights:
            self.bring(self.model.traces.facts.component(name))

    def leave(self) -> None:
        """Model offload sends everything back at the end (diffusers ``maybe_free_model_hooks``)."""
        if self.recipe.offload == "model":
            for name in self._chain:
                self._send(name)

    def _send(self, name: str) -> None:
        for block in self._weights.pop(name, ()):
            self.allocator.free(block)
        self.allocator.empty_cache()

    def call(self, phase: PhaseCost) -> None:
        """All passes of one distinct call, with what the pipeline holds meanwhile and what the weights grow by an upcast."""
        trace, index = self.cost.trace, phase.call
        if phase.in_graph:
            self._capture(phase)
            return
        component = trace.calls[index].component
        upcast = max((event.weight_bytes for event in trace.events if event.call == index), default=0) - self._resting[component]
        extra = [self.allocator.allocate(size) for size in (phase.held_bytes, upcast) if size > 0]
        for _ in range(min(phase.count, LOOP_PASSES)):
            before = self.allocator.state()
            if (index, before) in self._idle:
                break
            self._script(index).play(self.allocator)
            if self.allocator.state() == before:
                self._idle.add((index, before))
        for block in extra:
            self.allocator.free(block)

    def _script(self, index: int) -> Script:
        if index not in self._scripts:
            call = self.model.variant(self.cost.trace, index, self.recipe)
            self._scripts[index] = Script.of(call, self._workspace(call), self.cost.residency.window[index])
        return self._scripts[index]

    def _workspace(self, call: CallTrace) -> Sequence[Ints]:
        """Blocks that operations take beside their results. Only CUDA's kernels are known."""
        if self.model.device.kind != "cuda":
            return ()
        local = localized(self.recipe, self.model.role(call.component), call.component)
        return operator_pieces(call, self.model.device, local.recipe(), None if local.fused else local.scheme, most=self.most)

    def _capture(self, phase: PhaseCost) -> None:
        """A CUDA graph's pool is its own: segments that nothing else may use, taken once.

        They are those of an eager call, less what fusing saves of its peak.
        """
        if phase.call in self._captured:
            return
        self._captured.add(phase.call)
        pool = CachingAllocator()
        self._script(phase.call).play(pool)
        call = self.model.variant(self.cost.trace, phase.call, self.recipe)
        eager = int(np.sum([call.live_bytes, *self._workspace(call)], axis=0).max(initial=0))
        share = min(1.0, (phase.cost.activations_bytes + phase.cost.workspace_bytes) / eager) if eager else 0.0
        if pool.peak_reserved_bytes:
            self.allocator.allocate(round(pool.peak_reserved_bytes * share))


def _tensors(component: ComponentFacts, scheme: str | None, scale: float) -> Iterator[tuple[int, int]]:
    """Bytes of a component's tensors as loaded and as stored: a linear layer's bias is a tensor of its own.

    A tensor that belongs to several modules comes once.
    """
    tied = round(tied_bytes(component) * scale)
    plain, stored = leaf_bytes(component, None, scale), leaf_bytes(component, scheme, scale)
    for leaf, before, after in zip(component.leaves, plain, stored, strict=True):
        if tied and after == tied:
            tied = 0
            continue
        rest = min(round((leaf.bytes - leaf.linear_weight_bytes) * scale), before, after) if leaf.linear_weight_bytes else 0
        if rest:
            yield rest, rest
        if after > rest:
            yield before - rest, after - rest
