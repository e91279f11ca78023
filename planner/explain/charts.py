"""A plan's pictures as inline SVG: memory along the call, memory against latency, where the time goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from planner.explain import words
from planner.explain.layout import shortened
from planner.explain.page import escape, key
from planner.types import Estimate, KnobValue, Phase
from planner.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 18, 42
SPARE = 1.14
"""Room above what is drawn, for the budget's label."""
LEAST_SHARE = 0.04
"""A phase that takes less of the call than this is drawn this wide, so that it can be seen."""
LAYERS = ("weights", "activations", "workspace", "other")


def timeline(estimate: Estimate, budget_bytes: int | None) -> str:
    """Memory phase by phase along the call, stacked by layer, with the budget as a line."""
    if not estimate.phases:
        return "<p class=soft>no phases</p>"
    top = max([phase.peak_allocated_bytes for phase in estimate.phases] + [budget_bytes or 0]) * SPARE
    shares = visible_shares([phase.seconds for phase in estimate.phases])
    parts, x = [_bytes_axis(top)], float(LEFT)
    for place, (phase, share) in enumerate(zip(estimate.phases, shares, strict=True)):
        width = share * (WIDTH - LEFT - RIGHT)
        parts.append(_column(phase, x, width, top, place))
        x += width
    parts.append(_budget_line(budget_bytes, top))
    highest = max(estimate.phases, key=lambda phase: phase.peak_allocated_bytes)
    used = {name for phase in estimate.phases for name, size in layers(phase).items() if size}
    legend = {f"{name} {format_bytes(size)}": name for name, size in layers(highest).items() if name in used}
    caption = f"<p class='soft caption'>The peak, in {escape(highest.name)}, layer by layer. Short phases are drawn wider.</p>"
    return _svg("memory along the call", parts) + key(legend) + caption


def layers(phase: Phase) -> dict[str, int]:
    """What a phase's peak is made of; ``other`` is what no layer names (library workspaces)."""
    named = {"weights": phase.weights_bytes, "activations": phase.activations_bytes, "workspace": phase.workspace_bytes}
    return named | {"other": max(phase.peak_allocated_bytes - sum(named.values()), 0)}


def visible_shares(seconds: Sequence[float]) -> list[float]:
    """Shares of the whole, the small ones raised to a visible width; they sum to one."""
    total = sum(seconds)
    shares = [value / total if total > 0 else 1 / len(seconds) for value in seconds]
    least = min(LEAST_SHARE, 1 / len(shares))
    raised = [max(share, least) for share in shares]
    return [share / sum(raised) for share in raised]


def _column(phase: Phase, x: float, width: float, top: float, place: int) -> str:
    note = f"{phase.name}: {format_bytes(phase.peak_allocated_bytes)}, {phase.calls} calls, {format_seconds(phase.seconds)}"
    parts, below = [f"<g><title>{escape(note)}</title>"], 0
    for name, size in layers(phase).items():
        if size:
            high, low = _y(below + size, top), _y(below, top)
            below += size
            place_and_size = f'x="{x:.1f}" y="{high:.1f}" width="{max(width - 1, 1):.1f}" height="{low - high:.1f}"'
            parts.append(f'<rect {place_and_size} fill="var(--{name})"/>')
    middle = f'x="{x + width / 2:.1f}" text-anchor="middle"'
    parts.append(f'<text {middle} y="{HEIGHT - BOTTOM + 17}">{escape(_label((phase.name, str(place + 1)), width))}</text>')
    parts.append(f'<text class="soft" {middle} y="{HEIGHT - BOTTOM + 35}">{_label((format_seconds(phase.seconds),), width)}</text>')
    return "".join(parts) + "</g>"


def _label(texts: Sequence[str], width: float) -> str:
    """The first text that has room (about 8 units per letter), else nothing: a phase's name, or its number in the table."""
    return next((text for text in texts if len(text) * 8 <= width), "")


def _y(size: float, top: float) -> float:
    return HEIGHT - BOTTOM - size / top * (HEIGHT - TOP - BOTTOM)


def _bytes_axis(top: float) -> str:
    step = _round_step(top / GIB / 4)
    lines, value = [f'<text class="soft" x="2" y="{TOP - 3}">GiB</text>'], 0.0
    while value * GIB <= top:
        y = _y(value * GIB, top)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        lines.append(f'<text class="soft" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        value = round(value + step, 9)
    return "".join(lines)


def _round_step(value: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``value``."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{factor * power:.6g}") for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def _budget_line(budget_bytes: int | None, top: float) -> str:
    if budget_bytes is None:
        return ""
    y = _y(budget_bytes, top)
    text = f"budget {format_bytes(budget_bytes)}"
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--budget)" stroke-width="2" stroke-dasharray="6 4"/>'
        f'<text x="{WIDTH - RIGHT - 2}" y="{y - 5:.1f}" text-anchor="end">{text}</text>'
    )


