"""What differs between two plans, and what the difference does to memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from planner.explain import words
from planner.explain.layout import DEFAULT_WIDTH, paragraph, table
from planner.types import Frozen
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan

INDENT = 11
METRICS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "host_bytes", "latency_seconds", "step_seconds",
           "setup_seconds")  # fmt: skip
_NAMES = {
    "peak_allocated_bytes": "peak allocated", "peak_reserved_bytes": "peak reserved", "device_used_bytes": "on the device",
    "host_bytes": "host RAM", "latency_seconds": "a call", "step_seconds": "a step", "setup_seconds": "to set up, once",
}  # fmt: skip


class Change(Frozen):
    """One thing that is not the same in both; None where a plan lacks it."""

    name: str
    first: Any
    second: Any


class PlanDiff(Frozen):
    """Differences of two plans, first against second."""

    schema_: Literal["planner.diff/1"] = Field(default="planner.diff/1", serialization_alias="schema")
    first: str
    second: str
    about: tuple[Change, ...]
    """Model, device, workload, quality, objective."""
    settings: tuple[Change, ...]
    predicted: tuple[Change, ...]
    """Every estimate that differs, in bytes and seconds."""
    phases: tuple[Change, ...]
    """Peak bytes per phase, where they differ."""


def compare_plans(first: Plan, second: Plan) -> PlanDiff:
    """Everything in which two plans differ."""
    names = sorted({*first.settings, *second.settings})
    predicted = {name: (getattr(first.predicted, name), getattr(second.predicted, name)) for name in METRICS}
    peaks = [{phase.name: phase.peak_allocated_bytes for phase in plan.predicted.phases} for plan in (first, second)]
    phases = list(dict.fromkeys([*peaks[0], *peaks[1]]))
    return PlanDiff(
        first=_title(first),
        second=_title(second),
        about=_changes(_about(first), _about(second)),
        settings=_changes({name: first.settings.get(name) for name in names}, {name: second.settings.get(name) for name in names}),
        predicted=tuple(Change(name=name, first=a, second=b) for name, (a, b) in predicted.items() if a != b),
        phases=_changes({name: peaks[0].get(name) for name in phases}, {name: peaks[1].get(name) for name in phases}),
    )


def render(found: PlanDiff, width: int | None = None) -> str:
    """The differences as text, aligned."""
    room = width or DEFAULT_WIDTH
    lines = [*paragraph("A", found.first, room, INDENT), *paragraph("B", found.second, room, INDENT)]
    if not (found.about or found.settings or found.predicted or found.phases):
        return "\n".join([*lines, "", "no difference"]) + "\n"
    for title, rows in (
        ("about", [(change.name, str(change.first), str(change.second), "") for change in found.about]),
        ("settings", [(change.name, _word(change.first), _word(change.second), "") for change in found.settings]),
        ("predicted", [_measure_row(_NAMES[change.name], change) for change in found.predicted]),
        ("peak of", [_measure_row(change.name, change) for change in found.phases]),
    ):
        if rows:
            lines += ["", *table([(title, "A", "B", ""), *rows], room, left=(0, 1, 2, 3))]
    return "\n".join(lines) + "\n"


def _title(plan: Plan) -> str:
    return f"{plan.model} on {plan.device.name}, {words.workload_text(plan.workload)}: {words.plan_line(plan)}"


def _about(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model, "pipeline": plan.pipeline_class, "device": plan.device.name, "budget": format_bytes(plan.device.budget_bytes),
        "workload": words.workload_text(plan.workload), "quality": plan.quality, "objective": plan.objective, "calls": plan.calls,
    }  # fmt: skip


def _changes(first: dict[str, Any], second: dict[str, Any]) -> tuple[Change, ...]:
    return tuple(Change(name=name, first=first[name], second=second[name]) for name in first if first[name] != second[name])


def _word(value: Any) -> str:
    return "-" if value is None else words.value_text(value)


def _measure_row(name: str, change: Change) -> tuple[str, str, str, str]:
    show = format_seconds if change.name.endswith("_seconds") else format_bytes
    if change.first is None or change.second is None:
        return name, show(change.first), show(change.second), ""
    delta = change.second - change.first
    share = f" ({delta / change.first * 100:+.0f} %)" if change.first else ""
    return name, show(change.first), show(change.second), f"{'+' if delta > 0 else '-'}{show(abs(delta))}{share}"
