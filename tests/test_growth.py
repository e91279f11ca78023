"""``objective="throughput"`` grows the batch while that pays, and only then."""

from __future__ import annotations

import pytest

from planner import explain
from planner.errors import NoFeasiblePlan, UsageError
from planner.growth import grow, grown
from planner.plan import Plan
from tests.golden.cases import untouched
from tests.zoo import FAMILIES


def planner_of(seconds: dict[int, float], end: type[Exception] = NoFeasiblePlan):
    """Plans whose call takes the given seconds by batch; any other batch raises."""

    def planned(batch: int) -> Plan:
        if batch not in seconds:
            raise end("no")
        plan = untouched()
        predicted = plan.predicted.model_copy(update={"latency_seconds": seconds[batch]})
        return plan.model_copy(update={"workload": plan.workload.model_copy(update={"batch_size": batch}), "predicted": predicted})

    return planned


def test_the_batch_doubles_while_a_sample_gets_faster_by_more_than_the_gain() -> None:
    plan = grown(planner_of({1: 1.0, 2: 1.2, 4: 2.0, 8: 3.9, 16: 4.0}), 1)  # 1.0, 0.6, 0.5, 0.4875 seconds a sample
    assert plan.workload.batch_size == 4
    assert "grew from 1 to 4" in plan.warnings[0]


@pytest.mark.parametrize("end", [NoFeasiblePlan, UsageError])
def test_what_does_not_fit_or_contradicts_the_inputs_ends_the_growth(end: type[Exception]) -> None:
    batch, plan = grow(planner_of({3: 1.0, 6: 1.1}, end), 3)
    assert batch == plan.workload.batch_size == 6


def test_a_batch_that_is_not_grown_is_not_talked_about() -> None:
    assert grown(planner_of({2: 1.0, 4: 2.0}), 2).warnings == untouched().warnings


def test_the_first_batch_must_be_plannable() -> None:
    with pytest.raises(NoFeasiblePlan):
        grow(planner_of({}), 1)


def test_a_launch_bound_pipeline_grows() -> None:
    pipe = FAMILIES["sd15"].build()
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2}
    larger = explain(pipe, "RTX 4090", objective="throughput", **sizes)
    alone = explain(pipe, "RTX 4090", **sizes)
    assert larger.workload.batch_size > 1
    assert larger.predicted.latency_seconds / larger.workload.batch_size < alone.predicted.latency_seconds


def test_inputs_of_another_batch_are_refused_before_anything_grows() -> None:
    with pytest.raises(UsageError):
        explain(FAMILIES["sd15"].build(), "RTX 4090", objective="throughput", inputs={"prompt": ["a", "b"]}, batch_size=3)
