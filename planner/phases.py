"""The cost model as phases of a search: one phase per component, the pipeline's own code, and putting the plan in force.

Each phase names the axes that can change its demand. A component's demand depends on the trace (dtype, share of the batch),
on where weights are (offload, quantization), and on the part of a recipe that :func:`planner.cost.model.localized` lets
through to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import product

from planner.cost.kernels import CallTime
from planner.cost.model import TIMELESS, CostModel, localized
from planner.cost.residency import Residency
from planner.cost.transfer import transfer_seconds
from planner.dryrun.trace import CallTrace, PipelineTrace, VaeMode
from planner.recipe import Recipe
from planner.search import NOTHING, Assignment, Axis, Demand, Phase, Rule, Stock, Value

TRACE = frozenset({"dtype", "calls"})
PLACEMENT = frozenset({"offload", "offload_stream", "offload_blocks", "offload_disk", "resident", "weights", "only", "fused_qkv"})
VAE = frozenset({"vae_slicing", "vae_tiling", "vae_tile_pixels"})
SHARES = frozenset({"steps_factor", "denoiser_factor"})
NEVER = CallTime(1e18, 1e18, 0.0, 0, "compute", 0.0)
"""A computation so long that every copy hides behind it."""


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds: what the search adds up."""
    return round(seconds * 1e9)


def _running(calls: int, compute_seconds: float, copied_seconds: float) -> int:
    """Nanoseconds of a component's calls. Prices and floors add up alike, so that rounding keeps their order and ties are seen."""
    return nanoseconds(calls * (compute_seconds + copied_seconds))


@dataclass(slots=True)
class Recipes:
    """Recipes of assignments, and which axes change which of their fields."""

    shape: Callable[[Assignment], Recipe]
    axes: tuple[Axis, ...]
    base: dict[str, Value]
    """Every axis at its first value."""
    changes: dict[str, frozenset[str]] = field(default_factory=dict)
    _known: dict[object, Recipe] = field(default_factory=dict)
    _plain: Recipe = field(init=False)
    _effects: dict[tuple[str, Value], dict[str, object]] = field(default_factory=dict)
    _others: list[tuple[str, Recipe]] = field(default_factory=list)
    """Per axis and further value, the recipe with that value alone."""
    _apart: bool = False
    """No two axes change one field, so effects can be put together in any order."""

    def __post_init__(self) -> None:
        plain = self.shape(self.base)
        self._plain = plain
        names = [item.name for item in fields(Recipe)]
        for axis in self.axes:
            changed: set[str] = set()
            for value in axis.values[1:]:
                other = self.shape(self.base | {axis.name: value})
                self._others.append((axis.name, other))
                effect = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(plain, name)}
                self._effects[axis.name, value] = effect
                changed |= set(effect)
            self.changes[axis.name] = frozenset(changed)
        self._apart = sum(map(len, self.changes.values())) == len(frozenset().union(*self.changes.values()))

    def of(self, names: tuple[str, ...], assignment: Assignment) -> Recipe:
        """The recipe that has these axes as assigned and all others at their first value."""
        key = (names, *(assignment[name] for name in names))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._made({name: assignment[name] for name in names})
        return known

    def _made(self, chosen: dict[str, Value]) -> Recipe:
        if not self._apart:
            return self.shape(self.base | chosen)
        effects: dict[str, object] = {}
        for name, value in chosen.items():
            effects.update(self._effects.get((name, value), {}))
        return self._plain.but(**effects) if effects else self._plain

    def changing(self, wanted: frozenset[str]) -> tuple[str, ...]:
        """Axes that change any of these recipe fields."""
        return tuple(axis.name for axis in self.axes if self.changes[axis.name] & wanted)

    def only_changing(self, allowed: frozenset[str]) -> frozenset[str]:
        """Axes that change nothing but these recipe fields."""
        return frozenset(axis.name for axis in self.axes if self.changes[axis.name] <= allowed)

    def reaching(self, role: str, component: str) -> tuple[str, ...]:
        """Axes that change the part of a recipe which reaches one component."""
        plain = localized(self._plain, role, component)
        found = {name for name, other in self._others if localized(other, role, component) != plain}
        if role == "vae" and self.changing(frozenset({"fuse_vae"})):  # fusion reaches the VAE only together with it
            found |= set(self.changing(frozenset({"fuse_vae", "fusion", "cuda_graphs", "autotuned"})))
        return tuple(axis.name for axis in self.axes if axis.name in found)


