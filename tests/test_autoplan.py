"""The closed loop on this CPU: plan, apply, check, run, undo; and that whatever goes wrong leaves the pipeline as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner import Plan, autoplan
from planner.calls import call_split
from planner.errors import ApplyError, NoFeasiblePlan, PlannerError, UnsupportedPipeline, UsageError, VerificationError
from planner.force import in_force
from planner.snapshot import Snapshot
from planner.verify import SHORT_STEPS, short_call
from tests.zoo import FAMILIES, prepared

LOOPED = ("sd15", "flux", "pixart_sigma")
PLAIN = {"dtype": "fp32", "compile": "none"}
"""Random weights mean nothing, so neither does their precision; and compiling takes minutes."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing measured elsewhere is read, nothing is left behind."""
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_stays_in_force() -> Iterator[None]:
    yield
    for family in LOOPED:
        if prepared.cache_info().currsize and in_force(prepared(family)[0]) is not None:
            in_force(prepared(family)[0]).asked.undo(prepared(family)[0])  # type: ignore[union-attr]


def plan_for(family: str, **options: Any) -> Plan:
    pipe, inputs, _ = prepared(family)
    options = {"device": "cpu", "calibrate": "never", "fix": PLAIN} | options
    given = options.pop("inputs", inputs)
    return autoplan(pipe, inputs=given, **options)


def assert_untouched(family: str, before: Snapshot) -> None:
    pipe, _, expected = prepared(family)
    assert in_force(pipe) is None
    assert before.differences(pipe) == []
    assert np.array_equal(FAMILIES[family].run(pipe), expected)


@pytest.mark.parametrize("family", LOOPED)
def test_the_closed_loop_runs_and_undo_is_the_identity(family: str) -> None:
    pipe, inputs, _ = prepared(family)
    before = Snapshot.of(pipe, checksums=True)
    plan = plan_for(family)
    assert plan.measured is not None
    assert plan.measured.latency_seconds > 0
    assert plan.measured.output_finite is True
    assert plan.measured.peak_allocated_bytes is not None
    output = plan.run(pipe, **inputs)
    assert np.isfinite(np.asarray(output.images)).all()
    plan.undo(pipe)
    assert_untouched(family, before)
    with pytest.raises(ApplyError, match="nothing to undo"):
        plan.undo(pipe)


BATCH = {"num_images_per_prompt": 4, "height": 64, "width": 64}


def test_with_less_memory_it_chooses_to_save_and_stays_inside_as_measured() -> None:
    pipe, inputs, _ = prepared("sd15")
    before = Snapshot.of(pipe, checksums=True)
    wanted = inputs | BATCH
    roomy = plan_for("sd15", inputs=wanted, apply=False)
    budget = roomy.predicted.peak_allocated_bytes * 7 // 10
    plan = plan_for("sd15", inputs=wanted, memory_budget=budget)
    saved = {name for name in plan.changes if name in ("vae_slicing", "vae_tiling", "batch_split", "attention", "chunked_forward")}
    assert saved
    assert roomy.settings != plan.settings
    assert plan.measured is not None
    assert plan.measured.peak_allocated_bytes is not None
    assert plan.measured.peak_allocated_bytes <= budget
    assert plan.predicted.peak_allocated_bytes <= budget
    assert len(plan.run(pipe, **wanted).images) == 4
    plan.undo(pipe)
    assert_untouched("sd15", before)


def test_a_split_batch_is_run_in_that_many_calls_and_joined() -> None:
    pipe, inputs, _ = prepared("sd15")
    plan = plan_for("sd15", inputs=inputs | BATCH, fix={**PLAIN, "batch_split": 2}, verify=False)
    sizes: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True)
    try:
        output = plan.run(pipe, **inputs | BATCH)
    finally:
        handle.remove()
    assert output.images.shape[0] == 4
    # Two calls of two steps; guidance doubles two images.
    assert sizes == [4, 4, 4, 4]


def test_fewer_steps_are_handed_to_the_call() -> None:
    pipe, inputs, _ = prepared("sd15")
    given = inputs | {"num_inference_steps": 6}
    plan = plan_for("sd15", inputs=given, apply=False)
    fewer = plan.model_copy(update={"settings": {**plan.settings, "steps": 3}})
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    try:
        call_split(fewer, pipe, given)
        call_split(fewer, pipe, inputs | {"num_inference_steps": 2})
    finally:
        handle.remove()
    assert len(counted) == 3 + 2


def test_long_calls_are_checked_with_few_steps_and_extrapolated() -> None:
    pipe, inputs, _ = prepared("sd15")
    plan = plan_for("sd15", inputs=inputs | {"num_inference_steps": 30}, apply=False)
    slow = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"latency_seconds": 100.0})})
    assert short_call(plan, pipe, inputs).left_out == 0
    short = short_call(slow, pipe, inputs | {"num_inference_steps": 30})
    assert (short.inputs["num_inference_steps"], short.left_out) == (SHORT_STEPS, 27)


