"""Plans in force on live pipelines: applied, taken back, run under, and replaced when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.errors import ApplyError, NoFeasiblePlan, UnsupportedPipeline
from planner.progress import to_stderr

if TYPE_CHECKING:
    from planner.apply import Applied
    from planner.plan import Plan
    from planner.session import Session

logger = logging.getLogger(__name__)
MAX_RECOVERIES = 3
"""Plans that are tried after the first ran out of memory within one :meth:`planner.Plan.run`."""
_MARK = "_planner"
"""Where a pipeline carries what is in force on it: on itself, so that both go when nobody uses the pipeline any more."""


@dataclass(slots=True)
class InForce:
    """What is in force on a pipeline. ``asked`` is the plan that the user holds; ``plan`` may have taken its place."""

    asked: Plan
    plan: Plan
    applied: Applied
    modules: dict[str, int]
    """Modules per component once the plan was applied: what is loaded later (a LoRA) shows as more."""
    session: Session | None = None
    told: set[str] = field(default_factory=set)
    """Changes that the user has been warned of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a pipeline is not the pipeline that can be undone."""
        return


def in_force(pipe: Any) -> InForce | None:
    """What is in force on ``pipe``, if anything that this process applied."""
    found = getattr(pipe, "__dict__", {}).get(_MARK)
    return found if isinstance(found, InForce) else None


def put_in_force(plan: Plan, pipe: Any, *, asked: Plan | None = None, session: Session | None = None) -> None:
    """Apply a plan's settings as one transaction. ``asked``: the plan that it replaces.

    Raises:
        UnsupportedPipeline: another pipeline class than the plan's.
        ApplyError: a plan is in force already, or a knob failed; the pipeline is as it was.
    """
    from planner.apply import Applied
    from planner.dryrun.facts import read_facts
    from planner.measure import reset_peak
    from planner.watch import module_counts

    name = type(pipe).__name__
    if name != plan.pipeline_class:
        raise UnsupportedPipeline(f"the plan is for {plan.pipeline_class}, this is {name}; plan for it: autoplan(pipe).")
    if in_force(pipe) is not None:
        raise ApplyError("a plan is in force on this pipeline already; take it back first: plan.undo(pipe).")
    reset_peak(torch_device(plan))
    applied = Applied.begin(pipe, plan.settings)
    try:
        applied.put(torch_device(plan), read_facts(pipe))
        object.__setattr__(pipe, _MARK, InForce(asked or plan, plan, applied, module_counts(pipe), session))
        plan._remember(pipe)
    except BaseException:
        applied.undo()
        raise


def take_back(pipe: Any) -> None:
    """Undo the plan in force. Raises ApplyError when there is none, or when the pipeline still differs afterwards."""
    from planner.watch import changed_components

    current = in_force(pipe)
    if current is None:
        raise ApplyError("no plan of this process is in force on this pipeline, so there is nothing to undo.")
    if changed := changed_components(pipe):
        names = ", ".join(changed)
        logger.warning("%s changed after the plan was applied (a LoRA or adapter?): undo takes that away; load it again", names)
    try:
        current.applied.undo()
    finally:
        if not current.applied.in_force:
            vars(pipe).pop(_MARK, None)


def torch_device(plan: Plan) -> Any:
    """The torch device a plan was made for; of several of its kind the current one."""
    import torch

    if plan.device.kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if plan.device.kind == "cpu" else torch.device(plan.device.kind, 0)


# -- running ----------------------------------------------------------------------------------------------------------


def run_under(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Any:
    """Call the pipeline under the plan; see :meth:`planner.Plan.run`."""
    from planner.watch import changes_since

    current = in_force(pipe)
    if current is None:
        _warn(changes_since(plan, pipe, inputs), set())
        _apply_or_next(plan, pipe, inputs)
    elif not _same(current.asked, plan) and not _same(current.plan, plan):
        raise ApplyError("another plan is in force on this pipeline; take it back first: plan.undo(pipe).")
    else:
        _warn(changes_since(current.plan, pipe, inputs), current.told)
    tried = 0
    while True:
        try:
            return _call(pipe, inputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release(error)
        tried += 1
        _replace(pipe, inputs, tried)


def _call(pipe: Any, inputs: Mapping[str, Any]) -> Any:
    from planner.calls import call_split
    from planner.measure import reset_peak

    current = in_force(pipe)
    assert current is not None
    reset_peak(torch_device(current.plan))
    return call_split(current.plan, pipe, inputs, say=to_stderr)


def _same(one: Plan, other: Plan) -> bool:
    return (one.settings, one.workload, one.digest) == (other.settings, other.workload, other.digest)


def _apply_or_next(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> None:
    """Apply the plan, or when that alone takes more memory than there is, one that needs less."""
    from planner.session import Session

    try:
        plan.apply(pipe)
        return
    except ApplyError as error:
        if not is_out_of_memory(error):
            raise
        release(error)
    _next_that_applies(plan, Session.for_plan(plan, pipe, inputs), pipe, 0, plan)


def _warn(changes: list[str], told: set[str]) -> None:
    for line in changes:
        if line not in told:
            told.add(line)
            logger.warning("%s; plan.replan(pipe, ...) makes a plan for it", line)


def _replace(pipe: Any, inputs: Mapping[str, Any], tried: int) -> None:
    """After an OOM: the next best plan with the corrected model takes the place of the one in force.

    Raises:
        NoFeasiblePlan: none is left, or too many were tried; the pipeline is as it was.
        ApplyError: something was loaded into the pipeline meanwhile; the plan stays in force.
    """
    from planner.session import Session

    _keep_what_was_loaded(pipe, "out of memory: another plan would need the pipeline as it was")
    current = in_force(pipe)
    assert current is not None
    failed, session = current.plan, current.session
    peak = peak_of(failed)
    take_back(pipe)
    evidence = evidence_after(pipe, failed, peak)
    if tried > MAX_RECOVERIES:
        raise NoFeasiblePlan(
            f"out of memory: {tried} plans were tried and none held; the pipeline is as it was. "
            "Plan again with a smaller memory_budget or batch_size.",
            leanest=min(failed.alternatives, key=lambda item: item.predicted.peak_allocated_bytes, default=None))  # fmt: skip
    session = session or Session.for_plan(failed, pipe, inputs)
    replacement = session.after_out_of_memory(failed, evidence)
    _tell(failed, replacement, evidence)
    try:
        put_in_force(replacement, pipe, asked=current.asked, session=session)
    except ApplyError as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        _next_that_applies(replacement, session, pipe, tried, current.asked)


def _keep_what_was_loaded(pipe: Any, why: str) -> None:
    """Going back would take away what was loaded after the plan was applied, so the user is asked to do it in the right order."""
    from planner.watch import changed_components

    changed = changed_components(pipe)
    if changed:
        raise ApplyError(
            f"{why}, but {', '.join(changed)} changed after the plan was applied (a LoRA or adapter?), which going back would lose. "
            "Unload it, plan.undo(pipe), load it again, and plan for it: autoplan(pipe).")  # fmt: skip


def _tell(failed: Plan, replacement: Plan, evidence: Evidence) -> None:
    changed = ", ".join(f"{name}={value}" for name, value in replacement.settings.items() if failed.settings.get(name) != value)
    logger.warning("out of memory (%s): now %s", evidence.text(failed), changed or "again")


def _next_that_applies(failed: Plan, session: Session, pipe: Any, tried: int, asked: Plan) -> None:
    """The replacement did not even fit while it was applied: the next one, the same number of times."""
    for _ in range(tried, MAX_RECOVERIES):
        evidence = evidence_after(pipe, failed, peak_of(failed))
        replacement = session.after_out_of_memory(failed, evidence)
        _tell(failed, replacement, evidence)
        failed = replacement
        try:
            return put_in_force(failed, pipe, asked=asked, session=session)
        except ApplyError as error:
            if not is_out_of_memory(error):
                raise
            release(error)
    give_back_memory(pipe)
    raise NoFeasiblePlan("out of memory while applying every plan that was left; the pipeline is as it was. Free memory and plan again.")


def replan(plan: Plan, pipe: Any, inputs: Mapping[str, Any]) -> Plan:
    """See :meth:`planner.Plan.replan`. What the user fixed is known while a plan of this process is in force."""
    from planner.autoplan import autoplan
    from planner.dryrun.inputs import batch_argument, batch_of

    _keep_what_was_loaded(pipe, "planning again needs the pipeline as it was")
    current = in_force(pipe)
    session = current.session if current is not None else None
    given = (session.inputs if session is not None else {}) | dict(inputs)
    explicit = batch_of(pipe, inputs) > 1 or inputs.get(batch_argument(pipe) or "") is not None
    if current is not None:
        take_back(pipe)
    sizes = {name: value for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
             if (value := getattr(plan.workload, name)) is not None}  # fmt: skip
    asked = session.asked if session is not None else {"device": str(torch_device(plan))}
    return autoplan(
        pipe, batch_size=1 if explicit else plan.workload.batch_size, inputs=sizes | given, quality=plan.quality,
        objective=plan.objective, calls=plan.calls, fix=session.request.fix if session is not None else None, **asked)  # fmt: skip


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the device said when memory ran out: the most that was allocated, and what could have been. None: unknown."""

    peak_bytes: int | None
    available_bytes: int | None

    def text(self, plan: Plan) -> str:
        """``predicted 3.10 GiB, 3.40 GiB were allocated, 2.90 GiB could be``."""
        from planner.units import format_bytes

        parts = [f"predicted {format_bytes(plan.predicted.peak_allocated_bytes)}"]
        if self.peak_bytes is not None:
            parts.append(f"{format_bytes(self.peak_bytes)} were allocated")
        if self.available_bytes is not None:
            parts.append(f"{format_bytes(self.available_bytes)} could be")
        return ", ".join(parts)


