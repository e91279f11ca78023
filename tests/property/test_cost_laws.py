"""Laws of the cost model and of the chosen plan, on made-up pipelines."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.model import localized
from planner.knobs import KNOBS
from planner.outcome import MARGIN, choose
from planner.recipe import Recipe
from planner.search import Value
from planner.space import Space, build_space
from tests.property.strategies import MIB, SMALL, Part, pipelines, world

seeds = st.integers(0, 1 << 32).map(Random)
FEW = settings(max_examples=25, deadline=None)
recipes = st.builds(
    Recipe,
    dtype=st.sampled_from(("fp32", "fp16", "bf16")),
    attention=st.sampled_from(("default", "vanilla", "sliced")),
    vae_slicing=st.booleans(),
    vae_tiling=st.booleans(),
    vae_tile_pixels=st.sampled_from((None, 256)),
    offload=st.sampled_from(("none", "model", "sequential", "group_block", "group_leaf")),
    offload_stream=st.booleans(),
    fusion=st.sampled_from(("none", "whole", "regional")),
    cuda_graphs=st.booleans(),
    channels_last=st.booleans(),
)


@FEW
@given(pipelines(), recipes, st.integers(1, 4), st.integers(1, 4))
def test_a_larger_batch_never_needs_less_memory(parts: tuple[Part, ...], recipe: Recipe, batch: int, more: int) -> None:
    small, large = (world(parts, size)[1].cost(recipe).needed_bytes for size in (batch, batch + more))
    assert large >= small


@FEW
@given(pipelines(), recipes, st.integers(1, 4))
def test_the_peak_of_a_pipeline_is_the_largest_of_its_phases(parts: tuple[Part, ...], recipe: Recipe, batch: int) -> None:
    cost = world(parts, batch)[1].cost(recipe)
    assert cost.peak_bytes == max([phase.peak_bytes for phase in cost.phases] + [cost.glue_peak_bytes]) + cost.blas_bytes
    assert cost.needed_bytes >= cost.peak_bytes


@FEW
@given(pipelines(), st.integers(1, 4), st.integers(1, 3000), st.integers(0, 3000))
def test_more_budget_never_makes_the_chosen_plan_slower(parts: tuple[Part, ...], batch: int, budget: int, more: int) -> None:
    tight, wide = (_chosen(parts, batch, size * MIB) for size in (budget, budget + more))
    if tight is not None:
        assert wide is not None
        assert wide.cost <= tight.cost * (1 + MARGIN) * (1 + 0.1 * (tight.settings["batch_split"] != 1))


def _chosen(parts: tuple[Part, ...], batch: int, budget: int):
    return choose(build_space(*world(parts, batch, budget)), split_margin=0.1)


@FEW
@given(pipelines(), st.integers(1, 4), st.integers(1, 3000))
def test_the_chosen_plan_stays_within_its_budget_as_the_cost_model_prices_it(parts: tuple[Part, ...], batch: int, budget: int) -> None:
    space = build_space(*world(parts, batch, budget * MIB))
    chosen = choose(space)
    if chosen is not None:
        cost = space.model.cost(space.recipe(chosen.settings))
        assert cost.needed_bytes == chosen.needed_bytes <= budget * MIB
        assert cost.host_bytes == chosen.stock_bytes
        assert cost.seconds == pytest.approx(chosen.nanoseconds / 1e9, abs=1e-8)
        assert cost.setup_seconds == pytest.approx(chosen.setup_nanoseconds / 1e9, abs=1e-8)


@FEW
@given(pipelines(), st.integers(1, 4), st.integers(1, 2000), st.sampled_from((None, 1, 50)), seeds)
def test_no_candidate_of_the_space_beats_the_search(
    parts: tuple[Part, ...], batch: int, budget: int, calls: int | None, random: Random
) -> None:
    space = build_space(*world(parts, batch, budget * MIB), calls=calls)
    best = space.solver.best(space.limits)
    for _ in range(60):
        candidate = {axis.name: random.choice(axis.values) for axis in space.problem.axes}
        if space.solver.refusal(candidate) is None:
            priced = space.solver.evaluate(candidate)
            assert not priced.fits(space.limits) or (best is not None and best.rank <= priced.rank)


@FEW
@given(pipelines(), st.integers(1, 3), st.sampled_from((None, 3)), seeds)
def test_bounds_of_a_phase_never_exceed_its_price(parts: tuple[Part, ...], batch: int, calls: int | None, random: Random) -> None:
    space = build_space(*world(parts, batch), calls=calls)
    problem = space.problem
    for _ in range(20):
        full = _allowed(space, random)
        partial = {name: value for name, value in full.items() if random.random() < 0.8}
        for phase in problem.phases:
            if phase.floor is not None:
                floor, price = phase.floor(partial), phase.price(full)
                assert floor.peak_bytes <= price.peak_bytes
                assert problem.cost(floor) <= problem.cost(price)


def _allowed(space: Space, random: Random) -> dict[str, Value]:
    """Bounds hold for what the rules allow."""
    while True:
        full = {axis.name: random.choice(axis.values) for axis in space.problem.axes}
        if space.solver.refusal(full) is None:
            return full


@FEW
@given(pipelines(), st.integers(1, 3), seeds)
def test_knobs_without_a_credited_gain_never_win(parts: tuple[Part, ...], batch: int, random: Random) -> None:
    """So the search need not try them."""
    space = build_space(*world(parts, batch))
    for each in KNOBS:
        if not each.credited:
            assert space.problem.values(each.name) == (each.values(space.context)[0],)
            settings = _allowed(space, random)
            plain = space.model.cost(space.recipe(settings))
            for value in CREDITED_NOTHING[each.name]:
                other = space.model.cost(space.recipe({**settings, each.name: value}))
                assert other.needed_bytes >= plain.needed_bytes
                assert other.seconds >= plain.seconds
                assert other.setup_seconds >= plain.setup_seconds


CREDITED_NOTHING = {"fuse_qkv": (True,), "cudnn_benchmark": (True,), "cache": ("first_block", "pab", "taylorseer")}


@FEW
@given(pipelines(), st.integers(1, 3), seeds)
def test_an_axis_that_a_phase_does_not_name_does_not_change_it(parts: tuple[Part, ...], batch: int, random: Random) -> None:
    """The whole model's price of a recipe is the phases' price, whatever the other axes say: dependences are complete."""
    space = build_space(*world(parts, batch))
    for _ in range(15):
        candidate = {axis.name: random.choice(axis.values) for axis in space.problem.axes}
        priced = space.solver.evaluate(candidate)
        cost = space.model.cost(space.recipe(candidate))
        assert priced.needed_bytes == cost.needed_bytes
        assert priced.nanoseconds / 1e9 == pytest.approx(cost.seconds, abs=1e-8)


def test_estimates_do_not_depend_on_the_order_of_settings() -> None:
    space = build_space(*world(SMALL, 4))
    wanted = {**space.baseline, "offload": "model", "vae_tiling": True, "batch_split": 2, "dtype": "bf16"}
    turned = dict(reversed(wanted.items()))
    assert space.recipe(wanted) == space.recipe(turned)
    assert space.solver.evaluate(wanted) == space.solver.evaluate(turned)


def test_a_text_encoder_is_reached_by_no_knob_of_the_denoiser() -> None:
    everything = Recipe(attention="vanilla", channels_last=True, fusion="whole", cuda_graphs=True, autotuned=True, fused_qkv=True,
                        cudnn_benchmark=True, chunked_forward=True)  # fmt: skip
    assert localized(everything, "text_encoder", "t") == localized(Recipe(), "text_encoder", "t")
