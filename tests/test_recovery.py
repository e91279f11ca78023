"""Plans that meet trouble on the simulated accelerator: recovered from, or taken back to the bit with a clear error."""

from __future__ import annotations

import functools
import gc
import logging
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from planner import Plan, autoplan
from planner.autoplan import Request
from planner.calibrate import calibration_for
from planner.calls import call_split, parts_for
from planner.cost.model import CostModel
from planner.decide import settings_estimate
from planner.dryrun.provider import Traces
from planner.errors import ApplyError, NoFeasiblePlan, PlannerError, VerificationError
from planner.force import MAX_RECOVERIES, in_force, is_out_of_memory, release
from planner.knobs import knob
from planner.models import resolve
from planner.progress import to_stderr
from planner.reference import Reference
from planner.session import Session
from planner.snapshot import Snapshot
from planner.types import Device, KnobValue, Workload
from planner.verify import OUTPUT_TOLERANCE, check, check_seconds, samples
from tests import sim as simulator
from tests.zoo import FAMILIES, prepared

KIB = 1 << 10
SEED = int(os.environ.get("PLANNER_FAULT_SEED", "20261120"))
SCHEDULES = int(os.environ.get("PLANNER_FAULT_SCHEDULES", "120"))
"""Random fault schedules per run of the tests; set 1000 for the full check (about a quarter of a second each on a quiet machine)."""
SCHEDULED = ("dit", "flux", "pixart_alpha")


def device(budget_bytes: int | None, **changes: Any) -> Device:
    described: dict[str, Any] = {
        "name": "simulated", "kind": "sim", "architecture": "sim", "total_bytes": 1 << 30, "free_bytes": 1 << 30,
        "budget_bytes": budget_bytes, "host_free_bytes": 1 << 33,
        "flops_per_second": {"fp32": 1e12, "fp16": 4e12, "bf16": 4e12}, "bandwidth_bytes_per_second": 1e11,
        "link_bytes_per_second": 1e10, "basis": "assumed",
    }  # fmt: skip
    return Device.model_validate(described | changes)


@functools.cache
def traces(family: str) -> tuple[Any, Traces]:
    pipe, inputs, _ = prepared(family)
    source = resolve(pipe)
    return source, Traces.of(source, Workload(), inputs)


def session(family: str, budget_bytes: int | None, **options: Any) -> Session:
    """What autoplan builds before it decides, with traces shared between tests."""
    source, known = traces(family)
    where = device(budget_bytes)
    calibration = calibration_for(where, mode="never")
    model = CostModel(known, where, calibration.coefficients, known.workload.batch_size)
    return Session(source, known, model, Request(**options), calibration, dict(prepared(family)[1]))