def test_when_nothing_fits_the_error_carries_the_leanest_and_what_is_missing() -> None:
    before = Snapshot.of(prepared("sd15")[0], checksums=True)
    with pytest.raises(NoFeasiblePlan, match="nothing fits: the leanest plan") as caught:
        plan_for("sd15", memory_budget="100KiB")
    error = caught.value
    assert error.leanest is not None
    assert error.shortfall_bytes is not None
    # The search compares what the budget must hold, which is no less than the peak.
    assert error.shortfall_bytes >= error.leanest.predicted.peak_allocated_bytes - 100 * 1024 > 0
    assert_untouched("sd15", before)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"batch_size": 0}, UsageError, "batch_size 0"),
        ({"memory_budget": "12gb?"}, UsageError, "12gb?"),
        ({"fix": {"offload": "model"}}, UsageError, "offload=model"),
        ({"fix": {"colour": "red"}}, UsageError, "colour"),
        ({"fix": {"dtype": "fp12"}}, UsageError, "fp12"),
        ({"quality": "best"}, UsageError, "best"),
        ({"objective": "beauty"}, UsageError, "beauty"),
        ({"calibrate": "maybe"}, UsageError, "maybe"),
        ({"calls": 0}, UsageError, "calls 0"),
        ({"device": "tpu"}, PlannerError, "tpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_requests_get_one_clear_line(options: dict[str, Any], kind: type[PlannerError], said: str) -> None:
    before = Snapshot.of(prepared("sd15")[0], checksums=True)
    with pytest.raises(kind) as caught:
        plan_for("sd15", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_untouched("sd15", before)


@pytest.mark.parametrize(
    "thing", [42, None, "stable-diffusion-xl", torch.nn.Linear(2, 2), object()], ids=["int", "None", "str", "module", "object"]
)
def test_what_is_no_pipeline_is_refused(thing: Any) -> None:
    with pytest.raises((UnsupportedPipeline, UsageError)) as caught:
        autoplan(thing, device="cpu", calibrate="never")
    assert "\n" not in str(caught.value)


def test_apply_false_touches_nothing_and_the_plan_can_be_applied_later() -> None:
    pipe, _, _ = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)
    plan = plan_for("flux", apply=False, fix={**PLAIN, "vae_slicing": True})
    assert before.differences(pipe, addresses=True) == []
    assert plan.measured is None
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    with again.apply(pipe) as entered:
        assert entered is again
        assert pipe.vae.use_slicing
        with pytest.raises(ApplyError, match="in force on this pipeline already"):
            plan.apply(pipe)
    assert_untouched("flux", before)


def test_leaving_the_with_block_by_an_exception_takes_the_plan_back() -> None:
    pipe, _, _ = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)

    def body() -> None:
        with plan_for("flux", verify=False, fix={**PLAIN, "vae_slicing": True}):
            assert pipe.vae.use_slicing
            raise LookupError

    with pytest.raises(LookupError):
        body()
    assert_untouched("flux", before)


def test_a_plan_for_another_class_is_refused() -> None:
    plan = plan_for("flux", apply=False)
    with pytest.raises(UnsupportedPipeline, match="FluxPipeline"):
        plan.apply(prepared("sd15")[0])


def stop_at(line: int, error: BaseException) -> tuple[Callable[[str], None], list[str]]:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == line:
            raise error

    return say, said


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_stopping_at_any_stage_leaves_the_pipeline_as_it_was(error: BaseException) -> None:
    """Each line of progress begins a stage: tracing, searching, comparing, applying, checking."""
    before = Snapshot.of(prepared("flux")[0], checksums=True)
    fix = {**PLAIN, "vae_slicing": True}
    say, said = stop_at(0, error)
    plan_for("flux", fix=fix, progress=say).undo()
    assert len(said) >= 5
    for line in range(1, len(said) + 1):
        with contextlib.suppress(type(error), VerificationError):
            plan_for("flux", fix=fix, progress=stop_at(line, error)[0]).undo()
            assert isinstance(error, RuntimeError), "only a plan that raised may be replaced by another"
        assert_untouched("flux", before)


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_an_error_inside_a_component_leaves_the_pipeline_as_it_was(part: str, error: BaseException) -> None:
    pipe = prepared("flux")[0]
    fix = {**PLAIN, "vae_slicing": True, "channels_last": False}
    before = Snapshot.of(pipe, checksums=True)

    def fail(*_: Any) -> None:
        if in_force(pipe) is not None:
            raise error

    module = pipe.vae.decoder if part == "vae" else getattr(pipe, part)
    handle = module.register_forward_pre_hook(fail)
    hooked = Snapshot.of(pipe)
    try:
        with pytest.raises((KeyboardInterrupt, VerificationError)):
            plan_for("flux", fix=fix)
        assert hooked.differences(pipe) == []
    finally:
        handle.remove()
    assert_untouched("flux", before)


def test_probing_the_winner_ends_and_marks_times_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With probes, the chosen plan's times rest on measurements of its own operations, whatever it chose."""
    import planner.probing as probing
    from planner import autoplan as module  # noqa: F401  the function, not the module

    seen: list[str] = []
    original = probing.Prober._probe

    def counted(self: Any, calls: Any, variant: Any) -> bool:
        result = original(self, calls, variant)
        seen.append(variant)
        return result

    monkeypatch.setattr(probing.Prober, "_probe", counted)
    plan = plan_for("flux", calibrate="auto", apply=False, fix={**PLAIN, "channels_last": True})
    assert "channels_last" in seen
    assert plan.predicted.basis == "measured"