def peak_of(plan: Plan) -> int | None:
    """The most that was allocated on the plan's device since the plan was last applied or run; None where nobody counts."""
    from planner.measure import peak_so_far

    return peak_so_far(torch_device(plan))


def evidence_after(pipe: Any, plan: Plan, peak_bytes: int | None) -> Evidence:
    """Gives memory back, then asks what there is. The plan must have been taken back already."""
    from planner.measure import available_bytes

    give_back_memory(pipe)
    return Evidence(peak_bytes, available_bytes(torch_device(plan), pipe))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception is memory running out, or was caused by it."""
    import torch

    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    # The CPU's allocator says "DefaultCPUAllocator: can't allocate memory" (c10/core/impl/alloc_cpu.cpp).
    if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        return True
    return is_out_of_memory(error.__cause__)


def release(error: BaseException) -> None:
    """Drop the tensors that the frames of a failed call still hold: neither can their memory be given back before, nor can
    weights be swapped that something else refers to."""
    import gc

    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
        waiting += [one.__cause__, one.__context__]
    gc.collect()


def give_back_memory(pipe: Any) -> None:
    """What an exception in the middle of a call leaves behind: models on the device under model offload, cached blocks."""
    import gc

    from planner.measure import accelerators

    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
    gc.collect()
    for module in accelerators():
        with contextlib.suppress(RuntimeError):
            module.empty_cache()
