"""Random search problems, small enough to be solved by trying everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from hypothesis import strategies as st

from planner.search import Axis, Candidate, Demand, Limits, Phase, Problem, Rule, Solver, Stock, Value

Table = dict[tuple[Value, ...], Demand]
SMALL = st.integers(0, 6)


def _priced(axes: tuple[str, ...], table: Table):
    return lambda values: table[tuple(values[name] for name in axes)]


def _floored(domains: dict[str, tuple[Value, ...]], axes: tuple[str, ...], table: Table, slack: int, calls: int):
    """The least of all completions, less some slack: what a real lower bound looks like."""

    def floor(partial: Mapping[str, Value]) -> Demand:
        choices = [(partial[name],) if name in partial else domains[name] for name in axes]
        demands = [table[key] for key in product(*choices)]
        cheapest = min(demand.nanoseconds * calls + demand.setup_nanoseconds for demand in demands)
        return Demand(max(min(demand.peak_bytes for demand in demands) - slack, 0), 0, max(cheapest - slack, 0))

    return floor


def _plain(key: tuple[Value, ...], axes: tuple[str, ...], light: frozenset[str]) -> tuple[Value, ...]:
    """The same place with the axes that change no bytes at their first value."""
    return tuple(0 if name in light else value for name, value in zip(axes, key, strict=True))


def _as_heavy_as(demand: Demand, other: Demand) -> Demand:
    return replace(demand, peak_bytes=other.peak_bytes, kept_bytes=other.kept_bytes)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    names = tuple("abcde"[: draw(st.integers(1, 5))])
    values = {name: tuple(range(draw(st.integers(1, 3)))) for name in names}
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(lambda chosen: tuple(sorted(chosen)))
    calls = draw(st.integers(1, 3))
    light = draw(st.frozensets(st.sampled_from(names), max_size=2))
    phases = []
    for place in range(draw(st.integers(1, 3))):
        axes = draw(some)
        demand = st.builds(Demand, SMALL, SMALL, SMALL, st.sampled_from((0, 0, 0, 1, 3)))
        table = {key: draw(demand) for key in product(*(values[name] for name in axes))}
        table = {key: _as_heavy_as(table[key], table[_plain(key, axes, light)]) for key in table}
        floor = _floored(values, axes, table, draw(st.integers(0, 2)), calls) if draw(st.booleans()) else None
        phases.append(Phase(f"p{place}", axes, _priced(axes, table), floor, draw(st.booleans())))
    rules = []
    for _ in range(draw(st.integers(0, 3))):
        axes = draw(some)
        keys = list(product(*(values[name] for name in axes)))
        bad = draw(st.sets(st.sampled_from(keys), max_size=4))
        rules.append(Rule(axes, lambda chosen, axes=axes, bad=bad: "no" if tuple(chosen[name] for name in axes) in bad else None))
    stock = None
    if draw(st.booleans()):
        axes = draw(some)
        amounts = {key: draw(SMALL) for key in product(*(values[name] for name in axes))}
        amounts = {key: amounts[_plain(key, axes, light)] for key in amounts}
        stock = Stock(axes, lambda chosen: amounts[tuple(chosen[name] for name in axes)])
    order, size = tuple(draw(st.permutations(names))), draw(st.integers(1, 3))
    first = tuple(order[start : start + size] for start in range(0, len(order), size))
    return Problem(tuple(Axis(name, values[name]) for name in names), tuple(phases), tuple(rules), stock, calls, first, light)


limits = st.builds(Limits, st.one_of(st.none(), st.integers(0, 8)), st.one_of(st.none(), SMALL))


def allowed(problem: Problem) -> list[Candidate]:
    """Every candidate that no rule forbids, priced one by one."""
    solver = Solver(problem)
    return [solver.evaluate(each) for each in solver.candidates() if solver.refusal(each) is None]


def brute_force(problem: Problem, limits: Limits) -> Candidate | None:
    """The best candidate by trying all."""
    return min((each for each in allowed(problem) if each.fits(limits)), key=lambda each: each.rank, default=None)
