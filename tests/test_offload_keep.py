"""Components that stay on the device while the rest is offloaded: weights there and copies, predicted against real hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from planner.apply import apply_settings
from planner.cost.residency import Residency, residency
from planner.dryrun.facts import read_facts
from planner.dryrun.run import DryRun
from planner.dryrun.trace import PipelineTrace
from planner.facts import PipelineFacts
from planner.outcome import choose
from planner.recipe import Recipe
from planner.space import build_space
from planner.types import KnobValue, Workload
from tests import sim
from tests.property.strategies import MIB, SMALL, world
from tests.test_residency import peaks
from tests.zoo import FAMILIES, Case

BLOCK_BYTES = 512
"""The simulated accelerator gives whole blocks, the facts count bytes."""
KEPT = (("sd15", "text_encoder"), ("sdxl", "text_encoder_2,vae"), ("flux", "text_encoder_2"), ("wan22_t2v", "vae"))


@cache
def known(family: str) -> tuple[PipelineFacts, PipelineTrace]:
    case = FAMILIES[family]
    pipe = case.build()
    return read_facts(pipe), DryRun(pipe, Workload(), case.inputs(pipe)).trace()


@cache
def tensors_of(family: str, name: str) -> int:
    module = getattr(FAMILIES[family].build(), name)
    return len([*module.parameters(), *module.buffers()])


def second_call(case: Case, pipe: Any, memory: Any) -> tuple[tuple[int, int], list[Any]]:
    """Weight bytes that the second of two calls copies to and from the device, and its phases."""
    with sim.phases(pipe):
        case.run(pipe)
    before = memory.weight_h2d_bytes, memory.weight_d2h_bytes
    with sim.phases(pipe) as phases:
        case.run(pipe)
    return (memory.weight_h2d_bytes - before[0], memory.weight_d2h_bytes - before[1]), phases


def ran(family: str, settings: dict[str, KnobValue]) -> tuple[int, int, dict[str, int]]:
    """Weight bytes copied to and from the device in a second call, and the most there while each component runs."""
    case = FAMILIES[family]
    pipe = case.build()
    with sim.active() as memory:
        applied = apply_settings(pipe, settings, sim.load(), known(family)[0])
        copied, phases = second_call(case, pipe, memory)
        applied.undo()
    most: dict[str, int] = {}
    for phase in phases:
        most[phase.component] = max(most.get(phase.component, 0), phase.peak_weight_bytes)
    return *copied, most


def placed(family: str, recipe: Recipe) -> Residency:
    return residency(*known(family), recipe)


@pytest.mark.parametrize(("family", "kept"), KEPT)
@pytest.mark.parametrize("offload", ["sequential", "group_leaf", "group_block"])
def test_what_is_kept_is_there_all_the_time_and_never_copied(family: str, kept: str, offload: Any) -> None:
    facts, trace = known(family)
    recipe = Recipe(offload=offload, resident=frozenset(kept.split(",")))
    expected, otherwise = placed(family, recipe), placed(family, recipe.but(resident=frozenset()))
    loaded, returned, most = ran(family, {"offload": offload, "offload_keep": kept})
    assert sum(expected.onload_bytes) == pytest.approx(loaded, rel=0.01)
    assert sum(expected.offload_bytes) == pytest.approx(returned, rel=0.01)
    assert sum(expected.onload_bytes) < sum(otherwise.onload_bytes)
    tensors = {part.name: BLOCK_BYTES * tensors_of(family, part.name) for part in facts.components}
    for name, size in peaks(expected, trace).items():
        assert most[name] >= sum(facts.component(each).weight_bytes for each in recipe.resident)
        assert size <= most[name] * 1.001
        assert most[name] - size <= 0.01 * size + tensors[name] + sum(tensors[each] for each in recipe.resident)


@pytest.mark.parametrize(("family", "kept"), KEPT)
def test_under_model_offload_what_is_excluded_is_copied_all_the_same(family: str, kept: str) -> None:
    """The rule that forbids it: excluded from the chain by hand, as much is copied, and more stays on the device."""
    plain = ran(family, {"offload": "model"})
    case = FAMILIES[family]
    pipe = case.build()
    names = kept.split(",")
    pipe.model_cpu_offload_seq = "->".join(name for name in pipe.model_cpu_offload_seq.split("->") if name not in names)
    pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, *names]
    with sim.active() as memory:
        pipe.enable_model_cpu_offload(device="sim")
        copied, phases = second_call(case, pipe, memory)
    assert copied[0] >= plain[0]
    assert copied[1] >= plain[1]
    assert max(phase.peak_weight_bytes for phase in phases) >= max(plain[2].values())


def test_encoders_are_kept_where_there_is_room_for_them_only() -> None:
    chosen = {}
    for budget in (220, 700):
        space = build_space(*world(SMALL, 4, budget * MIB), fix={"offload": "sequential"})
        plan = choose(space, margin=0.0)
        assert plan is not None
        chosen[budget] = plan.settings["offload_keep"]
        assert plan.needed_bytes <= budget * MIB
    assert chosen == {220: "vae", 700: "text_encoder,vae"}
