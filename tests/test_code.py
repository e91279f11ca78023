"""The emitted diffusers code, executed: same settings and bit-identical output as the plan itself, on real small pipelines."""

from __future__ import annotations

import ast
import random
from typing import Any

import numpy as np
import pytest

from planner.batching import samples_in
from planner.dryrun.facts import read_facts
from planner.errors import ApplyError
from planner.explain.code import render
from planner.facts import PipelineFacts
from planner.force import in_force
from planner.knobs import KNOBS, Context, defaults, normalize, violations
from planner.plan import Plan
from planner.snapshot import read_switches, write_switches
from planner.types import Device, KnobValue, Workload
from tests.zoo import FAMILIES, PROMPT, as_array, seeded

from .golden.cases import estimate

CPU = Device(
    name="cpu", kind="cpu", architecture="any", total_bytes=1 << 34, basis="assumed", flops_per_second={"fp32": 1e11},
    bandwidth_bytes_per_second=1e10,
)  # fmt: skip
TRIED = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma", "aura_flow", "wan21_t2v", "kandinsky22")
NOT_COMPARED = {
    "unclip": "its call takes no number of steps, which every workload here names",
}
LEFT_OUT = ("compile", "channels_last", "quantization")
SAMPLES = 5
"""Random combinations of each of these; every other family that can be compared gets one."""


def context(facts: PipelineFacts, batch: int) -> Context:
    workload = Workload(batch_size=batch, num_inference_steps=2)
    return Context(facts=facts, device=CPU, workload=workload, quality="lossy", usable={"torchao": None})


def plan_with(facts: PipelineFacts, settings: dict[str, KnobValue], batch: int) -> Plan:
    where = context(facts, batch)
    return Plan(model="zoo", pipeline_class=facts.class_name, digest="0" * 64, workload=where.workload, device=CPU, quality="lossy",
                settings=normalize(settings, where), baseline=defaults(where), predicted=estimate(1, 1))  # fmt: skip


def combinations(facts: PipelineFacts, batch: int, seed: str, wanted: int = SAMPLES) -> list[dict[str, KnobValue]]:
    """Random settings that no rule forbids. Compilers take minutes each; the others left out have tests of their own below."""
    where, chance = context(facts, batch), random.Random(seed)
    choices = {each.name: each.values(where) for each in KNOBS if each.name not in LEFT_OUT}
    found: list[dict[str, KnobValue]] = []
    while len(found) < wanted:
        settings = {name: chance.choice(values) for name, values in choices.items() if chance.random() < 0.5}
        if not violations(settings, where):
            found.append(settings)
    return found


def state(pipe: Any) -> Any:
    facts = read_facts(pipe)
    return facts, [type(part).__name__ for part in pipe.components.values()], dict(getattr(pipe, "scheduler", pipe).config)


def inputs_of(family: str, pipe: Any, batch: int) -> dict[str, Any]:
    """The family's own call, without what the plan says: steps and the number of samples."""
    given = FAMILIES[family].inputs(pipe)
    if read_facts(pipe).batch_argument is None and "prompt" in given:
        given["prompt"] = [PROMPT] * batch
    return {name: value for name, value in given.items() if name not in ("num_inference_steps", "num_images_per_prompt")}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRIED)
def test_code_does_what_the_plan_does(family: str) -> None:
    facts = read_facts(FAMILIES[family].build())
    for settings in combinations(facts, 2, family):
        assert assert_same(family, facts, settings, 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {*TRIED, *NOT_COMPARED}))
def test_code_does_what_the_plan_does_in_every_family(family: str) -> None:
    """One sample, and the first of four combinations that the pipeline's own code runs with: the dry run refuses the others."""
    pipe = FAMILIES[family].build()
    facts, batch = read_facts(pipe), samples_in(FAMILIES[family].inputs(pipe)) or 1  # a plan cuts what is more than it was made for
    assert any(assert_same(family, facts, settings, batch) for settings in combinations(facts, batch, family, 4))


def test_code_of_channels_last_does_what_the_plan_does() -> None:
    assert assert_same("sd15", read_facts(FAMILIES["sd15"].build()), {"channels_last": True}, 2)


def test_code_of_dtype_does_what_the_plan_does_to_rotary_buffers() -> None:
    assert assert_same("qwen_image", read_facts(FAMILIES["qwen_image"].build()), {"dtype": "bf16"}, 2)


def test_code_of_quantization_does_what_the_plan_does() -> None:
    assert assert_same("wan21_t2v", read_facts(FAMILIES["wan21_t2v"].build()), {"quantization": "transformer=fp8wo"}, 2)


def assert_same(family: str, facts: PipelineFacts, settings: dict[str, KnobValue], batch: int) -> bool:
    """The plan on one pipeline, the code on another of the same weights: same state, same output to the last bit.

    False where the pipeline does not run with these settings; then it must not run with the code either.
    """
    plan = plan_with(facts, settings, batch)
    code = render(plan, facts)
    ours, theirs = FAMILIES[family].build(), FAMILIES[family].build()
    names: dict[str, Any] = {"pipe": theirs}
    switches = read_switches()  # plain code has no way back: tf32 is for the whole process, and so is set_attention_backend's default
    try:
        exec(compile(code, "emitted", "exec"), names)
        after_code = read_switches()
        write_switches(switches)
        plan.apply(ours)
        assert read_switches() | {"attention_backend": None} == after_code | {"attention_backend": None}, code
        assert state(theirs) == state(ours), code
        try:
            with seeded():
                expected = plan.run(ours, **inputs_of(family, ours, batch), **_steps(plan))
        except (RuntimeError, TypeError, ValueError) as error:
            with seeded(), pytest.raises(type(error)):
                names["generate"](**inputs_of(family, theirs, batch))
            return False
        with seeded():
            got = names["generate"](**inputs_of(family, theirs, batch))
        first = getattr(expected, FAMILIES[family].output)
        second = got if isinstance(got, list) else getattr(got, FAMILIES[family].output)
        assert np.array_equal(as_array(first), as_array(second)), code
        return True
    finally:
        if in_force(ours) is not None:
            plan.undo(ours)
        write_switches(switches)


def _steps(plan: Plan) -> dict[str, Any]:
    """What the steps knob asks of the call."""
    return {"num_inference_steps": plan.settings["steps"]} if plan.settings.get("steps") else {}


def test_code_of_a_split_batch_is_a_loop() -> None:
    facts = read_facts(FAMILIES["sd15"].build())
    code = render(plan_with(facts, {"batch_split": 4, "vae_tiling": True}, 8), facts)
    tree = ast.parse(code)
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["generate"]
    assert any(isinstance(node, ast.For) for node in ast.walk(tree))
    assert '"num_images_per_prompt": 2' in code
    assert "pipe.vae.enable_tiling()" in code or "pipe.enable_vae_tiling()" in code
    assert "planner" not in code


def test_code_without_changes_changes_nothing() -> None:
    facts = read_facts(FAMILIES["sd15"].build())
    code = render(plan_with(facts, {}, 1), facts)
    statements = [node for node in ast.parse(code).body if not isinstance(node, ast.FunctionDef)]
    assert [ast.unparse(node) for node in statements] in ([], ["pipe.to('cpu')"])


def test_code_of_a_lost_live_pipeline_says_what_to_do() -> None:
    facts = read_facts(FAMILIES["sd15"].build())
    with pytest.raises(ApplyError, match=r"plan for its folder"):
        plan_with(facts, {}, 1).to_python()