class Untouched:
    """The pipeline before, to be compared with the pipeline after."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.pipe = prepared(family)[0]
        self.before = Snapshot.of(self.pipe, checksums=True)

    def assert_holds(self, *, run: bool = True) -> None:
        assert in_force(self.pipe) is None
        assert self.before.differences(self.pipe) == []
        if run:
            assert np.array_equal(FAMILIES[self.family].run(self.pipe), prepared(self.family)[2])


@pytest.fixture
def family() -> Any:
    """Flux, small; whatever a test leaves in force is taken back."""
    yield "flux"
    pipe = prepared("flux")[0]
    current = in_force(pipe)
    if current is not None:
        current.asked.undo(pipe)


def planned(family: str, budget_bytes: int | None, *, free_bytes: int = 1 << 30, **options: Any) -> Plan:
    pipe, inputs, _ = prepared(family)
    simulator.memory.total_bytes = free_bytes
    return autoplan(pipe, inputs=inputs, device=device(None), memory_budget=budget_bytes, calibrate="never", **options)


# -- out of memory ----------------------------------------------------------------------------------------------------


def test_the_sim_device_is_detected_by_its_own_counters(sim: Any, family: str) -> None:
    pipe, inputs, _ = prepared(family)
    sim.memory.total_bytes = 64 << 20
    plan = autoplan(pipe, inputs=inputs, device=torch.device("sim"), calibrate="never", apply=False)
    assert (plan.device.kind, plan.device.total_bytes, plan.device.free_bytes) == ("sim", 64 << 20, 64 << 20)
    assert plan.device.budget_bytes == (64 << 20) - int((64 << 20) * 0.02)


def test_memory_that_is_not_there_while_applying_is_recovered_from(sim: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    """The budget says 1 GiB, the device has 900 KiB: the weights alone (1290 KiB) do not move there."""
    untouched = Untouched(family)
    with caplog.at_level(logging.WARNING):
        plan = planned(family, None, free_bytes=900 * KIB, verify=True)
    assert plan.settings["offload"] != "none" or plan.settings["dtype"] != "fp32"
    assert plan.measured is not None
    assert plan.measured.peak_allocated_bytes is not None
    assert plan.measured.peak_allocated_bytes <= 900 * KIB
    assert any("out of memory" in warning for warning in plan.warnings)
    assert any("out of memory" in record.message and "\n" not in record.message for record in caplog.records)
    plan.undo(untouched.pipe)
    untouched.assert_holds()


def test_running_out_while_checking_takes_a_plan_that_needs_less(sim: Any, family: str) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    first = session(family, 1 << 30).decide()
    asked = first.predicted.peak_allocated_bytes
    weights = sum(t.numel() * 4 for part in untouched.pipe.components.values() if hasattr(part, "parameters") for t in part.parameters())
    sim.memory.total_bytes = weights + 60 * KIB  # the weights fit, the call does not
    plan = autoplan(untouched.pipe, inputs=inputs, device=device(None), memory_budget=1 << 30, calibrate="never")
    assert plan.predicted.peak_allocated_bytes < asked
    assert plan.measured is not None
    assert plan.device.budget_bytes is not None
    assert plan.device.budget_bytes <= sim.memory.total_bytes
    plan.undo(untouched.pipe)
    untouched.assert_holds()


def test_running_out_later_is_recovered_from_and_told(sim: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30)
    assert plan.changes == {}
    sim.memory.other_process_bytes = sim.memory.total_bytes - 1000 * KIB
    assert any("can be had now" in line for line in plan.changes_since(untouched.pipe))
    with caplog.at_level(logging.WARNING):
        output = plan.run(untouched.pipe, **inputs)
    assert np.isfinite(output.images).all()
    assert "can be had now; plan.replan(pipe, ...) makes a plan for it" in caplog.records[0].message, "warned before anything failed"
    current = in_force(untouched.pipe)
    assert current is not None
    assert current.plan.predicted.peak_allocated_bytes <= 1000 * KIB
    told = [record.message for record in caplog.records if record.message.startswith("out of memory")]
    assert len(told) == 1
    plan.run(untouched.pipe, **inputs)  # the plan that took its place stays
    plan.undo(untouched.pipe)
    untouched.assert_holds()


def test_a_plan_from_a_file_recovers_too(sim: Any, family: str) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30)
    plan.undo(untouched.pipe)
    again = Plan.from_json(plan.to_json())
    sim.memory.other_process_bytes = sim.memory.total_bytes - 1000 * KIB
    output = again.run(untouched.pipe, **inputs)
    assert np.isfinite(output.images).all()
    again.undo(untouched.pipe)
    untouched.assert_holds()


def test_when_nothing_fits_the_error_says_so_and_nothing_is_left_behind(sim: Any, family: str) -> None:
    untouched = Untouched(family)
    with pytest.raises(NoFeasiblePlan, match="out of memory") as caught:
        planned(family, 1 << 30, free_bytes=20 * KIB)
    assert caught.value.leanest is not None
    assert caught.value.shortfall_bytes is not None
    assert caught.value.shortfall_bytes > 0
    untouched.assert_holds()
    release(caught.value)
    gc.collect()
    assert sim.memory.used_bytes < 20 * KIB


def test_later_when_nothing_fits_the_pipeline_comes_back(sim: Any, family: str) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30)
    sim.memory.other_process_bytes = sim.memory.total_bytes - 20 * KIB
    with pytest.raises(NoFeasiblePlan, match="out of memory"):
        plan.run(untouched.pipe, **inputs)
    untouched.assert_holds()


def test_plans_are_replaced_a_bounded_number_of_times(sim: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that is out of memory whatever is done: it comes back after as many plans as are promised, while others are left."""
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30)
    tried: list[dict[str, KnobValue]] = []

    def full(given: Plan, *_: Any, **__: Any) -> Any:
        tried.append(given.settings)
        raise simulator.out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr("planner.calls.call_split", full)
        with pytest.raises(NoFeasiblePlan, match=rf"{MAX_RECOVERIES + 1} plans were tried"):
            plan.run(untouched.pipe, **inputs)
    assert len(tried) == MAX_RECOVERIES + 1
    assert len({str(settings) for settings in tried}) == len(tried), "none is tried twice"
    untouched.assert_holds()


