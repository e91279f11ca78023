"""The space of plans for one pipeline, workload and device: knobs and the cost model as a problem for the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from planner.cost.model import WEIGHTLESS, CostModel
from planner.cost.reserved import lacking_bytes
from planner.cost.residency import vae_mode
from planner.dryrun.trace import VaeMode
from planner.errors import UnsupportedPipeline, UsageError
from planner.knobs import KNOBS, Conflict, Context, Knob, knob, normalize, parse_settings, violations
from planner.knobs.base import QUALITY_ORDER
from planner.phases import TRACE, VAE, Pricing, Recipes
from planner.recipe import Recipe
from planner.search import Assignment, Axis, Candidate, Limits, Problem, Rule, Solver, Value
from planner.types import KnobValue, Settings

_Table = tuple[tuple[str, ...], dict[tuple[Value, ...], object]]
DECIDED_FIRST = (("batch_split",), ("dtype",), ("quantization",), ("steps",),
                 ("offload", "offload_stream", "offload_keep", "offload_blocks", "offload_disk"))  # fmt: skip
"""Shared axes in the order of how much they say about memory and time: bounds get sharp early. Where weights are, only all say."""


class _Reads(dict[str, KnobValue]):
    """Settings that remember which of them were looked at."""

    def __init__(self, settings: Mapping[str, KnobValue]) -> None:
        super().__init__(settings)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> KnobValue:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.names.update(super().keys())
        return super().__iter__()


@dataclass(slots=True)
class Space:
    """What can be chosen here, with a solver that remembers every price.

    ``limits``: device budget of the model's device and the given host budget. ``fixed``: what the user decided.
    ``left_out``: values that were not even considered, with the reason (a rule, the quality level, an exclusion).
    """

    context: Context
    model: CostModel
    solver: Solver
    limits: Limits
    budget_bytes: int | None
    """The device budget itself; ``limits`` shrink below it where plans near it would not run for want of unbroken memory."""
    fixed: dict[str, KnobValue]
    baseline: dict[str, KnobValue]
    left_out: tuple[tuple[str, KnobValue, str], ...]
    recipes: Recipes
    _lacking: dict[tuple[tuple[str, Value], ...], int] = field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        return self.solver.problem

    def recipe(self, settings: Settings) -> Recipe:
        """The recipe of normalized settings."""
        return recipe_of(settings, self.context)

    def lacking_bytes(self, candidate: Candidate) -> int:
        """What a candidate lacks for the holes between its blocks; 0: nothing."""
        if candidate.values not in self._lacking:
            self._lacking[candidate.values] = lacking_bytes(self.model, self.recipe(candidate.settings))
        return self._lacking[candidate.values]


def recipe_of(settings: Settings, context: Context) -> Recipe:
    """What the settings do physically: every knob's effect in registry order. Unnamed knobs are at their defaults."""
    recipe = Recipe()
    for each in KNOBS:
        value = settings[each.name] if each.name in settings else each.values(context)[0]
        recipe = each.shape(recipe, value, context)
    return recipe


def build_space(context: Context, model: CostModel, *, fix: Settings | None = None, calls: int | None = None,
                budget_bytes: int | None = None, host_bytes: int | None = None,
                excluded: Mapping[str, Mapping[KnobValue, str]] | None = None) -> Space:  # fmt: skip
    """The space of plans. ``excluded`` values are not chosen (unless they leave the pipeline as it is), for the reason given.

    ``calls``: how many calls setting up is weighed against; None: setting up costs nothing.

    Raises:
        UsageError: a fixed value that no pipeline could take, that a rule refuses here, or that contradicts another.
    """
    fixed = parse_settings(fix or {})
    _check_fixed(fixed, context)
    baseline = normalize({}, context)
    domains, left_out = _domains(context, fixed, baseline, excluded or {})
    rules, domains = _settling(domains, fixed, baseline, context)
    rules += _clashes(domains, baseline, context) + _conflicts(domains)
    axes = tuple(Axis(each.name, domains[each.name]) for each in KNOBS)
    recipes = Recipes(lambda chosen: recipe_of(chosen, context), axes, {axis.name: axis.values[0] for axis in axes})
    pricing = Pricing(model, recipes, calls, _modes(recipes), tuple(rules))
    rules += _traced(pricing, recipes) + _vae_rules(pricing, recipes)
    problem = Problem(axes, pricing.phases(), tuple(rules), pricing.stock(), calls, DECIDED_FIRST, recipes.only_changing(WEIGHTLESS))
    budget = budget_bytes if budget_bytes is not None else model.device.budget_bytes
    return Space(context, model, Solver(problem), Limits(budget, host_bytes), budget, fixed, baseline, tuple(left_out), recipes)


