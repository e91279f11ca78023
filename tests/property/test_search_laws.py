"""Laws of the search, on problems that are small enough to try every candidate."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.search import Limits, Problem, Solver, needed_bytes
from tests.property.problems import allowed, brute_force, limits, problems

FEW = settings(max_examples=120, deadline=None)


@FEW
@given(problems(), limits)
def test_search_finds_what_trying_everything_finds(problem: Problem, limits: Limits) -> None:
    assert Solver(problem).best(limits) == brute_force(problem, limits)


@FEW
@given(problems(), st.one_of(st.none(), st.integers(0, 6)))
def test_the_leanest_candidate_needs_least_of_all(problem: Problem, stock_bytes: int | None) -> None:
    fitting = [each for each in allowed(problem) if each.fits(Limits(None, stock_bytes))]
    expected = min(fitting, key=lambda each: (each.needed_bytes, each.rank), default=None)
    assert Solver(problem).leanest(stock_bytes=stock_bytes) == expected


@FEW
@given(problems(), limits, st.data())
def test_a_fixed_axis_is_a_search_of_a_smaller_problem(problem: Problem, limits: Limits, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(problem.axes))
    value = data.draw(st.sampled_from(axis.values))
    expected = [each for each in allowed(problem) if each.fits(limits) and each.settings[axis.name] == value]
    assert Solver(problem).best(limits, {axis.name: value}) == min(expected, key=lambda each: each.rank, default=None)


@FEW
@given(problems(), st.integers(0, 8), st.integers(0, 4))
def test_more_budget_never_costs_more(problem: Problem, budget: int, more: int) -> None:
    solver = Solver(problem)
    tight, wide = solver.best(Limits(budget)), solver.best(Limits(budget + more))
    if tight is not None:
        assert wide is not None
        assert wide.rank <= tight.rank


@FEW
@given(problems(), limits)
def test_what_is_found_stays_within_its_limits_and_rules(problem: Problem, limits: Limits) -> None:
    solver = Solver(problem)
    found = solver.best(limits)
    if found is not None:
        assert found.fits(limits)
        assert solver.refusal(found.settings) is None


@FEW
@given(problems(), limits, st.randoms())
def test_the_order_of_phases_and_rules_and_of_the_walk_decides_nothing(problem: Problem, limits: Limits, random: object) -> None:
    def shuffled(items: tuple[object, ...]) -> tuple[object, ...]:
        items = list(items)
        random.shuffle(items)
        return tuple(items)

    other = replace(problem, phases=shuffled(problem.phases), rules=shuffled(problem.rules), first=shuffled(problem.first))
    here, there = Solver(problem).best(limits), Solver(other).best(limits)
    assert (here and (here.rank, here.values, here.needed_bytes)) == (there and (there.rank, there.values, there.needed_bytes))


@FEW
@given(problems(), limits, limits)
def test_earlier_questions_do_not_change_answers(problem: Problem, earlier: Limits, limits: Limits) -> None:
    solver = Solver(problem)
    solver.best(earlier)
    solver.leanest()
    assert solver.best(limits) == Solver(problem).best(limits)


@FEW
@given(problems())
def test_bytes_needed_are_never_below_the_largest_phase(problem: Problem) -> None:
    for candidate in allowed(problem)[:8]:
        assert candidate.needed_bytes == needed_bytes(problem.phases, candidate.demands)
        assert candidate.needed_bytes >= max(demand.peak_bytes for demand in candidate.demands)