def test_what_was_seen_when_memory_ran_out_is_kept(sim: Any, family: str, tmp_path: Path) -> None:
    from planner.calibrate import Calibration, device_key
    from planner.calibrate.store import Store
    from planner.force import Evidence

    one, store = session(family, 4 << 20), Store(tmp_path)
    plan = one.decide()
    key = device_key(plan.device)
    one.calibration = Calibration(one.calibration.coefficients, {}, "assumed", (), key, store)
    one.after_out_of_memory(plan, Evidence(peak_bytes=plan.predicted.peak_allocated_bytes // 2, available_bytes=4 << 20))
    assert store.load(key).observations == (), "less than predicted teaches nothing: the run ended early"
    one.after_out_of_memory(plan, Evidence(peak_bytes=plan.predicted.peak_allocated_bytes * 2, available_bytes=4 << 20))
    (kept,) = Store(tmp_path).load(key).observations
    assert kept.memory_ratio is not None
    assert kept.memory_ratio > 1
    assert kept.time_ratio is None


def test_an_underestimate_corrects_the_model_and_a_neighbour_does_not(sim: Any, family: str) -> None:
    """2 MiB were allocated where 1 was predicted: activations scale; memory taken by others only lowers the budget."""
    from planner.force import Evidence

    one = session(family, 4 << 20)
    plan = one.decide()
    one.after_out_of_memory(plan, Evidence(peak_bytes=plan.predicted.peak_allocated_bytes // 2, available_bytes=900 * KIB))
    assert one.model.memory_scale == 1.0
    assert one.model.device.budget_bytes == 900 * KIB
    other = session(family, 4 << 20)
    plan = other.decide()
    phase = max(plan.predicted.phases, key=lambda each: each.peak_allocated_bytes)
    moving = plan.predicted.peak_allocated_bytes - phase.weights_bytes
    other.after_out_of_memory(plan, Evidence(peak_bytes=phase.weights_bytes + 2 * moving, available_bytes=4 << 20))
    assert other.model.memory_scale == pytest.approx(2.0)
    assert other.model.device.budget_bytes == 4 << 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    wrapped = ApplyError("offload=none could not be applied")
    wrapped.__cause__ = error
    assert is_out_of_memory(error) is expected
    assert is_out_of_memory(wrapped) is expected


def test_the_check_keeps_all_counters_of_the_device(sim: Any, family: str) -> None:
    plan = planned(family, 1 << 30)
    sim.memory.other_process_bytes = 4096
    seen = plan.measured
    assert seen is not None
    assert plan.predicted.peak_reserved_bytes >= plan.predicted.peak_allocated_bytes > 0
    assert None not in (seen.peak_allocated_bytes, seen.peak_reserved_bytes, seen.device_used_bytes, seen.step_seconds)
    assert seen.peak_allocated_bytes <= seen.peak_reserved_bytes <= seen.device_used_bytes <= sim.memory.total_bytes  # type: ignore[operator]
    assert seen.latency_seconds > seen.step_seconds > 0  # type: ignore[operator]
    plan.undo(prepared(family)[0])


# -- what changes after planning --------------------------------------------------------------------------------------


def test_changed_inputs_and_components_are_noticed_once(sim: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30)
    assert plan.changes_since(untouched.pipe, **inputs) == []
    two = "the plan was made for a batch of 1, this call asks for 2"
    assert plan.changes_since(untouched.pipe, **inputs | {"num_images_per_prompt": 2}) == [two]
    assert plan.changes_since(untouched.pipe, **inputs | {"height": 64}) == ["the plan was made for height=32, this call asks for 64"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(plan.run(untouched.pipe, **inputs | {"prompt": ["a", "b"]}).images) == 2
    assert [record.message for record in caplog.records].count(f"{two}; plan.replan(pipe, ...) makes a plan for it") == 1
    untouched.pipe.transformer.proj_out.lora_A = torch.nn.Linear(2, 2)
    try:
        assert plan.changes_since(untouched.pipe, **inputs) == ["transformer changed after the plan was applied (a LoRA or adapter?)"]
        sim.memory.other_process_bytes = sim.memory.total_bytes - 20 * KIB
        for again in (plan.replan, plan.run):
            with pytest.raises(ApplyError, match=r"transformer changed after .* which going back would lose. Unload it"):
                again(untouched.pipe, **inputs)
        sim.memory.other_process_bytes = 0
        assert in_force(untouched.pipe) is not None
        assert untouched.pipe.transformer.proj_out.lora_A is not None
    finally:
        del untouched.pipe.transformer.proj_out.lora_A
    plan.undo(untouched.pipe)
    untouched.assert_holds()


def test_a_component_changed_before_applying_is_noticed(sim: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe, inputs, _ = prepared(family)
    plan = planned(family, 1 << 30, apply=False)
    assert plan.changes_since(pipe, **inputs) == []
    pipe.transformer.proj_out.lora_A = torch.nn.Linear(2, 2)
    try:
        assert len(plan.changes_since(pipe, **inputs)) == 1
        with caplog.at_level(logging.WARNING):
            assert np.isfinite(plan.run(pipe, **inputs).images).all()
        assert "is not as it was when the plan was made (a LoRA" in caplog.text
        new = plan.replan(pipe, **inputs)
        assert new.changes_since(pipe, **inputs) == []
        new.undo(pipe)
        assert pipe.transformer.proj_out.lora_A is not None
    finally:
        del pipe.transformer.proj_out.lora_A


def test_undo_says_that_it_takes_away_what_was_loaded_meanwhile(sim: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    untouched = Untouched(family)
    plan = planned(family, 1 << 30, verify=False)
    untouched.pipe.transformer.proj_out.lora_A = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        plan.undo(untouched.pipe)
    assert "transformer changed after the plan was applied (a LoRA or adapter?): undo takes that away" in caplog.text
    untouched.assert_holds()


def test_replan_keeps_the_wishes_and_takes_the_place_of_the_old_plan(sim: Any, family: str) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]
    plan = planned(family, 1 << 30, fix={"dtype": "fp32"})
    new = plan.replan(untouched.pipe, **inputs | {"num_images_per_prompt": 2})
    assert new.workload.batch_size == 2
    assert new.settings["dtype"] == "fp32"
    current = in_force(untouched.pipe)
    assert current is not None
    assert current.plan == new
    with pytest.raises(ApplyError, match="another plan is in force"):
        plan.run(untouched.pipe, **inputs)
    new.undo(untouched.pipe)
    untouched.assert_holds()


@pytest.mark.parametrize(("batch", "largest", "parts"), [(4, 2, 2), (6, 4, 2), (5, 2, 5), (3, 8, 1), (1, 1, 1)])
def test_a_changed_batch_is_cut_into_calls_no_larger_than_planned(batch: int, largest: int, parts: int) -> None:
    assert parts_for(batch, largest) == parts


def test_a_pipeline_that_nobody_uses_any_more_goes_with_its_plan(sim: Any) -> None:
    import weakref

    pipe = FAMILIES["flux"].build()
    inputs = FAMILIES["flux"].inputs(pipe)
    inputs.pop("generator")
    autoplan(pipe, inputs=inputs, device=device(None), memory_budget=1 << 30, calibrate="never", verify=False)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


# -- output and speed -------------------------------------------------------------------------------------------------


def sixteen_bit(module: torch.nn.Module) -> bool:
    return next(module.parameters()).dtype in (torch.float16, torch.bfloat16)


def overflowing(module: torch.nn.Module, _: Any, output: Any) -> Any:
    """What a model does that was not trained for 16 bit."""
    return tuple(torch.full_like(item, float("nan")) for item in output) if sixteen_bit(module) else output


def test_black_pictures_are_caught_and_another_dtype_is_chosen(sim: Any, family: str) -> None:
    pipe, _, _ = prepared(family)
    handle = pipe.transformer.register_forward_hook(overflowing)
    try:
        plan = planned(family, 900 * KIB)  # 16 bit fits there, 32 bit only with offload
        assert plan.settings["dtype"] == "fp32"
        assert plan.measured is not None
        assert plan.measured.output_finite is True
        assert any("black picture" in warning for warning in plan.warnings)
        plan.undo(pipe)
        untouched = Snapshot.of(pipe)
        with pytest.raises(VerificationError, match=r"dtype=bf16 is fixed"):
            planned(family, 900 * KIB, fix={"dtype": "bf16"})
        assert untouched.differences(pipe) == []
    finally:
        handle.remove()


def test_one_black_picture_of_a_batch_is_enough() -> None:
    from planner.verify import difference_of, is_sound, samples

    good, black = np.linspace(0, 1, 12).reshape(2, 2, 3), np.zeros((2, 2, 3))
    assert is_sound(samples((np.stack([good, good]),))) is True
    assert is_sound(samples((np.stack([good, black]),))) is False
    assert is_sound(samples((np.stack([good, good * np.nan]),))) is False
    assert is_sound(samples((["a text"],))) is None
    assert difference_of(samples((["a text"],)), samples((["a text"],))) == 0
    assert difference_of(samples((["a text"],)), samples((["a next"],))) > 0
    # Where the untouched pipeline's own numbers overflow there is nothing to compare with.
    overflown = good.copy()
    overflown[0, 0] = np.inf
    assert difference_of(samples((good[None],)), samples((overflown[None],))) == 0
    assert difference_of(samples((good[None],)), samples((good[None] * np.nan,))) is None
    # The second differs by its mean of 0.5, over the expected range of 1.
    assert difference_of(samples((np.stack([good, black]),)), samples((np.stack([good, good]),))) == pytest.approx(0.5)
    assert difference_of(samples((good[None],)), samples((np.stack([good, good]),))) == float("inf")


def slow_in_sixteen_bit(module: torch.nn.Module, _: Any) -> None:
    if sixteen_bit(module):
        time.sleep(1.0)


def test_a_plan_slower_than_the_untouched_pipeline_is_rolled_back(sim: Any, family: str) -> None:
    """The device is said to be slow in fp32, so 16 bit is chosen; the pipeline then sleeps in 16 bit."""
    pipe, inputs, _ = prepared(family)
    slow = device(None, flops_per_second={"fp32": 1e7, "fp16": 4e7, "bf16": 4e7})
    handle = pipe.transformer.register_forward_pre_hook(slow_in_sixteen_bit)
    try:
        plan = autoplan(pipe, inputs=inputs, device=slow, memory_budget=1 << 30, calibrate="never")
        assert plan.changes == {}
        assert any("slower than the untouched pipeline" in warning for warning in plan.warnings)
        plan.undo(pipe)
        unchecked = autoplan(pipe, inputs=inputs, device=slow, memory_budget=1 << 30, calibrate="never", verify=False)
        assert unchecked.settings["dtype"] in ("fp16", "bf16")
        assert unchecked.measured is None
        unchecked.undo(pipe)
    finally:
        handle.remove()


def test_an_error_of_the_pipeline_is_reported_as_one_line(sim: Any, family: str) -> None:
    untouched, inputs = Untouched(family), prepared(family)[1]

    def broken(step: Any, number: int, at: Any, values: Any) -> Any:
        raise LookupError("the callback is broken")

    given = inputs | {"callback_on_step_end": broken}
    with pytest.raises(VerificationError, match="LookupError: the callback is broken") as caught:
        autoplan(untouched.pipe, inputs=given, device=device(None), memory_budget=1 << 30, calibrate="never")
    assert "\n" not in str(caught.value)
    untouched.assert_holds()


# -- the picture of the pipeline as it is --------------------------------------------------------------------------------


def wrong(module: torch.nn.Module, _: Any, output: Any) -> Any:
    """A kernel that is wrong in 16 bit: other pictures, finite ones."""
    return tuple(-3 * item for item in output) if sixteen_bit(module) else output


def half_of_the_pictures(*args: Any, **options: Any) -> Any:
    """A join that loses some, or makes up some where there is one only."""
    output = call_split(*args, **options)
    output.images = output.images[::2] if len(output.images) > 1 else np.concatenate([output.images] * 2)
    return output


def needs(family: str, **inputs: Any) -> int:
    """Peak bytes of the untouched pipeline in a call with these inputs."""
    source, _ = traces(family)
    known = Traces.of(source, Workload(), prepared(family)[1] | inputs)
    where = device(None)
    model = CostModel(known, where, calibration_for(where, mode="never").coefficients, known.workload.batch_size)
    return settings_estimate(known, model, {}).peak_allocated_bytes


@pytest.mark.parametrize(("inputs", "smaller", "size"), [
    ({"num_images_per_prompt": 8}, {"num_images_per_prompt": 2}, "one sample of 32x32, 2 steps"),
    ({"height": 64, "width": 64}, {"height": 32, "width": 32}, "one sample of 32x32, 2 steps"),
])  # fmt: skip
def test_a_smaller_picture_is_compared_where_the_whole_call_does_not_fit(sim: Any, inputs: Any, smaller: Any, size: str,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    budget = (needs("sd15", **inputs) + needs("sd15", **smaller)) // 2
    pipe, usual, _ = prepared("sd15")
    untouched, given = Untouched("sd15"), usual | inputs
    sim.memory.total_bytes = budget
    options: dict[str, Any] = {"inputs": given, "device": device(None), "memory_budget": budget, "calibrate": "never"}
    plan = autoplan(pipe, fix={"dtype": "bf16"}, **options)
    assert plan.measured is not None
    assert plan.measured.output_difference is not None
    assert 0 < plan.measured.output_difference < OUTPUT_TOLERANCE["lossless"]
    assert plan.measured.note == f"compared with the pipeline as it is in a smaller call: {size}"
    plan.undo(pipe)
    with monkeypatch.context() as patch:
        patch.setattr("planner.calls.call_split", half_of_the_pictures)
        with pytest.raises(VerificationError, match=r"the output has \d samples, \d were asked for"):
            autoplan(pipe, fix={"dtype": "bf16"}, **options)
    handle = pipe.unet.register_forward_hook(wrong)
    try:
        with pytest.raises(VerificationError, match="differs from the untouched pipeline's by"):
            autoplan(pipe, fix={"dtype": "bf16"}, **options)
    finally:
        handle.remove()
    untouched.assert_holds()


def test_the_host_paints_the_picture_where_the_weights_do_not_fit(sim: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """900 KiB: 16 bit fits there, 32 bit (1290 KiB of weights) only under offload."""
    pipe = prepared(family)[0]
    plan = planned(family, 900 * KIB)
    assert plan.settings["dtype"] == "bf16"
    assert plan.measured is not None
    assert plan.measured.output_difference is not None
    assert 0 < plan.measured.output_difference < OUTPUT_TOLERANCE["lossless"]
    assert "on the host's processor" in str(plan.measured.note)
    plan.undo(pipe)
    untouched = Untouched(family)
    handle = pipe.transformer.register_forward_hook(wrong)
    try:
        caught = planned(family, 900 * KIB)
        assert caught.settings["dtype"] == "fp32"
        assert any("differs from the untouched pipeline's by" in line for line in caught.warnings)
        caught.undo(pipe)
    finally:
        handle.remove()
    untouched.assert_holds()
    monkeypatch.setattr("planner.reference.REFERENCE_SECONDS", 0.0)
    unseen = planned(family, 900 * KIB)
    assert unseen.measured is not None
    assert unseen.measured.output_difference is None
    assert unseen.measured.note == "not compared with the pipeline as it is"
    unseen.undo(pipe)


# -- a compiled plan --------------------------------------------------------------------------------------------------


def test_a_compiled_plan_is_measured_warm_and_compared_without_compiling_again() -> None:
    """On the CPU: one call that compiles, one for the allocator's events, three by the clock; none of the smaller call's sizes."""
    import torch._dynamo

    pipe, inputs = FAMILIES["flux"].build(), prepared("flux")[1]
    one = session("flux", 1 << 30).decide()
    cpu = one.device.model_copy(update={"kind": "cpu"})
    plan = one.model_copy(update={"device": cpu, "settings": one.settings | {"compile": "default", "dtype": "bf16"}})
    shapes: list[Any] = []
    calls: list[int] = []

    def compiler(graph: torch.fx.GraphModule, examples: Any) -> Any:
        shapes.append(1)
        return graph.forward

    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipe.transformer.compile(backend=compiler)
    try:
        small = inputs | {"height": 16, "width": 16}
        compared = Reference(samples(pipe(**inputs, generator=torch.Generator().manual_seed(0))), inputs=inputs)
        calls.clear()
        once = len(shapes)
        assert once
        seen = check(plan, pipe, inputs, compared)
        assert seen.measurement.output_difference == pytest.approx(0, abs=1e-6)
        assert len(calls) == 6 * 2, "five calls of two steps, and the smaller one"
        check(plan, pipe, inputs, Reference(None, inputs=small))
        assert len(shapes) == once
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("error", [simulator.out_of_memory(), RuntimeError("no compiler here"), KeyboardInterrupt()], ids=repr)
def test_what_fails_while_compiling_rolls_back(sim: Any, family: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling happens in the first checked run. Whatever else fails, a plan without it takes its place."""
    untouched, compiler = Untouched(family), torch.compile

    def backend(graph: Any, examples: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, **{**options, "backend": backend, "mode": None}))
    monkeypatch.setattr(type(knob("compile")), "refuse", lambda *_: None)  # a simulated device compiles nothing
    one = session(family, 1 << 30)
    one.inputs = prepared(family)[1]
    plan = one.decide()
    compiled = plan.model_copy(update={"settings": plan.settings | {"compile": "default"}})
    try:
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                one.settle(compiled, untouched.pipe)
        else:
            settled = one.settle(compiled, untouched.pipe)
            assert settled.settings["compile"] == "none"
            assert settled.measured is not None
            assert any(("out of memory" in line) is isinstance(error, torch.OutOfMemoryError) for line in settled.warnings)
            settled.undo(untouched.pipe)
    finally:
        torch._dynamo.reset()
    untouched.assert_holds()


# -- what a person is told --------------------------------------------------------------------------------------------


def test_every_long_stage_says_what_it_does_and_how_long_it_takes(sim: Any, family: str) -> None:
    told: list[str] = []
    plan = planned(family, 1 << 30, fix={"dtype": "bf16"}, progress=told.append)
    plan.undo(prepared(family)[0])
    stages = ["tracing the pipeline on meta", "searching", "running the pipeline as it is", "applying dtype=bf16",
              "checking with real calls"]  # fmt: skip
    assert [next(line for line in told if line.startswith(stage)) for stage in stages] == told
    assert all(re.search(r"\((some seconds|.*about [\d.]+ .?s)\)$", line) for line in told), told


def test_compiling_is_announced_with_its_time(sim: Any, family: str) -> None:
    """Not before it happens, which is in the first run of the check."""
    one = session(family, 1 << 30)
    plan = one.decide()
    predicted = plan.predicted.model_copy(update={"setup_seconds": 30.0, "latency_seconds": 2.0})
    compiled = plan.model_copy(update={"settings": plan.settings | {"compile": "default"}, "predicted": predicted})
    assert check_seconds(compiled, prepared(family)[0], one.inputs) == 30 + (1 + 3) * 2, "one that compiles, three by the clock"
    told: list[str] = []
    failing = {"side_effect": KeyboardInterrupt}
    with mock.patch("planner.session.check", **failing), pytest.raises(KeyboardInterrupt):
        one.settle(compiled, prepared(family)[0], told.append)
    assert told[-2].endswith("(before it compiles, some seconds)")
    assert told[-1].startswith("compiling, then checking with real calls")
    assert told[-1].endswith("(about 38.00 s)")


def test_progress_is_quiet_when_nobody_watches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    to_stderr("searching")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    to_stderr("searching")
    assert capsys.readouterr() == ("", "planner: searching …\n")


def test_the_calls_of_a_split_batch_are_counted(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs, _ = prepared("sd15")
    told: list[str] = []
    monkeypatch.setattr("planner.force.to_stderr", told.append)
    given = inputs | {"num_images_per_prompt": 2, "num_inference_steps": 1}
    options: dict[str, Any] = {"device": device(None), "memory_budget": 1 << 30, "calibrate": "never", "verify": False}
    plan = autoplan(pipe, inputs=given, fix={"batch_split": 2}, **options)
    try:
        assert len(plan.run(pipe, **given).images) == 2
    finally:
        plan.undo(pipe)
    assert told == ["call 1 of 2", "call 2 of 2"]


# -- random faults ----------------------------------------------------------------------------------------------------

FIXABLE: dict[str, tuple[KnobValue, ...]] = {
    "dtype": ("fp32", "bf16"), "offload": ("none", "model", "sequential", "group_block", "group_leaf"), "vae_slicing": (False, True),
    "channels_last": (False, True), "fuse_qkv": (False, True),
}  # fmt: skip
ERRORS = {
    "out of memory": simulator.out_of_memory,
    "runtime error": lambda: RuntimeError("injected"),
    "interrupt": KeyboardInterrupt,
}


def random_fault(chance: random.Random) -> simulator.Fault:
    event = chance.choice((simulator.ALLOCATION, simulator.ALLOCATION, simulator.COPY))
    number = int(10 ** chance.uniform(0, 3.3 if event == simulator.ALLOCATION else 2.3))
    if chance.random() < 0.25:
        return simulator.Fault(event=event, number=number, other_process_bytes=chance.randrange(simulator.memory.total_bytes))
    return simulator.Fault(event=event, number=number, error=ERRORS[chance.choices(list(ERRORS), (6, 2, 2))[0]])


def random_session(chance: random.Random, family: str) -> Session:
    """Random knobs fixed, a budget between too little and plenty, so that plans of all kinds come up."""
    fix: dict[str, KnobValue] = {"compile": "none", "attention": "sdpa", "vae_tiling": False, "batch_split": 1, "chunked_forward": False}
    for name, values in FIXABLE.items():
        if chance.random() < 0.5:
            fix[name] = chance.choice(values)
    return session(family, int(2 << chance.randrange(17, 24)), fix=fix)


def one_schedule(chance: random.Random) -> str:
    """Plan, check and run with random faults; how it ended. Raises AssertionError where it is none of the two ends."""
    untouched = Untouched(chance.choice(SCHEDULED))
    simulator.memory.total_bytes = int(2 << chance.randrange(17, 24))
    plans: list[Plan] = []
    failure = ended(untouched, chance, [random_fault(chance) for _ in range(chance.randrange(1, 4))], plans)
    simulator.memory.total_bytes, simulator.memory.other_process_bytes = 1 << 40, 0
    current = in_force(untouched.pipe)
    if current is not None:
        assert plans, "only a checked plan may stay"
        assert plans[0].measured is not None
        assert np.isfinite(FAMILIES[untouched.family].run(untouched.pipe)).all()
        plans[0].undo(untouched.pipe)
    else:
        assert isinstance(failure, PlannerError | KeyboardInterrupt), repr(failure)
        assert isinstance(failure, KeyboardInterrupt) or str(failure)
    untouched.assert_holds(run=chance.random() < 0.1)
    return "in force" if current is not None else type(failure).__name__


def ended(untouched: Untouched, chance: random.Random, faults: list[simulator.Fault], plans: list[Plan]) -> BaseException | None:
    """What came out of planning and at most two runs under the faults, if anything. A settled plan is put into ``plans``."""
    inputs = prepared(untouched.family)[1] | {"num_inference_steps": 1}
    try:
        with simulator.memory.faults(*faults):
            here = random_session(chance, untouched.family)
            here.inputs = inputs
            plans.append(here.settle(here.decide(), untouched.pipe))
            for _ in range(chance.randrange(3)):
                plans[0].run(untouched.pipe, **inputs)
    except BaseException as error:
        release(error)
        return error
    return None


@pytest.mark.slow
def test_random_fault_schedules_end_in_force_and_checked_or_untouched(sim: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logging.disable(logging.WARNING)
    ends: Counter[str] = Counter()
    try:
        for number in range(SCHEDULES):
            seed = SEED + number
            try:
                ends[one_schedule(random.Random(seed))] += 1
            except BaseException as error:
                raise AssertionError(f"schedule {number} (PLANNER_FAULT_SEED={seed} PLANNER_FAULT_SCHEDULES=1) broke: {error!r}") from error
    finally:
        logging.disable(logging.NOTSET)
    with capsys.disabled():
        print(f"\n{SCHEDULES} random fault schedules from seed {SEED}: {dict(sorted(ends.items()))}")
    assert sum(ends.values()) == SCHEDULES
    assert ends["in force"]
    assert SCHEDULES < 100 or len(ends) >= 3
