"""The explanation of a plan as plain text: one screen, like a database's EXPLAIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.explain import words
from planner.explain.layout import DEFAULT_WIDTH, LEAST_WIDTH, paragraph, table
from planner.types import Alternative, Device, Estimate, Measurement, Phase, Term
from planner.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.plan import Plan

INDENT = 11
MANY_PHASES = 8
MANY_LOST = 4
MANY_RULED_OUT = 3
ROOMY = 92
"""From this width on a table's sizes carry their units; below it the head says GiB once."""
TIGHT = 76
"""Below this width a table of phases names peaks only, and an alternative's settings stand on lines of their own."""
_PHASE_HEAD = ("phase", "calls", "time", "weights", "activations", "workspace", "peak", "bound by")
_NARROW_HEAD = ("in GiB", "calls", "time", "weights", "activ.", "worksp.", "peak", "bound")
UNSURE = "a gain that the model is not sure of, or that setting up uses up, is not taken"


def render(plan: Plan, verbose: bool = False, width: int | None = None) -> str:
    """The explanation, no line wider than ``width`` (default 100), ending in a newline.

    ``verbose`` adds every term of the memory and time sums, all phases, alternatives and rejections.
    """
    room = max(width or DEFAULT_WIDTH, LEAST_WIDTH)
    blocks = [
        _head(plan, room),
        _decision(plan, room),
        phase_table(plan.predicted, room, verbose),
        _what_binds(plan, room),
        _lost(plan, room, verbose),
        _terms(plan.predicted.terms, room) if verbose else [],
        _all_settings(plan, room) if verbose else [],
        _remarks(plan, room, verbose),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def render_estimate(model: str, device: Device, settings_line: str, estimate: Estimate, verbose: bool = False,
                    width: int | None = None) -> str:  # fmt: skip
    """The estimate of one given combination: what ``planner estimate`` prints."""
    room = max(width or DEFAULT_WIDTH, LEAST_WIDTH)
    head = [*_lines("model", model, room), *_device_lines(device, room), *_lines("settings", settings_line, room)]
    if not estimate.fits and device.budget_bytes is not None:
        over = estimate.peak_reserved_bytes - device.budget_bytes
        short = f"; needs {format_bytes(over)} more than the budget" if over > 0 else ""
        head += _lines("verdict", f"does not fit{short}", room)
    else:
        head += _lines("verdict", "fits" if device.budget_bytes is not None else "no budget to compare with", room)
    head += _needs(estimate, device.kind == "cuda", room)
    blocks = [head, phase_table(estimate, room, verbose), _terms(estimate.terms, room) if verbose else []]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _lines(label: str, text: str, width: int) -> list[str]:
    return paragraph(label, text, width, INDENT)


# -- head and decision ------------------------------------------------------------------------------------------------


def _head(plan: Plan, width: int) -> list[str]:
    lines = _lines("model", f"{plan.model} ({plan.pipeline_class}): {words.workload_text(plan.workload)}", width)
    lines += _device_lines(plan.device, width)
    return lines + _lines("wanted", words.wish_text(plan), width)


def _device_lines(device: Device, width: int) -> list[str]:
    lines = _lines("device", f"{device.name}: {words.budget_text(device)} ({device.basis} figures)", width)
    return lines + (_lines("", device.note, width) if device.note else [])


def _decision(plan: Plan, width: int) -> list[str]:
    lines = _lines("plan", words.plan_line(plan), width)
    lines += _needs(plan.predicted, plan.device.kind == "cuda", width)
    if plan.objective == "throughput" and (rate := words.throughput(plan, plan.predicted)) is not None:
        lines += _lines("", f"{rate:.3g} samples per second", width)
    if plan.measured is not None:
        lines += _lines("measured", measured_text(plan.measured, plan.predicted), width)
    if plan.baseline_predicted is not None and plan.changes:
        lines += _lines("as it is", _baseline(plan.baseline_predicted, plan.predicted), width)
    if int(plan.settings.get("batch_split", 1)) > 1:
        lines += _lines("to run", f"plan.run(pipe, ...): the batch is made in {plan.settings['batch_split']} calls", width)
    return lines


def _needs(estimate: Estimate, on_gpu: bool, width: int) -> list[str]:
    memory = [f"peak {words.bytes_interval(estimate, 'peak_allocated_bytes')}", f"reserved {format_bytes(estimate.peak_reserved_bytes)}"]
    memory += [f"nvidia-smi {format_bytes(estimate.device_used_bytes)}"] if on_gpu else []
    memory += [f"host RAM {format_bytes(estimate.host_bytes)}"] if estimate.host_bytes else []
    time = [f"{words.seconds_interval(estimate)} a call"]
    if estimate.step_seconds is not None:
        time.append(f"{format_seconds(estimate.step_seconds)} a step")
    if estimate.setup_seconds > 0:
        time.append(f"{format_seconds(estimate.setup_seconds)} once to set up")
    return _lines("memory", ", ".join(memory), width) + _lines("time", f"{', '.join(time)} ({estimate.basis} figures)", width)


def measured_text(seen: Measurement, predicted: Estimate) -> str:
    """Measured beside predicted, each with the prediction's error."""
    pairs = (
        ("peak", seen.peak_allocated_bytes, predicted.peak_allocated_bytes, format_bytes),
        ("reserved", seen.peak_reserved_bytes, predicted.peak_reserved_bytes, format_bytes),
        ("a call", seen.latency_seconds, predicted.latency_seconds, format_seconds),
        ("a step", seen.step_seconds, predicted.step_seconds, format_seconds),
    )
    parts = []
    for name, value, guess, show in pairs:
        if value is not None:
            error = f" (predicted {show(guess)}, {(guess / value - 1) * 100:+.0f} %)" if guess is not None and value else ""
            parts.append(f"{name} {show(value)}{error}")
    return ", ".join([*parts, *([seen.note] if seen.note else [])])


def _baseline(baseline: Estimate, chosen: Estimate) -> str:
    peak, time = format_bytes(baseline.peak_allocated_bytes), format_seconds(baseline.latency_seconds)
    verdict = words.times(baseline.latency_seconds, chosen.latency_seconds) if baseline.fits else "does not fit"
    return f"peak {peak}, {time} a call: {verdict}"


# -- phases -----------------------------------------------------------------------------------------------------------


def phase_table(estimate: Estimate, width: int, verbose: bool = False) -> list[str]:
    """Phases in the order in which the pipeline runs them; the highest peak and the longest time are marked.

    Without ``verbose`` only those that matter most for memory or time are listed one by one.
    """
    phases = estimate.phases
    if not phases:
        return []
    shown = phases if verbose else most_important(phases)
    highest, longest = max(phases, key=lambda phase: phase.peak_allocated_bytes), max(phases, key=lambda phase: phase.seconds)
    roomy = width >= ROOMY
    rows: list[tuple[str, ...]] = [_PHASE_HEAD if roomy else _NARROW_HEAD]
    rows += [_phase_row(phase, phase is highest, phase is longest, roomy) for phase in shown]
    if width < TIGHT:
        rows = [row[:3] + row[6:] for row in rows]
    lines = table(rows, width, left=(0, len(rows[0]) - 1))
    left_out = [phase for phase in phases if phase not in shown]
    if left_out:
        seconds, peak = sum(phase.seconds for phase in left_out), max(phase.peak_allocated_bytes for phase in left_out)
        rest = f"and {len(left_out)} more: {format_seconds(seconds)}, peak {format_bytes(peak)} at most (-v lists them)"
        lines += paragraph("", rest, width, 2)
    return lines


def most_important(phases: Sequence[Phase]) -> list[Phase]:
    """The phases that matter most for memory or time, in the order in which they run."""
    if len(phases) <= MANY_PHASES:
        return list(phases)
    by_peak = sorted(phases, key=lambda phase: -phase.peak_allocated_bytes)[: MANY_PHASES // 2]
    by_time = sorted((phase for phase in phases if phase not in by_peak), key=lambda phase: -phase.seconds)
    kept = [*by_peak, *by_time[: MANY_PHASES - len(by_peak)]]
    return [phase for phase in phases if phase in kept]


def _phase_row(phase: Phase, highest: bool, longest: bool, roomy: bool) -> tuple[str, ...]:
    show = format_bytes if roomy else _in_gib
    sizes = (phase.weights_bytes, phase.activations_bytes, phase.workspace_bytes)
    time = format_seconds(phase.seconds) + (" <" if longest else "  ")
    peak = show(phase.peak_allocated_bytes) + (" <" if highest else "  ")
    return (phase.name, str(phase.calls), time, *map(show, sizes), peak, phase.bound)


def _in_gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _what_binds(plan: Plan, width: int) -> list[str]:
    lines = _lines("binds", plan.binding, width) if plan.binding else []
    change = plan.what_if
    if change is not None:
        other = words.settings_text(words.difference(change.settings, plan.settings))
        faster = f"{change.speedup:.2f} times as fast" if change.speedup != 1 else "as fast"
        lines += _lines("would help", f"{format_bytes(change.extra_bytes)} more memory: {other}, {faster}", width)
    return lines


# -- what lost --------------------------------------------------------------------------------------------------------


def _lost(plan: Plan, width: int, verbose: bool) -> list[str]:
    others = [item for item in plan.alternatives if item.settings != plan.settings]
    equal = [item for item in others if words.why_lost(item.predicted, plan.predicted) == words.NO_BETTER]
    behind = [item for item in others if item not in equal]
    groups = _alike(plan, behind)
    shown = groups if verbose else groups[:MANY_LOST]
    lines = ["nearest alternatives, and what they set differently", *_alternatives(shown, width, verbose)] if shown else []
    if any(item.predicted.latency_seconds < plan.predicted.latency_seconds for _, items in shown for item, _ in items):
        lines += paragraph("", UNSURE, width, 2)
    if equal:
        names = [words.settings_text(words.difference(item.settings, plan.settings)) for item in equal]
        more = [] if verbose or len(names) <= 3 else [f"and {len(names) - 3} more (-v lists them)"]
        lines += _lines("as good", "; ".join([*(names[:3] if more else names), *more]), width)
    if plan.counts is not None:
        how = f"{plan.counts.candidates} combinations, by exact prices of {plan.counts.evaluated} parts of them"
        lines += _lines("searched", how, width)
    return lines + (_rejected_table(plan, width) if verbose else _rejected_summary(plan, width))


_Alike = tuple[tuple[str, str, str], list[tuple[Alternative, str]]]


def _alike(plan: Plan, found: Sequence[Alternative]) -> list[_Alike]:
    """Alternatives by peak, time and in what they are behind, each with what it sets differently."""
    groups: dict[tuple[str, str, str], list[tuple[Alternative, str]]] = {}
    for item in found:
        seen = item.predicted
        sizes = format_bytes(seen.peak_allocated_bytes), format_seconds(seen.latency_seconds), words.why_lost(seen, plan.predicted)
        groups.setdefault(sizes, []).append((item, words.settings_text(words.difference(item.settings, plan.settings))))
    return list(groups.items())


def _alternatives(groups: Sequence[_Alike], width: int, verbose: bool) -> list[str]:
    """Peak, time, in what each is behind, and beside them (below them where there is no room) its settings."""
    labels = table([sizes for sizes, _ in groups], width, left=(2,), indent=2)
    indent = max(map(len, labels), default=0) + 2 if width >= TIGHT else 4
    lines = []
    for label, (_, items) in zip(labels, groups, strict=True):
        texts = [text for _, text in items]
        if not verbose and len(texts) > 1:
            texts = [f"{texts[0]}, and {len(texts) - 1} like it"]
        for place, text in enumerate(texts):
            lines += paragraph(label if place == 0 else "", text, width, indent)
    return lines


def _rejected_summary(plan: Plan, width: int) -> list[str]:
    """One paragraph per kind of rejection: the nearest first, settings that share a reason together."""
    lines: list[str] = []
    for label in words.LOST:
        groups: dict[str, list[str]] = {}
        items = [item for item in plan.rejected if words.rejection_label(item) == label]
        for item in sorted(items, key=lambda item: item.shortfall_bytes or 0):
            groups.setdefault(words.rejection_text(item), []).append(words.rejected_name(item, plan))
        most = MANY_RULED_OUT if label == "ruled out" else MANY_LOST
        shown = [f"{_names(names)}: {reason}" for reason, names in list(groups.items())[:most]]
        if len(groups) > most:
            shown.append(f"and {len(groups) - most} more (-v lists them)")
        lines += _lines(label, "; ".join(shown), width) if shown else []
    return lines


def _names(names: Sequence[str]) -> str:
    """Up to three as they are, more by their knobs."""
    if len(names) <= 3:
        return ", ".join(names)
    knobs = dict.fromkeys(word.partition("=")[0] for name in names for word in name.split())
    return f"{len(names)} values of {', '.join(knobs)}"


def _rejected_table(plan: Plan, width: int) -> list[str]:
    rows = [(words.rejected_name(item, plan), words.rejection_label(item), words.rejection_text(item)) for item in plan.rejected]
    return ["", "rejected", *table(rows, width, left=(0, 1, 2), indent=2)] if rows else []


# -- details and remarks ----------------------------------------------------------------------------------------------


def _terms(terms: Sequence[Term], width: int) -> list[str]:
    """Every named line of the memory sum and of the time sum, with basis and source."""
    memory = [(term.name, format_bytes(term.bytes), term.basis, term.source) for term in terms if term.bytes is not None]
    time = [(term.name, format_seconds(term.seconds), term.basis, term.source) for term in terms if term.seconds is not None]
    lines: list[str] = []
    for title, rows in (("memory at the peak, term by term", memory), ("time of one call, term by term", time)):
        if rows:
            lines += ([""] if lines else []) + [title, *table(rows, width, left=(0, 2, 3), indent=2)]
    return lines


def _all_settings(plan: Plan, width: int) -> list[str]:
    return _lines("settings", words.settings_text(plan.settings), width)


def _remarks(plan: Plan, width: int, verbose: bool) -> list[str]:
    lines = [line for note in plan.notes for line in _lines("note", note, width)] if verbose else []
    return lines + [line for warning in plan.warnings for line in _lines("warning", warning, width)]