# -- values ----------------------------------------------------------------------------------------------------------


def _check_fixed(fixed: Settings, context: Context) -> None:
    for name, value in fixed.items():
        reason = knob(name).refuse(value, context)
        if reason is not None:
            raise UsageError(f"{name}={value} cannot be used here: {reason}. Leave {name} free or fix another value.")
    named = [item for item in violations(fixed, context) if item[0] in fixed]
    if named:
        name, value, reason, source = named[0]
        raise UsageError(f"{name}={value} cannot be used {reason} [{source}]. Leave one of the two free.")


def _domains(context: Context, fixed: Settings, baseline: Settings, excluded: Mapping[str, Mapping[KnobValue, str]]
             ) -> tuple[dict[str, tuple[Value, ...]], list[tuple[str, KnobValue, str]]]:  # fmt: skip
    domains: dict[str, tuple[Value, ...]] = {}
    left_out: list[tuple[str, KnobValue, str]] = []
    for each in KNOBS:
        if each.name in fixed:
            domains[each.name] = (fixed[each.name],)
            continue
        kept = [baseline[each.name]]
        for value in each.values(context):
            reason = _unwanted(each, value, context, excluded.get(each.name, {}))
            if value not in kept and reason is None:
                kept.append(value)
            elif reason is not None and value != kept[0]:
                left_out.append((each.name, value, reason))
        domains[each.name] = tuple(kept)
    return domains, left_out


def _unwanted(each: Knob, value: KnobValue, context: Context, excluded: Mapping[KnobValue, str]) -> str | None:
    if value in excluded:
        return excluded[value]
    if not each.credited:
        return "no estimate credits it with a gain; it is used when it is fixed"
    level = each.quality(value, context)
    if QUALITY_ORDER.index(level) > QUALITY_ORDER.index(context.quality):
        return f'needs quality="{level}", asked for is "{context.quality}"'
    return each.refuse(value, context)


# -- rules -----------------------------------------------------------------------------------------------------------


def _tabulated(names: tuple[str, ...], domains: Mapping[str, tuple[Value, ...]], base: Settings,
               answer: Callable[[_Reads], object]) -> _Table:  # fmt: skip
    """``answer`` for all values of the axes that it looks at, found by watching it: no other axis can change it."""
    while True:
        table = {}
        for values in product(*(domains[name] for name in names)):
            settings = _Reads({**base, **dict(zip(names, values, strict=True))})
            table[values] = answer(settings)
            unseen = sorted(name for name in settings.names if name in domains and name not in names and len(domains[name]) > 1)
            if unseen:
                names = (*names, *unseen)
                break
        else:
            return names, table


def _settling(domains: dict[str, tuple[Value, ...]], fixed: Settings, baseline: Settings, context: Context
              ) -> tuple[list[Rule], dict[str, tuple[Value, ...]]]:  # fmt: skip
    """Options without effect have one value only. A fixed option keeps its value where it has an effect."""
    base = {**baseline, **fixed}
    settled: dict[str, _Table] = {}
    while True:
        settled = {name: _tabulated((), domains, base, _settler(knob(name), context, value)) for name, value in fixed.items()}
        grown = {name: tuple(dict.fromkeys([fixed[name], *_values(table)])) for name, (_, table) in settled.items()}
        if all(domains[name] == values for name, values in grown.items()):
            break
        domains.update(grown)
    for each in KNOBS:
        if each.name not in fixed and len(domains[each.name]) > 1:
            settled[each.name] = _tabulated((each.name,), domains, base, _settler(each, context, None))
    return [_same(name, names, table) for name, (names, table) in settled.items() if len({name, *names}) > 1], domains


def _settler(each: Knob, context: Context, value: KnobValue | None) -> Callable[[_Reads], object]:
    """How a knob settles: what the user fixed (``value``), or whatever the settings say."""
    return lambda seen: each.settle(seen[each.name] if value is None else value, seen, context)