def _svg(label: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


# -- memory against latency -------------------------------------------------------------------------------------------


def scatter(plan: Plan) -> str:
    """Every candidate that was priced, memory against latency, with the frontier, the budget and the chosen plan."""
    points = _points(plan)
    if len(points) < 2:
        return "<p class=soft>only one candidate was priced</p>"
    low, high = min(point[0] for point in points), max(point[0] for point in points)
    top = max([point[1] for point in points] + [plan.device.budget_bytes or 0]) * SPARE

    def x(seconds: float) -> float:
        share = 0.5 if high <= low else math.log(seconds / low) / math.log(high / low)
        return LEFT + 10 + share * (WIDTH - LEFT - RIGHT - 20)

    parts = [_bytes_axis(top), _seconds_axis(low, high, x)]
    path = " ".join(f"{x(seconds):.1f},{_y(size, top):.1f}" for seconds, size in staircase(plan))
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--weights)" stroke-width="1.5"/>')
    parts += [_dot(x(seconds), _y(size, top), note, kind) for seconds, size, note, kind in points]
    parts.append(_budget_line(plan.device.budget_bytes, top))
    legend = {"chosen": "chosen", "frontier": "weights", "fits": "launch", "does not fit": "budget"}
    shown = len({(seconds, size) for seconds, size, _, kind in points if kind != "chosen"})
    searched = f", of {plan.counts.candidates} that were searched" if plan.counts else ""
    caption = f"<p class='soft caption'>{shown} different candidates were priced in full{searched}; point at one for its settings.</p>"
    return _svg("memory against latency", parts) + key(legend) + caption


def staircase(plan: Plan) -> list[tuple[float, int]]:
    """The corners of the frontier, fastest first: between two points more time saves nothing until the next is reached."""
    edge = sorted((point.latency_seconds, point.peak_allocated_bytes) for point in plan.frontier if point.latency_seconds > 0)
    steps = [corner for (_, size), (seconds, less) in pairwise(edge) for corner in ((seconds, size), (seconds, less))]
    return edge[:1] + steps


def _points(plan: Plan) -> list[tuple[float, int, str, str]]:
    """Seconds, bytes, what it is, and its colour; what matters most last, so that it lies on top."""
    found = []
    for point in plan.candidates:
        kind = "launch" if point.fits else "budget"
        found.append((point.latency_seconds, point.peak_allocated_bytes, _note(plan, point.settings, point.fits), kind))
    for item in plan.alternatives:
        seen = item.predicted
        found.append((seen.latency_seconds, seen.peak_allocated_bytes, _note(plan, item.settings, seen.fits), "launch"))
    for point in plan.frontier:
        found.append((point.latency_seconds, point.peak_allocated_bytes, _note(plan, point.settings, point.fits), "weights"))
    chosen = plan.predicted
    found.append((chosen.latency_seconds, chosen.peak_allocated_bytes, f"chosen: {words.plan_line(plan)}", "chosen"))
    return [point for point in found if point[0] > 0]


def _note(plan: Plan, settings: dict[str, KnobValue], fits: bool) -> str:
    return words.settings_text(words.difference(settings, plan.settings), "as chosen") + ("" if fits else ": does not fit")


def _dot(x: float, y: float, note: str, kind: str) -> str:
    size = 7 if kind == "chosen" else 3.5
    ring = ' stroke="var(--panel)" stroke-width="2"' if kind == "chosen" else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="var(--{kind})"{ring}><title>{escape(note)}</title></circle>'


def _seconds_axis(low: float, high: float, x: Callable[[float], float]) -> str:
    """Up to five labels, evenly spread over a logarithmic axis."""
    count = 4 if high > low * 1.05 else 0
    parts = []
    for place in range(count + 1):
        seconds = low * (high / low) ** (place / count) if count else low
        anchor = "start" if place == 0 and count else "end" if place == count and count else "middle"
        where = f'x="{x(seconds):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}"'
        parts.append(f'<text class="soft" {where}>{format_seconds(seconds)}</text>')
    return "".join(parts) + f'<text class="soft" x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">one call</text>'


# -- where the time goes ----------------------------------------------------------------------------------------------


def time_bars(estimate: Estimate) -> str:
    """One bar per phase, longest first, coloured by what bounds it."""
    phases = sorted(estimate.phases, key=lambda phase: -phase.seconds)
    longest = max((phase.seconds for phase in phases), default=0.0)
    if longest <= 0:
        return "<p class=soft>no time is predicted</p>"
    total = sum(phase.seconds for phase in phases) or longest
    parts = []
    for place, phase in enumerate(phases[:10]):
        y = 14 + place * 34
        part = phase.seconds / total * 100
        share = f"{format_seconds(phase.seconds)}, {f'{part:.0f}' if part >= 1 else 'under 1'} %"
        parts.append(f'<text x="2" y="{y}">{escape(shortened(phase.name, 30))} x{phase.calls}</text>')
        parts.append(f'<text class="soft" x="{WIDTH - 2}" y="{y}" text-anchor="end">{share}</text>')
        width = max(phase.seconds / longest * (WIDTH - 4), 1)
        parts.append(f'<rect x="2" y="{y + 5}" width="{width:.1f}" height="11" rx="2" fill="var(--{phase.bound})"/>')
    bounds = dict.fromkeys(phase.bound for phase in phases[:10])
    return _svg("where the time goes", parts, 14 + 34 * min(len(phases), 10)) + key({f"{bound}-bound": bound for bound in bounds})
