"""A plan as a page: one self-contained file, for light and dark screens, wide and narrow ones. Renders, never recomputes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.explain import charts, words
from planner.explain.page import SEARCH, document, escape, scoped, table
from planner.explain.text import UNSURE, measured_text
from planner.types import Phase
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan


def page(plan: Plan) -> str:
    """A whole HTML document; no network is needed to show it."""
    return document(f"{plan.model} on {plan.device.name}", _body(plan))


def fragment(plan: Plan) -> str:
    """The same for a notebook: an element with its own style."""
    return scoped(_body(plan))


def _body(plan: Plan) -> str:
    pictures = (
        _section("Memory along the call", charts.timeline(plan.predicted, plan.device.budget_bytes)),
        _section("Memory against latency", charts.scatter(plan)),
        _section("Where the time goes", charts.time_bars(plan.predicted)),
    )
    tables = (_section("Phase by phase", _phases(plan)), _others(plan), _rejected(plan), _terms(plan))
    return _head(plan) + _tiles(plan) + f'<div class="grid">{"".join(pictures)}</div>' + "".join(tables)


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _head(plan: Plan) -> str:
    wanted = f"{words.workload_text(plan.workload)}; {words.wish_text(plan)}"
    lines = [
        f"<h1>{escape(plan.model)} on {escape(plan.device.name)}</h1>",
        f"<p class=soft>{escape(plan.pipeline_class)}; {escape(wanted)}; {escape(words.budget_text(plan.device))}</p>",
        f"<p class=plan>{escape(words.plan_line(plan))}</p>",
    ]
    lines += [f"<p class=soft>{escape(plan.device.note)}</p>"] if plan.device.note else []
    lines += [f"<p><b>binds:</b> {escape(plan.binding)}</p>"] if plan.binding else []
    if plan.measured is not None:
        lines.append(f"<p><b>measured:</b> {escape(measured_text(plan.measured, plan.predicted))}</p>")
    lines += [f"<p class=warning>{escape(warning)}</p>" for warning in plan.warnings]
    return "".join(lines)


def _tiles(plan: Plan) -> str:
    estimate = plan.predicted
    low, high = estimate.peak_allocated_bytes_low, estimate.peak_allocated_bytes_high
    entries = [
        ("peak allocated", format_bytes(estimate.peak_allocated_bytes), f"{format_bytes(low)} to {format_bytes(high)}"),
        ("one call", format_seconds(estimate.latency_seconds), _seconds_range(plan)),
        ("reserved by torch", format_bytes(estimate.peak_reserved_bytes), "with what its allocator keeps"),
        ("host RAM", format_bytes(estimate.host_bytes), "for weights that wait there"),
    ]
    if plan.device.kind == "cuda":
        entries.insert(3, ("on the device", format_bytes(estimate.device_used_bytes), "as nvidia-smi shows it"))
    if estimate.step_seconds is not None:
        entries.insert(2, ("one step", format_seconds(estimate.step_seconds), f"{estimate.basis} figures"))
    inner = "".join(f'<div class="tile">{name}<b>{value}</b><span class="soft">{note}</span></div>' for name, value, note in entries)
    return f'<div class="tiles">{inner}</div>'


def _seconds_range(plan: Plan) -> str:
    estimate = plan.predicted
    return f"{format_seconds(estimate.latency_seconds_low)} to {format_seconds(estimate.latency_seconds_high)}"


def _phases(plan: Plan) -> str:
    rows: list[tuple[object, ...]] = [
        (place, phase.name, phase.calls, format_seconds(phase.seconds), *_sizes(phase), phase.bound)
        for place, phase in enumerate(plan.predicted.phases, start=1)
    ]
    head = ("", "phase", "calls", "time", "weights", "activations", "workspace", "peak", "bound by")
    return table(head, rows, frozenset({0, *range(2, 8)}))


def _sizes(phase: Phase) -> tuple[str, ...]:
    sizes = (phase.weights_bytes, phase.activations_bytes, phase.workspace_bytes, phase.peak_allocated_bytes)
    return tuple(format_bytes(size) for size in sizes)


def _others(plan: Plan) -> str:
    others = [item for item in plan.alternatives if item.settings != plan.settings]
    if not others:
        return ""
    rows: list[tuple[object, ...]] = []
    for item in others:
        setting = words.settings_text(words.difference(item.settings, plan.settings))
        sizes = (format_bytes(item.predicted.peak_allocated_bytes), format_seconds(item.predicted.latency_seconds))
        rows.append((setting, *sizes, words.why_lost(item.predicted, plan.predicted)))
    head = ("set differently", "peak", "one call", "against the plan")
    note = f"<p class='soft caption'>{UNSURE[0].upper()}{UNSURE[1:]}.</p>"
    return _section("What else would fit", SEARCH + table(head, rows, frozenset({1, 2})) + note)


def _rejected(plan: Plan) -> str:
    if not plan.rejected:
        return ""
    rows: list[tuple[object, ...]] = [
        (words.rejected_name(item, plan), item.count, words.rejection_label(item), words.rejection_text(item)) for item in plan.rejected
    ]
    return _section("What was rejected", SEARCH + table(("combinations with", "count", "kind", "why"), rows, frozenset({1})))


def _terms(plan: Plan) -> str:
    if not plan.predicted.terms:
        return ""
    rows: list[tuple[object, ...]] = [
        (term.name, format_bytes(term.bytes) if term.bytes is not None else format_seconds(term.seconds), term.basis, term.source)
        for term in plan.predicted.terms
    ]
    return _section("Every term, and where it is from", table(("term", "value", "basis", "source"), rows, frozenset({1})))
