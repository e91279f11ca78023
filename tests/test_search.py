"""The search on problems worked out by hand, and the space of a made-up pipeline."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planner.errors import UsageError
from planner.outcome import choose, explain_choice, frontier
from planner.search import Assignment, Axis, Demand, Limits, Phase, Problem, Rule, Solver, Stock
from planner.space import build_space
from tests.property.strategies import MIB, SMALL, world

TIMES = {("plain", "none"): (10, 0), ("fast", "none"): (7, 20), ("plain", "swap"): (16, 0), ("fast", "swap"): (13, 20)}
"""Time, and time to set up."""


def _finish(values: Assignment) -> tuple[int]:
    return (2 + (values["weights"] == "swap") + values["tile"],)


def two_phases(rules: tuple[Rule, ...] = (), calls: int | None = None) -> Problem:
    """``swap`` halves the memory of both phases and costs 6 and 1 more; ``fast`` saves 3; ``tile`` shrinks the second."""
    swap = {"none": 8, "swap": 4}
    return Problem(
        (Axis("kernel", ("plain", "fast")), Axis("weights", ("none", "swap")), Axis("tile", (False, True))),
        (
            Phase("work", ("kernel", "weights"), lambda v: Demand(swap[v["weights"]] + 1, *TIMES[v["kernel"], v["weights"]])),
            Phase("finish", ("weights", "tile"), lambda v: Demand(swap[v["weights"]] + (2 if v["tile"] else 6), *_finish(v))),
        ),
        rules,
        Stock(("weights",), lambda v: 8 if v["weights"] == "swap" else 0),
        calls,
    )


def test_only_shared_axes_are_walked_and_private_ones_decided_apart() -> None:
    solver = Solver(two_phases())
    assert solver.shared == ("weights",)
    best = solver.best()
    assert best is not None
    assert (best.settings, best.nanoseconds, best.needed_bytes) == ({"kernel": "fast", "weights": "none", "tile": False}, 9, 14)
    assert solver.visited <= 2
    assert solver.evaluations <= 8


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (14, {"kernel": "fast", "weights": "none", "tile": False}),
        (13, {"kernel": "fast", "weights": "none", "tile": True}),
        (10, {"kernel": "fast", "weights": "none", "tile": True}),
        (9, {"kernel": "fast", "weights": "swap", "tile": True}),
        (6, {"kernel": "fast", "weights": "swap", "tile": True}),
        (5, None),
    ],
)
def test_budgets(budget: int, expected: dict[str, object] | None) -> None:
    best = Solver(two_phases()).best(Limits(budget))
    assert (best and best.settings) == expected


def test_a_budget_that_only_one_phase_exceeds_is_met_in_that_phase_alone() -> None:
    best = Solver(two_phases()).best(Limits(10))
    assert best is not None
    assert best.settings == {"kernel": "fast", "weights": "none", "tile": True}
    assert best.nanoseconds == 10


def test_the_second_resource_is_a_hard_limit() -> None:
    assert Solver(two_phases()).best(Limits(9, 7)) is None
    assert Solver(two_phases()).leanest(stock_bytes=7).needed_bytes == 10
    assert Solver(two_phases()).leanest().needed_bytes == 6


def test_setting_up_is_weighed_against_the_calls() -> None:
    few, many = Solver(two_phases(calls=6)).best(), Solver(two_phases(calls=7)).best()
    assert few.settings["kernel"] == "plain"
    assert many.settings["kernel"] == "fast"


def test_a_rule_across_phases_makes_its_axes_shared() -> None:
    rule = Rule(("kernel", "tile"), lambda v: "no tiles with fast kernels" if v["kernel"] == "fast" and v["tile"] else None)
    solver = Solver(two_phases((rule,)))
    assert solver.shared == ("kernel", "weights", "tile")
    assert solver.best(Limits(10)).settings == {"kernel": "plain", "weights": "none", "tile": True}
    assert solver.refusal({"kernel": "fast", "weights": "none", "tile": True}) == (rule, "no tiles with fast kernels")


def test_ties_go_to_fewer_departures_then_to_earlier_axes() -> None:
    same = Phase("p", ("a", "b"), lambda v: Demand(0, 1 if v["a"] or v["b"] else 2))
    assert Solver(Problem((Axis("a", (0, 1)), Axis("b", (0, 1))), (same,))).best().settings == {"a": 0, "b": 1}


def test_what_one_phase_keeps_is_added_to_the_others() -> None:
    """A pool of 5 beside a phase of 6 needs 11, which does not fit into 10: the slower choice without a pool wins."""
    pool = Phase("pooled", ("graph",), lambda v: Demand(7, 1, 0, 5) if v["graph"] else Demand(7, 3))
    problem = Problem((Axis("graph", (False, True)),), (pool, Phase("other", (), lambda v: Demand(6, 1))))
    assert Solver(problem).best(Limits(11)).settings == {"graph": True}
    assert Solver(problem).best(Limits(10)).settings == {"graph": False}


def test_prices_are_shared_by_all_questions() -> None:
    solver = Solver(two_phases())
    for budget in range(20):
        solver.best(Limits(budget))
    solver.leanest()
    assert solver.evaluations <= 8


# -- the space of a pipeline ------------------------------------------------------------------------------------------


def test_candidates_of_equal_effect_are_one() -> None:
    space = build_space(*world(SMALL, 4))
    idle = {**space.baseline, "offload_stream": True}
    refusal = space.solver.refusal(idle)
    assert refusal is not None
    assert refusal[0].silent
    assert space.solver.refusal({**space.baseline, "offload": "group_leaf", "offload_stream": True}) is None


def test_with_room_for_all_the_pipeline_keeps_its_weights_on_the_device() -> None:
    space = build_space(*world(SMALL, 4, 8 << 30))
    chosen = choose(space)
    assert chosen.settings["offload"] == "none"
    assert chosen.settings["batch_split"] == 1


def test_a_tight_budget_takes_another_plan_and_says_what_would_be_faster() -> None:
    space = build_space(*world(SMALL, 4, 200 * MIB))
    chosen = choose(space)
    outcome = explain_choice(space, chosen)
    assert chosen.needed_bytes <= 200 * MIB
    assert chosen.settings["offload"] != "none"
    assert outcome.binding.startswith("memory")
    assert outcome.what_if.speedup > 1.05
    wider = space.solver.best(Limits(200 * MIB + outcome.what_if.extra_bytes))
    assert wider.cost == outcome.what_if.candidate.cost
    resident = next(item for item in outcome.rejected if item.settings == {"offload": "none"})
    assert resident.kind == "memory"
    assert resident.shortfall_bytes == space.solver.leanest({"offload": "none"}).needed_bytes - 200 * MIB


def test_when_nothing_fits_the_leanest_and_its_shortfall_are_known() -> None:
    space = build_space(*world(SMALL, 4, 20 * MIB))
    assert choose(space) is None
    outcome = explain_choice(space, None)
    assert outcome.shortfall_bytes == outcome.leanest.needed_bytes - 20 * MIB
    assert outcome.short_phase in {phase.name for phase in space.problem.phases}


def test_host_memory_is_a_hard_limit() -> None:
    context, model = world(SMALL, 4, 300 * MIB)
    free, tight = build_space(context, model), build_space(context, model, host_bytes=100 * MIB)
    assert choose(free).stock_bytes > 100 * MIB
    filed = choose(tight)
    assert filed.settings["offload_disk"] is True
    assert filed.stock_bytes <= 100 * MIB
    tight = build_space(context, model, host_bytes=100 * MIB, fix={"offload_disk": False})
    assert choose(tight) is None
    rejected = {tuple(item.settings.items()): item for item in explain_choice(tight, None).rejected}
    assert rejected[("offload", "model"),].kind == "host"


def test_what_the_user_fixed_is_kept_and_the_rest_is_searched() -> None:
    space = build_space(*world(SMALL, 4, 8 << 30), fix={"offload": "sequential", "vae_tiling": True})
    chosen = choose(space)
    assert chosen.settings["offload"] == "sequential"
    assert chosen.settings["vae_tiling"] is True


def test_a_fixed_option_counts_where_it_has_an_effect() -> None:
    space = build_space(*world(SMALL, 4, 200 * MIB), fix={"offload_stream": True})
    solver = space.solver
    grouped = solver.best(Limits(), {"offload": "group_leaf"})
    assert grouped.settings["offload_stream"] is True
    assert solver.best(Limits(), {"offload": "model"}).settings["offload_stream"] is False


def test_a_fixed_value_that_a_rule_refuses_is_an_error_with_the_reason() -> None:
    with pytest.raises(UsageError, match="does not split into 3"):
        build_space(*world(SMALL, 4), fix={"batch_split": 3})
    with pytest.raises(UsageError, match="group_leaf"):
        build_space(*world(SMALL, 4), fix={"compile": "default", "offload": "group_leaf"})


def test_excluded_values_and_higher_quality_levels_are_left_out_with_a_reason() -> None:
    space = build_space(*world(SMALL, 4, quality="exact"), excluded={"vae_slicing": {True: "it did not hold"}})
    assert space.problem.values("dtype") == ("fp16",)
    assert space.problem.values("vae_slicing") == (False,)
    reasons = {(name, value): reason for name, value, reason in space.left_out}
    assert 'needs quality="lossless"' in reasons["dtype", "bf16"]
    assert "did not hold" in reasons["vae_slicing", True]


def test_the_memory_objective_takes_the_leanest_plan() -> None:
    space = build_space(*world(SMALL, 4, 8 << 30))
    assert choose(space, "memory").needed_bytes == space.solver.leanest().needed_bytes


def test_a_split_must_win_by_more_than_the_uncertainty() -> None:
    space = build_space(*world(SMALL, 4, 510 * MIB))
    split, whole = space.solver.best(space.limits), space.solver.best(space.limits, {"batch_split": 1})
    assert split.settings["batch_split"] > 1
    gain = whole.cost / split.cost - 1
    assert choose(space, split_margin=gain * 1.01).settings["batch_split"] == 1
    assert choose(space, margin=0.0, split_margin=gain * 0.99).settings["batch_split"] > 1


def test_the_frontier_goes_down_in_memory_and_up_in_time() -> None:
    points = frontier(build_space(*world(SMALL, 4, 200 * MIB)))
    assert len(points) > 3
    assert all(before.needed_bytes > after.needed_bytes and before.cost < after.cost for before, after in pairwise(points))


def test_recorded_cases_price_few_phases() -> None:
    """Of 259 200 candidates on paper. A rise means that a bound has become weaker."""
    evaluated = {}
    for budget in (8192, 200, 20):
        space = build_space(*world(SMALL, 4, budget * MIB))
        space.solver.best(space.limits)
        evaluated[budget] = space.solver.evaluations
    assert space.problem.size == 259_200
    assert all(count <= 372 for count in evaluated.values()), evaluated