def _values(table: Mapping[tuple[Value, ...], object]) -> list[Value]:
    return [value for value in table.values() if isinstance(value, bool | int | str)]


def _same(name: str, names: tuple[str, ...], table: dict[tuple[Value, ...], object]) -> Rule:
    def refuse(chosen: Assignment) -> str | None:
        settled = table[tuple(chosen[axis] for axis in names)]
        return None if chosen[name] == settled else f"has the effect of {name}={settled}"

    return Rule(names if name in names else (name, *names), refuse, "", True)


def _clashes(domains: dict[str, tuple[Value, ...]], baseline: Settings, context: Context) -> list[Rule]:
    rules = []
    for each in KNOBS:
        names, table = _tabulated((each.name,), domains, baseline, _clasher(each, context))
        found = {values: conflict for values, conflict in table.items() if isinstance(conflict, Conflict)}
        if found:
            rules.append(_clash(each.name, names, found))
    return rules


def _clasher(each: Knob, context: Context) -> Callable[[_Reads], object]:
    return lambda seen: each.clash(seen[each.name], seen, context)


def _clash(name: str, names: tuple[str, ...], found: dict[tuple[Value, ...], Conflict]) -> Rule:
    def refuse(chosen: Assignment) -> str | None:
        conflict = found.get(tuple(chosen[axis] for axis in names))
        return None if conflict is None else _reason(name, chosen, conflict)

    return Rule(names, refuse, next(iter(found.values())).source)


def _conflicts(domains: dict[str, tuple[Value, ...]]) -> list[Rule]:
    return [_conflict(each.name, fixed) for each in KNOBS for fixed in each.conflicts
            if fixed.values & set(domains[each.name]) and fixed.other_values & set(domains.get(fixed.other, ()))]  # fmt: skip


def _conflict(name: str, conflict: Conflict) -> Rule:
    def refuse(chosen: Assignment) -> str | None:
        hit = chosen[name] in conflict.values and chosen[conflict.other] in conflict.other_values
        return _reason(name, chosen, conflict) if hit else None

    return Rule((name, conflict.other), refuse, conflict.source)


def _reason(name: str, chosen: Assignment, conflict: Conflict) -> str:
    return f"{name}={chosen[name]} with {conflict.other}={chosen.get(conflict.other)}: {conflict.reason} ({conflict.verdict})"


def _modes(recipes: Recipes) -> tuple[VaeMode, ...]:
    """Every VAE mode that some assignment asks for."""
    names = recipes.changing(VAE)
    domains = [axis.values for axis in recipes.axes if axis.name in names]
    chosen = (dict(zip(names, values, strict=True)) for values in product(*domains))
    found = {vae_mode(recipes.of(names, each)) for each in chosen}
    return tuple(sorted((mode for mode in found if mode is not None), key=lambda mode: mode.text))


def _traced(pricing: Pricing, recipes: Recipes) -> list[Rule]:
    """Dtypes and splits in which the pipeline's own code does not run; as the pipeline is, it must."""
    names = tuple(axis.name for axis in recipes.axes if axis.name in recipes.changing(TRACE))

    def refuse(chosen: Assignment) -> str | None:
        recipe = recipes.of(names, chosen)
        if recipe.dtype is None and recipe.calls == 1:
            return None
        try:
            pricing.trace(recipe)
        except (UnsupportedPipeline, UsageError) as error:
            return f"the pipeline's code does not run this way: {error}"
        return None

    return [Rule(names, refuse, "dry run")] if names else []


def _vae_rules(pricing: Pricing, recipes: Recipes) -> list[Rule]:
    """VAE modes that the dry run found not to work."""
    vae = recipes.changing(VAE)
    if not vae:
        return []
    names = tuple(axis.name for axis in recipes.axes if axis.name in {*vae, *recipes.changing(TRACE)})

    def refuse(chosen: Assignment) -> str | None:
        recipe = recipes.of(names, chosen)
        mode = vae_mode(recipe)
        if mode is None:
            return None
        refused = pricing.trace(recipe).refused
        return next((f"the VAE does not run in this mode: {reason}" for (_, text), reason in refused.items() if text == mode.text), None)

    return [Rule(names, refuse, "dry run")]