@dataclass(frozen=True, slots=True)
class _Local:
    """One way to run a component wherever its weights are: values of its local axes, and what they cost at least."""

    values: tuple[Value, ...]
    compute_seconds: float
    setup_seconds: float
    running_bytes: tuple[int, ...]
    """Per distinct call, activations and workspace at their peak."""


@dataclass(frozen=True, slots=True)
class _Least:
    """The local choices that are still open.

    ``front``: those that no other beats both in running and in setting up. ``running_bytes``: the least that any needs, per call.
    ``calls``: per batch.
    """

    front: tuple[_Local, ...]
    running_bytes: tuple[int, ...]
    calls: int


@dataclass(slots=True)
class Pricing:
    """Builds the phases. ``modes``: every VAE mode of the space, so that each trace is made once. ``rules`` sharpen the floors."""

    model: CostModel
    recipes: Recipes
    calls: int | None
    modes: tuple[VaeMode, ...] = ()
    rules: tuple[Rule, ...] = ()
    _traces: dict[object, PipelineTrace] = field(default_factory=dict)
    _trace_axes: tuple[str, ...] = field(init=False)
    _placement_axes: tuple[str, ...] = field(init=False)
    _locals: dict[object, list[_Local]] = field(default_factory=dict)
    _placed: dict[object, tuple[PipelineTrace, Residency]] = field(default_factory=dict)
    _wheres: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """Of the axes that are asked with, those that decide trace and residency."""
    _ruled: dict[object, tuple[Rule, ...]] = field(default_factory=dict)
    _indices: dict[object, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._trace_axes = self.recipes.changing(TRACE)
        self._placement_axes = self.recipes.changing(PLACEMENT)

    def phases(self) -> tuple[Phase, ...]:
        """One per component, ``pipeline`` for its own code, ``setting up`` for what happens before the first call."""
        names = [part.name for part in self.model.traces.facts.components]
        around = self._ordered({*self._trace_axes, *self._placement_axes, *self.recipes.changing(frozenset({"steps_factor"}))})
        placing = self._ordered({*self._trace_axes, *self._placement_axes})
        own_code, putting = self._around(around), self._placing(placing)
        return (*(self._component_phase(name) for name in names), Phase("pipeline", around, own_code, _once_decided(around, own_code)),
                Phase("setting up", placing, putting, _once_decided(placing, putting), False))  # fmt: skip

    def stock(self) -> Stock:
        """Host memory for weights that wait there."""
        axes = self._ordered({*self._trace_axes, *self._placement_axes})
        return Stock(axes, lambda chosen: self._at(axes, chosen)[2].host_bytes)

    def trace(self, recipe: Recipe) -> PipelineTrace:
        """The trace that a recipe runs, with all VAE modes of the space in it."""
        key = (recipe.dtype, recipe.calls)
        if key not in self._traces:
            self._traces[key] = self.model.traces.trace(recipe.dtype, self.model.batch_size // recipe.calls, self.modes)
        return self._traces[key]

    def _ordered(self, names: set[str]) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.recipes.axes if axis.name in names)

    def _at(self, axes: tuple[str, ...], chosen: Assignment) -> tuple[Recipe, PipelineTrace, Residency]:
        recipe = self.recipes.of(axes, chosen)
        if axes not in self._wheres:
            deciding = {*self._trace_axes, *self._placement_axes, *self.recipes.changing(VAE)}
            self._wheres[axes] = tuple(axis for axis in axes if axis in deciding)
        where = self._wheres[axes]
        key = (where, *map(chosen.__getitem__, where))
        known = self._placed.get(key)
        if known is None:
            trace = self.trace(recipe)
            known = self._placed[key] = trace, self.model.residency(trace, recipe)
        return recipe, *known

    def _around(self, axes: tuple[str, ...]) -> Callable[[Assignment], Demand]:
        def price(chosen: Assignment) -> Demand:
            recipe, trace, placed = self._at(axes, chosen)
            cost = self.model.around_cost(trace, recipe, placed)
            seconds = recipe.calls * (cost.glue_seconds + cost.host_seconds)
            return Demand(cost.glue_peak_bytes + cost.blas_bytes, nanoseconds(seconds))

        return price

    def _placing(self, axes: tuple[str, ...]) -> Callable[[Assignment], Demand]:
        def price(chosen: Assignment) -> Demand:
            recipe, trace, placed = self._at(axes, chosen)
            cost = self.model.around_cost(trace, recipe, placed)
            return Demand(cost.setup_peak_bytes, 0, nanoseconds(cost.setup_seconds))

        return price

    # -- one component ------------------------------------------------------------------------------------------------

    def _component_phase(self, name: str) -> Phase:
        role = self.model.role(name)
        local = set(self.recipes.reaching(role, name))
        if role == "vae":
            local |= set(self.recipes.changing(VAE))
        if role in ("denoiser", "controlnet"):
            local |= set(self.recipes.changing(SHARES))
        own = self._ordered({each for each in local if not self.recipes.changes[each] <= TIMELESS})
        axes = self._ordered({*local, *self._trace_axes, *self._placement_axes})
        return Phase(name, axes, self._price(name, axes), self._floor(name, axes, own))

    def _price(self, name: str, axes: tuple[str, ...]) -> Callable[[Assignment], Demand]:
        model = self.model

        def price(chosen: Assignment) -> Demand:
            recipe, trace, placed = self._at(axes, chosen)
            costs = [model.phase_cost(trace, index, recipe, placed) for index in self._calls_of(trace, name)]
            if not costs:
                return NOTHING
            setup = sum(model.compile_seconds(trace, cost.call, cost.cost.time, recipe) for cost in costs)
            kept = max((max(cost.cost.activations_bytes + cost.cost.workspace_bytes, 1) for cost in costs if cost.in_graph), default=0)
            running = _running(recipe.calls, sum(cost.compute_seconds for cost in costs), sum(cost.transfer_seconds for cost in costs))
            return Demand(max(cost.peak_bytes for cost in costs) + model.blas_bytes, running, nanoseconds(setup), kept)

        return price

    def _calls_of(self, trace: PipelineTrace, name: str) -> tuple[int, ...]:
        key = (self.model.key(trace), name)
        if key not in self._indices:
            self._indices[key] = tuple(index for index, call in enumerate(trace.calls) if call.component == name)
        return self._indices[key]

    def _floor(self, name: str, axes: tuple[str, ...], own: tuple[str, ...]) -> Callable[[Assignment], Demand]:
        """The cheapest local choice that is still open, what stays resident, and what must be copied."""
        weights = self.recipes.changing(frozenset({"weights", "only"}))
        asked = {axis for rule in self._rules_of(own) for axis in rule.axes}
        deciding = self._ordered({*own, *asked, *self._trace_axes, *weights})
        placing = self._ordered({*self._trace_axes, *self._placement_axes})
        vae_axes = tuple(axis for axis in self.recipes.changing(VAE) if axis in axes)
        needed = (*self._trace_axes, *weights)
        bests: dict[object, _Least | None] = {}
        places: dict[object, tuple[list[int], list[int], float]] = {}

        def floor(partial: Assignment) -> Demand:
            get = partial.get
            if None in map(get, needed):
                return NOTHING
            key = tuple(map(get, deciding))
            if key not in bests:
                bests[key] = self._least(name, own, deciding, partial)
            if (least := bests[key]) is None:
                return NOTHING
            where, copied = tuple(map(get, (*placing, *vae_axes))), 0.0
            if None in where[: len(placing)]:
                peak = max(least.running_bytes)
            else:
                if where not in places:
                    places[where] = self._placed_floor(name, (*placing, *vae_axes), partial)
                bases, moving, copied = places[where]
                peak = max(map(sum, zip(bases, map(max, moving, least.running_bytes), strict=True)))
            costs = [(_running(least.calls, each.compute_seconds, copied), nanoseconds(each.setup_seconds)) for each in least.front]
            return Demand(peak + self.model.blas_bytes, *min(costs, key=self._weigh))

        return floor

    def _placed_floor(self, name: str, axes: tuple[str, ...], partial: Assignment) -> tuple[list[int], list[int], float]:
        """Per distinct call what is there when it starts and what it needs with moving weights; seconds that copies add at least."""
        settled = all(axis in partial for axis in axes)
        recipe, trace, placed = self._at(tuple(axis for axis in axes if axis in partial), partial)
        model = self.model
        counts, helds = model.held(trace)
        bases, moving, copied = [], [], 0.0
        for index in self._calls_of(trace, name):
            variants = (model.variant(trace, index, recipe),) if settled else _variants(trace, index)
            bases.append(placed.resident_bytes[index] + helds[index])
            moving.append(min(model.least_running_bytes(call, placed.window[index]) for call in variants))
            copied += transfer_seconds(placed, index, counts[index], NEVER, model.device, model.coefficients, recipe, name)
        return bases, moving, copied

    def _least(self, name: str, own: tuple[str, ...], deciding: tuple[str, ...], partial: Assignment) -> _Least | None:
        """The local choices that agree with what is decided; None: the component is never called."""
        here = tuple(axis for axis in deciding if axis in partial)
        recipe = self.recipes.of(here, partial)
        trace = self.trace(recipe)
        indices = self._calls_of(trace, name)
        if not indices:
            return None
        wanted = [(place, partial[axis]) for place, axis in enumerate(own) if axis in partial]
        open_ = [each for each in self._all_locals(name, own, recipe, trace, indices, partial)
                 if all(each.values[place] == value for place, value in wanted)]  # fmt: skip
        rules = [rule for rule in self._rules_of(own) if set(rule.axes).issubset({*own, *here}) and not set(own).issuperset(rule.axes)]
        found = _allowed(open_, own, rules, partial)
        running = tuple(map(min, zip(*(each.running_bytes for each in found), strict=True)))
        return _Least(_front(found), running, recipe.calls)

    def _rules_of(self, own: tuple[str, ...]) -> tuple[Rule, ...]:
        """Rules that forbid choices of these axes, alone or together with others."""
        if own not in self._ruled:
            self._ruled[own] = tuple(rule for rule in self.rules if set(rule.axes) & set(own))
        return self._ruled[own]

    def _weigh(self, cost: tuple[int, int]) -> int:
        """What the search minimises, of nanoseconds to run and to set up."""
        return cost[0] if self.calls is None else cost[0] * self.calls + cost[1]

    def _all_locals(self, name: str, own: tuple[str, ...], recipe: Recipe, trace: PipelineTrace, indices: tuple[int, ...],
                    partial: Assignment) -> list[_Local]:  # fmt: skip
        """Every choice of a component's local axes with its time; trace and weights are as decided."""
        decided = {*self._trace_axes, *self.recipes.changing(frozenset({"weights", "only"}))}
        given = tuple(partial[axis] for axis in own if axis in decided)
        key = (name, self.model.key(trace), given, recipe.calls)
        known = self._locals.get(key)
        if known is None:
            domains = {axis.name: axis.values for axis in self.recipes.axes}
            choices = [(partial[axis],) if axis in decided else domains[axis] for axis in own]
            rules = [rule for rule in self._rules_of(own) if {*own, *decided}.issuperset(rule.axes)]
            beside = {axis: partial[axis] for axis in decided if axis in partial}
            allowed = _allowed([_Local(values, 0.0, 0.0, ()) for values in product(*choices)], own, rules, beside)
            times: dict[object, tuple[CallTime, ...]] = {}
            known = self._locals[key] = [self._timed(own, each.values, trace, indices, times) for each in allowed]
        return known

    def _timed(self, own: tuple[str, ...], values: tuple[Value, ...], trace: PipelineTrace, indices: tuple[int, ...],
               times: dict[object, tuple[CallTime, ...]]) -> _Local:  # fmt: skip
        """One choice with its time. How many steps are made changes how often a call is made, not its time: ``times`` by the rest."""
        recipe = self.recipes.of(own, dict(zip(own, values, strict=True)))
        rest = tuple(value for axis, value in zip(own, values, strict=True) if not self.recipes.changes[axis] <= SHARES)
        if rest not in times:
            times[rest] = tuple(self.model.call_seconds(trace, index, recipe) for index in indices)
        compute = setup = 0.0
        for index, time in zip(indices, times[rest], strict=True):
            compute += self.model.compute_seconds(trace, index, time, recipe)
            setup += self.model.compile_seconds(trace, index, time, recipe)
        running = tuple(self.model.running_bytes(trace, index, recipe) for index in indices)
        return _Local(values, compute, setup, running)


def _once_decided(axes: tuple[str, ...], price: Callable[[Assignment], Demand]) -> Callable[[Assignment], Demand]:
    """A floor that is exact as soon as everything is known, and says nothing before."""
    return lambda partial: price(partial) if all(axis in partial for axis in axes) else NOTHING


def _front(found: list[_Local]) -> tuple[_Local, ...]:
    """Those that no other beats both in running and in setting up."""
    front: list[_Local] = []
    for each in sorted(found, key=lambda local: (local.compute_seconds, local.setup_seconds)):
        if not front or each.setup_seconds < front[-1].setup_seconds:
            front.append(each)
    return tuple(front)


def _allowed(found: list[_Local], own: tuple[str, ...], rules: list[Rule], beside: Assignment) -> list[_Local]:
    """Those that no rule forbids beside what is decided; all, where the rules leave none."""
    full = [{**beside, **dict(zip(own, each.values, strict=True))} for each in found]
    return [each for each, values in zip(found, full, strict=True) if not any(rule.refuse(values) for rule in rules)] or found


def _variants(trace: PipelineTrace, index: int) -> tuple[CallTrace, ...]:
    """A call in every mode that was traced."""
    return (trace.calls[index], *(call for (place, _), call in trace.variants.items() if place == index))
